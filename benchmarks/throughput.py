"""How fast the networks are, and the loading: images a second and peak memory, side by side in one run.

    python benchmarks/throughput.py [--batch 8] [--rounds 3] [--json throughput.json]

Each row is one network in one setting; settings take turns, so that a noisy machine is noisy for all, and the best
round counts.  Training is forward, backward and AdamW's step on 256×256 pictures with HRNet's loss.  Peak memory is
the process's growth (each row in a process of its own), on a GPU what the allocator held.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch

from epiutils.dataset import Augmentation, Benchmark, MultiView
from epiutils.files import replacing
from epiutils.heatmaps import joints_mse
from epiutils.hrnet import SLIM, PoseHRNet
from epiutils.training import device_name

NETWORKS = {"slim": SLIM, "W32": {"width": 32}}
SETTINGS = {
    "contiguous": ("contiguous", "no"),
    "channels-last": ("last", "no"),
    "channels-last, bf16": ("last", "bf16"),
}


def memory() -> float:
    """Peak memory of this process so far, MB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(network: str, setting: str, training: bool, batch: int, rounds: int) -> dict:
    """Images a second (best round) and peak memory in MB of one network in one setting."""
    layout, precision = SETTINGS[setting]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = memory()
    form = torch.channels_last if layout == "last" else torch.contiguous_format
    torch.manual_seed(0)
    model = PoseHRNet(**NETWORKS[network]).to(device, memory_format=form).train(training)
    images = torch.randn(batch, 3, 256, 256, device=device).to(memory_format=form)
    target, weight = torch.rand(batch, 17, 64, 64, device=device), torch.ones(batch, 17, device=device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = model(images)
        if training:
            joints_mse(output.float(), target, weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    step()  # memory is taken, kernels are chosen
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"images_per_second": batch / min(seconds), "peak_mb": memory() - before}


def loading(rounds: int, workers: int, batch: int = 8) -> float:
    """Images a second that `MultiView` loads and augments from the cache, with so many processes."""
    data = torch.utils.data.ConcatDataset([MultiView(Benchmark("train").prepare(), Augmentation())] * rounds)
    loader = torch.utils.data.DataLoader(data, batch, num_workers=workers, multiprocessing_context="spawn")
    batches, images = iter(loader), 0
    for _ in range(2 * workers):  # the processes have begun
        next(batches)
    start = time.perf_counter()
    for samples in batches:
        images += samples["image"][:, :, 0, 0, 0].numel()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    chosen = parser.parse_args()
    results = {"device": device_name(), "torch": torch.__version__, "batch": chosen.batch, "networks": {}}
    rate = loading(2, chosen.workers)
    results["loading_images_per_second"] = rate
    print(f"loading and augmenting, {chosen.workers} processes: {rate:.0f} images a second", flush=True)
    print(f"\n{'':6}{'':22}{'inference':>12}{'training':>12}  images a second{'peak memory, training':>26}")
    for network in NETWORKS:
        for setting in SETTINGS:
            row = {}
            for training in (False, True):  # a process each: its peak memory is its own
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, (network, setting, training, chosen.batch, chosen.rounds))
                row["training" if training else "inference"] = found
            results["networks"].setdefault(network, {})[setting] = row
            rates = [row[kind]["images_per_second"] for kind in ("inference", "training")]
            print(
                f"{network:6}{setting:22}{rates[0]:12.1f}{rates[1]:12.1f}{row['training']['peak_mb']:38.0f} MB",
                flush=True,
            )
    if chosen.json:
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
