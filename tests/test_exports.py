"""What is taken away from a recording: files that come back as they were, in the units and axes of their programs."""

import csv
import json
import re
import tomllib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from recorded import HEIGHT, WIDTH, body, write_recording
from recorded import camera as ring
from scipy.spatial.transform import Rotation

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import read_calib
from epiutils.data.exports import write_results
from epiutils.data.recordings import Recording, Status, read_recording
from epiutils.triangulate import triangulate


@pytest.fixture
def recording(tmp_path):
    """Four cameras and five frames from 7 on; in one view a joint is wrong, another is undetected."""
    write_recording(tmp_path / "trial", frames=range(7, 12), n=4)
    read = read_recording(tmp_path / "trial")
    detections = read.detections.copy()
    detections[1, 2, 9, :2] += (30, -25)
    detections[3, 2, 9] = detections[3, 4, 16] = np.nan, np.nan, 0
    return replace(read, detections=detections)


TRUE = np.stack([body("BODY_25B", (0.02 * t, 0, 0)) for t in range(5)])


def read_table(path):
    """X (T, J, 3) of BODY_25B and the other columns, as texts."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    X = [[[float(row.pop(f"{j}_{axis}_m") or "nan") for axis in "xyz"] for j in JOINTS["BODY_25B"]] for row in rows]
    return np.array(X), rows


def test_poses_are_the_persons_and_detections_are_repaired_where_they_do_not_agree_and_nowhere_else(
    recording, tmp_path
):
    _, table = write_results(recording, tmp_path / "out")
    np.testing.assert_allclose(read_table(table)[0], TRUE, atol=1e-4)
    fixed, given = read_recording(tmp_path / "out").detections, recording.detections
    agree = np.ones(given.shape[:3], bool)
    agree[1, 2, 9] = agree[3, 2, 9] = agree[3, 4, 16] = False
    for v, camera in enumerate(recording.cameras):
        straight = np.concatenate([camera.undistort(given[v, ..., :2]), given[v, ..., 2:]], -1)
        np.testing.assert_allclose(fixed[v][agree[v]], straight[agree[v]], atol=1e-4)
        np.testing.assert_allclose(fixed[v, ..., :2], camera.without_distortion().project(TRUE), atol=0.02)
    np.testing.assert_allclose(fixed[3, 2, 9, 2], given[[0, 2], 2, 9, 2].mean(), atol=1e-4)


def test_what_falls_outside_the_picture_stays_as_it_was_detected(recording, tmp_path):
    moved = [replace(c, K=c.K - [[0, 0, 1e4], [0, 0, 0], [0, 0, 0]]) for c in recording.cameras]
    away = replace(recording, cameras=moved, detections=recording.detections - (1e4, 0, 0))
    write_results(away, tmp_path / "out")
    for camera, written, view in zip(moved, read_calib(tmp_path / "out/calibration/Calib.toml"), away.detections):
        file = tmp_path / "out" / "pose" / f"{camera.name}_json" / f"{camera.name}_000000000009_keypoints.json"
        (person,) = json.loads(file.read_text())["people"]
        back = np.reshape(person["pose_keypoints_2d"], (-1, 3))
        seen = np.isfinite(view[2, :, 0])
        rays = (camera.undistort(view[2, seen, :2]) - camera.K[:2, 2]) / np.diag(camera.K)[:2]
        np.testing.assert_allclose((back[seen, :2] - written.K[:2, 2]) / np.diag(written.K)[:2], rays, atol=1e-6)
        np.testing.assert_allclose(back[:, 2], view[2, :, 2], atol=1e-4)


def read_trc(path):
    """Marker names, X (T, J, 3) and the header's values, by the format's own rules."""
    lines = path.read_text().split("\n")
    assert lines[0] == f"PathFileType\t4\t(X/Y/Z)\t{path.name}" and lines[-1] == ""
    header = dict(zip(lines[1].split("\t"), lines[2].split("\t"), strict=True))
    names = lines[3].split("\t")[2::3]
    assert lines[4].split("\t")[2:5] == ["X1", "Y1", "Z1"]
    rows = [[float(value or "nan") for value in line.split("\t")] for line in lines[5:-1]]
    rows = np.array(rows)
    return [name for name in names if name], rows[:, :2], rows[:, 2:].reshape(len(rows), -1, 3), header


def test_poses_come_back_from_the_files_of_opensim_and_from_the_table(recording, tmp_path):
    recording.detections[2:, 3] = recording.detections[:2, 3] = np.nan, np.nan, 0  # a frame without anybody
    trc, table = write_results(recording, tmp_path / "out", rate=50)
    assert trc.name == "trial_7-11.trc" and trc.parent.name == "pose-3d"
    names, time, back, header = read_trc(trc)
    assert {key: header[key] for key in ("Units", "NumFrames", "NumMarkers", "DataRate")} == {
        "Units": "m", "NumFrames": "5", "NumMarkers": "25", "DataRate": "50"}  # fmt: skip
    assert names[:2] == ["Nose", "LEye"] and names[6] == "RShoulder" and names[24] == "RHeel"
    np.testing.assert_array_equal(time, np.column_stack([range(7, 12), np.arange(7, 12) / 50]))
    assert np.isnan(back[3]).all()
    X, rows = read_table(table)
    np.testing.assert_allclose(X, np.where(np.arange(5)[:, None, None] == 3, np.nan, TRUE), atol=1e-4)
    np.testing.assert_allclose(back, X[..., [1, 2, 0]], atol=1e-6)  # z up becomes y up, a rotation
    assert {row["up"] for row in rows} == {"z"} and [row["frame"] for row in rows] == ["7", "8", "9", "10", "11"]
    assert [row["time_s"] for row in rows] == [f"{t:.6f}" for t in time[:, 1]]


@pytest.mark.parametrize("up", ["x", "y", "z", "-x", "-y", "-z"])
def test_whatever_axis_points_up_does_so_in_opensims_file_and_nothing_is_mirrored(recording, tmp_path, up):
    axis, sign = "xyz".index(up[-1]), 1 - 2 * up.startswith("-")
    turn = Rotation.align_vectors([sign * np.eye(3)[axis]], [[0, 0, 1]])[0].as_matrix()  # z to that axis
    turned = replace(recording, cameras=[replace(c, R=c.R @ turn.T) for c in recording.cameras])
    _, _, X, _ = read_trc(write_results(turned, tmp_path / "out")[0])
    assert X[0, 18, 1] - X[0, 16, 1] > 1.5  # the head over an ankle
    aligned, _ = Rotation.align_vectors(X[0] - X[0].mean(0), TRUE[0] - TRUE[0].mean(0))
    np.testing.assert_allclose(aligned.apply(TRUE[0] - TRUE[0].mean(0)), X[0] - X[0].mean(0), atol=1e-3)
    np.testing.assert_allclose(aligned.apply((0, 0, 1)), (0, 1, 0), atol=1e-3)


def test_the_folder_is_a_trial_again_and_says_what_the_poses_do(recording, tmp_path):
    recording.detections[1, 3] = recording.detections[:, 4] = np.nan, np.nan, 0
    recording.status[1, 3] = Status.NO_PERSON  # nobody for one camera, but in its picture; and nobody at all
    _, table = write_results(recording, tmp_path / "out")
    again = read_recording(tmp_path / "out")
    assert again.model == recording.model
    assert (again.status[:, :4] == Status.OK).all() and (again.status[:, 4] == Status.NO_PERSON).all()
    np.testing.assert_array_equal(again.frames, recording.frames)
    straight = recording.cameras[1].without_distortion()
    np.testing.assert_allclose(again.detections[1, 3, :, :2], straight.project(TRUE[3]), atol=0.02)
    _, other = write_results(again, tmp_path / "again")
    np.testing.assert_allclose(read_table(other)[0], read_table(table)[0], atol=1e-3)
    files = sorted((tmp_path / "out" / "pose" / "cam02_json").iterdir())
    assert [f.name for f in files] == [f"cam02_{n:012d}_keypoints.json" for n in range(7, 12)]
    assert json.loads(files[4].read_text())["people"] == [{}]  # as Pose2Sim writes nobody
    with pytest.raises(ValueError, match='up must be "auto" or one of x, y'):
        write_results(recording, tmp_path / "other", up="north")


# What follows is what Pose2Sim 0.10.49 does; the files were seen to give its triangulation poses within 1 µm of these.


def pose2sims_folders(names):
    """Folders in the order in which its triangulation takes them for the tables of a Calib.toml, one after another."""
    last = [re.findall(r"\d+", name) for name in names]
    return [name for _, name in sorted(zip([(not n, int(n[-1]) if n else 0) for n in last], names, strict=True))]


def pose2sims_poses(folder):
    """Its way from a trial's folder to poses (T, J, 3), y up: no lens distortion, by DLT."""
    told = tomllib.loads((folder / "Config.toml").read_text())
    tables = tomllib.loads((folder / "calibration" / "Calib.toml").read_text())
    tables = [table for key, table in tables.items() if key != "metadata"]
    folders = pose2sims_folders([f.name for f in (folder / "pose").iterdir() if "json" in f.name])
    assert len(tables) == len(folders)
    P, points = [], []
    for table, name in zip(tables, folders, strict=True):
        R, _ = cv2.Rodrigues(np.array(table["rotation"]))
        P.append(np.array(table["matrix"]) @ np.column_stack([R, table["translation"]]))
        files = {int(re.split(r"(\d+)", f.name)[-2]): f for f in (folder / "pose" / name).iterdir()}
        (people,) = zip(*(json.loads(files[n].read_text())["people"] for n in range(*told["project"]["frame_range"])))
        points.append([np.reshape(person["pose_keypoints_2d"], (-1, 3)) for person in people])
    X = triangulate(np.array(points)[..., :2].transpose(1, 2, 0, 3), np.array(P))
    return X[..., [1, 2, 0]], told  # its zup2yup


@pytest.mark.parametrize(
    "names",
    [("cam10", "cam2", "Cam 1"), ("right", "front", "left"), ("a_4k", "b_4k", "c_4k"), ("../../out", "a/b", "c\0")],
    ids=["numbers", "words", "one number", "no names of files"],
)
@pytest.mark.parametrize("up", ["z", "y", "-x"])
def test_pose2sims_triangulation_makes_the_same_poses_of_the_folder(tmp_path, names, up):
    """Its order of cameras, its frames, its axis that points up, and no lens: of barrel, fisheye and none."""
    axis, sign = "xyz".index(up[-1]), 1 - 2 * up.startswith("-")
    turn = Rotation.align_vectors([sign * np.eye(3)[axis]], [[0, 0, 1]])[0].as_matrix()
    cameras = [replace(ring(i), name=name, R=ring(i).R @ turn.T) for i, name in enumerate(names)]
    lenses = [(-0.28, 0.09, 0, 0, -0.01), (0.05, -0.02, 0.01, 0), ()]
    cameras = [replace(c, distortion=lens, fisheye=len(lens) == 4) for c, lens in zip(cameras, lenses, strict=True)]
    frames = np.arange(7, 12)
    detections = np.stack([c.project(TRUE @ turn.T) for c in cameras])
    detections = np.concatenate([detections, np.full_like(detections[..., :1], 0.9)], -1)
    nothing = np.zeros(detections.shape[:2], int)
    recording = Recording(tmp_path, "BODY_25B", cameras, frames, detections, nothing, nothing, (None,) * 3, (0,) * 3)
    trc, _ = write_results(recording, tmp_path / "a" / "b" / "out", rate=59.94)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]  # nothing beside it, whatever a camera is called
    X, told = pose2sims_poses(tmp_path / "a" / "b" / "out")
    _, time, ours, _ = read_trc(trc)
    np.testing.assert_allclose(X, ours, atol=1e-5)
    assert told["pose"]["pose_model"] == "BODY_25B" and not told["project"]["multi_person"]
    np.testing.assert_allclose(
        np.arange(*told["project"]["frame_range"]) / told["project"]["frame_rate"], time[:, 1], atol=1e-6
    )


def test_points_that_a_lens_brought_into_the_picture_are_in_the_larger_one_without_it(recording, tmp_path):
    turn, wide = cv2.Rodrigues(np.array([0, 1.25, 0]))[0], {"distortion": (0.01, 0, 0, 0), "fisheye": True}
    cameras = [
        replace(c, K=np.diag([0.2, 0.2, 1]) @ c.K, R=turn @ c.R, t=turn @ c.t, **wide) for c in recording.cameras
    ]
    found = np.stack([c.project(TRUE) for c in cameras])
    assert (found > 0).all() and (found < (WIDTH, HEIGHT)).all()
    assert max(c.undistort(x)[..., 0].max() for c, x in zip(cameras, found, strict=True)) > 1.5 * WIDTH
    away = replace(recording, cameras=cameras, detections=np.concatenate([found, recording.detections[..., 2:]], -1))
    write_results(away, tmp_path / "out")
    again = read_recording(tmp_path / "out")
    for c, x in zip(again.cameras, again.detections[..., :2], strict=True):
        assert (x >= 0).all() and (x <= np.array(c.size) - 1).all()
    _, table = write_results(again, tmp_path / "again", up="z")
    np.testing.assert_allclose(read_table(table)[0], TRUE, atol=1e-4)


def test_what_was_recorded_is_not_written_over(recording):
    before = sorted(recording.path.rglob("*"))
    with pytest.raises(ValueError, match="choose another folder"):
        write_results(recording, recording.path)
    assert sorted(recording.path.rglob("*")) == before


def test_the_middle_of_the_hips_has_pose2sims_name(tmp_path):
    for model, name in (("BODY_25", "CHip"), ("HALPE_26", "Hip")):
        write_recording(tmp_path / model, model=model)
        trc, _ = write_results(read_recording(tmp_path / model, model), tmp_path / f"{model} out")
        assert read_trc(trc)[0][JOINTS[model].index("midhip")] == name
