"""Recordings: small ones written to tmp_path come back exactly, and each fault is told by its name."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import HEIGHT, WIDTH, body, write_json, write_recording, write_video
from scipy.spatial.transform import Rotation

from epiutils.data.bodies import BODY_BONES as BONES
from epiutils.data.bodies import DETECTED, JOINTS, guess_model
from epiutils.data.recordings import Status, as_predicted, heatmaps, read_recording, realigned
from epiutils.epipolar import symmetric_epipolar_distance
from epiutils.heatmaps import HEATMAP_FROM_INPUT, decode
from epiutils.triangulate import triangulate

REAL = Path(__file__).parents[2] / "shared" / "recordings" / "balancing"
FRAMES = 24


def picture(t, size=(WIDTH, HEIGHT)):
    """A picture that says which frame it is: the bits of t in five stripes."""
    image = np.full((size[1], size[0], 3), 60, np.uint8)
    for bit in range(5):
        image[:, bit * size[0] // 5 : (bit + 1) * size[0] // 5] = 230 if t >> bit & 1 else 20
    return image


def code(image):
    """The t that `picture` wrote."""
    columns = image[image.shape[0] // 2, [(2 * bit + 1) * image.shape[1] // 10 for bit in range(5)]].mean(-1)
    return int(sum((value > 125) << bit for bit, value in enumerate(columns)))


PICTURES = [picture(t) for t in range(FRAMES)]


@pytest.fixture
def made(tmp_path):
    write_recording(tmp_path)
    return tmp_path


def first(path, i=1):
    return min((path / "pose" / f"cam{i:02}_json").glob("*.json"))


@pytest.mark.parametrize("model", DETECTED)
def test_what_was_written_comes_back_exactly(tmp_path, model):
    cameras, written = write_recording(tmp_path, model, frames=range(4, 9), n=3)
    recording = read_recording(tmp_path)
    assert recording.model == model and recording.joints == JOINTS[model] and recording.bones == BONES[model]
    assert [c.name for c in recording.cameras] == ["cam01", "cam02", "cam03"] and len(recording) == 5
    np.testing.assert_array_equal(recording.detections, written)
    np.testing.assert_array_equal(recording.frames, range(4, 9))
    np.testing.assert_allclose(recording.cameras[2].P, cameras[2].P, atol=1e-9)
    assert (recording.status == Status.OK).all() and (recording.person == 0).all()
    assert recording.videos == (None, None, None)


NUMBERS = {  # how many joints there are, and some of them, as OpenPose's and mmpose's documentation have them
    "HALPE_26": (26, "0 nose 5 lsho 16 rank 17 head 18 neck 19 midhip 21 rbigtoe 22 lsmalltoe"),
    "COCO_17": (17, "0 nose 1 leye 6 rsho 9 lwri 16 rank"),
    "COCO_133": (133, "16 rank 17 lbigtoe 22 rheel 23 face0 91 lhand0 112 rhand0 132 rhand20"),
    "BODY_135": (135, "17 neck 18 head 19 lbigtoe 24 rheel 25 lhand1 45 rhand1 65 face0"),
    "BODY_25B": (25, "0 nose 1 leye 6 rsho 9 lwri 12 rhip 17 neck 18 head 24 rheel"),
    "BODY_25": (25, "1 neck 4 rwri 8 midhip 11 rank 14 lank 15 reye 18 lear 19 lbigtoe"),
    "COCO": (18, "1 neck 2 rsho 8 rhip 13 lank 14 reye 17 lear"),
}


@pytest.mark.parametrize("model", DETECTED)
def test_orders_agree_with_openpose(model):
    joints, bones, (count, known) = JOINTS[model], BONES[model], NUMBERS[model]
    assert len(joints) == len(set(joints)) == count
    assert all(joints[int(j)] == name for j, name in zip(known.split()[::2], known.split()[1::2], strict=True))
    drawn = {j for j, name in enumerate(joints) if not name.startswith("face")}
    assert {j for bone in bones for j in bone} == drawn  # every joint but those of the face is drawn, in one piece
    reached = {0}
    for _ in joints:
        reached |= {j for bone in bones if reached & set(bone) for j in bone}
    assert reached == drawn


def test_guess_is_right_for_turned_bodies_and_refuses_when_unsure():
    rng = np.random.default_rng(0)
    for model in ("BODY_25B", "BODY_25"):
        for _ in range(50):
            X = body(model) @ Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix().T
            people = np.concatenate([X[None, :, :2] * 100, np.ones((1, 25, 1))], -1).repeat(2, 0)
            assert guess_model(people) == model
    with pytest.raises(ValueError, match="cannot tell BODY_25B from BODY_25.*model="):
        guess_model(np.full((3, 25, 3), np.nan))
    with pytest.raises(ValueError, match="cannot tell"):
        guess_model(rng.normal(size=(50, 25, 3)))


def test_undetected_keypoints_are_nan_with_confidence_zero(made):
    data = json.loads(first(made).read_text())
    data["people"][0]["pose_keypoints_2d"][3:6] = [0, 0, 0]
    first(made).write_text(json.dumps(data))
    recording = read_recording(made)
    assert np.isnan(recording.detections[0, 0, 1, :2]).all() and recording.detections[0, 0, 1, 2] == 0
    assert np.isfinite(recording.detections[0, 0, 2:]).all()
    assert recording.views(0)[0].confidence[1] == 0
    assert (heatmaps(recording.views(0)[0])[1] == 0).all()


def test_no_file_and_no_person_are_told_apart_and_counted(made):
    sorted((made / "pose" / "cam02_json").glob("*.json"))[1].unlink()
    write_json(first(made), [])
    write_json(first(made, 2), [[0] * 75])  # a person without any joint is nobody
    recording = read_recording(made)
    np.testing.assert_array_equal(recording.status, [[2, 0, 0], [2, 1, 0]])
    np.testing.assert_array_equal(recording.person, [[-1, 0, 0], [-1, -1, 0]])
    assert recording.missing(Status.NO_FILE) == {"cam01": [], "cam02": [1]}
    assert recording.missing(Status.NO_PERSON) == {"cam01": [0], "cam02": [0]}
    assert np.isnan(recording.detections[1, 1, :, :2]).all() and (recording.detections[1, 1, :, 2] == 0).all()
    with pytest.raises(ValueError, match="cam01, frame 0: NO_PERSON"):
        recording.views(0)
    with pytest.raises(ValueError, match="cam02, frame 1: NO_FILE"):
        recording.views(1, cameras=["cam01", "cam02"])
    with pytest.warns(UserWarning, match=r"frame 1: left out: cam02 \(NO_FILE\)"):
        assert [v.camera.name for v in recording.views(1)] == ["cam01"]
    assert [v.camera.name for v in recording.views(1, cameras=["cam01"])] == ["cam01"]


def test_several_people_are_chosen_by_the_stated_rule_with_a_warning(made):
    person = json.loads(first(made).read_text())["people"][0]["pose_keypoints_2d"]
    small = np.reshape(person, (25, 3)) * (0.5, 0.5, 0) + (30, 0, 1)
    write_json(first(made), [small.ravel().tolist(), person])
    for rule, place in (("largest", 1), ("confident", 0), (0, 1), (1, 0)):
        with pytest.warns(UserWarning, match=r"several people.*cam01 0$"):
            recording = read_recording(made, person=rule)
        assert recording.person[0, 0] == place and recording.status[0, 0] == Status.SEVERAL
        np.testing.assert_array_equal(recording.detections[0, 0], small if place == 0 else np.reshape(person, (25, 3)))
        assert (recording.status[:, 1:] == Status.NO_PERSON).all() == (rule == 1)  # they have no second person


def test_frame_numbers_are_those_of_the_files_and_sorted_as_numbers(tmp_path):
    write_recording(tmp_path, frames=(2, 9, 10, 100), name="{0}_{1}.json")
    np.testing.assert_array_equal(read_recording(tmp_path).frames, [2, 9, 10, 100])


# Pictures


def test_frame_k_is_picture_k_in_any_order(tmp_path):
    write_recording(tmp_path, frames=range(FRAMES))
    for i in (1, 2):
        write_video(tmp_path / "videos" / f"cam{i:02}.mp4", PICTURES)
    recording = read_recording(tmp_path)
    assert [v.name for v in recording.videos] == ["cam01.mp4", "cam02.mp4"]
    for frame in np.random.default_rng(1).permutation(FRAMES):
        for view, whole in zip(recording.views(int(frame), size=(96, 128)), recording.cameras, strict=True):
            A = view.camera.K @ np.linalg.inv(whole.K)
            seen = cv2.warpAffine(cv2.undistort(picture(frame), whole.K, whole.distortion), A[:2], (96, 128))
            assert np.abs(seen.astype(float) - view.image).mean() < 6, frame


def test_video_start_shifts_the_numbering_and_the_end_is_named(tmp_path):
    write_recording(tmp_path, frames=[*range(10, 10 + FRAMES + 1), 999_999_999_999_999], n=1)
    write_video(tmp_path / "cam01.mp4", PICTURES)
    with pytest.warns(UserWarning, match="frames 10 to 9+, but cam01.mp4 has 24 pictures, frames 10 to 33 with"):
        recording = read_recording(tmp_path, video_start=10)
    assert [code(recording.picture(0, 10 + k)) for k in (7, 0, 23, 8, 22)] == [7, 0, 23, 8, 22]
    A = (view := recording.views(15)[0]).camera.K @ np.linalg.inv(recording.cameras[0].K)
    assert np.abs(cv2.warpAffine(picture(5), A[:2], (256, 256)).astype(float) - view.image).mean() < 12
    for frame, k in ((10 + FRAMES, FRAMES), (999_999_999_999_999, 999_999_999_999_989)):
        with pytest.raises(ValueError, match=rf"cam01.mp4: no picture {k}, counted from 0: OpenCV finds {FRAMES}"):
            recording.views(frame)
    with pytest.warns(UserWarning, match="some have none"):
        recording = read_recording(tmp_path, video_start=11)
    with pytest.raises(ValueError, match="cam01.mp4: no picture -1"):
        recording.views(10)


def test_pictures_beside_pose_sync_are_those_of_the_files_it_was_copied_from(tmp_path):
    lags = (0, 5)
    write_recording(tmp_path, frames=range(FRAMES), n=2)
    for name, lag in zip(("cam01", "cam02"), lags, strict=True):
        write_video(tmp_path / f"{name}.mp4", PICTURES)
        (synced := tmp_path / "pose-sync" / f"{name}_json").mkdir(parents=True)
        for number in range(lag + 1, FRAMES):  # as Pose2Sim: to other numbers, above 0 alone
            file = f"{name}_{number:012}_keypoints.json"
            shutil.copy(tmp_path / "pose" / f"{name}_json" / file, synced / f"{name}_{number - lag:06}_keypoints.json")
    recording = read_recording(tmp_path)
    assert recording.lags == lags and recording.video_start == 0
    assert any(note.endswith("other numbers in pose: cam01 +0, cam02 +5") for note in recording.notes)
    assert recording.of_cameras(["cam02"]).lags == (5,)
    for view, camera, lag in zip(recording.views(9, undistort=False), recording.cameras, lags, strict=True):
        A = view.camera.K @ np.linalg.inv(camera.K)
        assert np.abs(cv2.warpAffine(picture(9 + lag), A[:2], (256, 256)).astype(float) - view.image).mean() < 12
    shutil.rmtree(tmp_path / "pose")
    with pytest.warns(UserWarning, match="has the files of cam01, cam02: their pictures may be out of step"):
        assert read_recording(tmp_path).lags == (0, 0)


def test_a_letterboxed_video_is_brought_back_to_the_calibrated_picture(made):
    rng = np.random.default_rng(2)
    image = cv2.GaussianBlur(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 4)
    scaled = cv2.resize(image, (120, 180), interpolation=cv2.INTER_AREA)
    write_video(made / "cam01.avi", 3 * [cv2.copyMakeBorder(scaled, 10, 10, 0, 0, cv2.BORDER_CONSTANT)])
    write_video(made / "cam02.avi", 3 * [image])
    recording = read_recording(made)
    back, whole = recording.picture(0, 0), recording.picture(1, 0)
    np.testing.assert_array_equal(whole, image[..., ::-1])
    assert back.shape == image.shape
    back, whole, inner = back.astype(float), whole.astype(float), np.s_[8:-8, 8:-8]
    off = np.abs(back - whole)[inner]
    assert off.max() <= 4
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):  # half a pixel off would show
        assert np.abs(np.roll(whole, shift, (0, 1)) - back)[inner].mean() > 3 * off.mean()


@pytest.mark.parametrize("undistort", [True, False])
def test_views_keep_joints_and_camera_together(made, undistort):
    recording = read_recording(made)
    for t, frame in enumerate(recording.frames):
        for view in recording.views(frame, size=(192, 256), undistort=undistort):
            assert view.image.shape == (256, 192, 3) and (view.image[128, 96] == 128).all()  # no video: grey
            np.testing.assert_allclose(view.joints, view.camera.project(body("BODY_25B", (0.02 * t, 0, 0))), atol=1e-6)
            assert view.camera.distortion.any() != undistort
    chosen = recording.views(1, cameras=["cam02", "cam01"])
    assert [v.camera.name for v in chosen] == ["cam02", "cam01"]
    np.testing.assert_array_equal(chosen[0].confidence, recording.detections[1, 1, :, 2])


# Heatmaps


@settings(max_examples=50, deadline=None)
@given(st.integers(8, 55), st.integers(8, 39), st.floats(-0.49, 0.49), st.floats(-0.49, 0.49), st.floats(0.05, 1))
def test_heatmap_peak_is_the_confidence_and_dark_finds_the_joint(x, y, dx, dy, confidence):
    joints = np.array([[4.0 * x, 4.0 * y], [4 * (x + dx), 4 * (y + dy)], [np.nan, np.nan]])
    maps = heatmaps((joints, np.array([confidence, confidence, 0])), (48, 64))
    assert maps.shape == (3, 48, 64) and maps.dtype == torch.float64
    assert maps[0, y, x] == maps[0].max() == confidence and (maps[2] == 0).all()
    points, _ = decode(maps[:2], "dark")
    np.testing.assert_allclose(points.numpy() * 4, joints[:2], atol=1e-6)


def test_detections_as_a_network_would_predict_them_are_those_of_the_views(made):
    """Not only is each the views' own: their lines meet, and they triangulate to the person that was filmed."""
    write_json(first(made, 2), [])  # frame 0 has nobody in the second camera
    recording = read_recording(made)
    seen, index = as_predicted(recording)
    assert index.tolist() == [1, 2] and seen.output.shape == (2, 2, 25, 64, 64)
    assert seen.output.dtype == torch.float32 and not seen.F[:, range(2), range(2)].any()
    for n, t in enumerate(index):
        views = recording.views(recording.frames[t])
        np.testing.assert_allclose(seen.output[n], torch.stack([heatmaps(view) for view in views]), atol=1e-6)
        np.testing.assert_allclose(seen.joints[n], [view.joints for view in views])
        P = seen.P[n]
        np.testing.assert_allclose(P, [view.camera.P for view in views], atol=1e-9)
        x = [view.joints @ HEATMAP_FROM_INPUT[:2, :2].T + HEATMAP_FROM_INPUT[:2, 2] for view in views]
        for s, r in ((0, 1), (1, 0)):
            assert symmetric_epipolar_distance(seen.F[n, s, r].numpy(), x[s], x[r]).max() < 1e-6
        points, peak = decode(seen.output[n].double(), "dark")
        X = triangulate(4 * points.transpose(0, 1), P, peak.T)
        np.testing.assert_allclose(X, body("BODY_25B", (0.02 * t, 0, 0)), atol=2e-3)
    assert as_predicted(recording, [2, 0])[1].tolist() == [2]
    with pytest.raises(ValueError, match="none of the frames wanted has a person in every view"):
        as_predicted(recording, [0])


def test_a_camera_that_was_turned_after_its_calibration_is_found_by_what_it_sees(tmp_path):
    """The others stay where they are: what lines cannot see is settled by the pull towards zero."""
    write_recording(tmp_path, frames=range(0, 40, 4), n=4)
    recording = read_recording(tmp_path)
    assert np.abs(realigned(recording.cameras, recording.detections)[1]).max() < 0.05
    moved = recording.detections.copy()
    moved[2, ..., :2] += (6, -4)
    for frames in (slice(None), slice(5)):
        wrong = replace(recording, detections=moved)
        cameras, shifts = realigned(wrong.cameras, wrong.detections[:, frames], largest=0.05)
        right = replace(wrong, cameras=cameras)
        assert np.abs(shifts[2] - (6, -4)).max() < 1.5 and np.abs(np.delete(shifts, 2, 0)).max() < 1.5
        distances = [
            symmetric_epipolar_distance(seen.F[0, 2, 0], seen.joints[0, 2] / 4, seen.joints[0, 0] / 4)
            for seen, _ in map(as_predicted, (wrong, right))
        ]
        assert np.median(distances[1]) < 0.2 * np.median(distances[0])
    assert (recording.cameras[2].K == read_recording(tmp_path).cameras[2].K).all()
    moved[2, ..., :2] += (60, 0)
    with pytest.raises(
        ValueError, match="cam03: its detections would need a shift of .* more than 2.5% of its picture"
    ):
        realigned(recording.cameras, moved)
    assert np.abs(realigned(recording.cameras, moved, largest=0.5)[1][2] - (66, -4)).max() < 8
    wild = recording.detections.copy()
    wild[2, ::2, :, :2] += (7, 0)
    wild[2, 1::2, :, :2] -= (5, 0)
    with pytest.raises(ValueError, match="do not hold in frames that they were not fitted to"):
        realigned(recording.cameras, wild, largest=0.05)
    moved[1:] = np.nan
    with pytest.raises(ValueError, match="no two of the cameras cam01, .* have a joint in the same of the 10 frames"):
        realigned(recording.cameras, moved)


def test_videos_that_do_not_match_are_named_in_a_warning(made):
    write_video(made / "videos" / "cam01.mp4", PICTURES[:3])
    write_video(made / "videos" / "cam09.mp4", PICTURES[:1])
    with pytest.warns(
        UserWarning, match=r"no calibrated camera: \['cam09.mp4'\]; cameras without a video: \['cam02'\]"
    ):
        recording = read_recording(made)
    assert recording.videos[1] is None and (recording.views(0)[1].image[128, 128] == 128).all()


def test_views_name_what_they_do_not_have(made):
    write_json(first(made), [[50, 60, 1] + [0] * 72])
    recording = read_recording(made)
    with pytest.raises(ValueError, match="no camera cam07, there are cam01, cam02"):
        recording.views(0, cameras=["cam07"])
    with pytest.raises(ValueError, match="no frame 3, there are 0–2"):
        recording.views(3)
    with pytest.raises(ValueError, match="frame 0: cam01: 1 joints known"):
        recording.views(0)


# The real recording, beside the project


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"the real recording is not at {REAL}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bystander stands in two of the views
        return read_recording(REAL)


def test_real_recording_is_read_whole(real):
    assert real.model == "BODY_25B" and real.detections.shape == (4, 100, 25, 3)
    assert (real.person >= 0).all() and real.missing(Status.NO_FILE)["cam03"] == []
    assert [len(f) for f in real.missing(Status.SEVERAL).values()] == [100, 100, 0, 0]
    x = np.nanmedian(real.detections[..., 0], 2)  # it never jumps to the bystander, at 70 px and at 805 px
    assert x[0].min() > 300 and x[1].max() < 700
    assert real.person[0, 37] == 1  # here the detector cut the person in two, a half with the head, one with the legs


def test_real_models_are_told_apart_in_single_frames(real):
    names = dict(zip(real.joints, range(25), strict=True))
    people = real.detections[:, ::10].reshape(-1, 25, 3)
    other = np.full_like(people, np.nan)  # the same people as BODY_25 would have them
    for j, joint in enumerate(JOINTS["BODY_25"]):
        ends = {"midhip": ("lhip", "rhip"), "neck": ("lsho", "rsho")}.get(joint, (joint, joint))
        other[:, j] = (people[:, names[ends[0]]] + people[:, names[ends[1]]]) / 2
    for one, same in zip(people, other, strict=True):
        assert guess_model(np.stack([one, one])) == "BODY_25B"
        assert guess_model(np.stack([same, same])) == "BODY_25"


def test_real_random_frames_are_those_of_sequential_decoding(real):
    for v, last in enumerate((40, 40, 15, 15)):  # two codecs: H.264 and VP9
        capture = cv2.VideoCapture(str(real.videos[v]))
        frames = [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(last)]
        exact = replace(real, cameras=[replace(camera, size=frames[0].shape[1::-1]) for camera in real.cameras])
        for k in (last - 1, 3, 11):
            np.testing.assert_array_equal(exact.picture(v, k), frames[k])


def test_real_views_show_the_person(real):
    views = real.views(50)
    assert [v.camera.name for v in views] == ["cam01", "cam02", "cam03", "cam04"]
    for view in views:
        assert view.image.shape == (256, 256, 3) and view.image.std() > 30 and not view.camera.distortion.any()
        known = view.joints[view.confidence > 0]
        assert (known > 0).all() and (known < 256).all()
        peaks = heatmaps(view).flatten(1).amax(1).numpy()
        assert (peaks <= view.confidence + 1e-12).all() and (peaks >= 0.93 * view.confidence).all()
