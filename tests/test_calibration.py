"""Rig files: they come back as they were, and bad ones are refused by file, table and key."""

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tomli_w
from recorded import qualisys
from rigs import LENS, camera_pair

from epiutils.data.calibration import read_calib, write_calib

REAL = Path(__file__).parents[2] / "shared" / "recordings" / "balancing" / "calibration" / "Calib.toml"
QUALISYS = REAL.parents[2] / "second_person" / "calibration" / "Calib.qca.txt"


@pytest.mark.parametrize(
    "distortion", [(), (-0.1, 0.05, 1e-3, 2e-3), LENS, (*LENS, 0.1, 0.02, 3e-3)], ids=["none", "four", "five", "eight"]
)
def test_a_rig_file_comes_back_as_it_was_written(tmp_path, distortion):
    fish = replace(camera_pair(2)[0], name="third camera.é", distortion=(0.1, 0.02, 3e-3, 4e-4), fisheye=True)
    cameras = [*camera_pair(1, distortion), fish]
    write_calib(tmp_path / "Calib.toml", cameras)
    back = read_calib(tmp_path / "Calib.toml")
    assert [c.name for c in back] == ["src", "ref", "third camera.é"]
    for old, new in zip(cameras, back, strict=True):
        assert new.size == old.size and new.fisheye == old.fisheye
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
    r"table \[cam\]: a: distortion needs k1 k2 k3 k4 of a fisheye": TABLE | {"fisheye": True, "distortions": 5 * [0.1]},
    r"table \[cam\]: a: R is not a rotation": TABLE | {"rotation": [[1.0, 0, 0], [0, 1, 0], [0, 0, -1]]},
    r"table \[cam\]: .*reshape": TABLE | {"rotation": [1.0, 2.0]},
    r"table \[cam\]: a: t must hold": TABLE | {"translation": [1.0, 2.0]},
    r"table \[cam\]: a: K must hold": TABLE | {"matrix": [[1.0]]},
    r"table \[cam\]: a: distortion needs": TABLE | {"distortions": [0.0] * 12},
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


def project(table, X):
    """What OpenCV makes of a table of a rig file."""
    lens = np.array(table["matrix"], float), np.array(table["distortions"], float)
    outside = np.array(table["rotation"], float), np.array(table["translation"], float)
    model = cv2.fisheye.projectPoints if table.get("fisheye") else cv2.projectPoints
    return model(X[:, None], *outside, *lens)[0][:, 0]


LENSES = {
    "four": {"distortions": [-0.1, 0.05, 1e-3, 2e-3]},
    "five": {"distortions": [-0.1, 0.05, 1e-3, 2e-3, 0.02]},
    "eight": {"distortions": [-0.1, 0.05, 1e-3, 2e-3, 0.02, 0.03, -0.01, 5e-3]},
    "fisheye": {"distortions": [-0.05, 0.02, -4e-3, 1e-3], "fisheye": True},
    "nested": {"distortions": [[-0.1, 0.05, 1e-3, 2e-3]], "translation": [[0.0], [0.0], [3.0]]},
}
X = np.random.default_rng(0).uniform((-0.6, -0.4, 0.5), (0.6, 0.4, 2), (20, 3))


@pytest.mark.parametrize("program", ["pose2sim", "anipose", "caliscope"])
@pytest.mark.parametrize("lens", LENSES)
def test_rig_files_of_several_programs_are_read_as_opencv_understands_them(tmp_path, lens, program):
    table = TABLE | LENSES[lens]
    R = cv2.Rodrigues(np.array(table["rotation"]))[0].round(8)
    written = {
        "pose2sim": {"cam": table, "metadata": {"adjusted": False, "error": 0.0}},
        "anipose": {"cam": table, "metadata": {}, "charuco": {"columns": 4, "square_size_mm": 30.0}, "fps": 30.0},
        "caliscope": {
            "CreationDate": "2024-01-01",
            "cameras": {
                "0": table | {"cam_id": 0, "rotation_count": 1, "rotation": R.tolist(), "ignore": False},
                "1": {"cam_id": 1, "ignore": True, "size": [320, 240]},
            },
        },
    }[program]
    text = tomli_w.dumps(written)
    for prefix in ("", "\ufeff"):  # as Windows' editors begin a file
        (tmp_path / "Calib.toml").write_text(prefix + text, encoding="utf-8")
        (camera,) = read_calib(tmp_path / "Calib.toml")
        seen = project({**table, "translation": np.ravel(table["translation"])}, X)
        np.testing.assert_allclose(camera.project(X), seen, atol=1e-5 if program == "caliscope" else 1e-9)


def test_a_rig_in_the_boards_unit_is_read_in_metres(tmp_path):
    table = TABLE | {"translation": [10.0, -20.0, 3000.0]}
    (tmp_path / "Calib.toml").write_text(tomli_w.dumps({"cam": table}))
    for unit, t in {"m": (10, -20, 3000), "mm": (0.01, -0.02, 3), "cm": (0.1, -0.2, 30)}.items():
        np.testing.assert_allclose(read_calib(tmp_path / "Calib.toml", unit=unit)[0].t, t)
    with pytest.raises(ValueError, match="unit must be one of m, cm, mm, got 'feet'"):
        read_calib(tmp_path / "Calib.toml", unit="feet")


def test_qualisys_rig_is_read_with_its_units_axes_and_window(tmp_path):
    cameras = [replace(c, name=n) for c, n in zip(camera_pair(3, (-0.1, 0.05, 1e-3, 2e-3)), ("10", "9"), strict=True)]
    marker = '<camera serial="1" model="Miqus M3"><transform/></camera>'
    (tmp_path / "Calib.qca.txt").write_text(qualisys(cameras, marker))
    back = read_calib(tmp_path / "Calib.qca.txt")
    assert [camera.name for camera in back] == ["9", "10"]  # as Pose2Sim orders them
    for old, new in zip(cameras[::-1], back, strict=True):
        assert new.size == old.size
        for field in ("K", "R", "t", "distortion"):
            np.testing.assert_allclose(getattr(new, field), getattr(old, field), atol=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"focalLengthU": None}, r"camera src: KeyError\('focalLengthU'\)"),
        ({"focalLengthU": "much"}, r"camera src: src: K must hold .* finite"),
        ({"r11": "7"}, "camera src: src: R is not a rotation"),
        ({"right": "1e9"}, "camera src: size 999999993"),
        ({"bottom": ""}, "camera src: .*NaN"),
    ],
)
def test_a_bad_qualisys_rig_is_refused_by_file_camera_and_key(tmp_path, change, message):
    (tmp_path / "Calib.qca.txt").write_text(qualisys(camera_pair(3), **change))
    with pytest.raises(ValueError, match=f"(?s)Calib.qca.txt, {message}"):
        read_calib(tmp_path / "Calib.qca.txt")


@pytest.mark.parametrize("text", ["", "K 1 0 0", "<calibration>", '<!DOCTYPE a [<!ENTITY b "b">]><calibration/>'])
def test_what_is_no_qualisys_rig_is_refused_by_file(tmp_path, text):
    (tmp_path / "Calib.qca.txt").write_text(text)
    with pytest.raises(ValueError, match=r"Calib.qca.txt is not a .*Qualisys"):
        read_calib(tmp_path / "Calib.qca.txt")


@pytest.mark.skipif(not QUALISYS.exists(), reason=f"the recording is not here: {QUALISYS}")
def test_the_real_qualisys_rig_is_the_one_that_was_converted():
    for camera, same in zip(read_calib(QUALISYS), read_calib(REAL), strict=True):
        assert camera.name == same.name and camera.size == same.size
        for field in ("K", "R", "t", "distortion"):
            np.testing.assert_allclose(getattr(camera, field), getattr(same, field), atol=1e-12)


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
