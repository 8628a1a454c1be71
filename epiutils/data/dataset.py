"""What notebooks look at and what networks learn from: embedded people, recordings, and samples of several views.

What is filmed, an embedded performance, a `Recording` or a subject's part of `Human36M`, has V `cameras`, of the uncropped
pictures; J names of `joints` and pairs of their numbers, `bones`; the numbers (T,) of its `frames`; `views(frame)`, the
Views of one instant, cropped; and `detections` (V, T, J, 3), x and y in px of the uncropped pictures and a confidence
from 0 to 1, exact projections where the joints are known.

A `Benchmark` is a sequence of instants, each a list of Views, as Human3.6M's reader is; `MultiView`
turns such a sequence into training samples.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import tomllib
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from epiutils.cameras import Camera, crop_affine
from epiutils.data import human36m, people, raycast
from epiutils.data.bodies import Names
from epiutils.data.files import code, reading, replacing
from epiutils.data.human36m import Human36M
from epiutils.data.recordings import Recording, read_recording
from epiutils.data.views import BONES, JOINTS, View, exact_detections, heatmap_fundamentals
from epiutils.heatmaps import STRIDE, hrnet_targets

CACHE = Path(__file__).resolve().parents[2] / "data" / "cache"  # or the folder that EPIUTILS_CACHE names
# Subjects, performances of each action, instants of each performance, first seed.  A performance has a seed of its
# own, so room, light, furniture and clothes never repeat between performances, nor between training and test.
SPLITS = {
    "train": ((1,), 15, 4, 10_000),
    "train-large": ((1, 5, 6, 7, 8), 30, 3, 20_000),
    "train-strong": ((1, 5, 6, 7), 60, 3, 40_000),
    "validation": ((8,), 10, 3, 60_000),
    "test": ((9,), 10, 3, 30_000),
    "test-large": ((9, 11), 10, 3, 30_000),
}


@dataclass(frozen=True)
class _Performance:
    """An embedded person who performs one action before four cameras."""

    subject: int = 9
    action: str = "walk"
    seed: int = 0
    length: int = 100

    joints, bones = Names(JOINTS), BONES

    @property
    def cameras(self) -> list[Camera]:
        return people.rig()

    @property
    def frames(self) -> np.ndarray:
        return np.arange(self.length)

    @property
    def detections(self) -> np.ndarray:
        return exact_detections(
            self.cameras, [people.pose(self.subject, self.action, int(f), self.seed) for f in self.frames]
        )

    def views(self, frame: int) -> list[View]:
        """The cropped pictures of one instant, 256×256."""
        return people.scene(self.subject, self.action, frame, self.seed)


def open_dataset(
    recording: str = "", subject: int = 9, action: str = "walk", seed: int = 0, **options
) -> _Performance | Recording | Human36M:
    """The recording, or the subject's part of Human3.6M, in that folder; an embedded person where the name is empty.

    options: for `read_recording`, such as cameras="cam01,cam02" or person=1.
    """
    if not recording:
        return _Performance(subject, action, seed)
    if not human36m.is_there(recording):
        return read_recording(recording, **options)
    split = "test" if subject in human36m.SPLITS["test"][0] else "train"
    return Human36M(recording, split, subjects=(subject,))


def _best_instant(
    data: _Performance | Recording | Human36M, near: int
) -> tuple[_Performance | Recording | Human36M, int]:
    """Of the frames in which most cameras see the person, the one nearest to a number; and the data of these cameras."""
    seen = np.isfinite(data.detections[..., 0]).sum(-1) > 1  # (V, T): enough to place a crop
    best = np.flatnonzero(seen.sum(0) == seen.sum(0).max())
    t = best[np.abs(np.asarray(data.frames)[best] - near).argmin()]
    if isinstance(data, Recording) and not seen[:, t].all():
        data = data.of_cameras([camera.name for camera, sees in zip(data.cameras, seen[:, t], strict=True) if sees])
    return data, int(data.frames[t])


def open_instant(
    frame: int, recording: str | Recording = "", subject: int = 9, action: str = "walk", **options
) -> tuple[_Performance | Recording | Human36M, int]:
    """`open_dataset`, or a recording that was read already, and its `_best_instant` near a frame."""
    read = isinstance(recording, Recording)
    return _best_instant(recording if read else open_dataset(recording, subject, action, **options), frame)


@dataclass(frozen=True)
class _Instant:
    """One instant of the embedded benchmark: the arguments of `people.scene`."""

    subject: int
    action: str
    frame: int
    seed: int


def _instants(split: str) -> list[_Instant]:
    """The instants of a split, in order; "test" is the beginning of "test-large"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
    subjects, performances, frames, first = SPLITS[split]
    seeds = itertools.count(first)
    return [
        _Instant(subject, action, 7 + 59 * k, seed)
        for subject in subjects
        for _ in range(performances)
        for action, seed in zip(people.ACTIONS, seeds, strict=False)
        for k in range(frames)
    ]


class Benchmark(Sequence):
    """The embedded benchmark: a sequence of instants, each a list of four 256×256 Views, kept once rendered.

    split: "train" (subject 1) and "test" (subject 9) as the original had them, 840 and 420 instants;
    "train-large" (1, 5, 6, 7, 8) and "test-large" (9, 11), 6,300 and 840; "train-strong" (1, 5, 6, 7), 10,080, which
    leaves subject 8 to choose on, "validation", 420.  Pictures of training splits are kept as
    JPEG of quality 95, those of test splits without loss.  What is missing is rendered when asked for; `prepare`
    renders all of it at once.  cache: the folder; those of other versions of the renderer are not used.
    """

    def __init__(self, split: str = "test", cache: str | os.PathLike | None = None):
        self.split, self.instants = split, _instants(split)
        self.folder = Path(cache or os.environ.get("EPIUTILS_CACHE", CACHE)) / f"people-{_version()}"
        self.lossless = split.startswith("test")

    def __len__(self) -> int:
        return len(self.instants)

    def __getitem__(self, index: int) -> list[View]:
        path = self._path(self.instants[index])
        try:
            with reading(path, "a whole scene"):
                return _read_views(path)
        except FileNotFoundError:
            pass
        except ValueError as error:
            warnings.warn(f"{error}; it is rendered anew", stacklevel=2)
        views = people.scene(**vars(self.instants[index]))
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **_arrays(views, self.lossless))
        return views if self.lossless else _read_views(path)

    def prepare(
        self, workers: int | None = None, progress: bool = True, only: Sequence[int] | None = None
    ) -> Benchmark:
        """Render all that is missing (of the instants `only`), in parallel; can be stopped and taken up again.

        Workers start by reading the script that started them: one without `if __name__ == "__main__":` would start
        again in each.  Such a script gets its pictures from one process, and a warning.
        """
        wanted = range(len(self)) if only is None else only
        missing = [i for i in wanted if not self._path(self.instants[i]).exists()]
        workers = min(workers or os.cpu_count() or 1, max(1, len(missing) // 10))
        if workers > 1 and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit  # a worker that runs its parent's script again: the parent goes on alone
        bar = tqdm(total=len(missing), desc=f"rendering {self.split}", unit="scene", disable=not (progress and missing))
        with bar:
            if workers > 1:
                context = multiprocessing.get_context("spawn")
                try:
                    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
                        for _ in pool.map(self._render, missing, chunksize=6):
                            bar.update()
                    return self
                except BrokenProcessPool:
                    reason = 'a script that wants several has all it does under `if __name__ == "__main__":`'
                    warnings.warn(f"no workers: rendering in one process; {reason}", stacklevel=2)
                    bar.reset()
            for i in missing:
                self[i]
                bar.update()
        return self

    def _render(self, index: int) -> None:
        self[index]

    def _path(self, instant: _Instant) -> Path:
        kind = "png" if self.lossless else "jpg"
        return self.folder / f"s{instant.subject:02d}_{instant.action}_{instant.seed}_{instant.frame:03d}_{kind}.npz"


@lru_cache(maxsize=1)
def _version() -> str:
    """The renderer's version: its code and its tables, and one small scene as it is kept.

    The code is read without comments and docstrings.  The scene stands for what cameras, joints, OpenCV, numpy and the
    files' format do to all scenes.
    """
    sha = hashlib.sha256(repr(tomllib.loads(Path(people.__file__).with_suffix(".toml").read_text("utf-8"))).encode())
    for module in (people, raycast):
        sha.update(code(module).encode())
    views = people.scene(9, "carry", 40, size=64)
    for lossless in (True, False):
        for name, array in _arrays(views, lossless).items():
            array = array.round(6) + 0.0 if array.dtype.kind == "f" else array  # not the last digits, nor −0
            sha.update(name.encode() + array.tobytes())
    return sha.hexdigest()[:12]


def _arrays(views: list[View], lossless: bool) -> dict[str, np.ndarray]:
    """A scene as it is kept."""
    kind, options = (".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]) if lossless else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95])
    pictures = [cv2.imencode(kind, view.image[..., ::-1], options)[1] for view in views]
    return {
        "pictures": np.concatenate(pictures),
        "ends": np.cumsum([len(p) for p in pictures]),
        "names": np.array([view.camera.name for view in views]),
        "joints": np.stack([view.joints for view in views]),
        "joints_3d": views[0].joints_3d,
        "visible": np.stack([view.visible for view in views]),
        **{field: np.stack([getattr(view.camera, field) for view in views]) for field in ("K", "R", "t")},
    }


def _read_views(path: Path) -> list[View]:
    with path.open("rb") as file, np.load(file) as data:
        data = dict(data)
    views = []
    for v, picture in enumerate(np.split(data["pictures"], data["ends"][:-1])):
        image = cv2.imdecode(picture, cv2.IMREAD_COLOR_RGB)
        K, R, t = (data[field][v] for field in ("K", "R", "t"))
        camera = Camera(K=K, R=R, t=t, size=image.shape[1::-1], name=str(data["names"][v]))
        joints = data["joints"][v]
        views.append(View(image, camera, joints, np.ones(len(joints)), data["joints_3d"], data["visible"][v]))
    return views


@dataclass(frozen=True)
class Augmentation:
    """Random crops and colours; the crop goes into the camera, so that epipolar geometry stays exact.

    scale: the crop's side changes by a factor of up to 1 ± scale.  rotation: about the view axis, up to ± degrees.
    shift: of the centre, up to ± this part of the side.  colour: 0 to 1, how far channels are mixed and exposure,
    contrast and gamma move.  hiding: patches a view has painted over it on average, as things that stand before the
    person would; each has its centre near a joint, and joints under it are not visible.
    """

    scale: float = 0.2
    rotation: float = 25.0
    shift: float = 0.06
    colour: float = 0.7
    hiding: float = 0.0

    def __call__(self, view: View, rng: np.random.Generator, size: int = 256) -> View:
        """The view cut anew to size × size px and recoloured."""
        width, height = view.camera.size
        side = max(width, height) * (1 + rng.uniform(-self.scale, self.scale))
        centre = np.array((width, height)) / 2 + rng.uniform(-self.shift, self.shift, 2) * side
        angle = np.radians(rng.uniform(-self.rotation, self.rotation))
        view = view.crop(crop_affine(centre, side, (size, size), angle), (size, size))
        view = replace(view, image=self._recolour(view.image, rng))
        return self._hide(view, rng) if self.hiding else view

    def _recolour(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mix = rng.dirichlet((0.6, 0.6, 0.6), 3)  # each new channel is a mean of the old ones
        mix = (1 - self.colour) * np.eye(3) + self.colour * mix[:, rng.permutation(3)]
        gain = np.exp(rng.uniform(-0.35, 0.35) + rng.uniform(-0.2, 0.2, 3)) ** self.colour
        offset, gamma = self.colour * rng.uniform(-25, 25), np.exp(self.colour * rng.uniform(-0.35, 0.35))
        table = 255 * np.linspace(0, 1, 256) ** gamma
        return cv2.LUT(cv2.transform(image, np.column_stack([gain[:, None] * mix, [offset] * 3])), np.uint8(table))

    def _hide(self, view: View, rng: np.random.Generator) -> View:
        """Patches over the view: boxes and ellipses, of one colour or cut out of another place of the picture."""
        image, size = view.image.copy(), view.camera.size[0]
        visible = np.ones(len(view.joints), bool) if view.visible is None else view.visible.copy()
        known = view.joints[np.isfinite(view.joints).all(-1)]
        for _ in range(rng.poisson(self.hiding) if len(known) else 0):
            half = rng.uniform(0.04, 0.17, 2) * size
            centre = known[rng.integers(len(known))] + rng.uniform(-0.6, 0.6, 2) * half
            mask = np.zeros(image.shape[:2], np.uint8)
            if rng.random() < 0.5:
                box = (centre.tolist(), (2 * half).tolist(), float(rng.uniform(0, 180)))
                cv2.fillPoly(mask, [np.round(cv2.boxPoints(box)).astype(np.int32)], 1)
            else:
                cv2.ellipse(mask, (centre.tolist(), (2 * half).tolist(), float(rng.uniform(0, 180))), 1, -1)
            if rng.random() < 0.5:
                patch = np.broadcast_to(rng.integers(20, 236, 3).astype(np.uint8), image.shape)
            else:
                patch = np.roll(view.image, rng.integers(0, size, 2), (0, 1))
            np.copyto(image, patch, where=mask[..., None] > 0)
            at = np.nan_to_num(np.round(view.joints), nan=-1).astype(int)
            inside = ((at >= 0) & (at < mask.shape[::-1])).all(-1)
            under = np.zeros(len(visible), bool)
            under[inside] = mask[at[inside, 1], at[inside, 0]] > 0
            visible &= ~under
        return replace(view, image=image, visible=visible)


class MultiView(torch.utils.data.Dataset):
    """Samples for training: the views of one instant together.

    scenes: a sequence of lists of Views, their pictures cut around the person: a `Benchmark`, `Human36M`, or a list.
    augmentation: none by default.  size: side of the network's input in px.  seed: a sample's random
    numbers come from (seed, epoch, index) alone, whichever process asks for it; `data[index]` is of epoch 0.

    A sample is a dict of tensors: image (V, size, size, 3) uint8, see `hrnet.normalise`; target (V, J, h, w) and
    weight (V, J), see `hrnet_targets`; joints (V, J, 2) px of the input; visible (V, J) bool, in the picture and
    not hidden; joints_3d (J, 3) metres; K, R (V, 3, 3) and t (V, 3) of the cameras after crop and augmentation;
    F (V, V, 3, 3), F[s, r] from heatmap pixels of view s to those of view r, float64, zeros where s = r.
    """

    def __init__(self, scenes: Sequence[list[View]], augmentation: Augmentation | None = None, size=256, seed: int = 0):
        self.scenes, self.augmentation, self.size, self.seed = scenes, augmentation, size, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        """The sample as it is augmented in that epoch."""
        views = self.scenes[index]
        if self.augmentation:
            rng = np.random.default_rng((self.seed, epoch, index))
            views = [self.augmentation(view, rng, self.size) for view in views]
        elif views[0].camera.size != (self.size, self.size):
            views = [view.crop(_scaling(view, self.size), (self.size, self.size)) for view in views]
        joints = np.stack([view.joints for view in views])
        inside = ((joints > -0.5) & (joints < self.size - 0.5)).all(-1)
        visible = np.stack([np.ones(len(v.joints), bool) if v.visible is None else v.visible for v in views])
        target, weight = hrnet_targets(torch.from_numpy(joints), (self.size // STRIDE,) * 2)
        return {
            "image": torch.from_numpy(np.stack([view.image for view in views])),
            "target": target,
            "weight": weight,
            "joints": torch.from_numpy(joints),
            "visible": torch.from_numpy(visible & inside),
            "joints_3d": torch.from_numpy(np.array(views[0].joints_3d)),
            **{k: torch.from_numpy(np.stack([getattr(view.camera, k) for view in views])) for k in ("K", "R", "t")},
            "F": torch.from_numpy(heatmap_fundamentals([view.camera for view in views])),
        }


def _scaling(view: View, size: int) -> np.ndarray:
    """The whole picture, its longer side made `size`, as HRNet's crop places it."""
    width, height = view.camera.size
    return crop_affine((width / 2, height / 2), max(width, height), (size, size))
