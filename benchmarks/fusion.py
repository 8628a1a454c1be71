"""What fusion costs beside the network: its share of an iteration, for the original module and the repaired one.

    python benchmarks/fusion.py [--batch 8] [--rounds 5] [--json data/results/fusion.json]

All candidates take turns in one run, and medians over the rounds count: a busy machine is busy for all of them, and
what is quoted is a ratio.  Networks run on 256×256 pictures in channels-last memory, their best on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from redirect import measure  # beside this file

from epiutils.dataset import Benchmark, MultiView
from epiutils.experiments import fusion_loss
from epiutils.files import replacing
from epiutils.fusion import OriginalFusion, RepairedFusion
from epiutils.heatmaps import joints_mse
from epiutils.hrnet import SLIM, PoseHRNet, normalise
from epiutils.training import device_name

NETWORKS = {"slim": SLIM, "W32": {"width": 32}}


def candidates(batch: int) -> dict:
    """What is measured, by name; fusion always sets up its F, as in training on augmented pictures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = range(batch)
    data = MultiView(torch.utils.data.Subset(Benchmark("test").prepare(only=chosen), chosen))
    scenes = torch.utils.data.default_collate(list(data))
    scenes = {key: value.to(device) for key, value in scenes.items()}
    maps, F = scenes["target"], scenes["F"]  # (B, 4, 17, 64, 64), (B, 4, 4, 3, 3)
    pair = {"source": maps[:, 0].clone().requires_grad_(), "reference": maps[:, 1].clone().requires_grad_()}
    pair |= {"target": maps[:, 1], "weight": scenes["weight"][:, 1], "F": F[:, 0, 1]}
    repaired, original = RepairedFusion().to(device), OriginalFusion().to(device)
    torch.nn.init.constant_(repaired.gain, 0.5)

    def all_views() -> None:
        with torch.no_grad():
            repaired.all_views(maps, F)
        _wait()

    def forward_and_backward() -> None:
        fusion_loss(original, pair).backward()
        _wait()

    found = {"repaired, all views": all_views, "original, forward and backward": forward_and_backward}
    images = normalise(scenes["image"])  # (4 · B, 3, 256, 256)
    for name, settings in NETWORKS.items():
        network = PoseHRNet(**settings).to(device, memory_format=torch.channels_last)
        found[f"{name}, forward"] = lambda network=network: _forward(network, images)
        found[f"{name}, forward and backward"] = lambda network=network: _train(network, images[: 2 * batch], maps)
    return found


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
    seconds = measure(candidates(chosen.batch), chosen.rounds)
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
    if chosen.json:
        results = {"device": device_name(), "torch": torch.__version__, "batch": chosen.batch, "rounds": chosen.rounds}
        results |= {"command": "python benchmarks/fusion.py", "seconds": seconds, "shares": shares}
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
