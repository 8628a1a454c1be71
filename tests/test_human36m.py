"""Human3.6M: small files in exactly the two formats, made of the embedded people, come back as the same joints.

OpenCV projects and undistorts in the checks; each fault is told by its name.
"""

import itertools
import os
import pickle
import shutil
import warnings
import zipfile
from functools import cache

import cv2
import numpy as np
import pytest

from files36m import (  # isort: skip
    ACTIONS, CAMERAS, DIRECTIONS, GREETING, MIRRORED, SHOWN, SITTING_DOWN, TO_KARFLY, TO_TOOLBOX, WAITING, body, labels,
    pixels, records, rig, square, toolbox_record, write_jpeg, write_karfly, write_toolbox,
)  # fmt: skip
from torch.utils.data import DataLoader

from epiutils.data import people
from epiutils.data.dataset import MultiView
from epiutils.data.human36m import Human36M, _archive, _check_bones, _Instant
from epiutils.data.views import BONES, JOINTS


def fault(path, pattern, error=ValueError, **arguments):
    with pytest.raises(error, match=pattern):
        Human36M(path, **arguments)


def without(*fields):
    return [{k: v for k, v in record.items() if k not in fields} for record in records(SHOWN)]


def picture(x):
    """A 1000×1000 picture with a white dot at the points x (N, 2), exact to a fraction of a pixel."""
    rows, columns = np.mgrid[:1000, :1000].astype(np.float32)
    image = np.stack([columns / 20, rows / 20, 50 - columns / 40], -1)
    for p in x:
        near = tuple(slice(max(0, int(c) - 25), int(c) + 26) for c in p[::-1])
        image[near] += 200 * np.exp(-((columns[near] - p[0]) ** 2 + (rows[near] - p[1]) ** 2) / 18)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)  # RGB


SIZE = {True: 256, False: 200}  # of the views read with and without undistortion
READ = [("folder", True), ("zip", True), ("karfly", True), ("karfly", False)]
DOTS = [JOINTS.index(name) for name in ("head", "rank", "lwri")]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same three instants as toolbox with a folder, toolbox with a zip, and karfly's."""
    paths = {name: tmp_path_factory.mktemp(name) for name in ("folder", "zip", "karfly")}
    everything = records(SHOWN)
    write_toolbox(paths["folder"], everything)
    write_toolbox(paths["zip"], everything).joinpath("images").rmdir()
    write_karfly(paths["karfly"], labels(SHOWN))
    with zipfile.ZipFile(paths["zip"] / "images.zip", "w") as archive:
        for record in everything:
            instant = tuple(record[f] for f in ("subject", "action", "subaction", "image_id"))
            x = pixels(rig(record["subject"])[record["camera_id"]], body(instant)[DOTS])
            file = paths["folder"] / "images" / record["image"]
            write_jpeg(file, picture(x))
            archive.write(file, f"images/{record['image']}")
            sequence = f"S{record['subject']}/{ACTIONS[record['action'] - 2]}-{record['subaction']}/imageSequence"
            name = f"{sequence}/{CAMERAS[record['camera_id']]}/img_{record['image_id']:06d}.jpg"
            write_jpeg(paths["karfly"] / "processed" / name, picture(x))
    return paths


@pytest.fixture(scope="module")
def read(layouts):
    """All views of a layout, read once."""

    @cache
    def views(name, undistort=True):
        return list(Human36M(layouts[name], every=1, undistort=undistort, size=SIZE[undistort]))

    return views


def cropped(x, box, size):
    """Where HRNet's crop of the box puts points (N, 2): the box's centre in the middle, its side the picture's."""
    return (x - (box[:2] + box[2:]) / 2) * size / (box[2] - box[0]) + size / 2


# What is read


@pytest.mark.parametrize("name, undistort", READ)
def test_joints_come_back_where_opencv_projects_them(layouts, read, name, undistort):
    data, size = Human36M(layouts[name], every=1), SIZE[undistort]
    assert len(data) == 3 and data.left_out == {}
    assert data.instants[2] == _Instant(11, "Waiting", 2, 1) and str(data.instants[1]) == "S9 Directions-1 image 6"
    for instant, views in zip(SHOWN, read(name, undistort), strict=True):
        X = body(instant)
        assert [view.camera.name for view in views] == list(CAMERAS)
        for view, camera in zip(views, rig(instant[0]), strict=True):
            expected = cropped(pixels(camera, X, distortion=not undistort), square(camera, X), size)
            assert np.abs(view.joints - expected).max() < 0.01
            assert np.abs(pixels(view.camera, X) - expected).max() < 0.01
            assert np.abs(view.joints_3d - X).max() < 1e-6
            np.testing.assert_allclose(view.camera.C, camera.C, atol=1e-6)
            assert view.camera.distortion.any() != undistort and view.camera.size == (size, size)
            assert view.image.shape == (size, size, 3) and view.image.dtype == np.uint8
            np.testing.assert_array_equal(view.confidence, np.ones(17))
            assert view.visible is None


@pytest.mark.parametrize("name, undistort", READ)
def test_pictures_show_the_joints_where_they_are_said_to_be(read, name, undistort):
    size = SIZE[undistort]
    for view in itertools.chain(*read(name, undistort)):
        for x, y in view.joints[DOTS]:
            near = np.s_[round(y) - 5 : round(y) + 6, round(x) - 5 : round(x) + 6]
            weights = np.maximum(view.image[near].astype(float).mean(-1) - 100, 0)
            rows, columns = np.mgrid[near]
            off = (columns * weights).sum() / weights.sum() - x, (rows * weights).sum() / weights.sum() - y
            assert np.abs(off).max() < 0.25
    assert view.image[size // 2, size - 6, 0] > view.image[size // 2, 5, 0] + 5  # red grows to the right


def test_lens_distortion_matters_to_the_check_of_pictures(read):
    for a, b in zip(read("karfly")[0], read("karfly", False)[0], strict=True):
        assert np.abs(a.joints / SIZE[True] - b.joints / SIZE[False])[DOTS].max() * SIZE[False] > 0.5


@pytest.mark.parametrize("name", ["zip", "karfly"])
def test_layouts_agree(read, name):
    for a, b in zip(itertools.chain(*read("folder")), itertools.chain(*read(name)), strict=True):
        assert np.abs(a.joints - b.joints).max() < 0.01
        assert np.abs(a.image.astype(int) - b.image).max() <= (2 if name == "karfly" else 0)


@pytest.mark.parametrize("name", ["zip", "karfly"])
def test_it_is_a_source_of_training_samples(layouts, name):
    sample = MultiView(Human36M(layouts[name], every=1))[1]
    assert sample["image"].shape == (4, 256, 256, 3) and sample["target"].shape == (4, 17, 64, 64)
    assert (sample["weight"] == 1).all() and sample["visible"].all()
    np.testing.assert_allclose(sample["joints_3d"], body(SHOWN[1]), atol=1e-6)


def numbers(views):
    return np.concatenate([np.append(view.image.ravel(), view.joints) for view in views])


class OwnZip(zipfile.ZipFile):
    """A zip that only the process which opened it may read: forked ones share their place in the file."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.process = os.getpid()

    def open(self, name):
        assert os.getpid() == self.process
        return super().open(name)


def test_forked_workers_read_the_zip_each_with_its_own_handle(layouts, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", OwnZip)
    _archive.cache_clear()
    data = Human36M(layouts["zip"], every=1, size=64, undistort=False)
    alone = numbers(data[2])  # the zip is open before this process forks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        loader = DataLoader(
            data, sampler=4 * [2], batch_size=1, num_workers=2, collate_fn=lambda batch: numbers(batch[0]),
            multiprocessing_context="fork",
        )  # fmt: skip
        read = list(loader)
    _archive.cache_clear()
    np.testing.assert_array_equal(read, 4 * [alone])


def test_it_can_be_sent_to_a_spawned_worker(layouts):
    data = Human36M(layouts["zip"], undistort=False)
    before = numbers(data[0])
    np.testing.assert_array_equal(numbers(pickle.loads(pickle.dumps(data))[0]), before)


def test_it_has_the_names_of_a_recording(layouts):
    data = Human36M(layouts["folder"], every=1, subjects=(9,))
    assert data.joints == JOINTS and data.bones == BONES and data.frames.tolist() == [0, 1]
    assert data.detections.shape == (4, 2, 17, 3) and (data.detections[..., 2] == 1).all()
    for v, (camera, expected) in enumerate(zip(data.cameras, rig(9), strict=True)):
        assert camera.size == (1000, 1000) and camera.name == CAMERAS[v]
        assert np.abs(data.detections[v, 1, :, :2] - pixels(expected, body(SHOWN[1]))).max() < 1e-6
    assert np.abs(data.views(1)[0].joints_3d - body(SHOWN[1])).max() < 1e-6
    with pytest.raises(ValueError, match="2 sets of cameras.*subjects="):
        _ = Human36M(layouts["folder"], every=1).cameras


def test_margin_widens_the_crop(layouts):
    view = Human36M(layouts["folder"], margin=1.5)[0][0]
    camera, X = rig(9)[0], body(SHOWN[0])
    box, size = square(camera, X), 256
    expected = (cropped(pixels(camera, X, distortion=False), box, size) - size / 2) / 1.5 + size / 2
    assert np.abs(view.joints - expected).max() < 0.01


# Which instants


def sequences(subject, frames):
    """Two sequences' instants; the second is damaged where the subject is 9."""
    return [(subject, a, b, i) for a, b in ((DIRECTIONS, 1), (GREETING, 2)) for i in range(1, frames + 1)]


def write_both(path, split, instants):
    name = {"train": "h36m_train.pkl", "test": "h36m_validation.pkl"}[split]
    write_toolbox(path / "toolbox", records(instants), name)
    write_karfly(path / "karfly", labels(instants))
    return path / "toolbox", path / "karfly"


def test_the_usual_splits(tmp_path):
    for path in write_both(tmp_path, "train", sequences(1, 12) + sequences(5, 12)):
        data = Human36M(path, "train")
        assert [i.image for i in data.instants] == [1, 6, 11, 4, 9, 2, 7, 12, 5, 10]
        assert [i.subject for i in data.instants] == 5 * [1] + 5 * [5]
        assert len(Human36M(path, "train", subjects=(1,))) == 5
        assert len(Human36M(path, "train", subjects=(1,), every=1)) == 24
        fault(path, r"nothing of subjects \[7\]", split="train", subjects=(1, 7))


def test_test_split_counts_what_is_left(tmp_path):
    for path in write_both(tmp_path, "test", sequences(11, 33) + sequences(9, 33)):  # sorted, whatever the file's order
        data = Human36M(path)
        assert data.instants == [_Instant(9, "Directions", 1, 1), _Instant(11, "Directions", 1, 64 - 33 + 1)]
        assert list(data.left_out) == ["damaged sequence"] and len(data.left_out["damaged sequence"]) == 33
        whole, greeting = (
            Human36M(path, damaged=True),
            [(9, "Greeting", 2, 32), (11, "Greeting", 2, 30)],
        )  # 33, 99 before
        assert whole.instants == [(9, "Directions", 1, 1), *greeting] and whole.left_out == {}


@pytest.mark.parametrize("action, subaction", [(GREETING, 2), (SITTING_DOWN, 2), (WAITING, 1)])
def test_damaged_sequences_are_left_out(tmp_path, action, subaction):
    instants = [(s, action, b, 3) for s in (9, 11) for b in (1, 2)]
    for path in write_both(tmp_path, "test", instants):
        data, name = Human36M(path, every=1), ACTIONS[action - 2]
        assert data.left_out == {"damaged sequence": [_Instant(9, name, subaction, 3)]}
        assert len(data) == 3 and len(Human36M(path, every=1, damaged=True)) == 4


def test_an_instant_without_all_cameras_is_left_out_and_named(tmp_path):
    everything = [r for r in records(SHOWN) if (r["subject"], r["camera_id"]) != (11, 0)]
    table = labels(SHOWN)
    table["table"]["bbox_by_camera_tlbr"][2, 0] = 0
    gone = [_Instant(11, "Waiting", 2, 1)]
    data = Human36M(write_toolbox(tmp_path / "a", everything), every=1)
    assert data.left_out == {"no camera 54138969": gone} and len(data) == 2
    data = Human36M(write_karfly(tmp_path / "b", table), every=1)
    assert data.left_out == {"empty box in 54138969": gone} and len(data) == 2
    for path in (tmp_path / "a", tmp_path / "b"):
        fault(path, r"nothing left of subjects \(11,\).*54138969': 1", subjects=(11,))


@pytest.mark.parametrize("field", ["box", "scale"])
def test_an_empty_box_is_left_out_and_named(tmp_path, field):
    everything = records(SHOWN)
    for record in everything:
        if field == "box":  # others have no center and scale
            del record["center"], record["scale"]
    everything[5]["box"] = np.array([300.0, 400, 300, 700])  # of camera 1, second instant
    if field == "scale":
        everything[5]["scale"] = (0.0, 0.0)
    data = Human36M(write_toolbox(tmp_path, everything), every=1)
    assert data.left_out == {"empty box in 55011271": [_Instant(11, "Waiting", 2, 1)]}
    assert data.instants == [_Instant(9, "Directions", 1, 1), _Instant(9, "Directions", 1, 6)]


def test_the_box_is_enough(layouts, tmp_path):
    everything = without("center", "scale")
    data = Human36M(write_toolbox(tmp_path, everything), every=1)
    for shots, others in zip(data.shots, Human36M(layouts["folder"], every=1).shots, strict=True):
        for a, b in zip(shots, others, strict=True):
            np.testing.assert_allclose([*a.centre, a.side], [*b.centre, b.side])


# Pictures


def test_1002_rows_are_cut_below(layouts, tmp_path):
    path = shutil.copytree(layouts["folder"], tmp_path / "h36m")
    before = Human36M(path)[0][0]
    file = path / "images" / toolbox_record(SHOWN[0], 0)["image"]
    image = cv2.imread(str(file))[..., ::-1]
    file.unlink()
    cv2.imwrite(str(file.with_suffix(".png")), np.pad(image, ((0, 2), (0, 0), (0, 0)))[..., ::-1])
    file.with_suffix(".png").rename(file)  # decoded by content; JPEG would change the picture again
    np.testing.assert_array_equal(Human36M(path)[0][0].image, before.image)
    write_jpeg(file, image[:998])
    for data, got in ((file.read_bytes(), "1000×998"), (file.read_bytes()[:100], "none"), (b"", "none")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"ca_01_000001\.jpg: .*1000×1002 px, got {got}"):
            Human36M(path)[0]


@pytest.mark.parametrize("name, picture", [("folder", r"ca_03_000001\.jpg"), ("karfly", r"58860488/img_000001\.jpg")])
def test_a_missing_picture_is_named(layouts, tmp_path, name, picture):
    path = shutil.copytree(layouts[name], tmp_path / "h36m")
    data = Human36M(path, every=1)
    (path / data.shots[0][2].picture).unlink()
    with pytest.raises(FileNotFoundError, match=picture):
        data[0]
    assert len(data[1]) == 4


def write_zip(path, contents=None):
    """The toolbox's annotations with a zip of the named pictures, or with these bytes in the zip's place."""
    write_toolbox(path, records(SHOWN)).joinpath("images").rmdir()
    if isinstance(contents, bytes):
        (path / "images.zip").write_bytes(contents)
    else:
        with zipfile.ZipFile(path / "images.zip", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    return path


def test_faults_of_the_zip_are_named(tmp_path):
    path = write_zip(tmp_path / "0", {f"images/{record['image']}": b"\0" * 50 for record in records(SHOWN)[:4]})
    broken = (path / "images.zip").read_bytes().replace(b"\0" * 50, b"\1" * 50)
    other = write_zip(tmp_path / "1", {"images/readme": b""})
    for path, message, error in (
        (path, r"images\.zip.*images/.*ca_01_000001\.jpg.*got none", ValueError),
        (write_zip(tmp_path / "2", broken), r"images\.zip.*ca_01_000001\.jpg.*CRC", ValueError),
        (other, r"images\.zip: no picture images/s_09_act_02_subact_01_ca_01/", FileNotFoundError),
        (write_zip(tmp_path / "3", b"no zip"), r"images\.zip", ValueError),
    ):
        with pytest.raises(error, match=message):
            Human36M(path)[0]


# Joint orders and units


def changed(field, change, content=None):
    """Toolbox records with a field of each changed."""
    content = records(SHOWN) if content is None else content
    for record in content:
        record[field] = change(record[field])
    return content


def to_karfly(x):
    return x[TO_KARFLY]


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda: changed("joints_3d_camera", to_karfly), "joints_3d_camera is in karfly's joint order"),
        (lambda: changed("joints_2d", to_karfly), "joints_2d is in karfly's joint order"),
        (lambda: changed("joints_2d", lambda x: x[MIRRORED]), "left and right are swapped"),
        (lambda: changed("joints_2d", lambda x: x[::-1]), "no known joint order"),
        (lambda: changed("joints_2d", lambda x: x + 20), "28 px off .*no known joint order"),
        (lambda: changed("joints_2d", to_karfly, changed("joints_3d_camera", to_karfly)), "wrong joint order"),
        (lambda: changed("joints_3d_camera", lambda X: X / 1000), "disagree"),
    ],
)
def test_a_wrong_joint_order_is_named(tmp_path, content, message):
    fault(write_toolbox(tmp_path, content()), rf"h36m_validation\.pkl.*{message}", every=1)


def test_rounded_2d_joints_are_no_fault(tmp_path):
    write_toolbox(tmp_path, changed("joints_2d", np.round))
    write_toolbox(tmp_path, changed("joints_3d_camera", np.float32, changed("joints_2d", lambda x: x + 2)))
    assert len(Human36M(tmp_path, every=1)) == 3


def test_views_that_disagree_are_named(tmp_path):
    everything = records(SHOWN)
    moved = everything[4]  # camera 1, second instant
    moved["joints_3d_camera"] = moved["joints_3d_camera"] * 1.01  # the same projection
    write_toolbox(tmp_path, everything)
    fault(tmp_path, r"S9 Directions-1 image 6: .*disagree in the world, by \d\d mm", every=1)
    assert len(Human36M(tmp_path, every=2)) == 2  # what is not taken is not judged


def test_karflys_order_and_units_are_checked_by_bones(tmp_path):
    table = labels(SHOWN)
    table["table"]["keypoints"] = table["table"]["keypoints"][:, TO_TOOLBOX]
    fault(write_karfly(tmp_path, table), r"GTbboxes\.npy: wrong joint order")
    table = labels(SHOWN)
    table["table"]["keypoints"] /= 1000
    fault(write_karfly(tmp_path, table), r"GTbboxes\.npy: .*must be in mm")


@pytest.mark.parametrize("subject", people.SUBJECTS)
def test_bones_are_shorter_in_their_own_order_in_every_action(subject):
    X = np.stack([people.pose(subject, action, frame, 3) for action in people.ACTIONS for frame in (0, 40)])
    for x in X:
        _check_bones("own", x[None])
        for order in (TO_KARFLY, TO_TOOLBOX):
            with pytest.raises(ValueError, match="other: wrong joint order"):
                _check_bones("other", x[None, order])


# Faults, each told by its name


def test_faults_of_arguments_are_named(layouts):
    path = layouts["folder"]
    fault(path, "unknown split 'validation': there are train, test", split="validation")
    fault(path, r"subjects of 'test' are \(9, 11\), got \(1,\)", subjects=(1,))
    fault(path, r"subjects of 'test'", subjects=())
    for name in ("every", "size"):
        for value in (0, -1, 2.0):
            fault(path, f"{name} must be an integer", **{name: value})
    fault(path, r"neither annot/h36m_train\.pkl nor", FileNotFoundError, split="train")
    with pytest.raises(IndexError):
        Human36M(path)[1]


def test_faults_of_the_folder_are_named(tmp_path):
    fault(tmp_path / "none", "none: neither annot/h36m_validation.pkl nor extra/human36m", FileNotFoundError)
    write_toolbox(tmp_path / "a", records(SHOWN)).joinpath("images").rmdir()
    fault(tmp_path / "a", r"no images or images\.zip beside .*h36m_validation\.pkl", FileNotFoundError)
    write_karfly(tmp_path / "b", labels(SHOWN)).joinpath("processed").rmdir()
    fault(tmp_path / "b", r"no processed beside .*GTbboxes\.npy", FileNotFoundError)
    write_toolbox(tmp_path / "b", records(SHOWN))
    fault(tmp_path / "b", r"several files.*validation\.pkl.*GTbboxes\.npy")


def test_annotations_may_lie_in_the_folder_itself(tmp_path):
    shutil.move(write_toolbox(tmp_path / "a", records(SHOWN)) / "annot" / "h36m_validation.pkl", tmp_path / "a")
    write_karfly(tmp_path / "b", labels(SHOWN), "human36m-multiview-labels-GTbboxes.npy")
    write_karfly(tmp_path / "b", labels(SHOWN[:1]), "extra/human36m-multiview-labels-SSDbboxes.npy")  # a detector's
    for path in (tmp_path / "a", tmp_path / "b"):
        assert len(Human36M(path, every=1)) == 3


def test_other_npy_files_are_named(tmp_path):
    path = write_karfly(tmp_path, labels(SHOWN))
    file = path / "extra" / "human36m-multiview-labels-GTbboxes.npy"
    for content in (np.zeros(3), {"a": 1}, [1, 2], {**labels(SHOWN), "table": np.zeros(3)}):
        np.save(file, content)
        fault(path, r"GTbboxes\.npy is not (the labels|a pickle)")
    np.save(file, {**labels(SHOWN), "camera_names": [*CAMERAS[:2], "12345678", CAMERAS[3]]})
    fault(path, r"GTbboxes\.npy is not the labels.*58860488")
    file.write_bytes(b"no numpy file")
    fault(path, r"GTbboxes\.npy")


def broken(field, value, camera=False):
    content = records(SHOWN)
    content[7] |= {"camera": content[7]["camera"] | {field: value}} if camera else {field: value}
    return content


@pytest.mark.parametrize(
    "content, pattern",
    [
        (lambda: {"a": 1}, "expected a list of dicts"),
        (list, "nothing left"),
        (lambda: [1], "record 0: expected a list of dicts"),
        (lambda: without("joints_2d"), "record 0: missing joints_2d"),
        (lambda: without("box", "scale"), "record 0: missing scale"),
        (lambda: broken("camera_id", 4), r"record 7: .*camera_id 0 to 3: .* are \[9, 2, 1, 6, 4\]"),
        (lambda: broken("subject", "S9"), "record 7: expected whole numbers"),
        (lambda: broken("action", 1), "record 7: .*action 2 to 16"),
        (lambda: records(SHOWN) + records(SHOWN)[5:6], "S11 Waiting-2 image 1, camera 55011271: there are two"),
        (lambda: broken("joints_3d_camera", np.zeros((16, 3))), r"58860488: joints_3d_camera .*\(17, 3\)"),
        (lambda: broken("joints_2d", np.full((17, 2), np.nan)), "image 6, camera 58860488: joints_2d .*not finite"),
        (lambda: broken("joints_2d", None), "image 6, camera 58860488: joints_2d must be numbers"),
        (lambda: broken("scale", (np.nan, 1)), "image 6.*scale has a number that is not finite"),
        (lambda: broken("camera", None), "image 6, camera 58860488: R must be numbers"),
        (lambda: broken("R", np.ones((3, 3)), True), "image 6, camera 58860488: .*R is not a rotation"),
        (lambda: broken("fx", np.zeros(2), True), "image 6, camera 58860488: fx must be numbers"),
    ],
)  # fmt: skip
def test_faults_of_records_are_named(tmp_path, content, pattern):
    fault(write_toolbox(tmp_path, content()), rf"(?s)h36m_validation\.pkl.*{pattern}", every=1)
