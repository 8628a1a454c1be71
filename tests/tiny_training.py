"""A small training run, for tests that kill it, interrupt it, or share it between processes.

python tests/tiny_training.py OUT STEPS [SECONDS A STEP | double]
"""

import sys
import time

import torch

from epiutils.data.dataset import Augmentation, MultiView
from epiutils.data.people import scene
from epiutils.heatmaps import joints_mse
from epiutils.networks.hrnet import PoseHRNet, normalise
from epiutils.networks.loop import train
from epiutils.networks.training import pose_loss


def double_loss(network, batch, done) -> torch.Tensor:
    """HRNet's loss in double precision, where rounding does not grow from step to step until it shows."""
    output = network(normalise(batch["image"]).double())
    return joints_mse(output, batch["target"].flatten(0, 1).double(), batch["weight"].flatten(0, 1).double())


def run(
    out, steps: int, pause: float = 0.0, double: bool = False, **settings
) -> tuple[PoseHRNet, list[dict], list[dict]]:
    torch.manual_seed(0)
    network = PoseHRNet(width=4, modules=(1, 1, 1), blocks=1, stem=(8, 8), stem_blocks=1)
    scenes = [
        scene(1, action, 20, seed, size=64) for seed, action in enumerate(("walk", "sit", "wave", "kick", "turn"))
    ]

    def slow(*arguments) -> torch.Tensor:
        time.sleep(pause)
        return double_loss(*arguments) if double else pose_loss(*arguments)

    network = network.double() if double else network
    settings = {"batch": 2, "every": 4, "lr": 3e-3, "warmup": 3, "clip": 1.0, "progress": False} | settings
    epochs, rows = train(network, slow, MultiView(scenes, Augmentation(), 64), out, steps=steps, **settings)
    return network, epochs, rows


if __name__ == "__main__":
    try:
        how = sys.argv[3] if len(sys.argv) > 3 else "0"
        run(sys.argv[1], int(sys.argv[2]), 0.0 if how == "double" else float(how), how == "double")
    except KeyboardInterrupt as stopped:
        print(stopped)
        sys.exit(130)
