"""What users take away from a recording: poses in 3D, and its detections repaired, in the files of other programs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import tomli_w

from epiutils.cameras import Camera
from epiutils.data.calibration import write_calib
from epiutils.data.files import replacing
from epiutils.data.recordings import Recording
from epiutils.triangulate import triangulate_robust

# By the world's axis that points up, its rotation into a file's, whose y points up: Pose2Sim's for z
_TURN = {
    "x": ((0, 0, 1), (1, 0, 0), (0, 1, 0)), "y": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "z": ((0, 1, 0), (0, 0, 1), (1, 0, 0)), "-x": ((0, 0, 1), (-1, 0, 0), (0, -1, 0)),
    "-y": ((1, 0, 0), (0, -1, 0), (0, 0, -1)), "-z": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
}  # fmt: skip
_WORDS = {"sho": "Shoulder", "elb": "Elbow", "wri": "Wrist", "hip": "Hip", "kne": "Knee", "ank": "Ankle", "eye": "Eye",
          "ear": "Ear", "bigtoe": "BigToe", "smalltoe": "SmallToe", "heel": "Heel"}  # fmt: skip


def _poses_3d(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Joints in space, (T, J, 3) metres, nan where two views do not agree; and who agreed, (V, T, J) bool.

    By `triangulate_robust` of the detections, undistorted and weighted by confidence; a view agrees within 3 % of the
    person's extent in the pictures, and within 5 px at least.
    """
    found, cameras = recording.detections, recording.cameras
    xy = np.stack([camera.undistort(view[..., :2]) for camera, view in zip(cameras, found, strict=True)])
    sizes = [
        np.ptp(known, 0).max() for p in xy.reshape(-1, *xy.shape[2:])[::7] if len(known := p[np.isfinite(p[:, 0])])
    ]
    threshold = max(5.0, 0.03 * float(np.median(sizes))) if sizes else 5.0
    P, parts = np.stack([camera.P for camera in cameras]), []
    for t in range(0, len(recording), 500):
        part = np.s_[:, t : t + 500]
        parts.append(
            triangulate_robust(xy[part].transpose(1, 2, 0, 3), P, found[..., 2][part].transpose(1, 2, 0), threshold)
        )
    X, agree = (np.concatenate(each) for each in zip(*parts, strict=True))
    return X, agree.transpose(2, 0, 1)


def _repaired(recording: Recording, X: np.ndarray, agree: np.ndarray) -> np.ndarray:
    """The detections (V, T, J, 3), those that do not agree with the pose in space replaced by its projection.

    X, agree: of `_poses_3d`.  A projection is in px as recorded, lens distortion included, with the mean confidence of
    the views that agree; what falls outside the picture, or has no pose, stays as it was detected.
    """
    fixed = recording.detections.copy()
    with np.errstate(invalid="ignore", divide="ignore"):
        trust = (np.where(agree, fixed[..., 2], 0)).sum(0) / agree.sum(0)  # (T, J)
    for v, camera in enumerate(recording.cameras):
        x = camera.project(X)
        inside = ((x >= 0) & (x <= np.array(camera.size) - 1)).all(-1)
        put = inside & ~agree[v]
        fixed[v][put] = np.concatenate([x, trust[..., None]], -1)[put]
    return fixed


def write_results(
    recording: Recording, folder: str | os.PathLike, rate: float | None = None, up: str = "auto"
) -> list[Path]:
    """Write a recording's poses and repaired detections, as a folder that Pose2Sim takes for a trial of its own.

    `pose-3d/<name>_<first>-<last>.trc`: markers in metres, y up, as Pose2Sim and OpenSim have them; blank where there
    is no pose.  The same `.csv`: frame, time_s, then <joint>_x_m … in the world of the calibration, and which of its
    axes points up.  `pose/<camera>_json`: repaired detections as OpenPose's JSON, `{}` where nobody is seen, in px of
    the cameras of `calibration/Calib.toml`: those of the recording without lens distortion, as Pose2Sim's
    triangulation knows none by default, in metres, z up and in the order in which it takes folders.  `Config.toml`:
    what it has to be told, such as the body model, the rate and the frames.

    rate: pictures a second; by default the videos', or 30.  up: the world's axis that points up, "x", "y", "z" or "-x"
    …; "auto": the one nearest to the way from ankles to shoulders.  Returns the two files of poses.
    Raises ValueError where the folder is the recording's own.
    """
    folder, names, first, last = Path(folder), recording.joints, recording.frames[0], recording.frames[-1]
    if folder.resolve() == recording.path.resolve():
        raise ValueError(f"{folder}: results beside what was recorded would replace it: choose another folder")
    X, agree = _poses_3d(recording)
    up = _upwards(X, names) if up == "auto" else up
    if up not in _TURN:
        raise ValueError(f'up must be "auto" or one of {", ".join(_TURN)}, got {up!r}')
    rate = float(rate or _rate(recording) or 30)
    time = recording.frames / rate
    stem = folder / "pose-3d" / f"{recording.path.resolve().name}_{first}-{last}"
    trc, table = stem.with_name(f"{stem.name}.trc"), stem.with_name(f"{stem.name}.csv")
    turned = X @ np.array(_TURN[up]).T
    with replacing(trc) as part:
        part.write_text(
            _trc(trc.name, recording.frames, time, turned, [_marker(name, recording.model) for name in names], rate),
            "utf-8",
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["frame", "time_s", *(f"{name}_{axis}_m" for name in names for axis in "xyz"), "up"])
    for frame, at, joints in zip(recording.frames.tolist(), time, X, strict=True):
        writer.writerow([frame, f"{at:.6f}", *_texts(joints), up])
    with replacing(table) as part:
        part.write_text(text.getvalue(), "utf-8")

    cameras, straight = _without_lenses(recording, X, agree)
    to_z_up = np.array(_TURN["z"]).T @ _TURN[up]
    order = sorted(range(len(cameras)), key=lambda v: _place(cameras[v].name))
    write_calib(folder / "calibration" / "Calib.toml", [replace(cameras[v], R=cameras[v].R @ to_z_up.T) for v in order])
    for camera, view in zip(cameras, straight, strict=True):
        place = folder / "pose" / f"{camera.name}_json"
        place.mkdir(parents=True, exist_ok=True)
        for number, joints in zip(recording.frames.tolist(), view, strict=True):
            seen = np.isfinite(joints[:, 0])
            numbers = np.where(seen[:, None], joints, 0).round(4).ravel().tolist()
            people = [{"person_id": [-1], "pose_keypoints_2d": numbers} if seen.any() else {}]
            text = json.dumps({"version": 1.3, "people": people})
            (place / f"{camera.name}_{number:012d}_keypoints.json").write_text(text, "utf-8")
    frames = [int(first), int(last) + 1]
    told = {
        "project": {
            "multi_person": False,
            "frame_rate": int(rate) if rate.is_integer() else rate,
            "frame_range": frames,
        },
        "pose": {"pose_model": recording.model},
        "triangulation": {"undistort_points": False},
    }
    with replacing(folder / "Config.toml") as part:
        part.write_text(tomli_w.dumps(told), "utf-8")
    return [trc, table]


def _without_lenses(recording: Recording, X: np.ndarray, agree: np.ndarray) -> tuple[list[Camera], np.ndarray]:
    """Cameras without lens distortion, their names fit for files, and the repaired detections (V, T, J, 3) in their px.

    Where a lens bends so much that straight points lie far outside the picture, the picture is made larger.
    """
    cameras, straight = [], _repaired(recording, X, agree)
    names = [camera.name for camera in recording.cameras]
    known = [_place(name) for name in names]
    if len(set(known)) < len(names) or not all(re.fullmatch(r"[\w-][\w .-]{,99}", name) for name in names):
        names = [f"cam{v + 1:02d}" for v in range(len(names))]  # not to be told apart, or no names of files
    for name, given, view in zip(names, recording.cameras, straight, strict=True):
        view[..., :2] = given.undistort(view[..., :2])
        view[~np.isfinite(view[..., 0])] = np.nan, np.nan, 0
        size, xy = np.array(given.size), view[np.isfinite(view[..., 0]), :2]
        camera = replace(given.without_distortion(), name=name)
        if given.bends and ((xy < -0.05 * size) | (xy > 1.05 * size)).any():
            low, high = np.floor(np.minimum(xy.min(0), 0)), np.ceil(np.maximum(xy.max(0) + 1, size))
            scale = min(1.0, 8000 / (high - low).max())
            camera = camera.crop(
                np.array([[scale, 0, -scale * low[0]], [0, scale, -scale * low[1]], [0, 0, 1]]),
                tuple(np.ceil(scale * (high - low)).astype(int).tolist()),
            )
            view[..., :2] = scale * (view[..., :2] - low)
        cameras.append(camera)
    return cameras, straight


def _place(name: str) -> tuple[bool, int, str]:
    """Pose2Sim's order of folders: by the last number in the name, then those without, by name."""
    numbers = re.findall(r"\d+", name)
    return (False, int(numbers[-1]), "") if numbers else (True, 0, name)


def _trc(name: str, frames: np.ndarray, time: np.ndarray, X: np.ndarray, markers: list[str], rate: float) -> str:
    """OpenSim's text: tabs, a header of five lines, metres, y up."""
    rate, last = f"{rate:g}", len(markers)
    lines = [
        f"PathFileType\t4\t(X/Y/Z)\t{name}",
        "DataRate\tCameraRate\tNumFrames\tNumMarkers\tUnits\tOrigDataRate\tOrigDataStartFrame\tOrigNumFrames",
        "\t".join(map(str, [rate, rate, len(frames), last, "m", rate, frames[0], len(frames)])),
        "Frame#\tTime\t" + "\t\t\t".join(markers) + "\t\t\t",
        "\t\t" + "\t".join(f"X{i}\tY{i}\tZ{i}" for i in range(1, last + 1)) + "\t",
    ]
    lines += [
        "\t".join([str(f), f"{t:.6f}", *_texts(joints)]) for f, t, joints in zip(frames.tolist(), time, X, strict=True)
    ]
    return "\n".join(lines) + "\n"


def _texts(joints: np.ndarray) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.6f}" for value in joints.ravel()]


def _marker(joint: str, model: str) -> str:
    """A joint's name as Pose2Sim writes it: rsho is RShoulder."""
    if joint == "midhip":
        return "CHip" if model == "BODY_25" else "Hip"
    side, word = (joint[0].upper(), _WORDS[joint[1:]]) if joint[1:] in _WORDS else ("", joint.capitalize())
    return side + word


def _upwards(X: np.ndarray, names: tuple[str, ...]) -> str:
    """The axis of the world nearest to the way from ankles, or hips, to shoulders; z where they are not seen."""
    low = (
        ["lank", "rank"]
        if np.isfinite(X[:, [names.index("lank"), names.index("rank")]]).all(-1).any()
        else ["lhip", "rhip"]
    )
    ends = [X[:, [names.index(name) for name in pair]].mean(1) for pair in (["lsho", "rsho"], low)]
    way = ends[0] - ends[1]
    way = way[np.isfinite(way).all(-1)]
    if not len(way):
        return "z"
    way = np.median(way, 0)
    axis = int(np.abs(way).argmax())
    return "-" * bool(way[axis] < 0) + "xyz"[axis]


def _rate(recording: Recording) -> float:
    for video in filter(None, recording.videos):
        capture = cv2.VideoCapture(str(video))
        rate = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0
        capture.release()
        if 0 < rate < 10_000:
            return rate
    return 0
