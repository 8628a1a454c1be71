"""Rig files: the calibrated cameras of a recording, as Pose2Sim and aniposelib write them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tomli_w
from scipy.spatial.transform import Rotation

from epiutils.cameras import Camera
from epiutils.data.files import read_toml, reading, replacing


def read_calib(path: str | os.PathLike, limit: int = 1 << 20) -> list[Camera]:
    """Cameras of a `Calib.toml`, in the file's order (the format of Pose2Sim and aniposelib).

    One table a camera: name, size, matrix, distortions, rotation (Rodrigues vector) and translation
    in metres, world to camera.  limit: most bytes of the file.
    Raises ValueError with the file, the table and the key at fault.
    """
    path, cameras = Path(path), []
    for key, table in read_toml(path, limit).items():
        if key == "metadata":
            continue
        where = f"{path}, table [{key}]"
        if not isinstance(table, dict):
            raise ValueError(f"{where}: expected a table a camera, got {table!r:.100}")
        missing = {"size", "matrix", "distortions", "rotation", "translation"} - table.keys()
        if missing:
            raise ValueError(f"{where}: missing {', '.join(sorted(missing))}")
        if table.get("fisheye"):
            raise ValueError(f"{where}: fisheye lenses are not supported")
        with reading(where):
            width, height = map(int, table["size"])
            if max(width, height) >= 1 << 15 or width * height > 1 << 26:  # OpenCV's limit, and 200 MB a picture
                raise ValueError(f"size {width}×{height}: at most 32,767 px a side and 67 million in all")
            rotation = np.array(table["rotation"], dtype=float).reshape(3)
            cameras.append(
                Camera(
                    K=table["matrix"],
                    R=Rotation.from_rotvec(rotation).as_matrix(),
                    t=table["translation"],
                    distortion=table["distortions"],
                    size=table["size"],
                    name=str(table.get("name", key)),
                )
            )
    if not cameras:
        raise ValueError(f"{path}: no camera in it")
    names = [camera.name for camera in cameras]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two cameras share a name: {names}")
    return cameras


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
            "distortions": camera.distortion[: 5 if camera.distortion[4] else 4].tolist(),
            "rotation": Rotation.from_matrix(camera.R).as_rotvec().tolist(),
            "translation": camera.t.tolist(),
            "fisheye": False,
        }
        for camera in cameras
    }
    tables["metadata"] = {"adjusted": False, "error": 0.0}
    with replacing(path) as part:
        part.write_text(tomli_w.dumps(tables), encoding="utf-8")
