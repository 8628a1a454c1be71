"""A small training run, for tests that kill it, interrupt it, or share it between processes.

python tests/tiny_training.py OUT STEPS [SECONDS A STEP]
"""

import sys
import time

import torch

from epiutils.dataset import Augmentation, MultiView
from epiutils.hrnet import PoseHRNet
from epiutils.people import scene
from epiutils.training import pose_loss, train


def run(out, steps: int, pause: float = 0.0, **settings) -> tuple[PoseHRNet, list[dict], list[dict]]:
    torch.manual_seed(0)
    network = PoseHRNet(width=4, modules=(1, 1, 1), blocks=1, stem=(8, 8), stem_blocks=1)
    scenes = [
        scene(1, action, 20, seed, size=64) for seed, action in enumerate(("walk", "sit", "wave", "kick", "turn"))
    ]

    def slow(*arguments) -> torch.Tensor:
        time.sleep(pause)
        return pose_loss(*arguments)

    settings = {"batch": 2, "every": 4, "lr": 3e-3, "warmup": 3, "clip": 1.0, "progress": False} | settings
    epochs, rows = train(network, slow, MultiView(scenes, Augmentation(), 64), out, steps=steps, **settings)
    return network, epochs, rows


if __name__ == "__main__":
    try:
        run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
    except KeyboardInterrupt as stopped:
        print(stopped)
        sys.exit(130)
