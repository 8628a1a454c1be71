"""What fusion costs: each part of the original's iteration, its share of a network's time, and modules beside each other.

    python benchmarks/fusion.py [--what iteration modules space] [--batch 8] [--rounds 5] [--json data/results/fusion.json]

All candidates take turns in one run, and medians over the rounds count: a busy machine is busy for all of them, and
what is quoted is a ratio.  Networks run on 256×256 pictures in channels-last memory, their best on a CPU.  The memory
of each module is measured on the CPU, in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from redirect import measure  # beside this file
from torch.utils.data import default_collate

from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.data.views import heatmap_fundamentals
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import joints_mse
from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint, normalise
from epiutils.networks.predict import device_name
from epiutils.redirect import Pencil, redirect
from epiutils.space import poses
from epiutils.studies import evidence
from epiutils.studies.fitting import PAIRS, FusedNetwork, ViewPairs
from epiutils.studies.predicted import CHECKPOINTS, heatmaps_once, peaks, training_pictures
from epiutils.studies.runs import TOGETHER, TRAINING, WithNext
from epiutils.triangulate import triangulate_robust

NETWORKS = {"slim": SLIM, "W32": {"width": 32}}
RIVALS = ("alone", "line_sum", "line_mean", "line_max", "weighted_max", "attention", "dense", "repaired_frozen")
MODULES = {name: TOGETHER[name] for name in RIVALS} | {"original_frozen": lambda: WithNext(OriginalFusion())}
PARTS = ("iteration", "modules", "space")


def load(batch: int) -> dict[str, torch.Tensor]:
    """The first instants of the test set, as a batch."""
    chosen = range(batch)
    data = MultiView(torch.utils.data.Subset(Benchmark("test").prepare(only=chosen), chosen))
    scenes = torch.utils.data.default_collate(list(data))
    return {key: value.to("cuda" if torch.cuda.is_available() else "cpu") for key, value in scenes.items()}


def fusion_loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """HRNet's loss of what a module makes of pairs."""
    return joints_mse(module(batch["source"], batch["reference"], batch["F"]), batch["target"], batch["weight"])


LOOP_ROWS = 2  # of one heatmap, that the original's nested loops really visit


def quickest(run: Callable, times: int = 9) -> float:
    """Seconds of the quickest of a few calls, after one more: a machine has other work, too."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def iteration(batch: int) -> dict[str, dict[str, float]]:
    """Seconds of each part of a training iteration of so many pairs of views, in the original's way and in ours.

    The original's nested loops are extrapolated from `LOOP_ROWS` rows of one heatmap, and forward only; the parts
    that both ways have are measured once.
    """
    pairs, pictures = ViewPairs(heatmaps_once("original", "train", TRAINING)), training_pictures(TRAINING)
    samples, shot = (default_collate([data[len(PAIRS) * k] for k in range(batch)]) for data in (pairs, pictures))
    images, truth = normalise(torch.cat([shot["source"], shot["reference"]])), (samples["target"], samples["weight"])
    cameras = [view.camera for view in Benchmark("train")[0]]
    fusion, network = OriginalFusion(), load_checkpoint(CHECKPOINTS["original"]).train()
    free, joints, (height, width) = (
        FusedNetwork(network, fusion),
        samples["source"].shape[1],
        samples["source"].shape[-2:],
    )
    updates = {module: torch.optim.AdamW(module.parameters(), lr=0) for module in (fusion, network, free)}

    def trained(module: torch.nn.Module, inputs: dict) -> None:
        fusion_loss(module, inputs).backward()
        updates[module].step()
        updates[module].zero_grad()

    F, ours = samples["F"], {"F from two cameras": quickest(lambda: heatmap_fundamentals(cameras))}
    ours["set-up of F"] = quickest(lambda: Pencil.from_fundamental(F, (height, width), 1.0))
    pencil = Pencil.from_fundamental(F, (height, width), 1.0)
    with torch.no_grad():
        weighed = fusion.convolve(samples["source"])
        fused = fusion(samples["source"], samples["reference"], pencil)
        ours["convolution"] = quickest(lambda: fusion.convolve(samples["source"]))
        ours["redirection"] = quickest(lambda: pencil.sum(weighed))
        ours["loss"] = quickest(lambda: joints_mse(fused, *truth))
    loss = fusion_loss(fusion, samples)
    ours["gradient of nine weights"] = quickest(lambda: loss.backward(retain_graph=True))
    ours["their update"] = quickest(updates[fusion].step)
    ours["frozen iteration"] = quickest(lambda: trained(fusion, samples))
    with torch.no_grad():
        ours["backbone, forward"] = quickest(lambda: network(images), 3)
    loss = joints_mse(network(images)[:batch], *truth)
    ours["backbone, gradient"] = quickest(lambda: loss.backward(retain_graph=True), 3)
    ours["backbone, update"] = quickest(updates[network].step)
    ours["free iteration"] = quickest(lambda: trained(free, shot), 3)

    padded, w = torch.nn.functional.pad(samples["source"][0, 0], (1, 1, 1, 1)), fusion.weight.detach()
    places = list(itertools.product(range(LOOP_ROWS), range(width)))
    loops = {
        "convolution": lambda: [(padded[y : y + 3, x : x + 3] * w).sum() for y, x in places],
        "redirection": lambda: redirect(weighed[0, :1], F[0], 1.0, "loop", out_shape=(LOOP_ROWS, width)),
    }
    original = {part: quickest(run) * height / LOOP_ROWS * joints * batch for part, run in loops.items()}
    original |= {part: ours[part] for part in ("F from two cameras", "loss", "their update", "backbone, forward")}
    original["frozen iteration"] = sum(original.values())
    more = ours["backbone, gradient"] + ours["backbone, update"]
    original["free iteration"] = original["frozen iteration"] + more
    return {"original": original, "ours": ours}


def candidates(scenes: dict[str, torch.Tensor]) -> dict:
    """What is measured beside the networks; fusion always sets up its F, as in training on augmented pictures."""
    device, batch = scenes["F"].device, len(scenes["F"])
    maps, F = scenes["target"], scenes["F"]  # (B, 4, 17, 64, 64), (B, 4, 4, 3, 3)
    pair = {"source": maps[:, 0].clone().requires_grad_(), "reference": maps[:, 1].clone().requires_grad_()}
    pair |= {"target": maps[:, 1], "weight": scenes["weight"][:, 1], "F": F[:, 0, 1]}
    original = OriginalFusion().to(device)

    def forward_and_backward() -> None:
        fusion_loss(original, pair).backward()
        _wait()

    found = {"original, forward and backward": forward_and_backward}
    images = normalise(scenes["image"])  # (4 · B, 3, 256, 256)
    for name, settings in NETWORKS.items():
        network = PoseHRNet(**settings).to(device, memory_format=torch.channels_last)
        found[f"{name}, forward"] = lambda network=network: _forward(network, images)
        found[f"{name}, forward and backward"] = lambda network=network: _train(network, images[: 2 * batch], maps)
    return found


def all_views(name: str, maps: torch.Tensor, F: torch.Tensor) -> tuple[int, Callable]:
    """How many parameters a module has, and what fuses all views of a batch by it."""
    module = MODULES[name]().to(F.device)

    def run() -> None:
        with torch.no_grad():
            module.all_views(maps, F)
        _wait()

    return sum(p.numel() for p in module.parameters()), run


def peak_mb(name: str, batch: int) -> float:
    """How much all views of a batch, fused by a module, add to the most memory that its process had."""
    torch.set_grad_enabled(False)
    scenes = load(batch)
    maps, F = scenes["target"].cpu(), scenes["F"].cpu()
    torch.nn.functional.conv2d(maps.flatten(0, 1), torch.zeros(1, 17, 3, 3), padding=1)  # what any first call loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    all_views(name, maps, F)[1]()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1e6 if sys.platform == "darwin" else 1e3)


def memory(batch: int) -> dict[str, float]:
    """`peak_mb` of each module.  To be asked first: a process begins with the most that its parent had."""
    peaks = {}
    for name in MODULES:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            peaks[name] = fresh.submit(peak_mb, name, batch).result()
    return peaks


def _forward(network: PoseHRNet, images: torch.Tensor) -> None:
    network.eval()
    with torch.no_grad():
        network(images)
    _wait()


def _train(network: PoseHRNet, images: torch.Tensor, maps: torch.Tensor) -> None:
    network.train().zero_grad()
    target = maps.flatten(0, 1)[: len(images)]
    joints_mse(network(images), target, target.new_ones(target.shape[:2])).backward()
    _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch", type=int, default=8, help="instants, and pairs of views (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    about = {"device": device_name(), "torch": torch.__version__, "batch": chosen.batch}
    about |= {"command": " ".join(["python", "benchmarks/fusion.py", *sys.argv[1:]])}
    results = json.loads(chosen.json.read_text("utf-8")) if chosen.json and chosen.json.exists() else {}
    torch.manual_seed(0)
    if "modules" in chosen.what:
        results |= about | {"rounds": chosen.rounds} | beside_each_other(chosen.batch, chosen.rounds)
    if "iteration" in chosen.what:
        results["iteration"] = about | {"seconds": iteration(chosen.batch)}
        print(f"{device_name()}; an iteration of {chosen.batch} pairs")
        for way, parts in results["iteration"]["seconds"].items():
            for part, value in parts.items():
                print(f"  {way + ', ' + part:38s} {1e3 * value:12.2f} ms")
    if "space" in chosen.what:
        results["space"] = about | {"batch": 1, "threads": 1, "seconds": in_space(chosen.rounds)}
        for name, value in results["space"]["seconds"].items():
            print(f"  {name:32s} {1e3 * value:10.1f} ms for one instant, one thread")
    if chosen.json:
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def in_space(rounds: int) -> dict[str, float]:
    """Seconds of one instant of four views on one thread: its joints in space, and W32's forward of its pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scenes, calibration, body = load(1), evidence.calibrated("best"), evidence.training_parts().body
    maps = heatmaps_once("best", scenes=1, progress=False).output
    P = (scenes["K"] @ torch.cat([scenes["R"], scenes["t"][..., None]], -1)).cpu()  # (1, 4, 3, 4)
    x, heights = peaks(maps[0])
    network, images = PoseHRNet(**NETWORKS["W32"]), normalise(scenes["image"]).cpu()
    network = network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = {
            "in space": quickest(lambda: poses(maps, P.float(), calibration), 4 * rounds),
            "in space, bones": quickest(lambda: poses(maps, P.float(), calibration, body), 4 * rounds),
            "robust triangulation": quickest(lambda: triangulate_robust(x, P.numpy(), heights), 4 * rounds),
            "W32, forward": quickest(lambda: _forward(network, images), rounds),
        }
    torch.set_num_threads(threads)
    return seconds


def beside_each_other(batch: int, rounds: int) -> dict:
    """`seconds` of networks and of fusion beside them, the `shares` that fusion adds, and what `rivals` cost."""
    peaks, scenes = memory(batch), load(batch)
    modules = {name: all_views(name, scenes["target"], scenes["F"]) for name in MODULES}
    seconds = measure(candidates(scenes) | {name: run for name, (_, run) in modules.items()}, rounds)
    seconds["repaired, all views"] = seconds["repaired_frozen"]
    costs = {
        name: {"parameters": number, "milliseconds": 1e3 * seconds.pop(name), "peak_mb": peaks[name]}
        for name, (number, _) in modules.items()
    }
    shares = {
        f"{module} / {name}, {work}": seconds[f"{module}, {what}"] / seconds[f"{name}, {work}"]
        for name in NETWORKS
        for module, what, work in (
            ("repaired", "all views", "forward"),
            ("original", "forward and backward", "forward and backward"),
        )
    }
    print(f"{device_name()}; {4 * batch} pictures forward, {2 * batch} forward and backward")
    for name, value in seconds.items():
        print(f"  {name:32s} {1e3 * value:10.1f} ms")
    for name, value in shares.items():
        print(f"  {name:45s} {100 * value:5.1f} %")
    for name, cost in costs.items():
        print("  {:18s} {:>13,} parameters {:8.1f} ms {:8.0f} MB".format(name, *cost.values()))
    return {"seconds": seconds, "shares": shares, "rivals": costs}


if __name__ == "__main__":
    main()
