"""How fusion modules learn: from pairs or from all views of an instant, on heatmaps or through the backbone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.dataset import MultiView
from epiutils.data.views import Predicted
from epiutils.heatmaps import hit_loss, joints_mse
from epiutils.networks.hrnet import normalise
from epiutils.networks.loop import train
from epiutils.networks.training import maps_loss

PAIRS = tuple(itertools.permutations(range(4), 2))  # (source, reference) of four views


class HeatmapPairs(torch.utils.data.Dataset):
    """All ordered pairs of views: source, reference, target, weight and F of each.

    Sample 12 n + k is pair `PAIRS[k]` of scene n.
    """

    def __init__(self, predicted: Predicted):
        self.predicted = predicted

    def __len__(self) -> int:
        return len(PAIRS) * len(self.predicted)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene, (s, r) = index // len(PAIRS), PAIRS[index % len(PAIRS)]
        seen = self.predicted
        maps = {"source": seen.output[scene, s], "reference": seen.output[scene, r], "F": seen.F[scene, s, r]}
        return maps | {"target": seen.target[scene, r], "weight": seen.weight[scene, r]}


class HeatmapScenes(torch.utils.data.Dataset):
    """All views of an instant together: heatmaps, target, weight and F of each instant."""

    def __init__(self, predicted: Predicted):
        self.predicted = predicted

    def __len__(self) -> int:
        return len(self.predicted)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seen = self.predicted
        maps = {"heatmaps": seen.output[index], "F": seen.F[index]}
        return maps | {"target": seen.target[index], "weight": seen.weight[index]}


class PicturePairs(torch.utils.data.Dataset):
    """The same pairs as pictures: source and reference (H, W, 3) uint8, for a backbone that trains."""

    def __init__(self, data: MultiView):
        self.data = data

    def __len__(self) -> int:
        return len(PAIRS) * len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> dict[str, Tensor]:
        sample, (s, r) = self.data.sample(index // len(PAIRS), epoch), PAIRS[index % len(PAIRS)]
        pictures = {"source": sample["image"][s], "reference": sample["image"][r]}
        return pictures | {"target": sample["target"][r], "weight": sample["weight"][r], "F": sample["F"][s, r]}


class FusedNetwork(nn.Module):
    """A backbone and a fusion module: pictures become heatmaps, and these fused ones.

    frozen_statistics: batch normalisation keeps its running statistics, and uses them, also in training mode.
    """

    def __init__(self, network: nn.Module, fusion: nn.Module, frozen_statistics: bool = False):
        super().__init__()
        self.network, self.fusion, self.frozen_statistics = network, fusion, frozen_statistics

    def train(self, mode: bool = True) -> FusedNetwork:
        super().train(mode)
        for module in self.network.modules() if self.frozen_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, source: Tensor, reference: Tensor, F: Tensor) -> Tensor:
        """One fused heatmap a joint from the two pictures of each pair."""
        maps = self.network(normalise(torch.cat([source, reference])))
        return self.fusion(*maps.chunk(2), F)

    def all_views(self, images: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
        """The network's heatmaps of all views, and those fused with each other: images (B, V, …) → (B, V, J, h, w)."""
        maps = self.network(normalise(images)).unflatten(0, images.shape[:2])
        return maps, self.fusion.all_views(maps, F)


def fusion_loss(module: nn.Module, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """HRNet's loss of the fused heatmaps, for `training.train`; the module takes heatmaps, or pictures."""
    return joints_mse(module(batch["source"], batch["reference"], batch["F"]), batch["target"], batch["weight"])


def train_pairs(
    module: nn.Module,
    data: torch.utils.data.Dataset,
    steps: int = 50,
    batch: int = 8,
    lr: float = 1e-3,
    loss: Callable = fusion_loss,
    **settings,
) -> list[dict]:
    """Train on pairs of views as the original did: AdamW without decay, at one learning rate, on `fusion_loss`.

    data: `HeatmapPairs`, or `PicturePairs` for a `FusedNetwork`.  loss, settings: of `networks.loop.train`.
    Returns the rows of `steps.csv`, with those of `_watch`.
    """
    settings = {"weight_decay": 0, "schedule": "constant", "log": _watch, "progress": False} | settings
    return train(module, loss, data, steps=steps, batch=batch, lr=lr, **settings)[1]


def views_loss(module: nn.Module, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """Of all views fused with each other: how improbable the right places are, `heatmaps.hit_loss`, for `train`.

    module: has `all_views` and `sharpness`, as `RepairedFusion`, and a batch of `HeatmapScenes`.
    """
    fused = module.all_views(batch["heatmaps"], batch["F"])
    return hit_loss(module.sharpness * fused, batch["target"], batch["weight"])


def free_loss(model: FusedNetwork, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """`views_loss` through the backbone, and HRNet's own losses on its unfused heatmaps beside it; of `MultiView`."""
    maps, fused = model.all_views(batch["image"], batch["F"])
    return hit_loss(model.fusion.sharpness * fused, batch["target"], batch["weight"]) + maps_loss(maps, batch, 0.5)


def _watch(module: nn.Module) -> dict[str, float]:
    """The nine weights w0 … w8 and their gradients g0 … g8, row by row, as columns for `training.train`.

    module: an `OriginalFusion` or a `SimpleFusion`, or a `FusedNetwork` of one, after a backward pass.
    """
    weight = next(p for p in module.parameters() if p.numel() == 9 and p.shape[-2:] == (3, 3))
    columns = {f"w{k}": v for k, v in enumerate(weight.detach().flatten().tolist())}
    return columns | {f"g{k}": v for k, v in enumerate(weight.grad.flatten().tolist())}


def followed(rows: list[dict]) -> dict[str, np.ndarray]:
    """`losses` (steps,) and the nine weights with their gradients, `path` (steps, 2, 9), of the rows of `steps.csv`.

    The path of a training without `_watch` is empty.
    """
    path = [[row[f"{kind}{k}"] for k in range(9)] for row in rows if "w0" in row for kind in "wg"]
    return {"losses": np.array([row["loss"] for row in rows]), "path": np.float32(path).reshape(-1, 2, 9)}
