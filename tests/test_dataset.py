"""The benchmark's scenes and samples: fixed pictures, whole files, cameras that stay right under augmentation."""

import hashlib
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from recorded import write_json, write_recording

from epiutils.cameras import Camera
from epiutils.data import dataset, people, raycast
from epiutils.data.dataset import SPLITS, Augmentation, Benchmark, MultiView, open_dataset, open_instant
from epiutils.data.views import JOINTS
from epiutils.heatmaps import HEATMAP_FROM_INPUT, decode

# Of the fixed test set: its instants, and poses, cameras and what is visible of every 42nd of them.
INSTANTS = "f4d4f216"
SCENES = "2e1b511f"
TOML = Path(people.__file__).with_suffix(".toml")
SAME = {"image", "target", "weight", "joints", "visible", "joints_3d", "K", "R", "t", "F"}


def digest(*parts) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()[:8]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def test_set(cache) -> Benchmark:
    return Benchmark("test", cache)


@pytest.fixture(scope="module")
def scenes(test_set) -> list:
    return [test_set[i] for i in (0, 100, 419)]


# The splits


def test_splits_have_the_originals_subjects_and_share_no_seed():
    assert {i.subject for i in Benchmark("train").instants} == {1}
    assert {i.subject for i in Benchmark("test").instants} == {9}
    assert {i.subject for i in Benchmark("train-large").instants} == {1, 5, 6, 7, 8}
    assert {i.subject for i in Benchmark("test-large").instants} == {9, 11}
    assert len(Benchmark("test")) >= 400
    assert Benchmark("test-large").instants[: len(Benchmark("test"))] == Benchmark("test").instants
    for train in ("train", "train-large"):
        assert not {i.seed for i in Benchmark(train).instants} & {i.seed for i in Benchmark("test-large").instants}
    for split in SPLITS:
        asked = Benchmark(split).instants
        assert len(set(asked)) == len(asked)
        assert {i.action for i in asked} == set(people.ACTIONS)
        performances = {(i.subject, i.action, i.seed) for i in asked}
        assert len(performances) == len({seed for *_, seed in performances})  # a room of its own
    with pytest.raises(ValueError, match="unknown split 'val': there are train, train-large, train-strong"):
        Benchmark("val")


def test_the_test_set_is_fixed(test_set):
    chosen = Benchmark("test").instants
    assert digest(repr([tuple(vars(i).values()) for i in chosen]).encode()) == INSTANTS
    parts = []
    for i in range(0, len(chosen), 42):
        for view in test_set[i]:
            rounded = [np.round(a, 4) + 0.0 for a in (view.joints_3d, view.joints, view.camera.P)]
            small = cv2.resize(view.image, (8, 8), interpolation=cv2.INTER_AREA) // 16  # the picture, but for rounding
            parts += [*rounded, view.visible, small]
    assert digest(*parts) == SCENES


# The cache


def test_the_cache_gives_what_was_rendered(cache, scenes, test_set):
    for i, views in zip((0, 100, 419), scenes, strict=True):
        again, rendered = test_set[i], people.scene(**vars(test_set.instants[i]))
        for a, b, c in zip(views, again, rendered, strict=True):
            np.testing.assert_array_equal(a.image, c.image)
            np.testing.assert_array_equal(b.image, c.image)
            assert b.camera.name == c.camera.name and b.camera.size == c.camera.size
            for field in ("K", "R", "t"):
                np.testing.assert_array_equal(getattr(b.camera, field), getattr(c.camera, field))
            for field in ("joints", "joints_3d", "visible"):
                np.testing.assert_array_equal(getattr(b, field), getattr(c, field))


def test_training_pictures_are_nearly_those_rendered(cache):
    train = Benchmark("train", cache)
    first, again, rendered = train[7], train[7], people.scene(**vars(train.instants[7]))
    for a, b, c in zip(first, again, rendered, strict=True):
        np.testing.assert_array_equal(a.image, b.image)  # the first reading is what all later ones are
        assert 0 < np.abs(a.image.astype(float) - c.image).mean() < 5


def test_no_half_files_and_damage_is_named(cache, test_set, monkeypatch):
    test_set[3]
    path = test_set._path(test_set.instants[3])
    assert not [p for p in path.parent.iterdir() if p.suffix != ".npz"]
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:5000] + b"?" + whole[5001:], b""):  # cut off, changed inside, empty
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{path.name} is not a whole scene: .*rendered anew"):
            views = test_set[3]
        for view, again in zip(views, test_set[3], strict=True):
            np.testing.assert_array_equal(view.image, again.image)
        assert path.read_bytes() == whole
    path.unlink()
    monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        test_set[3]
    assert not path.exists() and not [p for p in path.parent.iterdir() if p.suffix != ".npz"]


UNGUARDED = """
import sys, warnings
from epiutils.data.dataset import Benchmark
print("begins")
with warnings.catch_warnings(record=True) as said:
    benchmark = Benchmark("test", sys.argv[1]).prepare(workers=2, progress=False, only=range(20))
print(len(list(benchmark.folder.iterdir())), *(w.message for w in said), sep="|")
"""


def test_prepare_renders_what_is_missing_in_parallel_or_in_one_process(tmp_path):
    """A script that its own workers would run again gets its pictures from one process, and is told why."""
    script, wanted = tmp_path / "script.py", range(20)
    script.write_text(UNGUARDED)
    ran = subprocess.run([sys.executable, script, tmp_path / "one"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stderr == ""
    *begun, last = ran.stdout.splitlines()
    assert last.startswith("20|no workers: rendering in one process; ") and '`if __name__ == "__main__":`' in last
    assert 2 <= len(begun) <= 3 and set(begun) == {"begins"}  # each worker as far as `prepare`, and no further
    one = Benchmark("test", tmp_path / "one")
    stamps = {p.name: p.stat().st_mtime_ns for p in one.folder.iterdir()}
    one.prepare(progress=False, only=wanted)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in one.folder.iterdir()}  # nothing twice
    two = Benchmark("test", tmp_path / "two").prepare(workers=2, progress=False, only=wanted)
    assert stamps.keys() == {p.name for p in two.folder.iterdir()} and len(stamps) == 20
    for p in one.folder.iterdir():
        with np.load(p) as a, np.load(two.folder / p.name) as b:
            assert all(np.array_equal(a[key], b[key]) for key in a.files)


CHANGES = {  # of people.py, raycast.py, people.toml: text, its replacement, and whether pictures may change
    "code": ("people.py", "rng.uniform(0.85, 1.15)", "rng.uniform(0.85, 1.25)", True),
    "rays": ("raycast.py", "0.14 * normal[2]", "0.15 * normal[2]", True),
    "docstring": ("people.py", "metres in the world, 50 frames", "metres in this world, 50 frames", False),
    "comment": ("raycast.py", "# the room", "# a room", False),
    "table": ("people.toml", "height = 1.86", "height = 1.87", True),
    "title": ("people.toml", "# How they move", "# Motions", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_is_of_the_renderers_code_and_tables_but_not_of_its_comments(monkeypatch, tmp_path, change):
    name, old, new, differs = CHANGES[change]
    for module in (people, raycast):
        copied = shutil.copy(module.__file__, tmp_path)
        monkeypatch.setattr(module, "__file__", copied)
    shutil.copy(TOML, tmp_path)
    before, text = dataset._version.__wrapped__(), (tmp_path / name).read_text("utf-8")
    assert before == dataset._version.__wrapped__() == dataset._version() and old in text
    (tmp_path / name).write_text(text.replace(old, new), "utf-8")
    assert (dataset._version.__wrapped__() != before) == differs


def test_a_cache_is_of_what_cameras_and_files_do(monkeypatch):
    cases = {
        (Camera, "crop"): lambda crop: (
            lambda self, A, size: crop(self, A + np.array([[0, 0, 0.01]] + 2 * [3 * [0]]), size)
        ),
        (Camera, "project"): lambda project: lambda self, X: project(self, X) + 1e-3,
        (cv2, "imencode"): lambda encode: lambda kind, image, options: encode(kind, image, [options[0], 90]),
        (people, "JOINTS"): lambda names: names[::-1],
    }
    found = {dataset._version()}
    for (owner, name), change in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, change(getattr(owner, name)))
            found.add(dataset._version.__wrapped__())
    assert len(found) == 5


def test_the_cache_may_be_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "elsewhere"))
    assert Benchmark("test").folder.parent == tmp_path / "elsewhere"


# Samples


def test_a_sample_has_the_documented_shapes(scenes):
    sample = MultiView(scenes)[1]
    assert sample.keys() == SAME
    assert sample["image"].shape == (4, 256, 256, 3) and sample["image"].dtype == torch.uint8
    assert sample["target"].shape == (4, 17, 64, 64) and sample["weight"].shape == (4, 17)
    assert sample["joints"].shape == (4, 17, 2) and sample["visible"].shape == (4, 17)
    assert sample["F"].shape == (4, 4, 3, 3) and sample["K"].shape == (4, 3, 3)
    np.testing.assert_array_equal(sample["image"][2], scenes[1][2].image)


@pytest.mark.parametrize("augmentation", [None, Augmentation(), Augmentation(0.4, 180, 0.2, 1)])
@pytest.mark.parametrize("size", [256, 128])
def test_cameras_follow_crop_and_augmentation(scenes, augmentation, size):
    data = MultiView(scenes, augmentation, size, seed=3)
    for index, epoch in ((0, 0), (1, 5), (2, 1)):
        s = {k: v.numpy() for k, v in data.sample(index, epoch).items()}
        x_cam = np.einsum("vij,nj->vni", s["R"], s["joints_3d"]) + s["t"][:, None]
        x = np.einsum("vij,vnj->vni", s["K"], x_cam)
        np.testing.assert_allclose(x[..., :2] / x[..., 2:], s["joints"], atol=1e-6)
        on_map = s["joints"] @ HEATMAP_FROM_INPUT[:2, :2].T
        for a in range(4):
            assert not s["F"][a, a].any()
            for b in range(4):
                if a != b:
                    lines = np.column_stack([on_map[a], np.ones(17)]) @ s["F"][a, b].T
                    distance = (lines[:, :2] * on_map[b]).sum(1) + lines[:, 2]
                    assert np.abs(distance / np.linalg.norm(lines[:, :2], axis=1)).max() < 1e-6


def test_the_picture_moves_with_its_joints():
    """A red dot drawn at a joint is still there after a random crop."""
    views = people.scene(9, "wave", 5, 1)
    for view in views:
        view.image[:] = 0
        cv2.circle(view.image, tuple(np.rint(view.joints[10]).astype(int)), 5, (255, 0, 0), -1)
    data = MultiView([views], Augmentation(colour=0), seed=1)
    for epoch in range(4):
        s = data.sample(0, epoch)
        for image, joint in zip(s["image"].double(), s["joints"][:, 10], strict=True):
            red = image[..., 0] / image[..., 0].sum()
            y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
            centre = torch.stack([(red * x).sum(), (red * y).sum()])
            assert (centre - joint).norm() < 1.0


def test_targets_are_where_the_joints_are(scenes):
    s = MultiView(scenes, Augmentation(), seed=2).sample(0, 0)
    points, peak = decode(s["target"], "argmax")
    inside = ((s["joints"] > 0) & (s["joints"] < 254)).all(-1)
    assert inside.float().mean() > 0.8 and (peak[inside] == 1).all()
    assert (points[inside] - s["joints"][inside] / 4).abs().max() <= 0.5 + 1e-6
    assert not s["visible"][((s["joints"] < -0.5) | (s["joints"] > 255.5)).any(-1)].any()


def test_samples_depend_on_seed_epoch_and_index_only(scenes):
    data = MultiView(scenes, Augmentation(), seed=4)
    first = data.sample(1, 2)
    data.sample(0, 9), data[2]
    for key, value in data.sample(1, 2).items():
        assert torch.equal(value, first[key]), key
    for other in (data.sample(1, 3), MultiView(scenes, Augmentation(), seed=5).sample(1, 2)):
        assert not torch.equal(other["image"], first["image"])
    assert torch.equal(data[1]["image"], data.sample(1, 0)["image"])
    image = scenes[1][0].image.copy()
    data[1]
    np.testing.assert_array_equal(scenes[1][0].image, image)


def test_colours_change_within_bounds(scenes):
    view, rng = scenes[0][0], np.random.default_rng(0)
    plain = Augmentation(0, 0, 0, 0)(view, rng)
    assert np.abs(plain.image.astype(int) - view.image).max() <= 1
    means = np.array([Augmentation(0, 0, 0, 1)(view, rng).image.mean((0, 1)) for _ in range(40)])
    assert means.std(0).min() > 8 and 30 < means.mean() < 225


@pytest.mark.parametrize("seed", range(3))
def test_hiding_paints_over_some_joints_and_says_which(scenes, seed):
    """Where a joint is said to be seen still, its pixel is as it was; where it is not any more, a patch lies."""
    view, hides = scenes[0][seed], Augmentation(0, 0, 0, 0, hiding=2)
    plain = Augmentation(0, 0, 0, 0)(view, np.random.default_rng(seed))
    lost = kept = 0
    for k in range(8):
        hidden = hides(view, np.random.default_rng((seed, k)))
        np.testing.assert_array_equal(hidden.joints, plain.joints)
        changed = (hidden.image != plain.image).any(-1)
        assert changed.mean() < 0.5
        x, y = np.round(plain.joints).astype(int).T
        assert not (changed[y, x] & hidden.visible).any() and not (hidden.visible & ~plain.visible).any()
        lost += (plain.visible & ~hidden.visible & changed[y, x]).sum()
        kept += (plain.visible & hidden.visible).sum()
    assert lost > 8 and kept > 8


def test_workers_give_the_same(scenes):
    data = MultiView(scenes, Augmentation(), seed=6)
    context = multiprocessing.get_context("spawn")
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context=context)
    batch = next(iter(loader))
    for key, value in data[1].items():
        assert torch.equal(batch[key][1], value), key


# An instant that exists


def test_the_instant_shown_is_one_that_most_cameras_see(tmp_path):
    write_recording(tmp_path, frames=range(100, 110), n=3)
    for camera, seen in (("cam01", range(100, 110)), ("cam02", range(103, 107)), ("cam03", range(106, 110))):
        for number in set(range(100, 110)) - set(seen):
            write_json(tmp_path / "pose" / f"{camera}_json" / f"{camera}_{number:012}_keypoints.json", [])
    data = open_dataset(str(tmp_path))
    assert dataset._best_instant(data, 20) == (data, 106) == dataset._best_instant(data, 200)
    both = open_dataset(str(tmp_path), cameras=["cam03", "cam02"])
    assert [camera.name for camera in both.cameras] == ["cam03", "cam02"] and dataset._best_instant(both, 20)[1] == 106
    write_json(tmp_path / "pose" / "cam02_json" / "cam02_000000000106_keypoints.json", [])
    less, frame = dataset._best_instant(open_dataset(str(tmp_path)), 20)  # no instant of all three: those that see it
    assert frame == 103 and [camera.name for camera in less.cameras] == ["cam01", "cam02"]
    assert less.detections.shape == (2, 10, 25, 3) and len(less.views(frame)) == less.status.shape[0] == 2
    assert len(less.videos) == len(less.person) == 2


def test_embedded_people_are_shown_at_the_instant_asked_for():
    data, frame = open_instant(20, "", 5, "carry")
    assert frame == 20 and (data.subject, data.action) == (5, "carry")


def test_a_joint_that_is_not_there_is_answered_with_those_that_are():
    assert open_dataset().joints.index("head") == 10 and open_dataset().joints == JOINTS
    with pytest.raises(ValueError, match="no joint 'tail'; there are: root, rhip, .*rwri$"):
        open_dataset().joints.index("tail")
