"""What fusion costs: its share of a network's time, and the repaired module beside its rivals in time and memory.

    python benchmarks/fusion.py [--batch 8] [--rounds 5] [--json data/results/fusion.json]

All candidates take turns in one run, and medians over the rounds count: a busy machine is busy for all of them, and
what is quoted is a ratio.  Networks run on 256×256 pictures in channels-last memory, their best on a CPU.  The memory
of each module is measured on the CPU, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from redirect import measure  # beside this file

from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import joints_mse
from epiutils.networks.hrnet import SLIM, PoseHRNet, normalise
from epiutils.networks.predict import device_name
from epiutils.studies.fitting import fusion_loss
from epiutils.studies.runs import TOGETHER, WithNext

NETWORKS = {"slim": SLIM, "W32": {"width": 32}}
RIVALS = ("alone", "line_sum", "line_mean", "line_max", "weighted_max", "attention", "dense", "repaired_frozen")
MODULES = {name: TOGETHER[name][0] for name in RIVALS} | {"original_frozen": lambda: WithNext(OriginalFusion())}


def load(batch: int) -> dict[str, torch.Tensor]:
    """The first instants of the test set, as a batch."""
    chosen = range(batch)
    data = MultiView(torch.utils.data.Subset(Benchmark("test").prepare(only=chosen), chosen))
    scenes = torch.utils.data.default_collate(list(data))
    return {key: value.to("cuda" if torch.cuda.is_available() else "cpu") for key, value in scenes.items()}


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
    parser.add_argument("--batch", type=int, default=8, help="instants, and pairs of views (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    peaks, scenes = memory(chosen.batch), load(chosen.batch)
    modules = {name: all_views(name, scenes["target"], scenes["F"]) for name in MODULES}
    seconds = measure(candidates(scenes) | {name: run for name, (_, run) in modules.items()}, chosen.rounds)
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
    print(f"{device_name()}; {4 * chosen.batch} pictures forward, {2 * chosen.batch} forward and backward")
    for name, value in seconds.items():
        print(f"  {name:32s} {1e3 * value:10.1f} ms")
    for name, value in shares.items():
        print(f"  {name:45s} {100 * value:5.1f} %")
    for name, cost in costs.items():
        print("  {:18s} {:>13,} parameters {:8.1f} ms {:8.0f} MB".format(name, *cost.values()))
    if chosen.json:
        results = {"device": device_name(), "torch": torch.__version__, "batch": chosen.batch, "rounds": chosen.rounds}
        results["command"] = " ".join(["python", "benchmarks/fusion.py", *sys.argv[1:]])
        results |= {"seconds": seconds, "shares": shares, "rivals": costs}
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
