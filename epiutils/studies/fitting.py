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

PAIRS = tuple(itertools.permutations(range(4), 2))  # (source, reference) of four views


class ViewPairs(torch.utils.data.Dataset):
    """All ordered pairs of views: source, reference, target, weight and F of each.

    Sample 12 n + k is pair `PAIRS[k]` of instant n.  data: a `Predicted`, whose heatmaps are source and reference; or a
    `MultiView` without augmentation, whose pictures (H, W, 3) uint8 are, for a backbone that trains.
    """

    def __init__(self, data: Predicted | MultiView):
        self.data = _Instants(data) if isinstance(data, Predicted) else data

    def __len__(self) -> int:
        return len(PAIRS) * len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seen, (s, r) = self.data[index // len(PAIRS)], PAIRS[index % len(PAIRS)]
        shown = seen["heatmaps" if "heatmaps" in seen else "image"]
        pair = {"source": shown[s], "reference": shown[r], "F": seen["F"][s, r]}
        return pair | {"target": seen["target"][r], "weight": seen["weight"][r]}


class _Instants(torch.utils.data.Dataset):
    """All views of an instant together: heatmaps, target, weight and F of each instant."""

    def __init__(self, predicted: Predicted):
        self.predicted = predicted

    def __len__(self) -> int:
        return len(self.predicted)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        seen = self.predicted
        maps = {"heatmaps": seen.output[index], "F": seen.F[index]}
        return maps | {"target": seen.target[index], "weight": seen.weight[index]}


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


def train_pairs(
    module: nn.Module,
    data: ViewPairs,
    steps: int = 50,
    batch: int = 8,
    lr: float = 1e-3,
    loss: Callable | None = None,
    **settings,
) -> dict[str, np.ndarray]:
    """Train on pairs of views as the original did: AdamW without decay, at one learning rate, on HRNet's loss.

    data: of pictures for a `FusedNetwork`.  loss: instead of HRNet's; loss, settings: of `networks.loop.train`.
    Returns `losses` (steps,) and the nine weights with their gradients before each step, `path` (steps, 2, 9).
    """
    settings = {"weight_decay": 0, "schedule": "constant", "log": _watch, "progress": False} | settings
    return _followed(train(module, loss or _fusion_loss, data, steps=steps, batch=batch, lr=lr, **settings)[1])


def train_together(
    make: Callable[[], nn.Module],
    heatmaps: Predicted,
    seed: int = 0,
    steps: int = 100,
    lr: float = 5e-2,
    squares: bool = False,
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """A module that `make()` gives, trained on all views of four instants a step, each fused with the others.

    module: has `all_views` and `sharpness`, as `RepairedFusion`.  The loss is how improbable the right places are,
    `heatmaps.hit_loss`; with squares, HRNet's.  seed: of the new module too.  lr: AdamW's highest.
    Returns the module and what `train_pairs` returns, but for an empty path.
    """

    def loss(module: nn.Module, batch: dict[str, Tensor], done: float) -> Tensor:
        fused, truth = module.all_views(batch["heatmaps"], batch["F"]), (batch["target"], batch["weight"])
        return joints_mse(fused, *truth) if squares else hit_loss(module.sharpness * fused, *truth)

    torch.manual_seed(seed)
    module = make()
    settings = {"steps": steps, "batch": 4, "lr": lr, "weight_decay": 0, "seed": seed, "progress": False}
    rows = train(module, loss, _Instants(heatmaps), **settings)[1]
    return module.cpu(), _followed(rows)


def _fusion_loss(module: nn.Module, batch: dict[str, Tensor], done: float) -> Tensor:
    """HRNet's loss of the fused heatmaps; the module takes heatmaps, or pictures."""
    return joints_mse(module(batch["source"], batch["reference"], batch["F"]), batch["target"], batch["weight"])


def _watch(module: nn.Module) -> dict[str, float]:
    """The nine weights w0 … w8 and their gradients g0 … g8, row by row, as columns for `networks.loop.train`.

    module: an `OriginalFusion` or a `SimpleFusion`, or a `FusedNetwork` of one, after a backward pass.
    """
    weight = next(p for p in module.parameters() if p.numel() == 9 and p.shape[-2:] == (3, 3))
    columns = {f"w{k}": v for k, v in enumerate(weight.detach().flatten().tolist())}
    return columns | {f"g{k}": v for k, v in enumerate(weight.grad.flatten().tolist())}


def _followed(rows: list[dict]) -> dict[str, np.ndarray]:
    """What `train_pairs` returns of the rows of `steps.csv`; the path of a training without `_watch` is empty."""
    path = [[row[f"{kind}{k}"] for k in range(9)] for row in rows if "w0" in row for kind in "wg"]
    return {"losses": np.array([row["loss"] for row in rows]), "path": np.float32(path).reshape(-1, 2, 9)}
