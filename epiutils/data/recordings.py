"""Your own calibrated recording: a rig file, detections in JSON for each camera, and the videos.

The layout is Pose2Sim's: `calibration/Calib*.toml`, `pose/cam01_json/*.json`, `videos/cam01.mp4`, with or without
those three upper folders; what else is read stands in `calibration` and `layouts`.  The n-th picture of a video, counted
from 0, shows the frame whose JSON file in `pose` carries the number `video_start` + n.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
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
from epiutils.data.bodies import BODY_BONES, DETECTED, JOINTS, guess_model
from epiutils.data.calibration import UNITS
from epiutils.data.checks import check_detections, check_videos
from epiutils.data.files import check_file, reading
from epiutils.data.layouts import POSES, Folder
from epiutils.data.tracks import MOST, associate
from epiutils.data.views import Predicted, View
from epiutils.epipolar import fundamental_from_cameras, sampson_distance
from epiutils.heatmaps import HEATMAP_FROM_INPUT, render


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
    videos: a path a camera; None where it has no video and `views` gives grey pictures.  lags: a number a camera, by
    how much later in its video a frame is than its number says (in `pose-sync`; else 0).  notes: what was found on
    reading, warnings included, for the report.
    """

    path: Path
    model: str
    cameras: list[Camera]
    frames: np.ndarray
    detections: np.ndarray
    status: np.ndarray
    person: np.ndarray
    videos: tuple[Path | None, ...]
    lags: tuple[int, ...]
    video_start: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def joints(self) -> tuple[str, ...]:
        """Joint names in the detector's order; l and r are the person's own left and right."""
        return JOINTS[self.model]

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """Pairs of joint numbers to draw."""
        return BODY_BONES[self.model]

    def of_cameras(self, names: Sequence[str]) -> Recording:
        """The same recording with those cameras alone, in that order."""
        known = [camera.name for camera in self.cameras]
        chosen = [known.index(name) for name in names]
        parts = {field: getattr(self, field)[chosen] for field in ("detections", "status", "person")}
        parts |= {field: tuple(getattr(self, field)[v] for v in chosen) for field in ("cameras", "videos", "lags")}
        return replace(self, **parts | {"cameras": list(parts["cameras"])})

    def missing(self, status: Status) -> dict[str, list[int]]:
        """For each camera the frame numbers of that status."""
        rows = zip(self.cameras, self.status, strict=True)
        return {camera.name: self.frames[row == status].tolist() for camera, row in rows}

    def views(
        self, frame: int, cameras: Sequence[str] | None = None, size: tuple[int, int] = (256, 256), undistort=True
    ) -> list[View]:
        """The cropped pictures of one instant, in the order asked, with the joints and confidences in them.

        frame: a number of `frames`.  cameras: names; by default all that see the person then, and a warning names the
        others.  size: (width, height) px.  Joints are in px of the view; confidences above 1 (OpenPose has them) become
        1.  A video whose picture is not `camera.size` is taken as that picture scaled to fit and centred between black
        bars, and scaled back.
        Raises ValueError naming the camera and the frame where there is no file, no person or no such picture.
        """
        names = [camera.name for camera in self.cameras]
        everyone, cameras = cameras is None, names if cameras is None else cameras
        if unknown := set(cameras) - set(names):
            raise ValueError(f"{self.path}: no camera {', '.join(map(str, unknown))}, there are {', '.join(names)}")
        if frame not in self.frames:
            raise ValueError(f"{self.path}: no frame {frame}, there are {_ranges(self.frames)}")
        t = int(np.flatnonzero(self.frames == frame)[0])
        blind = [f"{name} ({Status(self.status[v, t]).name})" for v, name in enumerate(names) if self.person[v, t] < 0]
        if everyone and 0 < len(blind) < len(names):
            warnings.warn(f"{self.path}: frame {frame}: left out: {', '.join(blind)}", stacklevel=2)
            cameras = [name for v, name in enumerate(names) if self.person[v, t] >= 0]
        views = []
        for v in map(names.index, cameras):
            if self.person[v, t] < 0:
                status = Status(self.status[v, t]).name
                raise ValueError(f"{self.path}: {names[v]}, frame {frame}: {status}; leave it out with cameras=")
            views.append(self.crop(v, t, self.picture(v, frame), size, undistort))
        return views

    def picture(self, v: int, frame: int) -> np.ndarray:
        """The whole picture (H, W, 3) of camera number v, as its calibration has it; grey where there is no video."""
        camera, video = self.cameras[v], self.videos[v]
        if video is None:
            return np.full((*camera.size[::-1], 3), 128, np.uint8)
        modified = check_file(video, within=self.path).stat().st_mtime_ns
        return _fit(_picture(video, frame + self.lags[v] - self.video_start, modified), camera.size)

    def pictures(self) -> Iterator[list[np.ndarray]]:
        """The whole pictures of all cameras, instant after instant; `picture`'s, each video decoded once from its start."""
        films = [v if v is None else cv2.VideoCapture(str(check_file(v, within=self.path))) for v in self.videos]
        next_one = [0] * len(films)
        for frame in self.frames.tolist():
            shown = []
            for v, film in enumerate(films):
                index, ok = frame + self.lags[v] - self.video_start, film is not None
                while ok and next_one[v] <= index:
                    ok, next_one[v] = film.grab(), next_one[v] + 1
                ok, image = film.retrieve() if ok and index >= 0 else (False, None)
                fits = ok and image is not None
                whole = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if fits else None
                shown.append(_fit(whole, self.cameras[v].size) if fits else self.picture(v, frame))
            yield shown

    def crop(self, v: int, t: int, image: np.ndarray, size=(256, 256), undistort: bool = True) -> View:
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
    nothing = np.zeros((1, 1, 3), np.uint8)
    cut = ([recording.crop(v, t, nothing) for v in range(len(recording.cameras))] for t in index)
    return Predicted.of_instants((views, torch.stack([heatmaps(v) for v in views]).float()) for views in cut), index


def realigned(
    cameras: Sequence[Camera], detections: np.ndarray, largest: float = 0.025
) -> tuple[list[Camera], np.ndarray]:
    """The cameras, the picture of each shifted so that detections lie closest to each other's epipolar lines.

    A shift stands for a camera that was turned a little after its calibration.  The shifts minimise Sampson distances
    in 5 px under a soft L1 loss; a pull towards zero, in 10 px, settles what lines cannot see, such as a shift of all
    pictures together.  The shift is found after undistortion and given to the principal point; with a lens that bends
    much, the two differ by some percent.
    detections: (V, T, J, 2 or more) px as recorded, nan where undetected, as `Recording.detections[:, frames]`.
    largest: shift, as a share of a picture's longer side.
    Returns the V cameras and the shifts (V, 2) px in x and y.
    Raises ValueError if no two cameras have a joint in the same frame; and refuses larger shifts, which fit detections
    that are wrong in the same way and no camera, and shifts that do not hold in frames that they were not fitted to.
    """
    pinholes = [camera.without_distortion() for camera in cameras]
    xy = [camera.undistort(d[..., :2]).reshape(-1, 2) for camera, d in zip(cameras, detections, strict=True)]
    frames, matches = np.arange(detections.shape[1]).repeat(detections.shape[2]), []
    for s, r in combinations(range(len(cameras)), 2):
        known = np.isfinite(xy[s] + xy[r]).all(1)
        matches.append((s, r, xy[s][known], xy[r][known], frames[known] % 2))
    if not any(len(p) for _, _, p, *_ in matches):
        names = ", ".join(camera.name for camera in cameras)
        raise ValueError(f"no two of the cameras {names} have a joint in the same of the {detections.shape[1]} frames")

    def distances(shifts, half):  # from the lines, in even frames (0), odd ones (1) or all (None)
        at = [_shifted(camera, shift) for camera, shift in zip(pinholes, shifts, strict=True)]
        chosen = [
            (s, r, p[i], q[i])
            for s, r, p, q, odd in matches
            if (i := np.ones(len(p), bool) if half is None else odd == half).any()
        ]
        return np.concatenate([sampson_distance(fundamental_from_cameras(at[s], at[r]), p, q) for s, r, p, q in chosen])

    def fitted(half=None):
        off = lambda flat: np.append(distances(flat.reshape(-1, 2), half) / 5, flat / 10)
        return least_squares(off, np.zeros(2 * len(cameras)), loss="soft_l1").x.reshape(-1, 2)

    shifts = fitted()
    for camera, shift in zip(cameras, shifts, strict=True):
        if np.hypot(*shift) > largest * max(camera.size):
            raise ValueError(
                f"{camera.name}: its detections would need a shift of {np.hypot(*shift):.0f} px, more than {largest:.1%} of "
                "its picture: they, or the calibration, are wrong in another way"
            )
    halves = {half for *_, odd in matches for half in np.unique(odd).tolist()}
    for half in halves if np.abs(shifts).max() > 1 and len(halves) == 2 else ():
        before, after = (np.mean(distances(at, half)) for at in (0 * shifts, fitted(1 - half)))
        if after >= before:
            raise ValueError(
                f"shifts of up to {np.abs(shifts).max():.0f} px do not hold in frames that they were not fitted to: "
                f"{before:.1f} px off the lines without, {after:.1f} with them"
            )
    return [_shifted(camera, shift) for camera, shift in zip(cameras, shifts, strict=True)], shifts


def _shifted(camera: Camera, shift: np.ndarray) -> Camera:
    K = camera.K.copy()
    K[:2, 2] += shift
    return replace(camera, K=K)


def read_recording(
    path: str | os.PathLike, model: str = "auto", person: str | int = 0, video_start: int | None = None,
    cameras: str | Sequence[str] = (), unit: str = "auto", limit: int = 16 << 20,
) -> Recording:  # fmt: skip
    """Read a recording's calibration and detections, checked against each other; pictures are read later, by `views`.

    model: of the body, one of `bodies.JOINTS`, or "auto": by the number of keypoints, and of BODY_25B and BODY_25 the
    one in whose order a body's bones are short.
    person: who is kept where files have several: a number from 0 of those that `tracks.associate` finds, 0 being seen
    most (in `pose-associated` the places are the people); or, each file for itself, the "largest" (the longer side of
    the box around the detected joints) or the most "confident" (sum of confidences).
    video_start: the number of the frame that the first picture of a video shows; None: 0, or the first number where
    that alone fits.  cameras: names of those to read, "cam01,cam02" or a sequence; all that see somebody by default.
    unit: of a Calib.toml's translations, "m", "cm" or "mm"; "auto": m, unless only another makes a person of 0.2 to 3 m.
    limit: most bytes of a JSON file of one frame.

    What was found is in `notes`; what is probably wrong is said in a warning too.  Raises FileNotFoundError where the
    folder is missing, ValueError naming the file or the cameras for all that is certainly wrong, files that lead out of
    the folder included.
    """
    folder = Folder(path, limit)
    if model not in ("auto", *JOINTS):
        raise ValueError(f'model must be "auto" or one of {", ".join(JOINTS)}, got {model!r}')
    if isinstance(person, str) and person.isdecimal():
        person = int(person)
    if person not in ("largest", "confident") and not (isinstance(person, int) and person >= 0):
        raise ValueError(f'person must be a number from 0, "largest" or "confident", got {person!r}')
    if not (video_start is None or isinstance(video_start, int)):
        raise ValueError(f"video_start must be the number of the frame that a video begins with, got {video_start!r}")
    if unit not in ("auto", *UNITS):
        raise ValueError(f'unit must be "auto" or one of {", ".join(UNITS)}, got {unit!r}')
    rig, wanted = folder.cameras(cameras, "m" if unit == "auto" else unit)
    path, below, entries = folder.path, folder.below, folder.detections([camera.name for camera in rig])
    known = {camera.name: (camera, entry) for camera, entry in zip(rig, entries, strict=True) if entry}
    if bare := [name for name in wanted if name not in known]:
        raise ValueError(f"{below}: no detections of {', '.join(bare)}, there are those of {', '.join(known)}")
    rig, entries = zip(*(known[name] for name in wanted or known), strict=True)
    others = [name for name in POSES if below.name in POSES and name != below.name and (path / name).is_dir()]
    folder.notes.append(f"{path}: detections of {below.name if below != path else 'this folder'}"
                        + (f", not those of {', '.join(others)}" if others else "")
                        + f"; calibration {folder.calib.name}")  # fmt: skip

    files = [folder.people(entry) for entry in entries]
    model = _model_of(files, entries, model, below)
    if blind := [
        v for v, frames in enumerate(files) if not any(len(one) for people in frames.values() for one in people)
    ]:
        folder.warn(f"{below}: nobody is detected in any frame of {', '.join(rig[v].name for v in blind)}: left out")
        rig, entries, files = ([one for v, one in enumerate(each) if v not in blind] for each in (rig, entries, files))

    numbers = np.array(sorted(set().union(*files)))
    people = [[frames.get(number, ()) for number in numbers.tolist()] for frames in files]
    seen = np.array([[sum(map(len, at)) // len(JOINTS[model]) for at in view] for view in people])  # (V, T)
    chosen = _chosen(rig, people, seen, person, below)
    detections = np.full((len(rig), len(numbers), len(JOINTS[model]), 3), (np.nan, np.nan, 0.0))
    status = np.full(seen.shape, Status.NO_FILE)
    for v, t in np.ndindex(seen.shape):
        if numbers[t] in files[v]:
            status[v, t] = Status.NO_PERSON if chosen[v, t] < 0 else Status.OK if seen[v, t] == 1 else Status.SEVERAL
        if chosen[v, t] >= 0:
            detections[v, t] = people[v][t][chosen[v, t]]

    names = [camera.name for camera in rig]
    videos, lags = folder.videos(names), folder.lags(entries)
    if any(videos) and None in lags:
        unknown = ", ".join(name for name, lag in zip(names, lags, strict=True) if lag is None)
        folder.warn(f"{below}: no folder pose beside it has the files of {unknown}: their pictures may be out of step")
    lags = tuple(lag or 0 for lag in lags)
    if any(lags):
        told = ", ".join(f"{name} {lag:+d}" for name, lag in zip(names, lags, strict=True))
        folder.notes.append(
            f"{below}: pictures are taken as many frames later as its files have other numbers in pose: {told}"
        )
    own = [n + lag for frames, lag in zip(files, lags, strict=True) for n in frames]
    start = check_videos(rig, videos, (min(own), max(own)), video_start, folder)
    rig = check_detections(rig, detections, model, unit, below, folder)
    recording = Recording(path, model, rig, numbers, detections, status, chosen, videos, lags, start)
    several = [f"{name} {_ranges(np.array(f))}" for name, f in recording.missing(Status.SEVERAL).items() if f]
    if several:
        folder.warn(f"{path}: several people, kept {person!r}, in frames: {'; '.join(several)}")
    return replace(recording, notes=tuple(folder.notes))


def _model_of(files: list[dict], entries: Sequence[Path], model: str, below: Path) -> str:
    """The body model of all people; ValueError where they have different numbers of keypoints, or there are none."""
    counts, some = {}, []  # counts: keypoints → where they were first seen
    for entry, frames in zip(entries, files, strict=True):
        for number, people in frames.items():
            for one in filter(len, people):
                counts.setdefault(len(one), f"{len(one)} keypoints a person in {entry.name}, frame {number}")
                some.append(one)
    if len(counts) != 1:
        raise ValueError(f"{below}: {'; '.join(counts.values()) or 'no person in any file'}")
    with reading(below):
        model = guess_model(np.stack(some[:: max(1, len(some) // 1000)]), DETECTED) if model == "auto" else model
    if len(some[0]) != len(JOINTS[model]):
        raise ValueError(f"{below}: {len(some[0])} keypoints a person, but {model} has {len(JOINTS[model])}")
    return model


def _chosen(rig: Sequence[Camera], people: list, seen: np.ndarray, person: str | int, below: Path) -> np.ndarray:
    """The place of the person to keep in each file, (V, T), −1 where there is none."""
    if isinstance(person, str):
        return np.array([[_choose(at, person) for at in view] for view in people])
    if below.name == POSES[0]:
        number = max(len(at) for view in people for at in view)
        shown = {*range(min(number, 10)), *[person][: number > person]}
        tracks = {k: np.array([[k if k < len(at) and len(at[k]) else -1 for at in v] for v in people]) for k in shown}
    elif seen.max() > 1:
        if seen.max() > MOST:
            raise ValueError(
                f"{below}: {seen.max()} people in a file of {rig[int(seen.max(1).argmax())].name}: of more than {MOST} "
                'none is followed; pass person="largest" or "confident"'
            )
        tracks = dict(enumerate(found := associate(rig, people)))
        number = len(found)
    else:
        tracks, number = {0: np.array([[_choose(at, "largest") for at in view] for view in people])}, 1
    if person >= number:
        known = "; ".join(f"{k} in {(tracks[k] >= 0).any(0).sum()} frames" for k in range(min(number, 10)))
        raise ValueError(f"{below}: no person {person}: {known}{' …' * (number > 10)}")
    return tracks[person]


def _choose(people: Sequence[np.ndarray], person: str) -> int:
    """The place of the person to keep, −1 where there is none."""
    known = [i for i, one in enumerate(people) if len(one)]
    if len(known) < 2:
        return known[0] if known else -1
    if person == "confident":
        return max(known, key=lambda i: people[i][:, 2].sum())
    return max(known, key=lambda i: (np.nanmax(people[i][:, :2], 0) - np.nanmin(people[i][:, :2], 0)).max())


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
