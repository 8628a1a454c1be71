"""What the notebooks' experiments share: heatmaps computed once, pairs of views, modules trained and scored on them.

A frozen backbone gives the same heatmaps at every iteration: they are computed once a checkpoint and split, kept in
the cache, and the nine weights train on them a hundred times faster than through the network.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.dataset import CACHE, Benchmark, MultiView
from epiutils.files import replacing
from epiutils.heatmaps import hrnet_targets, joints_mse
from epiutils.hrnet import load_checkpoint, normalise
from epiutils.metrics import bootstrap, found, joint_mean
from epiutils.training import predict

CHECKPOINTS = {
    point: Path(__file__).resolve().parents[1] / "data" / "checkpoints" / f"{point}.safetensors"
    for point in ("original", "best")
}
PAIRS = tuple(itertools.permutations(range(4), 2))  # (source, reference) of four views


def heatmaps_once(
    point: str, split: str = "test", scenes: slice = slice(None), progress: bool = True
) -> dict[str, Tensor]:
    """What the backbone of an operating point sees in a split of the benchmark: `training.predict`, kept in the cache.

    point: "original" (about 46 %) or "best".  scenes: some of them.  The maps, `output` (N, V, J, 64, 64), are kept
    in half precision and given in single.  Another checkpoint, renderer or choice of instants has a file of its own.
    """
    benchmark = Benchmark(split)
    chosen = range(len(benchmark))[scenes]
    content = repr((benchmark.folder.name, split, [benchmark.instants[i] for i in chosen]))
    sha = hashlib.sha256(CHECKPOINTS[point].read_bytes() + content.encode())
    path = Path(os.environ.get("EPIUTILS_CACHE", CACHE)) / f"heatmaps-{point}-{split}-{sha.hexdigest()[:12]}.pt"
    if not path.exists():
        benchmark.prepare(progress=progress, only=chosen)
        data = MultiView(torch.utils.data.Subset(benchmark, chosen))
        predicted = predict(load_checkpoint(CHECKPOINTS[point]), data, workers=1, progress=progress)
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
    """A backbone and a fusion module: two pictures of each pair become one fused heatmap for each joint."""

    def __init__(self, network: nn.Module, fusion: nn.Module):
        super().__init__()
        self.network, self.fusion = network, fusion

    def forward(self, source: Tensor, reference: Tensor, F: Tensor) -> Tensor:
        maps = self.network(normalise(torch.cat([source, reference])))
        return self.fusion(*maps.chunk(2), F)


def fusion_loss(module: nn.Module, batch: dict[str, Tensor], done: float = 0.0) -> Tensor:
    """HRNet's loss of the fused heatmaps, for `training.train`; the module takes heatmaps, or pictures."""
    return joints_mse(module(batch["source"], batch["reference"], batch["F"]), batch["target"], batch["weight"])


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


def summary(scored: dict[str, np.ndarray]) -> dict[str, float | tuple[float, float]]:
    """Of what `score` returns: HRNet's accuracy, its 95 % interval over scenes, and that of visible and hidden joints."""
    values, visible = scored["found"], scored["visible"]
    return {
        "accuracy": joint_mean(values),
        "accuracy_ci": bootstrap(values),
        "accuracy_visible": joint_mean(np.where(visible, values, np.nan)),
        "accuracy_occluded": joint_mean(np.where(visible, np.nan, values)),
    }


def training_pictures(split: str = "train", scenes: slice = slice(None)) -> PicturePairs:
    """Pairs of pictures of a split, without augmentation as in the original."""
    benchmark = Benchmark(split)
    chosen = range(len(benchmark))[scenes]
    return PicturePairs(MultiView(torch.utils.data.Subset(benchmark.prepare(only=chosen), chosen)))
