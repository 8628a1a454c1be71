"""What the notebooks' experiments share: heatmaps computed once, and what becomes of them, fused and triangulated.

A frozen backbone gives the same heatmaps at every iteration: they are computed once a checkpoint and split, kept in
the cache, and the nine weights train on them a hundred times faster than through the network.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.cameras import Camera
from epiutils.data import people
from epiutils.data.bodies import guess_model
from epiutils.data.dataset import CACHE, Benchmark, MultiView
from epiutils.data.files import code, replacing
from epiutils.data.human36m import Human36M
from epiutils.data.views import JOINTS, Predicted
from epiutils.epipolar import fundamental_from_cameras
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import STRIDE, decode, found, hrnet_targets, probabilities
from epiutils.metrics import bootstrap, joint_mean
from epiutils.networks.hrnet import load_checkpoint, normalise
from epiutils.networks.loop import train
from epiutils.networks.predict import predict
from epiutils.redirect import Pencil
from epiutils.studies.fitting import FusedNetwork, ViewPairs, train_pairs
from epiutils.triangulate import project, triangulate, triangulate_robust

CHECKPOINTS = {
    point: Path(__file__).resolve().parents[2] / "data" / "checkpoints" / f"{point}.safetensors"
    for point in ("original", "best", "strong")
}


def _open_split(split: str, dataset: str = "") -> Sequence:
    """Subject 1 ("train") or 9 ("test"), as the original had them: of the benchmark, or of Human3.6M in that folder."""
    if not dataset:
        return Benchmark(split)
    return Human36M(dataset, split, subjects={"train": (1,), "test": (9,)}[split])


def training_pictures(scenes: int | slice = slice(None), dataset: str = "") -> ViewPairs:
    """Pairs of pictures of subject 1, of the benchmark or of Human3.6M in that folder, without augmentation."""
    data = _open_split("train", dataset)
    chosen = choose(data, scenes)
    if isinstance(data, Benchmark):
        data.prepare(progress=False, only=chosen)
    return ViewPairs(MultiView(torch.utils.data.Subset(data, chosen)))


def choose(scenes: Sequence, wanted: int | slice = slice(None)) -> range:
    """Indices of the wanted instants: a slice of them, or that many, evenly spread (all where there are fewer)."""
    if isinstance(wanted, slice):
        return range(len(scenes))[wanted]
    return range(0, len(scenes), max(1, len(scenes) // wanted))[:wanted]


def kept(name: str, depends: Sequence, make: Callable[[], dict]) -> dict:
    """What `make()` gives, a dict of tensors, numbers and texts, from the cache if the same was made before.

    depends: all that decides it.  A function or a class stands for the code of its module, a path for its file's bytes;
    tensors, arrays, dataclasses, sequences, mappings, texts and numbers for their values.  Raises TypeError for others.
    The file is <name>-<hash of depends>.pt in `data.dataset.CACHE`, or the folder that EPIUTILS_CACHE names; a checksum
    of its contents ends it, and where that does not fit, what it holds is made anew, and said.
    """
    key = _fingerprint([torch.__version__, *depends])
    path = Path(os.environ.get("EPIUTILS_CACHE", CACHE)) / f"{name}-{key.hex()[:12]}.pt"
    if path.is_file():
        contents = path.read_bytes()
        contents, checksum = memoryview(contents)[:-_SHA], contents[-_SHA:]
        if hashlib.sha256(key + hashlib.sha256(contents).digest()).digest() == checksum:
            return torch.load(io.BytesIO(contents), weights_only=True)
        print(f"{path.name} in the cache is damaged: it is made anew", file=sys.stderr)
    made = make()
    with replacing(path) as part:
        torch.save(made, part)
        with part.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").digest()
        with part.open("ab") as file:  # what follows a zip archive does not disturb its readers
            file.write(hashlib.sha256(key + contents).digest())
    return made


_SHA = hashlib.sha256().digest_size


def _fingerprint(value) -> bytes:
    """The SHA-256 of a value's kind and of what it holds, for `kept`; it stands for the value there."""
    kind, parts = type(value).__name__, []
    if isinstance(value, FunctionType | type):
        parts, kind = [code(sys.modules[value.__module__]).encode()], "code"
    elif isinstance(value, Path):
        with value.open("rb") as file:  # piece by piece: it may be a film
            parts, kind = [hashlib.file_digest(file, "sha256").digest()], "Path"
    elif isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.hasobject:
            raise TypeError(f"what a kept result depends on must be plain, got an array of objects {array.shape}")
        parts, kind = [repr(array.shape).encode(), array.dtype.str.encode(), array.data], "array"
    elif is_dataclass(value):
        parts = [_fingerprint([field.name, getattr(value, field.name)]) for field in fields(value)]
    elif isinstance(value, Mapping):
        parts, kind = [_fingerprint(pair) for pair in value.items()], "mapping"
    elif isinstance(value, list | tuple):
        parts, kind = [_fingerprint(each) for each in value], "sequence"
    elif isinstance(value, str | int | float | complex | bytes | range | slice | np.generic | None):
        parts = [repr(value).encode()]
    else:
        raise TypeError(f"what a kept result depends on must be plain, got a {type(value).__name__}: {value!r}")
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in [kind.encode(), *parts])).digest()


def heatmaps_once(
    point: str,
    split: str = "test",
    scenes: int | slice = slice(None),
    progress: bool = True,
    dataset: str = "",
    rig: Sequence[Camera] | None = None,
    flip: bool = False,
) -> Predicted:
    """What the backbone of an operating point sees in a split: `networks.predict`, `kept` in the cache.

    point: "original" (about 46 %) or "best", or the path of a checkpoint.  split: of the benchmark; of Human3.6M in the
    folder `dataset`, subject 1 ("train") or 9 ("test"), as the original had them.  scenes: see `choose`.  rig: other cameras than the benchmark's, before which its instants are rendered.  flip: by
    HRNet's flip test.
    The maps are kept in half precision and given in single.  Raises ValueError for a rig and a dataset, and, before the
    work, for a checkpoint of other joints than Human3.6M's.
    """
    if dataset and rig:
        raise ValueError(f"a rig renders the embedded people anew; those of the dataset {dataset} have their cameras")
    checkpoint, data = Path(CHECKPOINTS.get(point, point)), _open_split(split, dataset)
    chosen = choose(data, scenes)

    def make() -> dict:
        network, instants = _backbone(checkpoint, data, chosen[0]), torch.utils.data.Subset(data, chosen)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        if rig:
            instants = [people.scene(**vars(data.instants[i]), rig=rig) for i in chosen]
        elif not dataset:
            data.prepare(progress=progress, only=chosen)
        return _halved(predict(network, MultiView(instants), progress=progress, flip=flip))

    depends = [checkpoint, split, *_instants(data, chosen, rig), *(["flip"] if flip else [])]
    return _whole(kept(f"heatmaps-{checkpoint.stem}-{split}", depends, make))


def _backbone(checkpoint: Path, data: Sequence, first: int) -> nn.Module:
    """The network of a checkpoint, if its joints are Human3.6M's: as many, and, as far as one instant tells, in its order."""
    network = load_checkpoint(checkpoint)
    count, found = network.final_layer.out_channels, ""
    if count == len(JOINTS) and checkpoint not in CHECKPOINTS.values():
        images = np.stack([view.image for view in data[first]])
        with torch.no_grad():
            points, heights = decode(network(normalise(images)))
        points[heights < 0.1] = torch.nan  # nothing found
        with suppress(ValueError):  # it cannot be told
            found = guess_model(points.numpy())
    if count != len(JOINTS) or found == "COCO_17":
        what = {
            16: "16 joints, as MPII has",
            17: "COCO's 17 joints (the first five lie together, as nose, eyes and ears)",
        }
        raise ValueError(
            f"{checkpoint}: gives {what.get(count, f'{count} joints')}; expected are Human3.6M's 17, as the truth has "
            f"them: {', '.join(JOINTS)}. Train it to these by python -m epiutils.networks.training --init"
            + (", or see it on a recording by make report RECORDING=… NETWORK=…" if found else "")
        )
    return network


def _instants(data: Sequence, chosen: range, rig: Sequence[Camera] | None = None) -> list:
    """All that decides what a network sees in these instants, but the network, for `kept`."""
    depends = [[data.instants[i] for i in chosen], rig]
    depends += [predict, load_checkpoint, MultiView, Predicted, Camera, fundamental_from_cameras, hrnet_targets]
    if isinstance(data, Benchmark):
        return [*depends, data.folder.name]  # the renderer's version
    return [*depends, Human36M, data.file.name, data.file.stat().st_mtime_ns]


def _halved(predicted: Predicted) -> dict[str, Tensor]:
    values = vars(predicted) | {"output": predicted.output.half()}
    del values["target"]  # soon made of the joints
    return values


def _whole(values: dict[str, Tensor]) -> Predicted:
    target, _ = hrnet_targets(values["joints"], values["output"].shape[-2:])
    return Predicted(**values | {"output": values["output"].float(), "target": target})


def freed(
    point: str,
    scenes: int | slice = slice(None),
    steps: int = 60,
    lr: float = 1e-3,
    threshold: float = 1.0,
    batch: int = 8,
    train_scenes: int | slice = slice(0, 840, 8),
    dataset: str = "",
) -> tuple[Predicted, dict[str, np.ndarray]]:
    """What the backbone of a point sees in the test split once it was set free, `kept` in the cache.

    Behind it stand the nine weights of `OriginalFusion`, new, of seed 0; they train together on pairs of pictures of
    subject 1, as the original did.  With lr = 0 nothing moves but the statistics of the batch normalisation.
    point, scenes, dataset: see `heatmaps_once`.  Returns what it sees, and the `weights` (3, 3) in the end beside the
    `losses` and the `path` of `train_pairs`.
    """
    checkpoint, (data, lessons) = CHECKPOINTS.get(point, point), (_open_split(s, dataset) for s in ("test", "train"))
    checkpoint, chosen = Path(checkpoint), choose(data, scenes)

    def make() -> dict:
        torch.manual_seed(0)
        model = FusedNetwork(_backbone(checkpoint, data, chosen[0]), OriginalFusion(threshold)).train()
        followed = train_pairs(model, training_pictures(train_scenes, dataset), steps, batch, lr)
        if not dataset:
            data.prepare(progress=False, only=chosen)
        seen = predict(model.network, MultiView(torch.utils.data.Subset(data, chosen)))
        training = {name: torch.from_numpy(values) for name, values in followed.items()}
        return _halved(seen) | training | {"weights": model.fusion.weight.detach()}

    depends = [checkpoint, *_instants(data, chosen), *_instants(lessons, choose(lessons, train_scenes))]
    depends += [train_pairs, train, OriginalFusion, Pencil, steps, lr, threshold, batch]
    values = kept(f"freed-{checkpoint.stem}", depends, make)
    training = {name: values.pop(name).numpy() for name in ("weights", "losses", "path")}
    return _whole(values), training


@torch.no_grad()
def _fuse_views(module: nn.Module | None, predicted: Predicted) -> Iterator[Tensor]:
    """Every instant's heatmaps (V, J, H, W) in order, all views fused with each other by `module.all_views`.

    module: None for the heatmaps alone.
    """
    for output, F in zip(predicted.output, predicted.F, strict=True):
        yield output if module is None else module.all_views(output[None], F[None])[0]


def found_by(module: nn.Module | None, predicted: Predicted) -> np.ndarray:
    """Which joints are found where a module fuses all views with each other, see `heatmaps.found`: (N, V, J)."""
    return np.stack([found(m, t) for m, t in zip(_fuse_views(module, predicted), predicted.target, strict=True)])


def peaks(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the views of one instant believe of each joint, from heatmaps (V, J, H, W), refined by DARK.

    Returns where, (J, V, 2) px of the network's input, and how high the peaks are, (J, V).
    """
    points, heights = decode(maps, "dark")
    return STRIDE * points.double().transpose(0, 1).numpy(), heights.double().T.numpy()


def found_back(X: np.ndarray, predicted: Predicted) -> np.ndarray:
    """Which joints are found by points in space, projected back into every view: (N, V, J), see `heatmaps.found`.

    X: (N, J, 3) metres, nan for a joint that is not found.  A point's heatmap is the one pixel nearest to it.
    """
    height, width = predicted.output.shape[-2:]
    x = project(np.asarray(X)[:, None, :, :], predicted.P.double().numpy()[:, :, None, None])[..., 0, :] / STRIDE
    at = np.rint(np.nan_to_num(x.clip(0, [width - 1, height - 1]))).astype(int)  # (N, V, J, 2)
    right = []
    for n, target in enumerate(predicted.target.numpy()):
        maps = np.zeros(target.shape, bool)
        v, j = np.indices(maps.shape[:2])
        maps[v, j, at[n, ..., 1], at[n, ..., 0]] = np.isfinite(x[n]).all(-1)
        right.append(found(maps, target))
    return np.stack(right)


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
    for maps in _fuse_views(module, predicted):
        sharpness = getattr(module, "sharpness", None)
        each.append(peaks(maps if sharpness is None else probabilities(maps, sharpness.detach())))
    x, heights = (np.stack(parts) for parts in zip(*each, strict=True))
    P = predicted.P.double().numpy()[:, None]  # (N, 1, V, 3, 4)
    seen = (heights > 0).astype(float)  # a detection that is missing has an empty map
    points = {"DLT": triangulate(x, P, seen), "weighted": triangulate(x, P, heights)}
    return x, points | {"robust": triangulate_robust(x, P, heights, threshold)[0]}


def summary(right: np.ndarray, visible: np.ndarray | Tensor) -> dict[str, float | list[float] | tuple[float, float]]:
    """HRNet's accuracy of n joints, its 95 % interval over performances and seeds, and that of visible and hidden ones.

    right: (N, V, J) as `found_by` gives it, or (S, N, V, J) of S seeds, then their mean, and where S > 1 also
    `accuracy_by_seed`.  visible: (N, V, J).
    """
    seeds = [joint_mean(one) for one in right] if np.ndim(right) == 4 else []
    interval = bootstrap(_performances(right))
    right, visible = _over_seeds(right), np.asarray(visible)
    by_seed = {"accuracy_by_seed": seeds} if len(seeds) > 1 else {}
    return {
        "accuracy": joint_mean(right),
        "accuracy_ci": interval,
        "accuracy_visible": joint_mean(np.where(visible, right, np.nan)),
        "accuracy_occluded": joint_mean(np.where(visible, np.nan, right)),
        "n": int(np.isfinite(right).sum()),
    } | by_seed


def effect(values: np.ndarray, against: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The difference of two methods' means, and its paired 95 % interval over performances and seeds.

    values, against: on the same instants, (N, …, J), or (S, N, V, J) of S seeds; as many seeds are the same seeds.
    """
    interval = bootstrap(_performances(values), _performances(against))
    return joint_mean(_over_seeds(values)) - joint_mean(_over_seeds(against)), interval


def _performances(values: np.ndarray, instants: int = 3) -> np.ndarray | list[np.ndarray]:
    """What is drawn together: the three instants of a performance are no three tests.  (N, …, J) → (N / 3, …, J).

    What is missing to the last three is nan.  Fewer instants than four stand for themselves.  Of (S, N, V, J) a list.
    """
    if values.ndim == 4:
        return [_performances(one) for one in values]
    if len(values) < instants + 1:
        return values
    filled = np.full((-len(values) % instants, *values.shape[1:]), np.nan)
    whole = np.concatenate([values, filled])
    return whole.reshape(-1, instants * int(np.prod(values.shape[1:-1])), values.shape[-1])


def _over_seeds(values: np.ndarray) -> np.ndarray:
    """(S, N, V, J) → (N, V, J)."""
    return values.mean(0) if values.ndim == 4 else values
