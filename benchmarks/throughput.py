"""How fast the networks are, and the loading: images a second and peak memory, side by side in one run.

    python benchmarks/throughput.py [--batch 8] [--rounds 3] [--human36m data/human36m] [--json throughput.json]
    python benchmarks/throughput.py --stored data/results/throughput.json

Each row is one network in one setting; settings take turns, so that a noisy machine is noisy for all, and the best
round counts.  Training is forward, backward and AdamW's step on 256×256 pictures with HRNet's loss.  Peak memory is
the process's growth (each row in a process of its own), on a GPU what the allocator held.  At the end stands what full
Human3.6M takes at these rates; --stored prints that alone.
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

from epiutils.data.dataset import Augmentation, Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.data.human36m import Human36M
from epiutils.heatmaps import joints_mse
from epiutils.networks.hrnet import SLIM, PoseHRNet
from epiutils.networks.loop import loader
from epiutils.networks.predict import device_name

NETWORKS = {"slim": SLIM, "W32": {"width": 32}}
SETTINGS = {
    "contiguous": ("contiguous", "no"),
    "channels-last": ("last", "no"),
    "channels-last, bf16": ("last", "bf16"),
}

HUMAN36M = {"train": 78_000, "test": 2_150}  # instants of four views: every 5th of five subjects, every 64th of two
PASSES = 20


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


def loading(rounds: int, workers: int, human36m: Path | None, batch: int = 8) -> float:
    """Images a second that `MultiView` loads and augments, of the benchmark or of Human3.6M, with so many processes."""
    scenes = Human36M(human36m, "train", every=100) if human36m else Benchmark("train").prepare()
    data = torch.utils.data.ConcatDataset([MultiView(scenes, Augmentation())] * rounds)
    batches, images = iter(loader(data, workers, batch_size=batch)), 0
    for _ in range(2 * workers):  # the processes have begun
        next(batches)
    start = time.perf_counter()
    for samples in batches:
        images += samples["image"][:, :, 0, 0, 0].numel()
    return images / (time.perf_counter() - start)


def sizing(results: dict) -> str:
    """What full Human3.6M takes on one such device, as a table in Markdown; each network in its fastest setting."""
    networks = results["networks"]
    fastest = lambda name, kind: max(row[kind]["images_per_second"] for row in networks[name].values())
    rows = [["", "instants", "pictures", "disk", *(f"hours, {name}" for name in networks)]]
    rows += [["---"] * len(rows[0])]
    for what, split, passes, disk, kind in (
        ("training, every 5th instant of 1, 5, 6, 7, 8", "train", 1, "25 GB as JPEG", "training"),
        (f"{PASSES} passes over it", "train", PASSES, "0.5 GB of checkpoints", "training"),
        ("testing, every 64th of 9, 11", "test", 1, "1 GB", "inference"),
    ):
        images = 4 * passes * HUMAN36M[split]
        hours = [images / fastest(name, kind) / 3600 for name in networks]
        texts = [f"{h:,.0f}" if h >= 10 else f"{h:.1f}" if h >= 1 else f"{h:.2f}" for h in hours]
        rows.append([what, f"{HUMAN36M[split]:,}" if passes == 1 else "", f"{images:,}", disk, *texts])
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def show_sizing(results: dict) -> None:
    print(f"\nHuman3.6M on one such device, {results['device']}:\n\n{sizing(results)}\n")
    rate = results["loading_images_per_second"]
    print(f"Loading alone takes {4 * PASSES * HUMAN36M['train'] / rate / 3600:.1f} hours of the {PASSES} passes.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    parser.add_argument("--human36m", type=Path, help="load from this folder, not from the embedded benchmark")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--stored", type=Path, help="measure nothing: what such a file says of full Human3.6M")
    chosen = parser.parse_args()
    if chosen.stored:
        show_sizing(json.loads(chosen.stored.read_text("utf-8")))
        return
    results = {"device": device_name(), "torch": torch.__version__, "batch": chosen.batch, "networks": {}}
    rate = loading(2, chosen.workers, chosen.human36m)
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
    show_sizing(results)
    if chosen.json:
        with replacing(chosen.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
