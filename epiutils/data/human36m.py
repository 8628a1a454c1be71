"""Human3.6M in the two layouts that multi-view code keeps it in, read as a sequence of instants, each a list of Views.

The H36M-Toolbox's: `annot/h36m_train.pkl` and `annot/h36m_validation.pkl`, their pictures in `images/` or `images.zip`.
Learnable Triangulation's, by karfly: `extra/human36m-multiview-labels-GTbboxes.npy`, and pictures as
`processed/S9/Directions-1/imageSequence/54138969/img_000001.jpg`.  Both store millimetres, and the toolbox the
camera's centre: metres and translations are made of them here, at the door.  Nobody may redistribute Human3.6M.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from epiutils.cameras import Camera, crop_affine
from epiutils.data.files import check_file, read_bytes, reading
from epiutils.data.pickles import unpickle
from epiutils.data.views import BONES, JOINTS, MIRRORED, View, exact_detections

_CAMERAS = ("54138969", "55011271", "58860488", "60457274")
_ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Posing", "Purchases", "Sitting",
            "SittingDown", "Smoking", "TakingPhoto", "Waiting", "Walking", "WalkingDog", "WalkingTogether")  # fmt: skip
SPLITS = {"train": ((1, 5, 6, 7, 8), 5), "test": ((9, 11), 64)}  # subjects; every n-th instant is taken
_DAMAGED = ((9, "Greeting", 2), (9, "SittingDown", 2), (9, "Waiting", 1))  # their 3D joints do not fit the pictures
# karfly's joint j is the toolbox's _FROM_TOOLBOX[j], and the toolbox's joint j is karfly's _FROM_KARFLY[j]
_FROM_TOOLBOX = np.array([3, 2, 1, 4, 5, 6, 0, 7, 8, 10, 16, 15, 14, 11, 12, 13, 9])
_FROM_KARFLY = np.argsort(_FROM_TOOLBOX)


class _Instant(NamedTuple):
    """One instant of Human3.6M; subaction is 1 or 2, and images are counted from 1."""

    subject: int
    action: str
    subaction: int
    image: int

    def __str__(self) -> str:
        return f"S{self.subject} {self.action}-{self.subaction} image {self.image}"


class _Shot(NamedTuple):
    """A picture, named as below the folder or in the zip, its camera, and the square that the annotated box makes."""

    picture: str
    camera: Camera
    centre: np.ndarray
    side: float


class Human36M(Sequence):
    """Human3.6M as a sequence of instants, each a list of four size × size Views, their pictures read when asked for.

    path: the folder; what lies in it tells the layout.  split: "train" (subjects 1 5 6 7 8, every 5th instant) or
    "test" (9 11, every 64th).  subjects: some of the split's; the original experiment trained on (1,) and tested on
    (9,).  every: another step; it counts what is not left out, in order of subject, action, subaction and image.
    undistort: pictures and cameras without lens distortion, else as recorded.  damaged: keep the three sequences of
    S9 whose joints do not fit the pictures.  margin: the crop's side as a multiple of the annotated box's.

    instants: what is in it.  joints_3d: (T, 17, 3) metres.  left_out: the instants left out for each reason, as
    "no camera 54138969", "empty box in 54138969" (karfly's sign of a missing picture) or "damaged sequence".
    Raises FileNotFoundError where annotations or pictures are missing; ValueError, naming the file and what in it, for
    pickles of more than arrays and plain containers, fields that are not the format's, 3D joints that differ by more
    than 10 mm between views or are not where the toolbox's 2D joints are, bones that another known joint order makes
    shorter, and where nothing is left.
    """

    def __init__(
        self, path: str | os.PathLike, split: str = "test", subjects: Sequence[int] | None = None,
        every: int | None = None, undistort: bool = True, damaged: bool = False, size: int = 256, margin: float = 1.0,
    ):  # fmt: skip
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
        known, usual = SPLITS[split]
        wanted = known if subjects is None else tuple(subjects)
        if not wanted or set(wanted) - set(known):
            raise ValueError(f"the subjects of {split!r} are {known}, got {subjects!r}")
        every = usual if every is None else every
        for name, value in (("every", every), ("size", size)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.path, self.split, self.undistort, self.size, self.margin = Path(path), split, undistort, size, margin
        self.file, read, self.root = _find(self.path, split)
        groups: dict[_Instant, list[dict | None]] = {}
        for instant, v, record in read(self.file):
            if instant.subject not in wanted:
                continue
            group = groups.setdefault(instant, [None] * len(_CAMERAS))
            if group[v] is not None:
                raise ValueError(f"{self.file}: {instant}, camera {_CAMERAS[v]}: there are two")
            group[v] = record
        if missing := set(subjects or ()) - {instant.subject for instant in groups}:
            raise ValueError(f"{self.file}: nothing of subjects {sorted(missing)}")

        self.left_out: dict[str, list[_Instant]] = {}
        kept = []
        for instant in sorted(groups):  # alphabetic order is the actions' order
            harmed = instant[:3] in _DAMAGED and not damaged
            fault = "damaged sequence" if harmed else _gap(f"{self.file}: {instant}", groups[instant])
            (self.left_out.setdefault(fault, []) if fault else kept).append(instant)
        if not kept:
            why = {reason: len(instants) for reason, instants in self.left_out.items()}
            raise ValueError(f"{self.file}: nothing left of subjects {wanted}; left out: {why}")
        self.instants, cameras = kept[::every], {}
        everything = [_shots(f"{self.file}: {i}", groups[i], cameras) for i in self.instants]
        self.shots = [shots for shots, _ in everything]
        self.joints_3d = np.stack([X for _, X in everything])
        _check_bones(self.file, self.joints_3d)

    def __len__(self) -> int:
        return len(self.instants)

    def __getitem__(self, index: int) -> list[View]:
        X, views, square = self.joints_3d[index], [], (self.size, self.size)
        for shot in self.shots[index]:
            image, joints = _read_picture(self.root, shot.picture), shot.camera.project(X)
            view = View(image, shot.camera, joints, np.ones(len(X)), X.copy())
            view = view.undistorted() if self.undistort else view
            view = view.crop(crop_affine(shot.centre, self.margin * shot.side, square), square)
            views.append(replace(view, joints=view.camera.project(X)))
        return views

    # What `epiutils.data.dataset` asks of all that is filmed
    joints, bones = JOINTS, BONES

    @property
    def cameras(self) -> list[Camera]:
        """The cameras of the pictures as recorded: those of one subject, as each has its own."""
        rigs = {b"".join(c.P.tobytes() + c.distortion.tobytes() for _, c, *_ in shots): shots for shots in self.shots}
        if len(rigs) > 1:
            raise ValueError(f"{self.file}: {len(rigs)} sets of cameras: choose a subject with subjects=")
        return [shot.camera for shot in self.shots[0]]

    @property
    def frames(self) -> np.ndarray:
        return np.arange(len(self))

    @property
    def detections(self) -> np.ndarray:
        return exact_detections(self.cameras, self.joints_3d)

    def views(self, frame: int) -> list[View]:
        return self[frame]


def is_there(path: str | os.PathLike) -> bool:
    """Whether the folder holds annotations of Human3.6M in a layout that `Human36M` reads."""
    patterns = ("annot/h36m_*.pkl", "h36m_*.pkl", "human36m-multiview-labels-*.npy", "extra/human36m-multiview-*.npy")
    return any(any(Path(path).glob(pattern)) for pattern in patterns)


def _find(path: Path, split: str) -> tuple[Path, Callable, Path]:
    """The file of annotations, its reader, and the folder or zip in which the pictures have their names."""
    name = {"train": "h36m_train.pkl", "test": "h36m_validation.pkl"}[split]
    labels = [*path.glob("human36m-multiview-labels-*.npy"), *path.glob("extra/human36m-multiview-labels-*.npy")]
    labels = [file for file in labels if "GTbboxes" in file.name] or labels  # others have the boxes of a detector
    files = [file for file in (path / "annot" / name, path / name) if file.is_file()] + labels
    if not files:
        raise FileNotFoundError(f"{path}: neither annot/{name} nor extra/human36m-multiview-labels-GTbboxes.npy")
    if len(files) > 1:
        raise ValueError(f"{path}: several files of annotations, keep one: {', '.join(map(str, files))}")
    places, read = (["processed"], _read_karfly) if labels else (["images", "images.zip"], _read_toolbox)
    for place in places:
        if (path / place).exists():
            return files[0], read, path / place if place.endswith(".zip") else path
    raise FileNotFoundError(f"{path}: no {' or '.join(places)} beside the annotations {files[0].relative_to(path)}")


def _read_toolbox(file: Path) -> Iterator[tuple[_Instant, int, dict]]:
    """The pickle's records as they are: a dict for each picture, with its instant and the camera's number."""
    records = unpickle(file)
    numbers = ("subject", "action", "subaction", "image_id", "camera_id")
    needed = {"image", "joints_2d", "joints_3d_camera", "camera", *numbers}
    for number, record in enumerate(records if isinstance(records, list) else [None]):
        where = f"{file}, record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a list of dicts, one a picture")
        if missing := needed - record.keys() or ({"box"} - record.keys() and {"center", "scale"} - record.keys()):
            raise ValueError(f"{where}: missing {', '.join(sorted(missing))}")
        subject, action, subaction, image, v = found = [record[field] for field in numbers]
        whole = all(isinstance(n, Integral) and 0 <= n < 1 << 31 for n in found)
        if not whole or not 2 <= action < 2 + len(_ACTIONS) or not 0 <= v < len(_CAMERAS):
            raise ValueError(
                f"{where}: expected whole numbers, action 2 to 16, camera_id 0 to 3: {numbers} are {found!s:.200}"
            )
        yield _Instant(int(subject), _ACTIONS[action - 2], int(subaction), int(image)), int(v), record


def _read_karfly(file: Path) -> Iterator[tuple[_Instant, int, dict]]:
    """The rows of the table, each as four records like the toolbox's, with a Camera and with keypoints in the world."""
    labels = unpickle(file)
    with reading(file, "the labels of learnable-triangulation-pytorch"):
        labels = labels[()]  # the dict in the array
        rows, names = labels["table"], list(labels["camera_names"])
        sequences = [(*name.rsplit("-", 1), name) for name in labels["action_names"]]
        columns = [names.index(name) for name in _CAMERAS]
        cameras = [
            [Camera(c["K"], c["R"], c["t"] / 1000, c["dist"], (1000, 1000), n) for n, c in zip(_CAMERAS, row[columns])]
            for row in labels["cameras"]
        ]
        boxes = rows["bbox_by_camera_tlbr"][:, columns][..., [1, 0, 3, 2]]  # left, top, right, bottom
        order = zip(*(rows[f].tolist() for f in ("subject_idx", "action_idx", "frame_idx")), strict=True)
        for row, (s, a, frame) in enumerate(order):
            subject, (action, subaction, sequence) = labels["subject_names"][s], sequences[a]
            instant = _Instant(int(subject[1:]), action, int(subaction), frame + 1)
            for v, camera in enumerate(_CAMERAS):
                image = f"processed/{subject}/{sequence}/imageSequence/{camera}/img_{frame + 1:06d}.jpg"
                record = {"image": image, "box": boxes[row, v], "camera": cameras[s][v], "keypoints": rows[row]}
                yield instant, v, record


def _numbers(where: str, record: dict | np.void, field: str, shape: tuple[int, ...]) -> np.ndarray:
    """A record's field as float64 of that shape, below 1e9; ValueError naming both where it is not."""
    try:
        value = np.asarray(record[field], dtype=np.float64).reshape(shape)
    except Exception as error:  # what a file holds can be anything
        raise ValueError(f"{where}: {field} must be numbers of shape {shape}: {error!r:.500}") from error
    if not (np.abs(value) < 1e9).all():
        raise ValueError(f"{where}: {field} has a number that is not finite, or 1e9 or more")
    return value


def _box(where: str, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Centre (x, y) and extents in px of the annotated box."""
    if "scale" in record and "center" in record:  # HRNet's: 200 px a unit
        return _numbers(where, record, "center", (2,)), 200 * _numbers(where, record, "scale", (-1,))
    low, high = _numbers(where, record, "box", (2, 2))
    return (low + high) / 2, high - low


def _gap(where: str, records: list[dict | None]) -> str:
    """What an instant's records lack, in words; nothing where they are whole."""
    for name, record in zip(_CAMERAS, records, strict=True):
        if record is None:
            return f"no camera {name}"
        if _box(f"{where}, camera {name}", record)[1].min() <= 0:
            return f"empty box in {name}"
    return ""


def _shots(where: str, records: list[dict], cameras: dict) -> tuple[list[_Shot], np.ndarray]:
    """The pictures of an instant and its joints (17, 3), metres in the world: the views' mean.

    cameras: those made so far, by number and identity of the toolbox's dict, which its pictures share.
    """
    shots, X = [], np.empty((len(_CAMERAS), len(JOINTS), 3))
    for v, record in enumerate(records):
        at, camera, picture = f"{where}, camera {_CAMERAS[v]}", record["camera"], record["image"]
        if isinstance(camera, Camera):  # karfly's
            X[v] = _numbers(at, record["keypoints"], "keypoints", (17, 3))[_FROM_KARFLY] / 1000
        else:
            if (v, id(camera)) not in cameras:
                cameras[v, id(camera)] = _toolbox_camera(at, camera, _CAMERAS[v])
            camera, picture = cameras[v, id(camera)], f"images/{picture}"
            X[v] = (_numbers(at, record, "joints_3d_camera", (17, 3)) / 1000 - camera.t) @ camera.R  # Rᵀ (X_c − t)
            _check_projection(at, camera.project(X[v]), _numbers(at, record, "joints_2d", (17, 2)))
        centre, extent = _box(at, record)
        shots.append(_Shot(picture, camera, centre, extent.max()))
    if (apart := np.abs(X - X[0]).max()) > 0.01:
        raise ValueError(f"{where}: the views' joints_3d_camera disagree in the world, by {1000 * apart:.0f} mm")
    return shots, X.mean(0)


def _toolbox_camera(where: str, stored: dict, name: str) -> Camera:
    """The Camera of the toolbox's R, T, fx, fy, cx, cy, k, p, with T the centre in mm: t = −R T / 1000."""
    shapes = {"R": (3, 3), "T": (3,), "fx": (), "fy": (), "cx": (), "cy": (), "k": (3,), "p": (2,)}
    R, T, fx, fy, cx, cy, k, p = (_numbers(where, stored, field, shape) for field, shape in shapes.items())
    try:
        K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
        return Camera(K, R, -R @ T / 1000, (k[0], k[1], p[0], p[1], k[2]), (1000, 1000), name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_projection(where: str, projected: np.ndarray, joints_2d: np.ndarray, tolerance: float = 5.0) -> None:
    """Raises ValueError where projected (17, 2) are not joints_2d, saying which other joint order would fit."""

    def apart(order=slice(None)) -> float:
        return np.linalg.norm(projected[order] - joints_2d, axis=-1).mean()

    if apart() <= tolerance:
        return
    known = {
        "joints_3d_camera is in karfly's joint order": _FROM_KARFLY,
        "joints_2d is in karfly's joint order": _FROM_TOOLBOX,
        "left and right are swapped in one of them": np.array(MIRRORED),
    }
    clue = next((clue for clue, order in known.items() if apart(order) <= tolerance), "no known joint order would fit")
    raise ValueError(f"{where}: joints_2d is {apart():.0f} px off the projected joints_3d_camera: {clue}")


def _check_bones(file: Path, X: np.ndarray) -> None:
    """Raises ValueError where the bones of X (T, 17, 3) are not a body's in metres, or shorter in another joint order.

    In its own order a body's bones are short.  Left and right swapped throughout would not show.
    """
    a, b = np.array(BONES).T
    length, *others = (
        np.linalg.norm(X[:, order[a]] - X[:, order[b]], axis=-1).mean()
        for order in (np.arange(17), _FROM_KARFLY, _FROM_TOOLBOX)
    )
    if min(others) < length:
        raise ValueError(f"{file}: wrong joint order: {length:.2f} m a bone, {min(others):.2f} in the other layout's")
    if not 0.1 < length < 0.5:
        raise ValueError(f"{file}: {length:.3g} m a bone: joints must be in mm")


def _read_picture(root: Path, name: str) -> np.ndarray:
    """The picture, (1000, 1000, 3) RGB; where it has 1002 rows, the last two are cut off and K stays right."""
    try:
        data = (
            _unzipped(root, name)
            if root.suffix == ".zip"
            else read_bytes(root / name, within=root / Path(name).parts[0])
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: no picture {name}") from error
    size = image = None
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        size = Image.open(io.BytesIO(data), formats=("JPEG", "PNG")).size  # before there is room made for it
    if size in ((1000, 1000), (1000, 1002)) and (data[:2] != b"\xff\xd8" or data.count(b"\xff\xda") < 64):  # scans
        with reading(f"{root}, {name}"):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        got = f"{size[0]}×{size[1]}" if size else "none"
        raise ValueError(f"{root}, {name}: expected a picture of 1000×1000 or 1000×1002 px, got {got}")
    return cv2.cvtColor(image[:1000], cv2.COLOR_BGR2RGB)


def _unzipped(root: Path, name: str, limit: int = 16 << 20) -> bytes:
    """A picture's file out of the zip."""
    with reading(f"{root}, picture {name}"):
        archive = _archive(root, os.getpid())
        if name not in archive.NameToInfo:
            raise FileNotFoundError
        info = archive.getinfo(name)
        if info.file_size > limit or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.file_size} bytes, compressed in way {info.compress_type}")
        with archive.open(info) as file:
            return file.read(limit)  # no more than that, whatever its size is said to be


@lru_cache(maxsize=2)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """The zip, opened once a process: forked ones would move each other's place in the file."""
    return zipfile.ZipFile(check_file(path))
