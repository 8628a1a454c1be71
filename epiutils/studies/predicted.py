"""What the notebooks' experiments share: heatmaps computed once, and what becomes of them, fused and triangulated.

A frozen backbone gives the same heatmaps at every iteration: they are computed once a checkpoint and split, kept in
the cache, and the nine weights train on them a hundred times faster than through the network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.dataset import CACHE, Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.data.human36m import Human36M
from epiutils.data.views import Predicted
from epiutils.heatmaps import STRIDE, decode, hrnet_targets, probabilities
from epiutils.metrics import bootstrap, found, joint_mean
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.predict import predict
from epiutils.studies.fitting import PicturePairs
from epiutils.triangulate import triangulate, triangulate_robust

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
) -> Predicted:
    """What the backbone of an operating point sees in a split: `networks.predict`, kept in the cache.

    point: "original" (about 46 %) or "best", or the path of a checkpoint.  split, dataset: see `open_split`.
    scenes: see `choose`.  The maps are kept in half precision and given in single.
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
        kept = vars(predicted) | {"output": predicted.output.half()}
        del kept["target"]  # soon made of the joints
        with replacing(path) as part:
            torch.save(kept, part)
    kept = torch.load(path, weights_only=True)
    target, _ = hrnet_targets(kept["joints"], kept["output"].shape[-2:])
    return Predicted(**kept | {"output": kept["output"].float(), "target": target})


@torch.no_grad()
def fuse_views(module: nn.Module | None, predicted: Predicted) -> Iterator[Tensor]:
    """Every instant's heatmaps (V, J, H, W) in order, all views fused with each other by `module.all_views`.

    module: None for the heatmaps alone.
    """
    for output, F in zip(predicted.output, predicted.F, strict=True):
        yield output if module is None else module.all_views(output[None], F[None])[0]


def found_by(module: nn.Module | None, predicted: Predicted) -> np.ndarray:
    """Which joints are found where a module fuses all views with each other, see `metrics.found`: (N, V, J)."""
    return np.stack([found(m, t) for m, t in zip(fuse_views(module, predicted), predicted.target, strict=True)])


def peaks(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the views of one instant believe of each joint, from heatmaps (V, J, H, W), refined by DARK.

    Returns where, (J, V, 2) px of the network's input, and how high the peaks are, (J, V).
    """
    points, heights = decode(maps, "dark")
    return STRIDE * points.double().transpose(0, 1).numpy(), heights.double().T.numpy()


def triangulated(
    module: nn.Module | None, predicted: Predicted, threshold: float = 12.8
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Where the views, fused by a module, see the joints, and where these are in space by each way to triangulate.

    Maps of a module with a `sharpness` are logarithms of probabilities: softmax(β maps) is decoded.
    threshold: of `triangulate_robust`, px of the network's input.
    Returns pixels (N, J, V, 2) of the network's input, and points (N, J, 3) in metres: "DLT", views alike;
    "weighted" and "robust", by the heights of their peaks.
    """
    each = []
    for maps in fuse_views(module, predicted):
        sharpness = getattr(module, "sharpness", None)
        each.append(peaks(maps if sharpness is None else probabilities(maps, sharpness.detach())))
    x, heights = (np.stack(parts) for parts in zip(*each, strict=True))
    P = predicted.P.double().numpy()[:, None]  # (N, 1, V, 3, 4)
    seen = (heights > 0).astype(float)  # a detection that is missing has an empty map
    points = {"DLT": triangulate(x, P, seen), "weighted": triangulate(x, P, heights)}
    return x, points | {"robust": triangulate_robust(x, P, heights, threshold)[0]}


def summary(right: np.ndarray, visible: np.ndarray | Tensor) -> dict[str, float | tuple[float, float]]:
    """HRNet's accuracy, its 95 % interval over instants, and that of visible and of hidden joints.

    right: (N, V, J) as `found_by` gives it, or (S, N, V, J) of S seeds, then their mean.  visible: (N, V, J).
    """
    right, visible = _over_seeds(right), np.asarray(visible)
    return {
        "accuracy": joint_mean(right),
        "accuracy_ci": bootstrap(right),
        "accuracy_visible": joint_mean(np.where(visible, right, np.nan)),
        "accuracy_occluded": joint_mean(np.where(visible, np.nan, right)),
    }


def effect(values: np.ndarray, against: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The difference of two methods' means on the same instants, and its paired 95 % interval.

    values, against: (N, …, J), or (S, N, V, J) of S seeds: then their mean.
    """
    values, against = _over_seeds(values), _over_seeds(against)
    return joint_mean(values) - joint_mean(against), bootstrap(values, against)


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """(S, N, V, J) → (N, V, J)."""
    return values.mean(0) if values.ndim == 4 else values


def training_pictures(split: str = "train", scenes: int | slice = slice(None), dataset: str = "") -> PicturePairs:
    """Pairs of pictures of a split, without augmentation as in the original."""
    data = open_split(split, dataset)
    chosen = choose(data, scenes)
    if isinstance(data, Benchmark):
        data.prepare(only=chosen)
    return PicturePairs(MultiView(torch.utils.data.Subset(data, chosen)))
