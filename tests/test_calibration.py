"""Rig files: they come back as they were, and bad ones are refused at once by file, table and key."""

import os
import time
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
FIELDS = ("K", "R", "t", "distortion")
TABLE = {
    "name": "a", "size": [320.0, 240.0], "matrix": [[300.0, 0.0, 160.0], [0.0, 300.0, 120.0], [0.0, 0.0, 1.0]],
    "distortions": [0.0, 0.0, 0.0, 0.0], "rotation": [0.1, 0.2, 0.3], "translation": [0.0, 0.0, 3.0],
}  # fmt: skip


def assert_same(cameras, others, atol):
    for camera, other in zip(cameras, others, strict=True):
        assert (camera.name, camera.size, camera.fisheye) == (other.name, other.size, other.fisheye)
        for field in FIELDS:
            np.testing.assert_allclose(getattr(camera, field), getattr(other, field), rtol=0, atol=atol)


@pytest.mark.parametrize("lens", [(), LENS[:4], LENS, (*LENS, 0.1, 0.02, 3e-3)], ids=["none", "four", "five", "eight"])
def test_a_rig_file_comes_back_as_it_was_written(tmp_path, lens):
    fish = replace(camera_pair(2)[0], name="third camera.é", distortion=(0.1, 0.02, 3e-3, 4e-4), fisheye=True)
    cameras = [*camera_pair(1, lens), fish]
    write_calib(tmp_path / "Calib.toml", cameras)
    back = read_calib(tmp_path / "Calib.toml")
    assert_same(back, [replace(old, R=new.R) for old, new in zip(cameras, back, strict=True)], 0)
    assert_same(back, cameras, 1e-14)
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


IN_CAM, NO_TOML = r", table \[cam\]: ", " is not a TOML file: "
BAD_FILES = [  # what is written, or that a table has otherwise, and what it is refused with
    ("[cam\nsize = 3", NO_TOML),
    ("a = " + 100_000 * "[", NO_TOML),
    ("a = " + 100_000 * "{b=", NO_TOML),
    (".".join(100_000 * "a") + " = 1", NO_TOML),
    (f"[{'.'.join(100 * 'a')}]", NO_TOML),
    ("a = " + 5000 * "1", NO_TOML),
    ("a = \xff", NO_TOML),
    ("\0", NO_TOML),
    ("a = 1\na = 2", NO_TOML),
    (b"\0" * (100 << 20), " has 104857600 bytes; more than 1048576 are"),
    ("", ": no camera in it"),
    ("cam = 3", IN_CAM + "expected a table"),
    (tomli_w.dumps({"one": TABLE, "two": TABLE}), ": two cameras share a name"),
    (
        tomli_w.dumps({"cam": {"name": "a", "rotation": [0.0]}}),
        IN_CAM + "missing distortions, matrix, size, translation",
    ),
    ({"fisheye": True, "distortions": 5 * [0.1]}, IN_CAM + "a: distortion needs k1 k2 k3 k4 of a fisheye"),
    ({"distortions": 12 * [0.0]}, IN_CAM + "a: distortion needs"),
    ({"rotation": [[1.0, 0, 0], [0, 1, 0], [0, 0, -1]]}, IN_CAM + "a: R is not a rotation"),
    ({"rotation": [1.0, 2.0]}, IN_CAM + ".*reshape"),
    ({"translation": [1.0, 2.0]}, IN_CAM + "a: t must hold"),
    ({"translation": ["x", "y", "z"]}, IN_CAM + "could not convert"),
    ({"matrix": [[1.0]]}, IN_CAM + "a: K must hold"),
    ({"size": [1.0]}, IN_CAM + ".*(size|values)"),
    ({"size": [40_000.0, 40_000.0]}, IN_CAM + "size 40000×40000: at most 32,767 px a side"),
    ({"size": [33_000.0, 10.0]}, IN_CAM + "size"),
    ({"size": [10_000.0, 10_000.0]}, IN_CAM + "size"),
    ({"size": [float("inf"), 10.0]}, IN_CAM + ".*infinity"),
    ({"size": [1e300, 1e300]}, IN_CAM + "size"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_rig_file_is_refused_at_once_by_file_table_and_key(tmp_path, content, message):
    path, began = tmp_path / "Calib.toml", time.process_time()
    content = tomli_w.dumps({"cam": TABLE | content}) if isinstance(content, dict) else content
    path.write_bytes(content.encode("latin1") if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"(?s)Calib.toml{message}"):
        read_calib(path)
    assert time.process_time() - began < 2


def test_a_camera_without_a_name_takes_its_tables_and_metadata_is_no_camera(tmp_path):
    unnamed = {k: v for k, v in TABLE.items() if k != "name"}
    (tmp_path / "Calib.toml").write_text(tomli_w.dumps({"metadata": {"error": 0.0}, "cam_7": unnamed}))
    (camera,) = read_calib(tmp_path / "Calib.toml")
    assert camera.name == "cam_7"
    np.testing.assert_allclose(camera.R, cv2.Rodrigues(np.array([0.1, 0.2, 0.3]))[0], atol=1e-12)


def project(table, X):
    """What OpenCV makes of a table of a rig file."""
    R, t, K, lens = (np.array(table[key], float) for key in ("rotation", "translation", "matrix", "distortions"))
    model = cv2.fisheye.projectPoints if table.get("fisheye") else cv2.projectPoints
    return model(X[:, None], R, t.ravel(), K, lens)[0][:, 0]


LENSES = {
    "four": {"distortions": [-0.1, 0.05, 1e-3, 2e-3]},
    "five": {"distortions": [-0.1, 0.05, 1e-3, 2e-3, 0.02]},
    "eight": {"distortions": [-0.1, 0.05, 1e-3, 2e-3, 0.02, 0.03, -0.01, 5e-3]},
    "fisheye": {"distortions": [-0.05, 0.02, -4e-3, 1e-3], "fisheye": True},
    "nested": {"distortions": [[-0.1, 0.05, 1e-3, 2e-3]], "translation": [[0.0], [0.0], [3.0]]},
}


@pytest.mark.parametrize("program", ["pose2sim", "anipose", "caliscope"])
@pytest.mark.parametrize("lens", LENSES)
def test_rig_files_of_several_programs_are_read_as_opencv_understands_them(tmp_path, lens, program):
    table, X = TABLE | LENSES[lens], np.random.default_rng(0).uniform((-0.6, -0.4, 0.5), (0.6, 0.4, 2), (20, 3))
    R = cv2.Rodrigues(np.array(table["rotation"]))[0].round(8).tolist()
    written = {
        "pose2sim": {"cam": table, "metadata": {"adjusted": False, "error": 0.0}},
        "anipose": {"cam": table, "metadata": {}, "charuco": {"columns": 4, "square_size_mm": 30.0}, "fps": 30.0},
        "caliscope": {
            "CreationDate": "2024-01-01",
            "cameras": {
                "0": table | {"cam_id": 0, "rotation_count": 1, "rotation": R, "ignore": False},
                "1": {"cam_id": 1, "ignore": True, "size": [320, 240]},
            },
        },
    }[program]
    for prefix in ("", "\ufeff"):  # as Windows' editors begin a file
        (tmp_path / "Calib.toml").write_text(prefix + tomli_w.dumps(written), encoding="utf-8")
        (camera,) = read_calib(tmp_path / "Calib.toml")
        np.testing.assert_allclose(camera.project(X), project(table, X), atol=1e-5 if program == "caliscope" else 1e-9)


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
    assert_same(back, cameras[::-1], 1e-9)


NO_QUALISYS = " is not a .*Qualisys"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"focalLengthU": None}, r", camera src: KeyError\('focalLengthU'\)"),
        ({"focalLengthU": "much"}, ", camera src: src: K must hold .* finite"),
        ({"r11": "7"}, ", camera src: src: R is not a rotation"),
        ({"right": "1e9"}, ", camera src: size 999999993"),
        ({"bottom": ""}, ", camera src: .*NaN"),
        (
            "<calibration><cameras><camera serial='src'/></cameras></calibration>",
            ", camera src: missing fov_video, int",
        ),
        ("", NO_QUALISYS),
        ("K 1 0 0", NO_QUALISYS),
        ("<calibration>", NO_QUALISYS),
        ('<!DOCTYPE a [<!ENTITY b "b">]><calibration/>', NO_QUALISYS),
    ],
)
def test_a_bad_qualisys_rig_is_refused_by_file_camera_and_key(tmp_path, content, message):
    path = tmp_path / "Calib.qca.txt"
    path.write_text(content if isinstance(content, str) else qualisys(camera_pair(3), **content))
    with pytest.raises(ValueError, match=f"(?s)Calib.qca.txt{message}"):
        read_calib(path)


@pytest.mark.skipif(not QUALISYS.exists(), reason=f"the recording is not here: {QUALISYS}")
def test_the_real_qualisys_rig_is_the_one_that_was_converted():
    assert_same(read_calib(QUALISYS), read_calib(REAL), 1e-12)


@pytest.mark.skipif(not REAL.exists(), reason=f"the recording is not here: {REAL}")
def test_the_real_recordings_rig_reads():
    cameras = read_calib(REAL)
    assert len(cameras) == 4 and len({c.name for c in cameras}) == 4
    tables = [table for key, table in tomllib.loads(REAL.read_text()).items() if key != "metadata"]
    for camera, table in zip(cameras, tables, strict=True):
        assert camera.size == (1088, 1920)
        X = (camera.C + camera.R.T @ (0.3, -0.4, 3))[None]
        np.testing.assert_allclose(camera.project(X), project(table, X), atol=1e-6)
