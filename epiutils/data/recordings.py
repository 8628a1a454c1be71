"""Your own calibrated recording: Calib.toml, OpenPose's JSON for each camera, and the videos.

The layout is Pose2Sim's: `calibration/Calib*.toml`, `pose/cam01_json/*.json`, `videos/cam01.mp4`, with or without
those three upper folders; folders and videos belong to the camera of their name.  The n-th picture of a video,
counted from 0, shows the frame whose JSON file carries the number `video_start` + n.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from epiutils.cameras import Camera
from epiutils.data.calibration import read_calib
from epiutils.data.files import check_file, read_bytes, reading
from epiutils.data.views import Predicted, View, heatmap_fundamentals
from epiutils.epipolar import fundamental_from_cameras, sampson_distance
from epiutils.heatmaps import HEATMAP_FROM_INPUT, render

_ORDERS = """
BODY_25B nose leye reye lear rear lsho rsho lelb relb lwri rwri lhip rhip lkne rkne lank rank neck head _FEET
BODY_25 nose neck rsho relb rwri lsho lelb lwri midhip rhip rkne rank lhip lkne lank reye leye rear lear _FEET
COCO nose neck rsho relb rwri lsho lelb lwri rhip rkne rank lhip lkne lank reye leye rear lear
""".replace("_FEET", "lbigtoe lsmalltoe lheel rbigtoe rsmalltoe rheel")
_LIMBS = """nose-leye leye-lear nose-reye reye-rear nose-neck neck-head lsho-rsho neck-lsho neck-rsho lsho-lelb lelb-lwri
rsho-relb relb-rwri neck-midhip midhip-lhip midhip-rhip lhip-rhip lsho-lhip rsho-rhip lhip-lkne lkne-lank rhip-rkne
rkne-rank lank-lheel rank-rheel lank-lbigtoe lbigtoe-lsmalltoe rank-rbigtoe rbigtoe-rsmalltoe"""
_JOINTS = {line.split()[0]: tuple(line.split()[1:]) for line in _ORDERS.strip().splitlines()}  # OpenPose's orders
_BONES = {  # pairs of joint numbers, for drawing: every limb of which the model has both ends
    model: tuple(tuple(map(names.index, ends)) for b in _LIMBS.split() if set(ends := b.split("-")) <= set(names))
    for model, names in _JOINTS.items()
}


class Status(IntEnum):
    """What a camera's file of a frame held: one person, no file at all, nobody, or several people."""

    OK = 0
    NO_FILE = 1
    NO_PERSON = 2
    SEVERAL = 3


@dataclass(frozen=True, eq=False)
class Recording:
    """One person (the chosen one) seen by V calibrated cameras over T frames, J joints each.

    detections: (V, T, J, 3) float64, x and y in px as recorded (distorted) and OpenPose's confidence; an
    undetected joint is nan, nan, 0.  frames: (T,) the numbers in the file names, all that any camera has.
    status: (V, T) of `Status`.  person: (V, T) the chosen person's place in its file, −1 where there is none.
    videos: a path a camera; None where it has no video and `views` gives grey pictures.
    """

    path: Path
    model: str
    cameras: list[Camera]
    frames: np.ndarray
    detections: np.ndarray
    status: np.ndarray
    person: np.ndarray
    videos: tuple[Path | None, ...]
    video_start: int = 0

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def joints(self) -> tuple[str, ...]:
        """Joint names in the detector's order; l and r are the person's own left and right."""
        return _JOINTS[self.model]

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """Pairs of joint numbers to draw."""
        return _BONES[self.model]

    def missing(self, status: Status) -> dict[str, list[int]]:
        """For each camera the frame numbers of that status."""
        rows = zip(self.cameras, self.status, strict=True)
        return {camera.name: self.frames[row == status].tolist() for camera, row in rows}

    def views(
        self, frame: int, cameras: Sequence[str] | None = None, size: tuple[int, int] = (256, 256), undistort=True
    ) -> list[View]:
        """The cropped pictures of one instant, in the order asked, with the joints and confidences in them.

        frame: a number of `frames`.  cameras: names, all of them by default.  size: (width, height) px.  Joints
        are in px of the view; confidences above 1 (OpenPose has them) become 1.  A video whose picture is not
        `camera.size` is taken as that picture scaled to fit and centred between black bars, and scaled back.
        Raises ValueError naming the camera and the frame where there is no file, no person or no such picture.
        """
        names = [camera.name for camera in self.cameras]
        cameras = names if cameras is None else cameras
        if unknown := set(cameras) - set(names):
            raise ValueError(f"{self.path}: no camera {', '.join(map(str, unknown))}, there are {', '.join(names)}")
        if frame not in self.frames:
            raise ValueError(f"{self.path}: no frame {frame}, there are {_ranges(self.frames)}")
        t = int(np.flatnonzero(self.frames == frame)[0])
        views = []
        for v in map(names.index, cameras):
            camera, video = self.cameras[v], self.videos[v]
            if self.person[v, t] < 0:
                status = Status(self.status[v, t]).name
                raise ValueError(f"{self.path}: {names[v]}, frame {frame}: {status}; leave it out with cameras=")
            if video is None:
                image = np.full((*camera.size[::-1], 3), 128, np.uint8)
            else:
                modified = check_file(video, within=self.path).stat().st_mtime_ns
                image = _fit(_picture(video, frame - self.video_start, modified), camera.size)
            views.append(self._crop(v, t, image, size, undistort))
        return views

    def _crop(self, v: int, t: int, image: np.ndarray, size=(256, 256), undistort: bool = True) -> View:
        """The crop of a camera's picture to the person of an instant; camera and joints are right for any picture."""
        joints = self.detections[v, t]
        view = View(image, self.cameras[v], joints[:, :2], np.minimum(joints[:, 2], 1))
        with reading(f"{self.path}: frame {self.frames[t]}"):
            return (view.undistorted() if undistort else view).crop_to_person(size)


def heatmaps(view: View | tuple, shape: tuple[int, int] = (64, 64), sigma: float = 2.0) -> Tensor:
    """A Gaussian for each detection, its peak the confidence; zeros where the joint was not detected.

    view: a View, or a pair: joints (..., J, 2) in px of the network's input and confidence (..., J).
    shape: (H, W) and sigma in heatmap px.  Returns (..., J, H, W) in the joints' dtype.
    """
    joints, confidence = (view.joints, view.confidence) if isinstance(view, View) else view
    joints = torch.as_tensor(joints)
    A = torch.as_tensor(HEATMAP_FROM_INPUT.copy()).to(joints)
    return render(joints @ A[:2, :2].T + A[:2, 2], shape, sigma, torch.as_tensor(confidence))


def as_predicted(recording: Recording, frames: Sequence[int] | None = None) -> tuple[Predicted, np.ndarray]:
    """Detections as `Predicted`, so that fusion modules take them as they take a network's heatmaps.

    frames: numbers of `recording.frames`, all by default; those that lack a person in a view are left out.  Each view
    is cropped as by `Recording.views`, but no picture is read.  Returns the `heatmaps` of the detections, 64×64, with
    the crops' cameras and joints; and index (N,) of the instants in `recording.detections`.
    """
    wanted = recording.frames if frames is None else np.asarray(frames)
    known = np.isfinite(recording.detections[..., :2]).all(-1).sum(-1) > 1  # (V, T): enough to place a crop
    index = np.flatnonzero(np.isin(recording.frames, wanted) & known.all(0))
    if not len(index):
        raise ValueError(f"{recording.path}: none of the frames wanted has a person in every view")
    nothing, samples = np.zeros((1, 1, 3), np.uint8), []
    for t in index:
        views = [recording._crop(v, t, nothing) for v in range(len(recording.cameras))]
        F = heatmap_fundamentals([view.camera for view in views])
        sample = {"output": torch.stack([heatmaps(view) for view in views]).float(), "F": torch.from_numpy(F)}
        sample["joints"] = torch.from_numpy(np.stack([view.joints for view in views]))
        samples.append(sample | {k: torch.from_numpy(np.stack([getattr(v.camera, k) for v in views])) for k in "KRt"})
    return Predicted(**{key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}), index


def realigned(cameras: Sequence[Camera], detections: np.ndarray) -> tuple[list[Camera], np.ndarray]:
    """The cameras, the picture of each shifted so that detections lie closest to each other's epipolar lines.

    A shift stands for a camera that was turned a little after its calibration.  The shifts minimise Sampson distances
    in 5 px under a soft L1 loss; a pull towards zero, in 10 px, settles what lines cannot see, such as a shift of all
    pictures together.  The shift is found after undistortion and given to the principal point; with a lens that bends
    much, the two differ by some percent.
    detections: (V, T, J, 2 or more) px as recorded, nan where undetected, as `Recording.detections[:, frames]`.
    Returns the V cameras and the shifts (V, 2) px in x and y.
    Raises ValueError if no two cameras have a joint in the same frame.
    """
    pinholes = [camera.without_distortion() for camera in cameras]
    xy = [camera.undistort(d[..., :2]).reshape(-1, 2) for camera, d in zip(cameras, detections, strict=True)]
    matches = []
    for s, r in combinations(range(len(cameras)), 2):
        known = np.isfinite(xy[s] + xy[r]).all(1)
        matches.append((s, r, xy[s][known], xy[r][known]))
    if not any(len(p) for _, _, p, _ in matches):
        names = ", ".join(camera.name for camera in cameras)
        raise ValueError(f"no two of the cameras {names} have a joint in the same of the {detections.shape[1]} frames")

    def residuals(shifts):
        at = [_shifted(camera, shift) for camera, shift in zip(pinholes, shifts.reshape(-1, 2), strict=True)]
        off = [sampson_distance(fundamental_from_cameras(at[s], at[r]), p, q) for s, r, p, q in matches]
        return np.concatenate([*(distance / 5 for distance in off), shifts / 10])

    shifts = least_squares(residuals, np.zeros(2 * len(cameras)), loss="soft_l1").x.reshape(-1, 2)
    return [_shifted(camera, shift) for camera, shift in zip(cameras, shifts, strict=True)], shifts


def _shifted(camera: Camera, shift: np.ndarray) -> Camera:
    K = camera.K.copy()
    K[:2, 2] += shift
    return replace(camera, K=K)


def read_recording(
    path: str | os.PathLike, model: str = "auto", person: str | int = "largest", video_start: int = 0,
    limit: int = 16 << 20,
) -> Recording:  # fmt: skip
    """Read a recording's calibration and detections; pictures are read later, by `Recording.views`.

    model: "BODY_25B", "BODY_25", "COCO", or "auto": by the number of keypoints, and of
    BODY_25B and BODY_25 the one in whose order a body's bones are short.  person: who is kept where a file has several:
    "largest" (the longer side of the box around the detected joints), "confident" (the largest sum of confidences),
    or a place in the file from 0.  Each file is judged on its own: nobody is followed over time or matched between
    views; a warning names the frames with several.  limit: most bytes of a JSON file.
    Raises FileNotFoundError where the folder is missing, ValueError naming the file or the cameras for all else that is
    wrong, files that lead out of the folder included.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if model not in ("auto", *_JOINTS):
        raise ValueError(f'model must be "auto" or one of {", ".join(_JOINTS)}, got {model!r}')
    if person not in ("largest", "confident") and not (isinstance(person, int) and person >= 0):
        raise ValueError(f'person must be "largest", "confident" or a place from 0, got {person!r}')
    found = sorted({*path.glob("[Cc]alib*.toml"), *path.glob("[Cc]alibration/[Cc]alib*.toml")})
    if len(found) != 1:
        raise ValueError(f"{path}: expected one Calib*.toml here or in calibration/, found {list(map(str, found))}")
    cameras = read_calib(check_file(found[0], within=path))
    names = [camera.name for camera in cameras]
    below = path / "pose" if (path / "pose").is_dir() else path
    folders, strays = _match(names, [f for f in below.iterdir() if any(f.glob("*.json"))])
    bare = [name for name, folder in zip(names, folders, strict=True) if folder is None]
    if strays or bare:
        raise ValueError(
            f"{below}: cameras of {found[0].name} without a folder of JSON files: {bare}; "
            f"folders of JSON files without a calibration: {strays}"
        )
    videos, strays = _match(
        names,
        [
            f
            for d in (path, path / "videos")
            for f in d.glob("*")
            if f.suffix.lower() in (".mp4", ".avi", ".mov", ".mkv")
        ],
    )
    bare = [name for name, video in zip(names, videos, strict=True) if video is None and any(videos)]
    if strays or bare:
        warnings.warn(
            f"{path}: videos of no calibrated camera: {strays}; cameras without a video: {bare}", stacklevel=2
        )

    files = [
        {number: _read_people(file, limit=limit, within=path) for number, file in _numbered(folder).items()}
        for folder in folders
    ]
    counts, everybody = {}, []  # counts: keypoints → where they were first seen
    for folder, frames in zip(folders, files, strict=True):
        for number, people in frames.items():
            everybody += people
            for one in people:
                counts.setdefault(len(one), f"{len(one)} keypoints a person in {folder.name}, frame {number}")
    if len(counts) != 1:
        raise ValueError(f"{below}: {'; '.join(counts.values()) or 'no person in any file'}")
    everybody = np.stack(everybody)
    if np.nanmax(abs(everybody[..., :2])) <= 1:
        raise ValueError(f"{below}: keypoints within [−1, 1]: pixels are needed (OpenPose's keypoint_scale 0)")
    try:
        model = _guess_model(everybody) if model == "auto" else model
    except ValueError as error:
        raise ValueError(f"{below}: {error}") from error
    if everybody.shape[1] != len(_JOINTS[model]):
        raise ValueError(f"{below}: {everybody.shape[1]} keypoints a person, but {model} has {len(_JOINTS[model])}")

    numbers = np.array(sorted(set().union(*files)))
    detections = np.full((len(cameras), len(numbers), *everybody.shape[1:]), (np.nan, np.nan, 0.0))
    status, chosen = (np.full(detections.shape[:2], fill) for fill in (Status.NO_FILE, -1))
    for v, t in np.ndindex(status.shape):
        if (people := files[v].get(numbers[t])) is None:
            continue
        chosen[v, t] = place = _choose(people, person)
        status[v, t] = Status.NO_PERSON if place < 0 else Status.OK if len(people) == 1 else Status.SEVERAL
        if place >= 0:
            detections[v, t] = people[place]
    recording = Recording(path, model, cameras, numbers, detections, status, chosen, videos, video_start)
    several = [f"{name} {_ranges(np.array(f))}" for name, f in recording.missing(Status.SEVERAL).items() if f]
    if several:
        warnings.warn(f"{path}: several people, kept {person!r}, in frames: {'; '.join(several)}", stacklevel=2)
    return recording


def _guess_model(people: np.ndarray) -> str:
    """The body model of people (N, J, 3), nan where undetected: 18 keypoints are COCO, 25 one of two orders.

    In its own order a body's bones are short; read in the other's, wrists are joined to hips and eyes to shoulders.
    The order with the smaller mean bone length wins.  Raises ValueError where the other's is not 1.25 times as long,
    or fewer than 30 bones are seen in either, and for other numbers of keypoints.
    """
    if people.shape[1] == 18:
        return "COCO"
    if people.shape[1] != 25:
        raise ValueError(f"{people.shape[1]} keypoints a person: BODY_25B and BODY_25 have 25, COCO 18")
    length = {}
    for model in ("BODY_25B", "BODY_25"):
        a, b = np.array(_BONES[model]).T
        bones = np.linalg.norm(people[:, a, :2] - people[:, b, :2], axis=-1)  # (N, bones)
        bones = bones[np.isfinite(bones)]
        length[model] = float(bones.mean()) if len(bones) >= 30 else np.nan
    short, long = sorted(length, key=length.get)
    if not length[long] >= 1.25 * length[short]:
        raise ValueError(f"cannot tell BODY_25B from BODY_25 (mean bone, px: {length}): pass model=")
    return short


def _read_people(file: Path, **bounds) -> list[np.ndarray]:
    """The file's people (J, 3), nan, nan, 0 where a joint is undetected; those without any joint are left out."""
    data = read_bytes(file, **bounds)
    with reading(file, "OpenPose's people: [pose_keypoints_2d: [x, y, c …]]"):
        people = [np.asarray(person["pose_keypoints_2d"], dtype=np.float64) for person in json.loads(data)["people"]]
    kept = []
    for i, person in enumerate(people):
        if person.ndim != 1 or person.size % 3:
            raise ValueError(f"{file}: person {i}: expected 3 numbers a keypoint, got shape {person.shape}")
        person = person.reshape(-1, 3)
        if not (np.abs(person) < 1e6).all() or (person[:, 2] < 0).any():
            raise ValueError(f"{file}: person {i}: a number is not finite, a million or more, or a negative confidence")
        if (person[:, 2] > 0).any():
            kept.append(np.where(person[:, 2:] > 0, person, (np.nan, np.nan, 0)))
    return kept


def _numbered(folder: Path) -> dict[int, Path]:
    """The folder's JSON files by frame number: the last number in the name, `cam01_000000000012_keypoints.json`."""
    files = {}
    for file in sorted(folder.glob("*.json")):
        digits = re.findall(r"\d+", file.stem)
        if not digits:
            raise ValueError(f"{file}: no frame number in the name")
        if len(digits[-1]) > 15:
            raise ValueError(f"{file}: no frame has a number of {len(digits[-1])} digits")
        if (other := files.setdefault(int(digits[-1]), file)) is not file:
            raise ValueError(f"{folder}: {other.name} and {file.name} are both frame {int(digits[-1])}")
    return files


def _match(names: list[str], entries: list[Path]) -> tuple[tuple[Path | None, ...], list[str]]:
    """The folder or video of each camera (cam_01, CAM01, cam01_json are one name), and the names of those left over."""
    matched, strays = {}, []
    keys = {re.sub(r"[\W_]", "", name.lower()): name for name in names}
    for entry in sorted(entries):
        key = re.sub(r"[\W_]", "", (entry.name if entry.is_dir() else entry.stem).lower())
        camera = keys.get(key, keys.get(re.sub(r"(json|pose|keypoints)$", "", key)))
        if camera is None:
            strays.append(entry.name)
        elif (other := matched.setdefault(camera, entry)) is not entry:
            raise ValueError(f"{other} and {entry} both belong to camera {camera}")
    return tuple(matched.get(name) for name in names), strays


def _choose(people: list[np.ndarray], person: str | int) -> int:
    """The place of the person to keep, −1 where there is none."""
    if isinstance(person, int) or not people:
        return person if people and person < len(people) else -1
    if person == "confident":
        return int(np.argmax([p[:, 2].sum() for p in people]))
    return int(np.argmax([(np.nanmax(p[:, :2], 0) - np.nanmin(p[:, :2], 0)).max() for p in people]))


@lru_cache(maxsize=8)  # 50 MB of full HD
def _picture(video: Path, index: int, modified: int) -> np.ndarray:
    """A video's picture number `index` from 0, (H, W, 3) RGB, the very one that decoding from the start would give."""
    with reading(video, "a video"):
        capture = cv2.VideoCapture(str(video))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        if capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > 1 << 26:
            raise ValueError("pictures of over 67 million px")
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        if index >= 0 and int(capture.get(cv2.CAP_PROP_POS_FRAMES)) != index:  # no seeking in this one
            capture.open(str(video))
            all(capture.grab() for _ in range(index))  # up to the end
        ok, image = capture.read() if index >= 0 else (False, None)
        capture.release()
    if not ok:
        raise ValueError(f"{video}: no picture {index}, counted from 0: OpenCV finds {count} in it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Undo a scaling that keeps the aspect ratio and centres the picture between black bars."""
    found = np.array(image.shape[1::-1])
    if tuple(found) == tuple(size):
        return image
    s = (found / size).min()
    corner = (found - s * np.array(size)) / 2 + s / 2 - 0.5  # where the centre of the top-left pixel went
    A = np.column_stack([np.eye(2) * s, corner])
    return cv2.warpAffine(image, A, tuple(size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _ranges(numbers: np.ndarray) -> str:
    """Frame numbers in few words: 0–3, 7."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    text = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:8])
    return text + (f" … ({len(numbers)} in all)" if len(runs) > 8 else "")
