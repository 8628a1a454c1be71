"""Rig files: the calibrated cameras of a recording, as Pose2Sim, anipose, caliscope and Qualisys write them."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tomli_w
from scipy.spatial.transform import Rotation

from epiutils.cameras import Camera
from epiutils.data.files import read_bytes, reading, replacing

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}  # metres
_KEYS = ("size", "matrix", "distortions", "rotation", "translation")


def read_calib(path: str | os.PathLike, limit: int = 1 << 20, unit: str = "m") -> list[Camera]:
    """Cameras of a rig file, in the file's order.

    A `Calib.toml` has a table a camera, at its top (Pose2Sim, anipose) or below `cameras` (caliscope): name, size,
    matrix, distortions (4, 5 or 8; 4 with `fisheye = true`), rotation (Rodrigues vector or 3×3) and translation, world
    to camera; those with `ignore = true` are left out.  A `Calib.qca.txt` is Qualisys' (XML): centres in mm, intrinsics
    and distortion in 1/64, as Pose2Sim reads it; marker cameras are left out beside video cameras.
    limit: most bytes of the file.  unit: of a TOML's translations, "m", "cm" or "mm" (anipose has the board's).
    Raises ValueError with the file, the table and the key at fault.
    """
    path = Path(path)
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    data = read_bytes(path, limit)
    if path.suffix.lower() == ".toml":
        cameras = [replace(c, t=UNITS[unit] * c.t) for c in _of_toml(data, path)]
    else:
        cameras = _of_qualisys(data, path)
    if not cameras:
        raise ValueError(f"{path}: no camera in it")
    names = [camera.name for camera in cameras]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two cameras share a name: {names}")
    return cameras


def _of_toml(data: bytes, path: Path) -> list[Camera]:
    with reading(path, "a TOML file"):
        if max(line.count(b".") for line in data.split(b"\n")) > 64:  # tomllib's time is quadratic in a.b.c.d…
            raise ValueError("a line has more than 64 dots")
        tables = tomllib.loads(data.decode("utf-8-sig"))
    below, cameras = isinstance(tables.get("cameras"), dict), []
    tables = tables["cameras"] if below else tables
    known = [table for table in tables.values() if isinstance(table, dict) and table.keys() & set(_KEYS[1:])]
    for key, table in tables.items():
        if key == "metadata" or (known and not (isinstance(table, dict) and table.keys() & set(_KEYS[1:]))):
            continue  # what else a program keeps there: the board, the day
        where = f"{path}, table [{'cameras.' * below}{key}]"
        if not isinstance(table, dict):
            raise ValueError(f"{where}: expected a table a camera, got {table!r:.100}")
        if table.get("ignore") is True:
            continue
        if missing := set(_KEYS) - table.keys():
            raise ValueError(f"{where}: missing {', '.join(sorted(missing))}")
        with reading(where):
            cameras.append(
                Camera(
                    K=table["matrix"],
                    R=_rotation(np.array(table["rotation"], dtype=float)),
                    t=table["translation"],
                    distortion=table["distortions"],
                    size=_size(*map(int, table["size"])),
                    name=str(table.get("name", f"cam_{key}" if below else key)),
                    fisheye=table.get("fisheye") is True,
                )
            )
    return cameras


def _size(width: int, height: int) -> tuple[int, int]:
    if max(width, height) >= 1 << 15 or width * height > 1 << 26:  # OpenCV's limit, and 200 MB a picture
        raise ValueError(f"size {width}×{height}: at most 32,767 px a side and 67 million in all")
    return width, height


def _rotation(numbers: np.ndarray) -> np.ndarray:
    """The rotation of a Rodrigues vector, or of a matrix that was written with four digits or more."""
    if numbers.size != 9:
        return Rotation.from_rotvec(numbers.reshape(3)).as_matrix()
    R = numbers.reshape(3, 3)
    if np.abs(R @ R.T - np.eye(3)).max() < 1e-3:
        u, _, vt = np.linalg.svd(R)
        R = u @ vt
    return R


def _of_qualisys(data: bytes, path: Path) -> list[Camera]:
    with reading(path, "a Calib.toml nor Qualisys' calibration (XML)"):
        if b"<!" in data.replace(b"\0", b"").replace(b"<!--", b""):  # in UTF-16 too
            raise ValueError("it has a DOCTYPE or an ENTITY, which calibrations do not need")
        found = ElementTree.fromstring(data).findall("cameras/camera")
    kinds = [camera.get("model", "none").lower() for camera in found]
    films = [bool(re.search("video|none", kind)) for kind in kinds]
    cameras = []
    for number, (camera, film) in enumerate(zip(found, films, strict=True), 1):
        if any(films) and not film:
            continue
        name = camera.get("serial") or f"cam_{number}"
        with reading(f"{path}, camera {name}"):
            parts = {part: camera.find(part) for part in ("fov_video", "intrinsic", "transform")}
            if missing := [part for part, element in parts.items() if element is None]:
                raise ValueError(f"missing {', '.join(missing)}")
            field, inside, outside = ({k: _number(k, v) for k, v in element.items()} for element in parts.values())
            K, lens = np.eye(3), [inside[f"radialDistortion{i}"] / 64 for i in (1, 2)]
            K[0, 0], K[1, 1] = inside["focalLengthU"] / 64, inside["focalLengthV"] / 64
            K[:2, 2] = inside["centerPointU"] / 64 - field["left"], inside["centerPointV"] / 64 - field["top"]
            lens += [inside[f"tangentalDistortion{i}"] / 64 for i in (1, 2)]  # spelt so
            M = np.array([[outside[f"r{i}{j}"] for j in (1, 2, 3)] for i in (1, 2, 3)])
            R = _rotation(np.diag([1, -1, -1]) @ M)
            C = np.array([outside[axis] for axis in "xyz"]) / 1000
            size = _size(*(int(field[far] - field[near]) + 1 for near, far in (("left", "right"), ("top", "bottom"))))
            cameras.append(Camera(K, R, -R @ C, lens, size, name))
    return sorted(cameras, key=lambda camera: re.sub(r"\d+", lambda number: number[0].zfill(20), camera.name))


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan  # a name, a date; a number that is needed and is none is told by Camera


def write_calib(path: str | os.PathLike, cameras: Iterable[Camera]) -> None:
    """Write cameras as a `Calib.toml` that `read_calib` reads back; the file appears whole or not at all.

    Raises ValueError where two cameras share a name, or one is called "metadata" as the file's own table is.
    """
    cameras = list(cameras)
    names = [camera.name for camera in cameras]
    if len(set(names)) < len(names) or "metadata" in names:
        raise ValueError(f'cameras need names of their own, other than "metadata", got {names}')
    tables = {
        camera.name: {
            "name": camera.name,
            "size": [float(v) for v in camera.size],
            "matrix": camera.K.tolist(),
            "distortions": camera.distortion[: 4 if not camera.distortion[4:].any() else None].tolist(),
            "rotation": Rotation.from_matrix(camera.R).as_rotvec().tolist(),
            "translation": camera.t.tolist(),
            "fisheye": camera.fisheye,
        }
        for camera in cameras
    }
    tables["metadata"] = {"adjusted": False, "error": 0.0}
    with replacing(path) as part:
        part.write_text(tomli_w.dumps(tables), encoding="utf-8")
