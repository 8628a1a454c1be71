"""HRNet's training: its loss, and the command `python -m epiutils.networks.training`.

The command trains on the embedded benchmark or on Human3.6M; `--help` lists its options.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from epiutils.data.dataset import SPLITS, Augmentation, Benchmark, MultiView
from epiutils.data.human36m import Human36M
from epiutils.data.views import JOINTS, Predicted
from epiutils.heatmaps import accuracy, found, joints_mse
from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint, normalise, provenance, save_checkpoint
from epiutils.networks.loop import Settings, train
from epiutils.networks.predict import device_name, predict

_NETWORKS = {"slim": SLIM, "w32": {"width": 32}, "w48": {"width": 48}}


def pose_loss(network: nn.Module, batch: dict[str, Tensor], done: float) -> Tensor:
    """`maps_loss` of what a network sees in a batch of `MultiView`."""
    return maps_loss(network(normalise(batch["image"])).unflatten(0, batch["image"].shape[:2]), batch, done)


def maps_loss(maps: Tensor, batch: dict[str, Tensor], done: float) -> Tensor:
    """HRNet's JointsMSE, and a cross-entropy over positions whose weight falls to zero as the training goes on.

    The MSE alone, from scratch, rests on all-zero maps for hundreds of steps; the cross-entropy leaves them at
    once and has its least value at the same maps.  maps: (B, V, J, h, w).  done: 0 to 1, of the training.
    """
    truth, fades = (batch["target"], batch["weight"]), 0.5 * (1 + math.cos(math.pi * done))
    return 100 * joints_mse(maps, *truth) + 0.5 * fades * _position_cross_entropy(maps, *truth)


def _position_cross_entropy(output: Tensor, target: Tensor, weight: Tensor, sharpness: float = 10.0) -> Tensor:
    """Cross-entropy between pixel distributions: −Σ q log p, p = softmax(β output), q = softmax(β target).

    q's own entropy is subtracted, so that the least is 0, where output = target + constant: there the MSE is least
    too, but unlike the MSE it has no plateau at the all-zero map.  Averaged over the joints with weight > 0.

    output, target: (..., J, H, W).  weight: (..., J).  sharpness: β.  Returns a scalar.
    """
    log_p = nn.functional.log_softmax(sharpness * output.float().flatten(-2), -1)  # (..., J, H·W)
    log_q = nn.functional.log_softmax(sharpness * target.float().flatten(-2), -1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (divergence * weight).sum() / weight.sum().clamp_min(1)


def train_pose(
    network: nn.Module, scenes: Sequence, out: str | os.PathLike | None = None, *, size: int = 256, batch: int = 4,
    lr: float = 2e-3, warmup: int = 50, seed: int = 0, workers: int = 1, hiding: float = 0.0, facts: dict | None = None,
    **settings,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Train HRNet on augmented instants with `pose_loss`, as the checkpoints that ship were; see `train`."""
    augmentation = Augmentation(hiding=hiding)
    data = MultiView(scenes, augmentation, size, seed)
    settings = {"batch": batch, "lr": lr, "warmup": warmup, "clip": 1.0, "seed": seed, "workers": workers} | settings
    return train(network, pose_loss, data, out, facts={"size": size, **vars(augmentation)} | (facts or {}), **settings)


def _scores(predicted: Predicted) -> dict[str, float]:
    """HRNet's accuracy, pooled PCK, and pooled PCK of visible and of occluded joints."""
    output, target, visible = (a.flatten(0, 1) for a in (predicted.output, predicted.target, predicted.visible))
    hidden, seen = (target * chosen[..., None, None] for chosen in (~visible, visible))
    return {
        "accuracy": accuracy(output, target),
        "pck": _pck(output, target),
        "pck_visible": _pck(output, seen),
        "pck_occluded": _pck(output, hidden),
    }


def _pck(output: Tensor, target: Tensor) -> float:
    """Pooled PCK: the share of all counted joints that are `found`, each joint of each sample once; nan where none is."""
    right = found(output, target)
    right = right[~np.isnan(right)]
    return float(right.mean()) if len(right) else float("nan")


def main(arguments: list[str] | None = None) -> int:
    """Train HRNet and write its weights, with their provenance, beside the checkpoint and the tables."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped")
        return 130
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m epiutils.networks.training", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a stopped run goes on from it")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--split", choices=SPLITS, help="what to train on (default: train)")
    data.add_argument("--human36m", type=Path, help="folder of Human3.6M, in place of the benchmark")
    parser.add_argument("--network", choices=_NETWORKS, help="default: that of --init, or slim")
    parser.add_argument("--init", type=Path, help="weights to begin with")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in px (default: %(default)s)")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stop", type=int, help="end after so many steps, with the schedule of all")
    parser.add_argument("--batch", type=int, default=4, help="instants of all views a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's highest (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="steps (default: %(default)s)")
    parser.add_argument("--every", type=int, default=0, help="steps between validations and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that load (default: %(default)s)")
    parser.add_argument("--hiding", type=float, default=0.0, help="patches painted over each view, on average")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    return parser


def _run(chosen: argparse.Namespace) -> int:
    """What the command does: all that can be known to fail is tried before the first step."""
    settings = {k: getattr(chosen, k) for k in ("steps", "batch", "lr", "warmup", "every", "seed", "precision")}
    accelerator = Settings(**settings).accelerator()
    first = accelerator.is_main_process
    torch.backends.cudnn.benchmark = True  # a third faster for W32 on a GPU: all batches have one shape
    chosen.split = None if chosen.human36m else chosen.split or "train"
    if chosen.size < 32 or chosen.size % 32 or chosen.workers < 0:
        raise ValueError(f"size must be a multiple of 32, got {chosen.size}; workers at least 0, got {chosen.workers}")
    network = _network(chosen)
    Settings(**settings).check(network, chosen.out if first else None, accelerator.num_processes, chosen.stop)
    told = _provenance(chosen)
    scenes, test = _scenes(chosen)
    few = _prepared("validation") if chosen.split == "train-strong" else test
    test, few = (MultiView(part, size=chosen.size) for part in (test, [few[i] for i in _subset(len(few))]))
    names = _scores(predict(network, MultiView(few.scenes[:1], size=chosen.size))) if first else {}
    epochs, rows = train_pose(
        network, scenes, chosen.out, size=chosen.size, stop=chosen.stop, workers=chosen.workers, hiding=chosen.hiding,
        **settings, facts=_facts(chosen, network, told["data"], scenes),
        validate=lambda network: _scores(predict(network, few)),
    )  # fmt: skip
    if first:
        told |= {
            "losses": [row["loss"] for row in rows[:50]],
            "test": None,
            "subset": {k: epochs[-1][k] for k in names},
        }
        save_checkpoint(chosen.out / "weights.safetensors", network, **told)  # whatever becomes of the test
        told["test"] = _scores(predict(network, test, progress=True))
        print({key: round(value, 4) for key, value in told["test"].items()})
        save_checkpoint(chosen.out / "weights.safetensors", network, **told)
    return 0


def _network(chosen: argparse.Namespace) -> PoseHRNet:
    """The network to train: that of --init, or one whose weights the seed draws."""
    torch.manual_seed(chosen.seed)
    if not chosen.init:
        chosen.network = chosen.network or "slim"
        network = PoseHRNet(**_NETWORKS[chosen.network])
    else:
        network = load_checkpoint(chosen.init, joints=len(JOINTS))
        with torch.device("meta"):
            asked = PoseHRNet(**_NETWORKS[chosen.network]).settings if chosen.network else network.settings
        if network.settings != asked:
            raise ValueError(f"{chosen.init} is of {network.settings}, --network {chosen.network} is {asked}")
    return network.train().to(memory_format=torch.channels_last)


def _subset(scenes: int) -> range:
    """The part of a test set that is scored during training: about 50 instants."""
    return range(0, scenes, max(1, scenes // 48))


def _scenes(chosen: argparse.Namespace) -> tuple[Sequence, Sequence]:
    """What to train on, and what to test it on in the end."""
    if chosen.human36m:
        return tuple(Human36M(chosen.human36m, split) for split in ("train", "test"))
    return _prepared(chosen.split), _prepared("test")


def _prepared(split: str) -> Benchmark:
    state = PartialState()
    with state.main_process_first():
        return Benchmark(split).prepare(progress=state.is_main_process)


def _facts(chosen: argparse.Namespace, network: PoseHRNet, data: str, scenes: Sequence) -> dict:
    """What a checkpoint must agree with, beside the settings of the training."""
    joints = np.rint(np.nan_to_num([view.joints for view in scenes[0]])).astype(int)
    version = scenes.folder.name if isinstance(scenes, Benchmark) else ""
    return {
        "network": network.settings,
        "init": hashlib.sha256(chosen.init.read_bytes()).hexdigest() if chosen.init else None,
        "data": f"{data} {version}".strip(),
        "joints": hashlib.sha256(joints.tobytes()).hexdigest()[:12],
    }


def _provenance(chosen: argparse.Namespace) -> dict:
    """Where the weights come from, as far as it is known before the first step."""
    try:
        told = {"check": False, "capture_output": True, "text": True, "cwd": Path(__file__).parent}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **told).stdout.strip()
    except OSError:  # no git here
        commit = ""
    shown = {k: v for k, v in vars(chosen).items() if v not in (None, 0, False) and k != "out"}
    return {
        "command": "python -m epiutils.networks.training "
        + " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in shown.items()),
        "begun_with": provenance(chosen.init) if chosen.init else None,
        "commit": commit or None,
        "seed": chosen.seed,
        "data": str(chosen.human36m.resolve().name if chosen.human36m else f"embedded benchmark, {chosen.split}"),
        "device": device_name(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
