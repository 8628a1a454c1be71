"""Small trainings, for tests that kill them or share them between processes: python tests/tiny_training.py both|die|long OUT."""

import os
import signal
import sys
from functools import cache
from pathlib import Path

import torch

from epiutils.data.dataset import Augmentation, MultiView
from epiutils.data.people import scene
from epiutils.heatmaps import joints_mse
from epiutils.networks import training
from epiutils.networks.hrnet import PoseHRNet, normalise
from epiutils.networks.loop import train

TINY = {"width": 4, "modules": (1, 1, 1), "blocks": 1, "stem": (8, 8), "stem_blocks": 1}


@cache
def scenes() -> list:
    """Five instants, pictures of 64×64."""
    return [scene(1, action, 20, seed, size=64) for seed, action in enumerate(("walk", "sit", "wave", "kick", "turn"))]


def double_loss(network, batch, done) -> torch.Tensor:
    """HRNet's loss in double precision, where rounding does not grow from step to step until it shows."""
    output = network(normalise(batch["image"]).double())
    return joints_mse(output, batch["target"].flatten(0, 1).double(), batch["weight"].flatten(0, 1).double())


def run(out, steps: int, double: bool = False, **settings) -> tuple[PoseHRNet, list[dict], list[dict]]:
    torch.manual_seed(0)
    network = PoseHRNet(**TINY).double() if double else PoseHRNet(**TINY)
    loss = double_loss if double else training.pose_loss
    settings = {"batch": 2, "every": 4, "lr": 3e-3, "warmup": 3, "clip": 1.0, "progress": False} | settings
    return network, *train(network, loss, MultiView(scenes(), Augmentation(), 64), out, steps=steps, **settings)


def command(out, *options) -> int:
    """`python -m epiutils.networks.training` with a tiny network, on tiny data."""
    training._NETWORKS["slim"], training._scenes = TINY, lambda chosen: (scenes(), scenes()[:2])
    asked = {"--size": 64, "--steps": 4, "--batch": 2, "--every": 2, "--workers": 0} | dict(zip(*[iter(options)] * 2))
    return training.main([str(a) for option in ({"--out": out} | asked).items() for a in option])


def both(out) -> None:
    """A run in double precision, and the command."""
    run(Path(out, "run"), 8, double=True)
    command(Path(out, "command"))


def die(out) -> None:
    """A run that is killed inside its second save: the new checkpoint is written and not yet in its place."""
    run(out, 9, stop=4)
    place = os.replace
    os.replace = lambda new, old: (os.kill(os.getpid(), signal.SIGKILL) if old.suffix == ".pt" else place)(new, old)
    run(out, 9)


def long(out) -> None:
    """The command with many saves, after a line that says that it begins."""
    print("begun", flush=True)
    sys.exit(command(out, "--steps", 12, "--every", 1))


if __name__ == "__main__":
    {"both": both, "die": die, "long": long}[sys.argv[1]](sys.argv[2])
