"""Rig files: they come back as they were, and bad ones are refused by file, table and key."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tomli_w
from rigs import LENS, camera_pair

from epiutils.data.calibration import read_calib, write_calib

REAL = Path(__file__).parents[2] / "shared" / "recordings" / "balancing" / "calibration" / "Calib.toml"


@pytest.mark.parametrize("distortion", [(), (-0.1, 0.05, 1e-3, 2e-3), LENS], ids=["none", "four", "five"])
def test_a_rig_file_comes_back_as_it_was_written(tmp_path, distortion):
    cameras = camera_pair(1, distortion) + [replace(camera_pair(2)[0], name="third camera.é")]
    write_calib(tmp_path / "Calib.toml", cameras)
    back = read_calib(tmp_path / "Calib.toml")
    assert [c.name for c in back] == ["src", "ref", "third camera.é"]
    for old, new in zip(cameras, back, strict=True):
        assert new.size == old.size
        for field in ("K", "t", "distortion"):
            np.testing.assert_array_equal(getattr(new, field), getattr(old, field))
        np.testing.assert_allclose(new.R, old.R, atol=1e-14)
    assert os.listdir(tmp_path) == ["Calib.toml"], "no temporary file stays"


def test_a_written_rig_has_the_keys_and_units_of_pose2sim(tmp_path):
    camera = camera_pair(1, (-0.1, 0.05, 1e-3, 2e-3))[1]
    write_calib(tmp_path / "Calib.toml", [camera])
    table = tomllib.loads((tmp_path / "Calib.toml").read_text())["ref"]
    assert table["size"] == [300.0, 400.0] and table["distortions"] == [-0.1, 0.05, 1e-3, 2e-3]
    np.testing.assert_allclose(table["rotation"], cv2.Rodrigues(camera.R)[0].ravel(), atol=1e-12)
    assert table["translation"] == camera.t.tolist() and table["matrix"] == camera.K.tolist()


def test_writing_replaces_a_file_whole_or_leaves_it(tmp_path):
    path = tmp_path / "Calib.toml"
    write_calib(path, camera_pair(1))
    before = path.read_text()
    unwritable = replace(camera_pair(2)[0], name="\ud800")  # fails in the middle of the file
    with pytest.raises(UnicodeEncodeError):
        write_calib(path, [*camera_pair(2), unwritable])
    assert path.read_text() == before
    write_calib(path, camera_pair(2)[:1])
    assert len(read_calib(path)) == 1


@pytest.mark.parametrize("names", [("same", "same"), ("metadata", "other")])
def test_cameras_that_a_rig_file_cannot_tell_apart_are_not_written(tmp_path, names):
    cameras = [replace(c, name=name) for c, name in zip(camera_pair(1), names, strict=True)]
    with pytest.raises(ValueError, match=names[0]):
        write_calib(tmp_path / "Calib.toml", cameras)


TABLE = {
    "name": "a",
    "size": [320.0, 240.0],
    "matrix": [[300.0, 0.0, 160.0], [0.0, 300.0, 120.0], [0.0, 0.0, 1.0]],
    "distortions": [0.0, 0.0, 0.0, 0.0],
    "rotation": [0.1, 0.2, 0.3],
    "translation": [0.0, 0.0, 3.0],
}
BAD_FILES = {
    "is not a TOML file": "[cam\nsize = 3",
    "no camera in it": "",
    r"table \[cam\]: expected a table": "cam = 3",
    r"table \[cam\]: missing distortions, matrix": {
        k: v for k, v in TABLE.items() if k not in ("matrix", "distortions")
    },
    r"table \[cam\]: fisheye": TABLE | {"fisheye": True},
    r"table \[cam\]: .*reshape": TABLE | {"rotation": [1.0, 2.0]},
    r"table \[cam\]: a: t must hold": TABLE | {"translation": [1.0, 2.0]},
    r"table \[cam\]: a: K must hold": TABLE | {"matrix": [[1.0]]},
    r"table \[cam\]: a: distortion needs": TABLE | {"distortions": [0.0] * 8},
    r"table \[cam\]: .*size|table \[cam\]: .*values": TABLE | {"size": [1.0]},
    r"table \[cam\]: could not convert": TABLE | {"translation": ["x", "y", "z"]},
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_rig_file_is_refused_by_file_table_and_key(tmp_path, message):
    path, content = tmp_path / "Calib.toml", BAD_FILES[message]
    path.write_text(content if isinstance(content, str) else tomli_w.dumps({"cam": content}))
    with pytest.raises(ValueError, match=f"(?s)Calib.toml.*{message}"):
        read_calib(path)


def test_two_cameras_of_one_name_are_refused(tmp_path):
    (tmp_path / "Calib.toml").write_text(tomli_w.dumps({"one": TABLE, "two": TABLE}))
    with pytest.raises(ValueError, match="two cameras share a name"):
        read_calib(tmp_path / "Calib.toml")


def test_a_camera_without_a_name_takes_its_tables_and_metadata_is_no_camera(tmp_path):
    unnamed = {k: v for k, v in TABLE.items() if k != "name"}
    (tmp_path / "Calib.toml").write_text(tomli_w.dumps({"metadata": {"error": 0.0}, "cam_7": unnamed}))
    (camera,) = read_calib(tmp_path / "Calib.toml")
    assert camera.name == "cam_7"
    np.testing.assert_allclose(camera.R, cv2.Rodrigues(np.array([0.1, 0.2, 0.3]))[0], atol=1e-12)


@pytest.mark.skipif(not REAL.exists(), reason=f"the recording is not here: {REAL}")
def test_the_real_recordings_rig_reads():
    cameras = read_calib(REAL)
    assert len(cameras) == 4 and len({c.name for c in cameras}) == 4
    tables = [table for key, table in tomllib.loads(REAL.read_text()).items() if key != "metadata"]
    for camera, table in zip(cameras, tables, strict=True):
        assert camera.size == (1088, 1920)
        X = camera.C + camera.R.T @ (0.3, -0.4, 3)
        lens = np.array(table["matrix"]), np.array(table["distortions"])
        pixels, _ = cv2.projectPoints(X, np.array(table["rotation"]), np.array(table["translation"]), *lens)
        np.testing.assert_allclose(camera.project(X), pixels[0, 0], atol=1e-6)
