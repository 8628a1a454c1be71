"""One loop for every experiment: seeded batches, AdamW, a schedule, clipping, and files from which it goes on.

`train` is what notebooks call; `python -m epiutils.networks.training --help` trains HRNet on the benchmark or Human3.6M.
Everything that is random in step k follows from (seed, k): a run that was killed and taken up again ends with the
weights of an unbroken one, and several processes (`accelerate launch`) do what one does with the same batch.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from epiutils.data.dataset import SPLITS, Augmentation, Benchmark, MultiView
from epiutils.data.human36m import Human36M
from epiutils.data.views import JOINTS
from epiutils.heatmaps import joints_mse, position_cross_entropy
from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint, normalise, provenance, save_checkpoint
from epiutils.networks.loop import _accelerator, train
from epiutils.networks.predict import device_name, predict, scores

# Batch normalisation over all processes


# HRNet


def pose_loss(network: nn.Module, batch: dict[str, Tensor], done: float) -> Tensor:
    """HRNet's JointsMSE, and a cross-entropy over positions whose weight falls to zero as the training goes on.

    The MSE alone, from scratch, rests on all-zero maps for hundreds of steps; the cross-entropy leaves them at
    once and has its least value at the same maps.
    """
    output = network(normalise(batch["image"]))  # (B·V, J, h, w)
    target, weight = batch["target"].flatten(0, 1), batch["weight"].flatten(0, 1)
    fades = 0.5 * (1 + math.cos(math.pi * done))
    return 100 * joints_mse(output, target, weight) + 0.5 * fades * position_cross_entropy(output, target, weight)


def train_pose(
    network: nn.Module, scenes: Sequence, out: str | os.PathLike | None = None, *, size: int = 256, batch: int = 4,
    lr: float = 2e-3, warmup: int = 50, seed: int = 0, workers: int = 1, **settings,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Train HRNet on augmented instants with `pose_loss`, as the checkpoints that ship were; see `train`."""
    data = MultiView(scenes, Augmentation(), size, seed)
    settings = {"batch": batch, "lr": lr, "warmup": warmup, "clip": 1.0, "seed": seed, "workers": workers} | settings
    return train(network, pose_loss, data, out, **settings)


def main(arguments: list[str] | None = None) -> int:
    """Train HRNet and write its weights, with their provenance, beside the checkpoint and the tables."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.networks.training", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a stopped run goes on from it")
    parser.add_argument("--split", choices=SPLITS, default="train", help="what to train on (default: %(default)s)")
    parser.add_argument("--human36m", type=Path, help="folder of Human3.6M, in place of the benchmark")
    parser.add_argument("--network", choices=("slim", "w32", "w48"), default="slim")
    parser.add_argument("--init", type=Path, help="weights to begin with")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in px (default: %(default)s)")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stop", type=int, help="end before this step, with the schedule of all steps")
    parser.add_argument("--batch", type=int, default=4, help="instants of all views a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's highest (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="steps (default: %(default)s)")
    parser.add_argument("--every", type=int, default=0, help="steps between validations and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that load (default: %(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(chosen.seed)
    settings = {"slim": SLIM, "w32": {"width": 32}, "w48": {"width": 48}}[chosen.network]
    network = load_checkpoint(chosen.init, joints=len(JOINTS)) if chosen.init else PoseHRNet(**settings)
    network = network.train().to(memory_format=torch.channels_last)
    scenes, test = _scenes(chosen)
    few = MultiView([test[i] for i in subset(len(test))], size=chosen.size)
    try:
        epochs, rows = train_pose(
            network, scenes, chosen.out, size=chosen.size, steps=chosen.steps, stop=chosen.stop, batch=chosen.batch,
            lr=chosen.lr, warmup=chosen.warmup, every=chosen.every, seed=chosen.seed, workers=chosen.workers,
            precision=chosen.precision, validate=lambda network: scores(predict(network, few)),
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        print(stopped)
        return 130
    if _accelerator().is_main_process:
        measured = scores(predict(network, MultiView(test, size=chosen.size), progress=True))
        print({key: round(value, 4) for key, value in measured.items()})
        few_measured = {key: epochs[-1][key] for key in measured}
        save_checkpoint(
            chosen.out / "weights.safetensors", network, **_provenance(chosen, measured, few_measured, rows)
        )
    return 0


def subset(scenes: int) -> range:
    """The part of a test set that is scored during training: about 50 instants."""
    return range(0, scenes, max(1, scenes // 48))


def _scenes(chosen: argparse.Namespace) -> tuple:
    """What to train on and what to test on."""
    if chosen.human36m:
        return Human36M(chosen.human36m, "train"), Human36M(chosen.human36m, "test")
    main_process = _accelerator().is_main_process
    with _accelerator().main_process_first():
        return tuple(Benchmark(s).prepare(progress=main_process) for s in (chosen.split, "test"))


def _provenance(chosen: argparse.Namespace, measured: dict, few: dict, rows: list[dict]) -> dict:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], check=False, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    shown = {k: v for k, v in vars(chosen).items() if v not in (None, 0, False) and k != "out"}
    return {
        "command": "python -m epiutils.networks.training "
        + " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in shown.items()),
        "begun_with": provenance(chosen.init) if chosen.init else None,
        "commit": git.stdout.strip() or None,
        "seed": chosen.seed,
        "data": str(chosen.human36m.name if chosen.human36m else f"embedded benchmark, {chosen.split}"),
        "device": device_name(),
        "torch": torch.__version__,
        "losses": [row["loss"] for row in rows[:50]],
        "test": measured,
        "subset": few,
    }


if __name__ == "__main__":
    sys.exit(main())
