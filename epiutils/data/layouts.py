"""Where programs put a recording's calibration, detections and videos, and which belong to which camera.

Folders are Pose2Sim's, in the order in which it takes them: `pose-associated` (one person kept a place), `pose-sync`
(cameras shifted in time), `pose`; or the recording's own folder.  In each, a folder a camera with a JSON file a frame
(OpenPose, RTMPose), or one JSON file a camera for all frames (AlphaPose).  Files whose names begin with a dot, which
systems leave there, are no data.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from epiutils.cameras import Camera
from epiutils.data.calibration import read_calib
from epiutils.data.files import check_file, read_bytes, reading

POSES = ("pose-associated", "pose-sync", "pose")
_MOST = 1000  # people of a file
_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".mpg", ".webm")


class Folder:
    """A recording's folder as it is read: where its parts lie, which are whose, and the notes on what was found.

    below: the first of the folders that holds detections; entries: in it the folders or files of cameras, or none.
    limit: most bytes of a JSON file of one frame.  Raises FileNotFoundError where there is no such folder.
    """

    def __init__(self, path: str | os.PathLike, limit: int = 16 << 20):
        self.path, self.limit, self.notes = Path(path), limit, []
        self.below, self.entries = self.path, []
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder")
        for below in (*(self.path / name for name in POSES), self.path):
            here = _visible(below) if below.is_dir() else []
            entries = [f for f in here if f.is_dir() and any(g.suffix.lower() == ".json" for g in _visible(f))]
            if entries := entries or [f for f in here if f.suffix.lower() == ".json" and f.is_file()]:
                self.below, self.entries = below, entries
                break

    def warn(self, text: str) -> None:
        """Note what is probably wrong, in a warning too."""
        self.notes.append(text)
        warnings.warn(text, stacklevel=3)

    @cached_property
    def calib(self) -> Path:
        """The one rig file: in the folder or `calibration/`, else one level up, beside the trials.

        Raises ValueError where there is none, or several.
        """
        for place in (self.path, self.path.resolve().parent):
            folders = [place, *(f for f in _visible(place) if f.is_dir() and f.name.lower().startswith("calib"))]
            files = [f for folder in folders for f in _visible(folder) if not f.is_dir()]
            for fits in (r".*calib.*\.toml|camera_array\.toml", r".*\.qca(\.txt|\.xml)?"):
                found = [f for f in files if re.fullmatch(fits, f.name.lower())]
                if len(found) == 1:
                    return check_file(found[0], within=place)
                if found:
                    break
            if found:
                break
        raise ValueError(
            f"{self.path}: expected one Calib*.toml or *.qca.txt here, in calibration/ or one level up, "
            f"found {list(map(str, found))}"
        )

    def cameras(self, wanted: str | Sequence[str], unit: str) -> tuple[list[Camera], list[str]]:
        """The calibrated cameras, and the names of those wanted, "cam01,cam02" or a sequence; none where all are.

        unit: see `read_calib`.  Raises ValueError for names that are told twice or are not there.
        """
        rig = read_calib(self.calib, unit=unit)
        known = [camera.name for camera in rig]
        wanted = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) and wanted else list(wanted)
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"{self.calib}: cameras to read are named twice: {', '.join(wanted)}")
        if unknown := set(wanted) - set(known):
            raise ValueError(f"{self.calib}: no camera {', '.join(map(str, unknown))}, there are {', '.join(known)}")
        return rig, wanted

    def detections(self, names: Sequence[str]) -> tuple[Path | None, ...]:
        """The folder or file of detections of each camera, None where it has none.

        What was matched otherwise than by name is said.  Raises ValueError naming both sides where folders are left
        over, or none is there.
        """
        found, strays = self._match(names, self.entries, self.below)
        bare = [name for name, entry in zip(names, found, strict=True) if entry is None]
        if strays or len(bare) == len(names):
            raise ValueError(
                f"{self.below}: cameras without a folder of JSON files: {bare}; "
                f"folders of JSON files without a calibration: {strays}"
            )
        if bare:
            self.warn(f"{self.below}: calibrated, but without detections, and left out: {', '.join(bare)}")
        return found

    def videos(self, names: Sequence[str]) -> tuple[Path | None, ...]:
        """The video of each camera, here or in `videos/`; those left over, and cameras without, are said."""
        places = [place for place in (self.path, self.path / "videos") if place.is_dir()]
        videos = [f for place in places for f in _visible(place) if f.suffix.lower() in _VIDEOS]
        found, strays = self._match(names, videos, self.path)
        bare = [name for name, video in zip(names, found, strict=True) if video is None and any(found)]
        if strays or bare:
            self.warn(f"{self.path}: videos of no calibrated camera: {strays}; cameras without a video: {bare}")
        return found

    def lags(self, entries: Sequence[Path]) -> list[int | None]:
        """By how much the frames of each camera have higher numbers in `pose`, as in its video, than in `pose-sync`.

        Pose2Sim's synchronisation copies files to other numbers, so the same bytes are of the same picture.  None where
        `pose` is missing or has no such files.
        """
        lags, read = [], lambda file: read_bytes(file, self.limit, self.path)
        for entry in entries:
            synced, raw = (self.path / name / entry.name for name in POSES[1:])
            if self.below.name not in POSES[:2] or not synced.is_dir():
                lags.append(0)
                continue
            by_size, agree = {}, None
            for number, file in _numbered(raw).items() if raw.is_dir() else ():
                by_size.setdefault(file.stat().st_size, []).append((number, file))
            files = list(_numbered(synced).items())
            for number, file in files[:: max(1, len(files) // 20)]:
                data = read(file)
                same = {n - number for n, other in by_size.get(len(data), ()) if read(other) == data}
                agree = same if agree is None else agree & same
            lags.append(min(agree, key=abs) if agree else None)
        return lags

    def people(self, entry: Path) -> dict[int, list[np.ndarray]]:
        """The people (J, 3) of each frame number that a camera's folder, or its one file, holds.

        An undetected joint is nan, nan, 0; a place without anybody stays, as an array of no joints.
        """
        if not entry.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{entry} leads out of {self.path}: only what is inside is read")
        files = [entry] if entry.is_file() else _json(entry)
        if entry.is_file() or (len(files) == 1 and not re.search(r"\d", files[0].stem)):
            frames = _of_alphapose(files[0], self.limit, self.path)
        else:
            links = {found.name for found in os.scandir(entry) if found.is_symlink()}
            frames = {
                number: _of_openpose(file, self.limit, self.path if file.name in links else None)
                for number, file in _numbered(entry).items()
            }
        return _keypoints(frames)

    def _match(
        self, names: Sequence[str], entries: list[Path], where: Path
    ) -> tuple[tuple[Path | None, ...], list[str]]:
        """The folder or file of each camera, and the names of those left over.

        By name (cam_01, CAM01, cam01_json are one), else by the last or the first number in it (int_cam01_img and cam_1),
        else, where no name fits and there are as many of both, by order.
        """
        plain = {_plain(name): name for name in names}
        by_name = {}
        for entry in entries:
            key = _plain(entry.name if entry.is_dir() else entry.stem)
            camera = plain.get(key, plain.get(re.sub(r"(json|pose|keypoints|alphaposeresults)$", "", key)))
            if camera is None:
                continue
            if (other := by_name.setdefault(camera, entry)) is not entry:
                raise ValueError(f"{other} and {entry} both belong to camera {camera}")
        left = [entry for entry in entries if entry not in by_name.values()]
        for which in (-1, 0) if left else ():
            number = {name: _which(name, which) for name in names}
            of_entry = {entry: _which(entry.stem, which) for entry in entries}
            known, wanted = list(number.values()), list(of_entry.values())
            unique = len(set(known)) == len(known) and len(set(wanted)) == len(wanted) and None not in wanted
            agree = all(number[name] == of_entry[entry] for name, entry in by_name.items())
            if unique and agree and set(wanted) <= set(known):
                back = {value: entry for entry, value in of_entry.items()}
                return tuple(back.get(number[name]) for name in names), []
        if left and not by_name and len(entries) == len(names):
            order = sorted(entries, key=lambda entry: re.sub(r"\d+", lambda n: n[0].zfill(20), entry.name))
            pairs = ", ".join(f"{name} = {entry.name}" for name, entry in zip(names, order, strict=True))
            self.warn(
                f"{where}: cameras of the calibration matched by order, as no name or number fits: {pairs}; see that it is so"
            )
            return tuple(order), []
        return tuple(by_name.get(name) for name in names), [entry.name for entry in left]


def _of_openpose(file: Path, limit: int, within: Path | None) -> list[tuple[np.ndarray, Path, int]]:
    """The numbers of each person of a file, the file, and the person's place in it."""
    data = read_bytes(file, limit, within)
    with reading(file, "OpenPose's people: [pose_keypoints_2d: [x, y, c …]]"):
        people = json.loads(data)["people"]
        if len(people) > _MOST:
            raise ValueError(f"{len(people)} people; more than {_MOST} are not read")
        numbers = (() if person == {} else person["pose_keypoints_2d"] for person in people)  # {}: not seen here
        return [(np.array(person, dtype=np.float64), file, i) for i, person in enumerate(numbers)]


def _of_alphapose(file: Path, limit: int, within: Path) -> dict[int, list[tuple[np.ndarray, Path, int]]]:
    data, frames = read_bytes(file, 64 * limit, within), {}
    with reading(file, "AlphaPose's [{image_id, keypoints: [x, y, c …]}, …]"):
        for i, found in enumerate(json.loads(data)):
            name = str(found["image_id"])
            digits = re.findall(r"\d+", os.path.splitext(os.path.basename(name))[0] or name)
            person = np.array(found["keypoints"], dtype=np.float64)
            frames.setdefault(_number(digits[-1:], file), []).append((person, file, i))
    return frames


def _keypoints(frames: dict[int, list[tuple[np.ndarray, Path, int]]]) -> dict[int, list[np.ndarray]]:
    """Everybody's numbers as (J, 3), checked; nan, nan, 0 where a joint is undetected, no joints where all are."""
    alike = {}  # who has as many numbers
    for one in (one for people in frames.values() for one in people):
        alike.setdefault(one[0].shape, []).append(one)
    checked = {}
    for shape, some in alike.items():
        if len(shape) != 1 or shape[0] % 3:
            _, file, place = some[0]
            raise ValueError(f"{file}: person {place}: expected 3 numbers a keypoint, got shape {shape}")
        numbers = np.stack([person for person, *_ in some]).reshape(len(some), -1, 3)
        if shape[0]:
            numbers[numbers[..., 2] == 0] = 0  # whatever a program writes there
            good = (np.abs(numbers) < 1e6).all((1, 2)) & (numbers[..., 2] >= 0).all(1)
            for _, file, i in (some[n] for n in np.flatnonzero(~good)[:1]):
                raise ValueError(
                    f"{file}: person {i}: a number is not finite, a million or more, or a negative confidence"
                )
        numbers[numbers[..., 2] == 0] = np.nan, np.nan, 0
        seen = (numbers[..., 2] > 0).any(1).tolist()
        checked |= {
            id(one): person if known else person[:0] for one, person, known in zip(some, numbers, seen, strict=True)
        }
    return {number: [checked[id(one)] for one in people] for number, people in frames.items()}


def _numbered(folder: Path) -> dict[int, Path]:
    """The folder's JSON files by frame number: the last number in the name, `cam01_000000000012_keypoints.json`."""
    numbered = {}
    for file in _json(folder):
        number = _number(re.findall(r"\d+", file.stem)[-1:], file)
        if (other := numbered.setdefault(number, file)) is not file:
            raise ValueError(f"{folder}: {other.name} and {file.name} are both frame {number}")
    return numbered


def _number(digits: list[str], file: Path) -> int:
    if not digits:
        raise ValueError(f"{file}: no frame number in the name")
    if len(digits[0]) > 15:
        raise ValueError(f"{file}: no frame has a number of {len(digits[0])} digits")
    return int(digits[0])


def _json(folder: Path) -> list[Path]:
    return [file for file in _visible(folder) if file.suffix.lower() == ".json"]


def _visible(folder: Path) -> list[Path]:
    return sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda file: file.name)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _which(name: str, which: int) -> int | None:
    numbers = re.findall(r"\d+", re.sub(r"(?i)[ _.-](json|2d|3d)$", "", name))
    return int(numbers[which][:15]) if numbers else None
