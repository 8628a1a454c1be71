"""What a network sees in views, and on which device."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from epiutils.data.dataset import MultiView
from epiutils.data.views import MIRRORED, Predicted
from epiutils.networks.hrnet import normalise
from epiutils.networks.loop import loader


@torch.no_grad()
def predict(
    network: nn.Module, data: MultiView, batch: int = 8, workers: int = 0, progress: bool = False, flip: bool = False
) -> Predicted:
    """Heatmaps of a whole dataset by a network in evaluation mode, and all of its samples but the pictures.

    flip: HRNet's flip test, the mean of the heatmaps and of those of the mirrored pictures, mirrored back, with left
    and right joints exchanged, and shifted by one pixel.  The heatmaps are float32, everything on the CPU.
    """
    device, training = next(network.parameters()).device, network.training
    network.eval()
    parts = []
    for samples in tqdm(loader(data, workers, batch_size=batch), desc="predicting", unit="batch", disable=not progress):
        images = samples.pop("image")
        inputs = normalise(images.to(device))  # (B · V, 3, H, W)
        maps = network(inputs).float()
        if flip:
            mirrored = network(inputs.flip(-1)).float().flip(-1)[:, MIRRORED]
            mirrored[..., 1:] = mirrored[..., :-1].clone()  # pixel i lies at 4 i, its mirror image at 4 i + 3
            maps = (maps + mirrored) / 2
        samples["output"] = maps.cpu().unflatten(0, images.shape[:2])
        parts.append(samples)
    network.train(training)
    return Predicted(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def device_name() -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []
