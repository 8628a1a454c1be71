"""What the notebooks' experiments share: heatmaps computed once, pairs and sets of views, modules trained and scored.

A frozen backbone gives the same heatmaps at every iteration: they are computed once a checkpoint and split, kept in
the cache, and the nine weights train on them a hundred times faster than through the network.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.dataset import CACHE, Benchmark, MultiView
from epiutils.files import replacing
from epiutils.heatmaps import hit_loss, hrnet_targets, joints_mse, position_cross_entropy
from epiutils.hrnet import load_checkpoint, normalise
from epiutils.human36m import Human36M
from epiutils.metrics import bootstrap, found, joint_mean
from epiutils.training import predict

CHECKPOINTS = {
    point: Path(__file__).resolve().parents[1] / "data" / "checkpoints" / f"{point}.safetensors"
    for point in ("original", "best")
}
PAIRS = tuple(itertools.permutations(range(4), 2))  # (source, reference) of four views


def open_split(split: str, dataset: str = "") -> Sequence:
    """Subject 1 ("train") or 9 ("test"), as the original had them: of the benchmark, or of Human3.6M in that folder."""
    if not dataset:
        return Benchmark(split)
    return Human36M(dataset, split, subjects={"train": (1,), "test": (9,)}[split])


def choose(scenes: Sequence, wanted: int | slice = slice(None)) -> range:
    """Indices of the wanted instants: a slice of them, or that many, evenly spread (all where there are fewer)."""
    if isinstance(wanted, slice):
        return range(len(scenes))[wanted]
    return range(0, len(scenes), max(1, len(scenes) // wanted))[:wanted]


def heatmaps_once(
    point: str, split: str = "test", scenes: int | slice = slice(None), progress: bool = True, dataset: str = ""
) -> dict[str, Tensor]:
    """What the backbone of an operating point sees in a split: `training.predict`, kept in the cache.

    point: "original" (about 46 %) or "best", or the path of a checkpoint.  split, dataset: see `open_split`.
    scenes: see `choose`.  The maps, `output` (N, V, J, 64, 64), are kept in half precision and given in single.
    Another checkpoint, renderer, dataset or choice of instants has a file of its own.
    """
    checkpoint, data = Path(CHECKPOINTS.get(point, point)), open_split(split, dataset)
    chosen = choose(data, scenes)
    source = data.folder.name if isinstance(data, Benchmark) else f"{data.file.name} {data.file.stat().st_mtime_ns}"
    content = repr((source, split, [data.instants[i] for i in chosen]))
    sha = hashlib.sha256(checkpoint.read_bytes() + content.encode())
    path = (
        Path(os.environ.get("EPIUTILS_CACHE", CACHE)) / f"heatmaps-{checkpoint.stem}-{split}-{sha.hexdigest()[:12]}.pt"
    )
    if not path.exists():
        if isinstance(data, Benchmark):
            data.prepare(progress=progress, only=chosen)
        views = MultiView(torch.utils.data.Subset(data, chosen))
        predicted = predict(load_checkpoint(checkpoint), views, workers=1, progress=progress)
        kept = predicted | {"output": predicted["output"].half()}
        del kept["target"]
        with replacing(path) as part:
            torch.save(kept, part)
    predicted = torch.load(path, weights_only=True)
    output = predicted["output"].float()
    target, _ = hrnet_targets(predicted["joints"], output.shape[-2:])
    return predicted | {"output": output, "target": target}


class HeatmapPairs(torch.utils.data.Dataset):
    """All ordered pairs of views of what `predict` gives: source, reference, target, weight and F of each.

    Sample 12 n + k is pair `PAIRS[k]` of scene n.
    """

    def __init__(self, predicted: dict[str, Tensor]):
        self.predicted = predicted

    def __len__(self) -> int:
        return len(PAIRS) * len(self.predicted["output"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene, (s, r) = index // len(PAIRS), PAIRS[index % len(PAIRS)]
        maps = {"source": self.predicted["output"][scene, s], "reference": self.predicted["output"][scene, r]}
        truth = {key: self.predicted[key][scene, r] for key in ("target", "weight")}
        return maps | truth | {"F": self.predicted["F"][scene, s, r]}


class HeatmapScenes(torch.utils.data.Dataset):
    """All views of an instant together, of what `predict` gives: heatmaps, target, weight and F of each instant."""

    def __init__(self, predicted: dict[str, Tensor]):
        self.predicted = predicted

    def __len__(self) -> int:
        return len(self.predicted["output"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        truth = {key: self.predicted[key][index] for key in ("target", "weight", "F")}
        return {"heatmaps": self.predicted["output"][index]} | truth


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


def views_loss(module: nn.Module, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """Of all views fused with each other: how improbable the right places are, `heatmaps.hit_loss`, for `train`.

    module: has `all_views` and `sharpness`, as `RepairedFusion`, and a batch of `HeatmapScenes`.
    """
    fused = module.all_views(batch["heatmaps"], batch["F"])
    return hit_loss(module.sharpness * fused, batch["target"], batch["weight"])


def free_loss(model: FusedNetwork, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """`views_loss` through the backbone, and HRNet's own losses on its unfused heatmaps beside it; of `MultiView`."""
    maps, fused = model.all_views(batch["image"], batch["F"])
    truth = batch["target"], batch["weight"]
    alone = 100 * joints_mse(maps, *truth) + 0.25 * position_cross_entropy(maps, *truth)
    return hit_loss(model.fusion.sharpness * fused, *truth) + alone


def watch(module: nn.Module) -> dict[str, float]:
    """The nine weights w0 … w8 and their gradients g0 … g8, row by row, as columns for `training.train`.

    module: an `OriginalFusion` or a `SimpleFusion`, or a `FusedNetwork` of one, after a backward pass.
    """
    weight = next(p for p in module.parameters() if p.numel() == 9 and p.shape[-2:] == (3, 3))
    columns = {f"w{k}": v for k, v in enumerate(weight.detach().flatten().tolist())}
    return columns | {f"g{k}": v for k, v in enumerate(weight.grad.flatten().tolist())}


@torch.no_grad()
def score(
    fuse: Callable[[Tensor, Tensor, Tensor], Tensor] | None, predicted: dict[str, Tensor], sources: int = 3
) -> dict[str, np.ndarray]:
    """Which joints are found in every reference view, fused with each of its first `sources` others in turn.

    fuse(source, reference, F): the fused heatmaps; None: the reference view alone.
    Returns found (N, 4, sources, J), see `metrics.found`, and visible of the same shape.
    """
    output, target, F = (predicted[key] for key in ("output", "target", "F"))
    r = torch.arange(4).repeat_interleave(sources)  # (4 · sources,) reference views, and their sources
    s = (r + torch.arange(1, sources + 1).repeat(4)) % 4
    right = []
    for n in range(len(output)):
        reference = output[n, r]  # (4 · sources, J, 64, 64)
        fused = reference if fuse is None else fuse(output[n, s], reference, F[n, s, r])
        right.append(found(fused, target[n, r]))
    right = np.stack(right).reshape(len(output), 4, sources, -1)
    visible = predicted["visible"].numpy()[:, :, None].repeat(sources, 2)
    return {"found": right, "visible": visible}


@torch.no_grad()
def fuse_views(module: nn.Module | None, predicted: dict[str, Tensor], chosen: Sequence[int] | None = None) -> Iterator:
    """Every chosen instant's heatmaps (V, J, H, W), all views fused with each other by `module.all_views`, in order.

    module: None for the heatmaps alone.
    """
    output, F = predicted["output"], predicted["F"]
    for n in range(len(output)) if chosen is None else chosen:
        yield output[n] if module is None else module.all_views(output[n : n + 1], F[n : n + 1])[0]


def score_views(module: nn.Module | None, predicted: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Which joints are found where all views are fused with each other: found and visible (N, V, J)."""
    right = [
        found(maps, target) for maps, target in zip(fuse_views(module, predicted), predicted["target"], strict=True)
    ]
    return {"found": np.stack(right), "visible": predicted["visible"].numpy()}


def summary(scored: dict[str, np.ndarray]) -> dict[str, float | tuple[float, float]]:
    """Of what `score` returns: HRNet's accuracy, its 95 % interval over scenes, and that of visible and hidden joints."""
    values, visible = scored["found"], scored["visible"]
    return {
        "accuracy": joint_mean(values),
        "accuracy_ci": bootstrap(values),
        "accuracy_visible": joint_mean(np.where(visible, values, np.nan)),
        "accuracy_occluded": joint_mean(np.where(visible, np.nan, values)),
    }


def training_pictures(split: str = "train", scenes: int | slice = slice(None), dataset: str = "") -> PicturePairs:
    """Pairs of pictures of a split, without augmentation as in the original."""
    data = open_split(split, dataset)
    chosen = choose(data, scenes)
    if isinstance(data, Benchmark):
        data.prepare(only=chosen)
    return PicturePairs(MultiView(torch.utils.data.Subset(data, chosen)))
