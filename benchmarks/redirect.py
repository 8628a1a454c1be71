"""How fast the redirection operator is, measured against the alternatives side by side in one run.

    python benchmarks/redirect.py --json data/results/redirect.json

prints a table; `studies.runs.measured("redirect")` reads what is written.  Each comparison runs its candidates in turn, round after
round, and quotes medians over the rounds: the machine may be busy, but it is equally busy for all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from epiutils.data import people
from epiutils.data.files import replacing
from epiutils.data.views import heatmap_fundamentals
from epiutils.epipolar import transfer
from epiutils.heatmaps import render
from epiutils.networks.predict import device_name
from epiutils.redirect import Pencil, redirect

THRESHOLD = 1.0
LOOP_ROWS = 4  # reference rows that the nested loops really visit; their cost is proportional to the rows


def measure(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over rounds in which all of them run in turn, after one warm-up each.

    A quick one runs several times in its turn, for about 20 ms, so that its caches are warm as in real use.
    """
    times, repeats = {name: [] for name in candidates}, {}
    for name, run in candidates.items():
        run()
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        repeats[name] = max(1, round(0.02 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            _wait()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    """For the work that a GPU was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def case(size: int = 64, joints: int = 17, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Heatmaps (J, size, size) of a person in one view, and F to another view, both scaled to that size."""
    source, reference = people.scene(9, "walk", 20)[:2]
    F = heatmap_fundamentals([source.camera, reference.camera])[0, 1]
    A = np.diag([size / 64, size / 64, 1.0])
    points = torch.from_numpy(source.joints[:joints] * size / 256)
    maps = render(points, (size, size), sigma=size / 32).float()
    return maps.to(device), torch.from_numpy(transfer(F, A, A)).to(device)


def maximum_by_grid_sample(values: Tensor, F: Tensor, volume: bool) -> Tensor:
    """The maximum along a line from the nearest pixel at each of its W columns and H rows, as in AdaFuse.

    volume: AdaFuse's way, the views stacked to a volume that is sampled at (x, y, view); otherwise the leaner
    sampling of one view's picture.  values: (J, H, W).  F: (3, 3).  Returns (J, H, W).
    """
    H, W = values.shape[-2:]
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")  # on the CPU, moved with the pixels
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3).to(values)
    a, b, c = (pixels @ F.to(values)).unbind(-1)  # of each reference pixel's line in the source view
    columns, rows = torch.arange(W).to(values), torch.arange(H).to(values)
    at_columns = torch.stack([columns.expand(len(a), -1), -(a[:, None] * columns + c[:, None]) / b[:, None]], -1)
    at_rows = torch.stack([-(b[:, None] * rows + c[:, None]) / a[:, None], rows.expand(len(a), -1)], -1)
    samples = torch.cat([at_columns, at_rows], 1)  # (H·W, W + H, 2)
    grid = samples * samples.new_tensor([2 / (W - 1), 2 / (H - 1)]) - 1
    values = values[None]
    if volume:
        values = torch.stack([values, values], 2)  # (1, J, views, H, W)
        grid = torch.nn.functional.pad(grid, (0, 1), value=-1.0)[None]
    sampled = torch.nn.functional.grid_sample(values, grid[None], mode="nearest", align_corners=True)
    return sampled.amax(-1).reshape(-1, H, W)


def ladder(rounds: int = 7, device: str = "cpu") -> dict[str, float]:
    """Seconds for 17 heatmaps of 64×64 at threshold 1, set-up of F included, from the slowest to the fastest."""
    values, F = case(device=device)
    J, H, _ = values.shape
    seconds = measure(
        {
            "nested loops": lambda: redirect(values[:1], F, THRESHOLD, "loop", out_shape=(LOOP_ROWS, 64)),
            "dense mask": lambda: redirect(values, F, THRESHOLD, "dense"),
            "maximum, as AdaFuse": lambda: maximum_by_grid_sample(values, F, volume=True),
            "maximum, grid_sample 2D": lambda: maximum_by_grid_sample(values, F, volume=False),
            "pencil: maximum": lambda: Pencil.from_fundamental(F, (64, 64), THRESHOLD).max(values),
            "pencil: sum": lambda: redirect(values, F, THRESHOLD),
        },
        rounds,
    )
    seconds["nested loops"] *= J * H / LOOP_ROWS
    return seconds


def reuse(rounds: int = 25) -> float:
    """Time of one application with F's set-up kept, as a multiple of a plain copy of the same heatmaps."""
    values, F = case()
    pencil = Pencil.from_fundamental(F, (64, 64), THRESHOLD)
    seconds = measure({"sum": lambda: pencil.sum(values), "copy": values.clone}, rounds)
    return seconds["sum"] / seconds["copy"]


def growth(sizes: tuple[int, ...] = (32, 64, 128, 256), rounds: int = 5) -> dict[int, tuple[float, float]]:
    """For each size, seconds of `redirect` on size² pixels and the peak of memory that it allocates, in bytes."""
    cases = {size: case(size) for size in sizes}
    seconds = measure({size: lambda c=c: redirect(*c, THRESHOLD) for size, c in cases.items()}, rounds)
    return {size: (seconds[size], peak_memory(lambda c=c: redirect(*c, THRESHOLD))) for size, c in cases.items()}


def peak_memory(run: Callable) -> int:
    """The most bytes that torch held at once while it ran."""
    run()
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        run()
    events = [e for e in traced.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(sizes).max())


@contextmanager
def _silent_stderr():
    """Without what the profiler's C++ code writes to the process's standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The power p of values ~ N^p, N = size² pixels, fitted on logarithms."""
    return float(np.polyfit(2 * np.log(sizes), np.log(values), 1)[0])


def all_pairs(batch: int = 8, rounds: int = 3, device: str = "cpu") -> dict[str, float]:
    """Seconds, forward and backward, for a batch of scenes whose four views all fuse with each other."""
    views = people.scene(9, "walk", 20)
    pairs = [(s, r) for r in views for s in views if s is not r] * batch
    F = torch.stack([torch.from_numpy(heatmap_fundamentals([s.camera, r.camera])[0, 1]) for s, r in pairs])
    joints = torch.stack([torch.from_numpy(s.joints) for s, _ in pairs])
    values, F = render(joints / 4, (64, 64)).float().to(device).requires_grad_(), F.to(device)
    pencil = Pencil.from_fundamental(F, (64, 64), THRESHOLD)
    return measure(
        {
            "set-up of 96 F": lambda: Pencil.from_fundamental(F, (64, 64), THRESHOLD),
            "sum forward": lambda: pencil.sum(values),
            "sum forward and backward": lambda: pencil.sum(values).sum().backward(),
        },
        rounds,
    )


def main() -> None:
    """Measure everything on one thread, print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--device", default="cpu", help="cuda: the ladder and all pairs on a GPU (default: %(default)s)"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # two would wait for each other on a busy machine, the fastest candidate longest
    results = {"device": device_name(), "torch": torch.__version__}
    results["command"] = " ".join(["python", "benchmarks/redirect.py", *sys.argv[1:]])
    print(results["device"])
    results |= _measured() if chosen.device == "cpu" else _on_gpu(chosen.device)
    if chosen.json:
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _on_gpu(device: str) -> dict[str, dict]:
    """The ladder and all pairs, in seconds."""
    seconds = {"ladder": ladder(device=device), "all_pairs": all_pairs(device=device, rounds=7)}
    for name, value in itertools.chain(*(part.items() for part in seconds.values())):
        print(f"  {name:26s} {1e3 * value:12.3f} ms")
    return seconds


def _measured() -> dict[str, dict]:
    """The ladder, the growth, and the numbers that follow."""
    print("17 heatmaps of 64×64, threshold 1, set-up of F included, one thread")
    steps = ladder()
    fastest, maximum = steps["pencil: sum"], steps["pencil: maximum"]
    for name, seconds in steps.items():
        print(f"  {name:24s} {1e3 * seconds:12.2f} ms  {seconds / fastest:10.0f} ×")
    print(f"  (the loops: one map and {LOOP_ROWS} of 64 reference rows, extrapolated)")
    times_copy = reuse()
    print(f"with F's set-up kept: {times_copy:.0f} × a copy of the heatmaps")
    grown = growth()
    for size, (seconds, peak) in grown.items():
        print(f"  {size:3d}²: {1e3 * seconds:8.2f} ms  {peak / 1e6:7.1f} MB")
    time_power, memory_power = (exponent(list(grown), [pair[k] for pair in grown.values()]) for k in (0, 1))
    print(f"time grows as N^{time_power:.2f}, memory as N^{memory_power:.2f}")
    print("8 scenes, four views all fused with each other: 96 pairs of 17 heatmaps")
    together = all_pairs()
    for name, seconds in together.items():
        print(f"  {name:26s} {1e3 * seconds:8.0f} ms")
    a_pair = (together["set-up of 96 F"] + together["sum forward"]) / 96
    adafuse, lean = steps["maximum, as AdaFuse"], steps["maximum, grid_sample 2D"]
    print(
        f"  set-up and sum of one of these: {1e3 * a_pair:.2f} ms, {adafuse / a_pair:.0f} × as fast as AdaFuse's maximum"
    )
    numbers = {
        "speedup_loop": steps["nested loops"] / fastest,
        "speedup_dense": steps["dense mask"] / fastest,
        "speedup_grid_sample": adafuse / fastest,
        "speedup_grid_sample_2d": lean / fastest,
        "max_speedup_grid_sample": adafuse / maximum,
        "max_speedup_grid_sample_2d": lean / maximum,
        "seconds": fastest,
        "times_copy": times_copy,
        "time_exponent": time_power,
        "memory_exponent": memory_power,
        "all_pairs_seconds": together,
        "all_pairs_speedup_grid_sample": adafuse / a_pair,
    }
    return {"ladder": steps, "growth": {str(size): pair for size, pair in grown.items()}, "numbers": numbers}


if __name__ == "__main__":
    main()
