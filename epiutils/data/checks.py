"""A recording's files checked against each other: what is certainly wrong is an error, what probably is, a warning.

Each function warns of what is probably wrong and says what to do, and raises ValueError that names both sides otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from epiutils.cameras import Camera
from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import UNITS
from epiutils.data.files import check_file
from epiutils.data.layouts import Folder
from epiutils.epipolar import fundamental_from_cameras, symmetric_epipolar_distance
from epiutils.triangulate import triangulate

TALL = 0.2, 3.0  # metres, of a person
OFF = 0.05  # of a person's extent, beyond which a median distance from epipolar lines is too much
_INSTANTS = 60  # that geometry is judged by


def check_videos(
    cameras: Sequence[Camera], videos: Sequence[Path | None], frames: tuple[int, int], start: int | None,
    folder: Folder,
) -> int:  # fmt: skip
    """Pictures have the size, or at least the shape, of their camera's, and are there for the first and last of frames.

    start: the number of the frame that the first picture shows; None: 0, or the first number where frames and pictures
    are as many and would not fit otherwise.  Returns it.
    """
    counts = {}
    for camera, video in zip(cameras, videos, strict=True):
        if video is None:
            continue
        capture = cv2.VideoCapture(str(check_file(video, within=folder.path)))
        try:
            if not capture.isOpened():
                raise ValueError(f"{video} is not a video that OpenCV can read: make it anew, or take it away")
            counts[video.name] = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            size = tuple(int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            if size != camera.size and min(size) > 0 and size[0] * size[1] <= 1 << 26:
                _check_picture(capture.read()[1], camera, video)
        finally:
            capture.release()
    (first, last), fewest = frames, min(counts.values(), default=0)
    if fewest < 1:
        return start or 0
    if start is None:
        start = 0
        if last >= fewest and set(counts.values()) == {last - first + 1}:
            start = first
            folder.warn(
                f"{folder.path}: frames {first} to {last} and {fewest} pictures: the first picture is taken for frame "
                f"{first}; pass video_start= if it is not"
            )
    if first < start or last >= start + fewest:
        name = min(counts, key=counts.get)
        folder.warn(
            f"{folder.path}: frames {first} to {last}, but {name} has {fewest} pictures, frames {start} to "
            f"{start + fewest - 1} with video_start={start}: some have none; pass the number that the first picture has"
        )
    return start


def _check_picture(image: np.ndarray | None, camera: Camera, video: Path) -> None:
    """The picture is the camera's, scaled, with black bars where the shape is another."""
    if image is None:
        return
    (height, width), (w, h) = image.shape[:2], camera.size
    shape, wanted = np.log(width / height), np.log(w / h)
    if abs(shape - wanted) < 0.01:
        return
    text = f"{video}: pictures of {width}×{height} px, but the calibration of {camera.name} is for {w}×{h}"
    if abs(shape + wanted) < 0.01:
        raise ValueError(
            f"{text}: turned by 90°; turn the video (ffmpeg -vf transpose=1 or 2), or detect and calibrate anew"
        )
    s = min(width / w, height / h)
    inner = np.ones((height, width), bool)
    x, y = (int(np.ceil(max(0, side - s * full) / 2)) + 2 for side, full in ((width, w), (height, h)))
    inner[y : height - y, x : width - x] = False
    bars = inner & (np.arange(width) < x - 4) | inner & (np.arange(width) >= width - x + 4)
    bars |= inner & ((np.arange(height) < y - 4) | (np.arange(height) >= height - y + 4))[:, None]
    if bars.any() and image[bars].mean() > 30:
        raise ValueError(f"{text}: another shape, and no black bars around it; which part of the picture is it?")


def check_detections(
    cameras: Sequence[Camera], detections: np.ndarray, model: str, unit: str, where: Path, folder: Folder
) -> list[Camera]:
    """Detections (V, T, J, 3) are pixels, lie near each other's epipolar lines, and make a person of 0.2 to 3 m.

    unit: "auto" where cameras in metres may be found to be in cm or mm.  Returns the cameras, in metres.
    where: what the detections are of.  The folder's notes get the median distances in px by pair.
    """
    cameras = list(cameras)
    for camera, found in zip(cameras, detections, strict=True):
        _check_pixels(camera, found, where, folder.warn)
    several = (np.isfinite(detections[..., 0]).any(-1)).sum(0) > 1
    instants = np.flatnonzero(several)
    instants = instants[np.linspace(0, len(instants) - 1, min(_INSTANTS, len(instants))).astype(int)]
    if not len(instants):
        return cameras
    found = detections[:, instants]
    xy = np.stack(
        [camera.undistort(view[..., :2]) for camera, view in zip(cameras, found, strict=True)]
    )  # (V, T, J, 2)
    extent = np.full(len(cameras), np.nan)
    for v, view in enumerate(xy):
        known = [person[np.isfinite(person[:, 0])] for person in view]
        sizes = [np.ptp(person, 0).max() for person in known if len(person) > 1]
        extent[v] = max(np.median(sizes), 1) if sizes else np.nan
    off, share, number = {}, {}, 0
    for s, r in combinations(range(len(cameras)), 2):
        both = np.isfinite(xy[s] + xy[r]).all(-1)
        if both.any():
            F = fundamental_from_cameras(cameras[s], cameras[r])
            off[s, r] = float(np.median(symmetric_epipolar_distance(F, xy[s][both], xy[r][both])))
            share[s, r] = off[s, r] / np.nanmean(extent[[s, r]])
            number = max(number, int(both.sum()))
    if not off:
        return cameras
    name = [camera.name for camera in cameras]
    folder.notes.append(
        f"{where}: median distance from epipolar lines, px: "
        + ", ".join(f"{name[s]}–{name[r]} {value:.1f}" for (s, r), value in off.items())
    )
    for v in range(len(cameras)):
        own, others = ([value for pair, value in share.items() if (v in pair) == mine] for mine in (True, False))
        if own and others and min(own) > max(0.01, 2 * np.median(others)):
            _check_step(cameras, detections, v, where, folder.warn)
    bad = [pair for pair, value in share.items() if not value <= OFF]
    if bad:
        if number >= 50:
            said = ", ".join(f"{name[s]}–{name[r]} {off[s, r]:.0f} px" for s, r in bad)
            common = [n for v, n in enumerate(name) if len(bad) > 1 and all(v in pair for pair in bad)]
            folder.warn(
                f"{where}: detections lie off each other's epipolar lines in {len(bad)} of {len(off)} pairs of cameras: "
                f"{said}{'; ' + ', '.join(common) + ' is in all of them' if common else ''}. Do {folder.calib.name} and "
                "the folders name the same cameras, in pictures of the same size; are the cameras in step (pose-sync); "
                "is it the same person? A camera turned after its calibration is found by recordings.realigned"
            )
        return cameras
    P = np.stack([camera.P for camera in cameras])
    X = triangulate(xy.transpose(1, 2, 0, 3), P, found[..., 2].transpose(1, 2, 0))
    tall = _stature(X, model)
    if not np.isfinite(tall) or TALL[0] <= tall <= TALL[1]:
        return cameras
    text = f"{folder.calib} and the detections in {where} make a person of {tall:.3g} m"
    fits = {u: tall * scale for u, scale in UNITS.items() if TALL[0] <= tall * scale <= TALL[1]}
    if unit != "auto" or not fits:
        raise ValueError(
            f"{text} with unit={unit!r}, and people have {TALL[0]} to {TALL[1]}: in which unit are the calibration's "
            f"translations, {', '.join(UNITS)}, or sides of the board?"
        )
    chosen = min(fits, key=lambda u: abs(np.log(fits[u] / 1.7)))
    folder.warn(f"{text}: its unit is taken for {chosen}, which makes {fits[chosen]:.2f} m; pass unit= to say it")
    return [replace(camera, t=UNITS[chosen] * camera.t) for camera in cameras]


def _check_pixels(camera: Camera, found: np.ndarray, where: Path, say: Callable[[str], None]) -> None:
    """Detections (T, J, 3) are pixels of their camera's pictures, and not shares of their size."""
    xy = found[np.isfinite(found[..., 0]), :2]
    if not len(xy):
        return
    seen = np.isfinite(found[..., 0]).sum(-1)  # (T,) joints
    small = (np.abs(found[..., :2]).max(-1) <= 2).sum(-1)
    if tiny := np.flatnonzero((seen > 4) & (small > 0.9 * seen)).tolist():
        some = "" if len(tiny) > 0.9 * (seen > 0).sum() else f" in {len(tiny)} of {(seen > 0).sum()} frames"
        raise ValueError(
            f"{where}: keypoints of {camera.name} within [−2, 2]{some}: pixels are needed (OpenPose's keypoint_scale 0)"
        )
    outside = ((xy < -0.05 * np.array(camera.size)) | (xy > 1.05 * np.array(camera.size))).any(-1).mean()
    if outside > 0.2:
        low, high = np.percentile(xy, [2, 98], axis=0).round().astype(int)
        text = (
            f"{where}: {100 * outside:.0f} % of the keypoints of {camera.name} lie outside its picture: they span "
            f"{low[0]}–{high[0]} × {low[1]}–{high[1]} px, the calibration says {camera.size[0]}×{camera.size[1]}; "
            "detections and calibration need pictures of one size"
        )
        if outside > 0.5:
            raise ValueError(text)
        say(text)


def _stature(X: np.ndarray, model: str) -> float:
    """How tall a person is, from joints in space (T, J, 3): the medians of trunk and legs, over their part of a body.

    The parts are those of grown people, who are 1.1 (nose to ankle) of their sum tall.  In the unit of X; nan where no
    part is seen.
    """
    parts = {("nose", "sho"): 0.15, ("sho", "hip"): 0.285, ("hip", "kne"): 0.245, ("kne", "ank"): 0.24}
    place = {name: number for number, name in enumerate(JOINTS[model])}
    length = share = 0.0
    for (a, b), part in parts.items():
        ends = [(place[a] if a == "nose" else place[side + a], place[side + b]) for side in "lr"]
        sides = np.array([np.linalg.norm(X[:, i] - X[:, j], axis=-1) for i, j in ends])
        if np.isfinite(sides).any():
            length, share = length + float(np.nanmedian(sides)), share + part
    return length / share if share else np.nan


def _check_step(
    cameras: Sequence[Camera], detections: np.ndarray, v: int, where: Path, say: Callable[[str], None], most: int = 30
) -> None:
    """Tell `say` if camera v, some frames earlier or later, at most so many, lies twice as near to epipolar lines."""
    others = [u for u in range(len(cameras)) if u != v]
    F = {u: fundamental_from_cameras(cameras[u], cameras[v]) for u in others}
    last = detections.shape[1] - 1
    instants = np.unique(np.linspace(0, last, min(_INSTANTS, last + 1)).astype(int))
    xy = {u: cameras[u].undistort(detections[u, instants, :, :2]) for u in others}
    off = {}
    for lag in range(-min(most, last // 2), min(most, last // 2) + 1):
        inside = (instants + lag >= 0) & (instants + lag <= last)
        own = cameras[v].undistort(detections[v, instants[inside] + lag, :, :2])
        both = {u: np.isfinite(own + xy[u][inside]).all(-1) for u in others}
        medians = [
            np.median(symmetric_epipolar_distance(F[u], xy[u][inside][both[u]], own[both[u]]))
            for u in others if both[u].any()
        ]  # fmt: skip
        off[lag] = float(np.mean(medians)) if medians else np.inf
    best = min(off, key=off.get)
    if best and off[best] < 0.5 * off[0]:
        say(
            f"{where}: frame t{best:+d} of {cameras[v].name} fits frame t of the others better ({off[best]:.1f} px from "
            f"epipolar lines, not {off[0]:.1f}): is it out of step? Synchronise the cameras"
        )
