"""What the notebooks' experiments share: heatmaps computed once, pairs and sets of views, modules trained and scored.

A frozen backbone gives the same heatmaps at every iteration: they are computed once a checkpoint and split, kept in
the cache, and the nine weights train on them a hundred times faster than through the network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.dataset import CACHE, Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.data.human36m import Human36M
from epiutils.heatmaps import hrnet_targets
from epiutils.metrics import bootstrap, found, joint_mean
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.predict import predict
from epiutils.studies.fitting import PicturePairs

CHECKPOINTS = {
    point: Path(__file__).resolve().parents[2] / "data" / "checkpoints" / f"{point}.safetensors"
    for point in ("original", "best")
}


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
