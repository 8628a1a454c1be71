"""Heatmaps that are computed once, and the scores of fusing them, against literal loops."""

import functools
import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from files36m import labels, write_jpeg, write_karfly
from rigs import look_at, random_maps
from scenes import JOINTS, SHAPE, WEIGHTS, found_literally, literal_views, made_up, repaired, toy
from torch import nn

from epiutils import cameras
from epiutils.cameras import Camera
from epiutils.data import bodies, people
from epiutils.data import dataset as data_sets
from epiutils.data.dataset import SPLITS, Benchmark, MultiView
from epiutils.data.human36m import Human36M
from epiutils.data.views import Predicted
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import accuracy, render
from epiutils.metrics import bootstrap, joint_mean
from epiutils.networks.hrnet import load_checkpoint, normalise, save_checkpoint
from epiutils.studies import predicted as studied
from epiutils.studies.fitting import PAIRS, FusedNetwork, train_pairs
from epiutils.studies.predicted import (
    choose,
    effect,
    found_by,
    freed,
    heatmaps_once,
    kept,
    peaks,
    summary,
    training_pictures,
    triangulated,
)
from epiutils.studies.runs import WithNext

TEST = ((9,), 1, 1, 30_000)  # 14 instants


class Sources(nn.Module):
    """Every view's maps are replaced by the next view's."""

    def all_views(self, heatmaps, F):
        assert not torch.is_grad_enabled() and heatmaps.shape == (1, 4, JOINTS, *SHAPE) and F.shape == (1, 4, 4, 3, 3)
        return heatmaps.roll(-1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_scored_views_are_a_literal_loop(seed):
    predicted, module = made_up(seed, twice=0.5), repaired()
    predicted.target[:, :, 1] = 0  # a joint that is nowhere
    before = {key: value.clone() for key, value in vars(predicted).items()}
    right, alone = found_by(module, predicted), found_by(None, predicted)
    fused = literal_views(module, predicted.output, predicted.F).detach()
    np.testing.assert_array_equal(right, found_literally(fused, predicted.target))
    np.testing.assert_array_equal(alone, found_literally(predicted.output, predicted.target))
    assert right.shape == (3, 4, JOINTS) and (right != alone).any() and torch.is_grad_enabled()
    expected = accuracy(predicted.output.flatten(0, 1), predicted.target.flatten(0, 1))
    assert joint_mean(alone) == pytest.approx(expected, abs=1e-12) and 0 < expected < 1
    crossed = found_literally(predicted.output.roll(-1, 1), predicted.target)  # scored against the reference view
    np.testing.assert_array_equal(found_by(Sources(), predicted), crossed)
    assert np.nanmin(found_by(None, replace(predicted, output=predicted.target))) == 1
    assert all(torch.equal(value, before[key]) for key, value in vars(predicted).items())


@pytest.mark.parametrize("seed", range(3))
def test_the_pair_module_of_every_view_and_the_next_is_a_literal_loop(seed):
    predicted, settings = made_up(seed, twice=0.5), {"shape": SHAPE, "initial": WEIGHTS / 30}
    right, expected = found_by(WithNext(OriginalFusion(1.5, **settings)), predicted), np.empty((3, 4, JOINTS))
    dense = OriginalFusion(1.5, method="dense", **settings).requires_grad_(False)
    for n, r in np.ndindex(3, 4):
        s = (r + 1) % 4
        maps = dense(predicted.output[n, s][None], predicted.output[n, r][None], predicted.F[n, s, r])
        expected[n, r] = found_literally(maps, predicted.target[n, r][None])[0]
    np.testing.assert_array_equal(right, expected)
    assert 0 < np.nanmean(right) < 1


@pytest.mark.parametrize("seed", range(3))
def test_the_summary_splits_the_accuracy_into_that_of_visible_and_of_hidden_joints(seed):
    predicted = made_up(seed, scenes=4, twice=0.5)
    right = found_by(None, predicted)
    given = summary(right, predicted.visible)
    output, target, seen = (a.flatten(0, 1) for a in (predicted.output, predicted.target, predicted.visible))
    assert given.keys() == {"accuracy", "accuracy_ci", "accuracy_visible", "accuracy_occluded", "n"}
    assert given["n"] == np.isfinite(right).sum() and given["accuracy"] == joint_mean(right)
    assert given["accuracy"] == pytest.approx(accuracy(output, target), abs=1e-12)
    for key, counted in (("accuracy_visible", seen), ("accuracy_occluded", ~seen)):
        assert given[key] == pytest.approx(accuracy(output, target * counted[..., None, None]), abs=1e-12)
    low, high = given["accuracy_ci"]
    nobody = np.full_like(right[0], np.nan)  # four instants are a performance of three, and one of one
    performances = [np.concatenate(three) for three in (right[:3], (right[3], nobody, nobody))]
    assert low < given["accuracy"] < high and (low, high) == bootstrap(np.stack(performances))
    other = found_by(Sources(), predicted)
    both = summary(np.stack([right, other]), predicted.visible)
    assert both.pop("accuracy_by_seed") == [joint_mean(right), joint_mean(other)]
    mean = summary((right + other) / 2, predicted.visible)
    assert both | {"accuracy_ci": 0} == mean | {"accuracy_ci": 0}
    assert np.diff(both["accuracy_ci"]) > np.diff(mean["accuracy_ci"])  # the seeds' part
    assert summary(right[None], predicted.visible) == given  # one seed says nothing of seeds
    none_hidden = summary(right, torch.ones_like(predicted.visible))
    assert none_hidden["accuracy_visible"] == given["accuracy"] and math.isnan(none_hidden["accuracy_occluded"])


def test_an_effect_is_the_paired_difference_over_scenes_of_the_mean_over_seeds():
    rng = np.random.default_rng(1)
    values, against = (rng.random((seeds, 39, 4, 5)) < p for seeds, p in ((3, 0.6), (1, 0.4)))
    change, interval = effect(values.astype(float), against.astype(float))
    assert change == pytest.approx(values.mean() - against.mean())
    both = [
        [np.stack([np.concatenate(v[k : k + 3]) for k in range(0, 39, 3)]).astype(float) for v in seeds]
        for seeds in (values, against)
    ]
    assert interval == bootstrap(*both) and interval[0] < change < interval[1]
    assert effect(values.mean(0), values.mean(0)) == (0, (0, 0))


# Some instants, some views, and what is triangulated


def test_some_instants_and_some_views_are_those_of_every_field():
    predicted = made_up(scenes=4)
    for instants in (slice(1, None, 2), [3, 0], np.array([2])):
        some = predicted[instants]
        for name, value in vars(predicted).items():
            assert torch.equal(getattr(some, name), value[instants]), name
    some = predicted.of_views([2, 0])
    assert torch.equal(some.F, predicted.F[:, [2, 0]][:, :, [2, 0]]) and torch.equal(
        some.joints_3d, predicted.joints_3d
    )
    for name in ("output", "K", "R", "t", "joints", "target", "weight", "visible"):
        assert torch.equal(getattr(some, name), getattr(predicted, name)[:, [2, 0]]), name
    assert len(predicted[:0]) == 0 and replace(predicted, target=None)[1:].target is None
    X = torch.tensor([0.3, -0.2, 1.1], dtype=predicted.K.dtype)
    image = (predicted.K @ (predicted.R @ X + predicted.t)[..., None])[..., 0]
    np.testing.assert_allclose(predicted.P @ torch.cat([X, X.new_ones(1)]), image)


@pytest.mark.parametrize("seed", range(2))
def test_what_perfect_views_see_is_triangulated_to_the_joints_and_a_lost_one_is_rejected(seed):
    predicted = made_up(seed, shape=(60, 80))
    x, points = triangulated(None, predicted)
    inside, true = torch.isfinite(predicted.joints).all(-1).numpy(), predicted.joints_3d.numpy()
    np.testing.assert_allclose(x.swapaxes(1, 2)[inside], predicted.joints.numpy()[inside], atol=0.1)
    assert list(points) == ["DLT", "weighted", "robust"]
    for X in points.values():
        np.testing.assert_allclose(X, true, atol=2e-3)
    predicted.output[:, 2] = 0.1 * predicted.output[:, 2].roll(15, -1)  # elsewhere, and faint
    off = {name: np.linalg.norm(X - true, axis=-1).mean() for name, X in triangulated(None, predicted)[1].items()}
    assert off["robust"] < 2e-3 < off["weighted"] < 0.3 * off["DLT"]
    predicted.output[:, 2] = 0  # an empty map says nothing
    np.testing.assert_allclose(triangulated(None, predicted)[1]["DLT"], true, atol=2e-3)


def test_peaks_are_in_pixels_of_the_input_and_as_high_as_the_maps():
    maps = render(torch.tensor([[[20.3, 10.6]], [[5.0, 7.5]]]).double(), SHAPE, peak=torch.tensor([[0.8], [0.3]]))
    where, heights = peaks(maps)
    np.testing.assert_allclose(where, 4 * np.array([[[20.3, 10.6], [5.0, 7.5]]]), atol=1e-3)
    assert heights.shape == (1, 2) and heights[0, 0] == maps[0].max()


# What is kept in the cache


def counting(values) -> Callable:
    """A function that gives copies of these values, and counts how often it was asked."""

    def make():
        make.calls += 1
        return {name: value.clone() for name, value in values.items()}

    make.calls = 0
    return make


def test_the_same_result_is_made_once_and_read_as_it_was(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "new"))
    values = {"a": random_maps(3, 5, 7), "b": torch.arange(4), "c": random_maps(2).half()}
    make = counting(values)
    for _ in range(3):
        given = kept("some", [1, "two", [3.0, None], {"four": slice(5)}], make)
        assert all(
            torch.equal(value, given[name]) and value.dtype == given[name].dtype for name, value in values.items()
        )
    assert make.calls == 1 and capsys.readouterr().err == ""
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("some-") and torch.load(path, weights_only=True).keys() == given.keys()


DAMAGE = {
    "a flipped bit": lambda old, at, rng: old[:at] + bytes([old[at] ^ 1 << int(rng.integers(8))]) + old[at + 1 :],
    "a page of zeros": lambda old, at, rng: (old[: (at := at // 512 * 512)] + bytes(512) + old[at + 512 :])[: len(old)],
    "truncated": lambda old, at, rng: old[:at],
    "longer": lambda old, at, rng: old + b"0",
    "another file": lambda old, at, rng: rng.bytes(len(old)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_made_anew_and_said(monkeypatch, tmp_path, capsys, how):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    values = 1 + random_maps(5, 7, 11)
    make = counting({"values": values})
    kept("some", [1], make)
    (path,) = tmp_path.iterdir()
    whole, times = path.read_bytes(), 60
    for seed in range(times):
        rng = np.random.default_rng(seed)
        path.write_bytes(DAMAGE[how](whole, int(rng.integers(len(whole))), rng) if seed else b"")
        assert torch.equal(kept("some", [1], make)["values"], values) and path.read_bytes() == whole
        assert capsys.readouterr().err == f"{path.name} in the cache is damaged: it is made anew\n"
    assert make.calls == 1 + times


def test_a_file_of_another_result_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    of = lambda k: kept("some", [k], counting({"values": torch.full((3,), k)}))["values"]
    of(1)
    (one,) = tmp_path.iterdir()
    of(2)
    (two,) = set(tmp_path.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    assert torch.equal(of(2), torch.full((3,), 2)) and two.name in capsys.readouterr().err


def test_whatever_differs_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    checkpoint, maps = tmp_path / "weights", random_maps(2, 3)
    checkpoint.write_bytes(b"some weights")
    records = [*(data_sets._Instant(9, "walk", 7, k) for k in (3, 4)), *(look_at((0, 3, z), (0, 0, 1)) for z in (1, 2))]
    different = [
        [], [[]], [1], [1.0], [True], ["1"], ["1", "2"], ["12"], [["1"], "2"], [["1", "2"]], [None], [{"1": "2"}],
        [maps], [maps.numpy()[:1]], [maps.reshape(3, 2)], [maps.float()], [maps + 1e-15], *([each] for each in records),
        [checkpoint], [Camera], [Predicted], [slice(1)], [slice(2)], [range(2)],
    ]  # fmt: skip
    for number, depends in enumerate(different):
        for _ in range(2):
            assert kept("some", depends, lambda n=number: {"number": n})["number"] == number, depends
    of_maps = next(n for n, depends in enumerate(different) if depends and depends[0] is maps)
    assert kept("some", [maps.numpy()], counting({})) == {"number": of_maps}
    checkpoint.write_bytes(b"same weightz")
    assert kept("some", [checkpoint], counting({})) == {}
    other = tmp_path / "cameras.py"
    shutil.copy(cameras.__file__, other)
    monkeypatch.setattr(cameras, "__file__", str(other))
    assert kept("some", [Camera], counting({}))  # the file's place does not matter, nor do comments
    other.write_text("# said otherwise\n" + other.read_text())
    assert kept("some", [Camera], counting({}))
    other.write_text(other.read_text() + "\nx = 1\n")
    assert kept("some", [Camera], counting({})) == {}
    for odd in (object(), [{1}], np.array([None])):
        with pytest.raises(TypeError, match="must be plain"):
            kept("some", [odd], counting({}))


# Heatmaps computed once


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own, splits of 14 instants, and two checkpoints of a tiny network."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        points = {point: folder / f"{point}.safetensors" for point in ("original", "best")}
        for seed, path in enumerate(points.values()):
            save_checkpoint(path, toy(seed))
        patch.setattr(studied, "CHECKPOINTS", points)
        patch.setitem(SPLITS, "test", TEST)
        patch.setitem(SPLITS, "train", ((1,), 1, 1, 10_000))
        patch.setenv("EPIUTILS_CACHE", str(folder))
        yield folder


def written(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.glob("heatmaps-*")}


@pytest.fixture
def asked(cache, monkeypatch, tmp_path) -> list:
    """Which instants are predicted, by a stand-in that renders nothing, in an empty cache."""
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    monkeypatch.setattr(Benchmark, "prepare", lambda self, **_: self)
    asked = []

    def stand_in(network, data, **_):
        asked.append([data.scenes.dataset.instants[i] for i in data.scenes.indices])
        maps = network.final_layer.weight.detach().flatten()[:24].reshape(4, 6).repeat(len(data), 1, 1, 1, 1)
        nothing = torch.zeros(len(data), 1)
        return Predicted(maps, *[nothing] * 4, torch.zeros(len(data), 1, 1, 2), torch.zeros_like(maps))

    monkeypatch.setattr(studied, "predict", stand_in)
    return asked


def test_the_heatmaps_are_what_the_network_sees_in_half_precision(cache, monkeypatch):
    predicted = heatmaps_once("best", scenes=slice(0, 2), progress=False)
    network, data = load_checkpoint(studied.CHECKPOINTS["best"]), MultiView(Benchmark("test"))
    output, rest = predicted.output, {k: v for k, v in vars(predicted).items() if k != "output"}
    assert output.shape == (2, 4, 17, 64, 64) and output.dtype == torch.float32
    for n in range(2):
        sample = data[n]
        with torch.no_grad():
            maps = network(normalise(sample.pop("image")))
        torch.testing.assert_close(output[n], maps, rtol=2**-10, atol=1e-4)
        assert not torch.equal(output[n], maps) and torch.equal(output[n], output[n].half().float())
        assert sample.keys() == rest.keys()
        for key, value in sample.items():
            assert torch.equal(rest[key][n], value) and rest[key].dtype == value.dtype, key

    assert len(list(Benchmark("test").folder.iterdir())) == 2  # no more are rendered than asked for
    ((path, at),) = written(cache).items()
    assert path.name.startswith("heatmaps-best-test-")
    stored = torch.load(path, weights_only=True)
    assert [key for key, value in stored.items() if value.dtype == torch.float16] == ["output"]
    assert "target" not in stored  # twice the room of all the rest, and soon made of the joints
    for name in ("predict", "load_checkpoint"):
        fails = functools.wraps(getattr(studied, name))(lambda *_, **__: pytest.fail("once is enough"))
        monkeypatch.setattr(studied, name, fails)
    monkeypatch.setattr(Benchmark, "__getitem__", None)
    again = heatmaps_once("best", "test", slice(0, 2))
    assert torch.equal(again.output, output) and all(torch.equal(getattr(again, k), v) for k, v in rest.items())
    assert written(cache) == {path: at}


def test_another_checkpoint_slice_split_or_renderer_has_another_file(asked, tmp_path, monkeypatch):
    test = Benchmark("test").instants
    expected = []

    def computes(instants, *arguments):
        before = written(tmp_path)
        given = heatmaps_once(*arguments)
        expected.append(instants)
        assert asked == expected and len(given.output) == len(instants)
        assert len(written(tmp_path)) == len(expected) and before.items() <= written(tmp_path).items()
        return given.output

    best = computes(test[:2], "best", "test", slice(0, 2))
    assert not torch.equal(computes(test[:2], "original", "test", slice(0, 2)), best)
    computes(test[:1], "best", "test", slice(0, 1))
    computes(test[1:3], "best", "test", slice(1, 3))
    computes(test[1::-1], "best", "test", slice(1, None, -1))
    computes(test, "best")
    computes(Benchmark("train").instants[:2], "best", "train", slice(0, 2))
    save_checkpoint(tmp_path / "trained on.safetensors", toy(7))
    with monkeypatch.context() as patch:
        patch.setitem(studied.CHECKPOINTS, "best", tmp_path / "trained on.safetensors")
        assert not torch.equal(computes(test[:2], "best", "test", slice(0, 2)), best)
    with monkeypatch.context() as patch:
        patch.setattr(data_sets, "_version", lambda: "of another renderer")
        computes(test[:2], "best", "test", slice(0, 2))
    with monkeypatch.context() as patch:
        patch.setitem(SPLITS, "test", ((9,), 1, 1, 40_000))
        computes(Benchmark("test").instants[:2], "best", "test", slice(0, 2))
    for scenes in (slice(0, 2), slice(2), slice(-14, 2), slice(0, 2, 1), slice(-20, -12)):  # the same by other names
        assert torch.equal(heatmaps_once("best", "test", scenes).output, best.half().float())
    assert len(asked) == len(expected)


def test_other_cameras_have_a_file_of_their_own(asked, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(people, "scene", lambda **given: seen.append(given) or given)
    monkeypatch.setattr(studied, "predict", lambda network, data, **_: (asked.append(data.scenes), made_up(1))[1])
    cameras, others = ([look_at((x, 3, 1), (0, 0, 1)) for x in (at, 0, 1, 2)] for at in (3, 4))
    for rig in (cameras, others, list(cameras)):
        heatmaps_once("best", scenes=slice(0, 3, 2), rig=rig)
    instants = [vars(instant) for instant in Benchmark("test").instants[0:3:2]]
    assert asked == [[instant | {"rig": rig} for instant in instants] for rig in (cameras, others)]
    assert len(written(tmp_path)) == 2
    with pytest.raises(ValueError, match="rig"):
        heatmaps_once("best", rig=cameras, dataset=str(tmp_path))


def test_a_backbone_that_was_set_free_is_trained_once(cache, monkeypatch):
    settings = {"scenes": slice(0, 1), "steps": 2, "batch": 2, "train_scenes": slice(1, 2)}
    seen, training = freed("best", **settings)
    torch.manual_seed(0)
    model = FusedNetwork(load_checkpoint(studied.CHECKPOINTS["best"]), OriginalFusion()).train()
    begin = model.fusion.weight.detach().flatten().numpy().copy()
    losses = train_pairs(model, training_pictures(slice(1, 2)), 2, 2)["losses"]
    np.testing.assert_allclose(training["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(training["weights"], model.fusion.weight.detach(), rtol=1e-4)
    np.testing.assert_array_equal(training["path"][0, 0], begin)
    with torch.no_grad():
        maps = model.network.eval()(normalise(MultiView(Benchmark("test"))[0]["image"]))
    torch.testing.assert_close(seen.output[0], maps, rtol=2**-8, atol=1e-3)
    still, _ = freed("best", **settings, lr=0.0)  # the batch statistics move all the same
    before = heatmaps_once("best", scenes=slice(0, 1), progress=False).output
    assert not torch.allclose(still.output, before, atol=1e-2) and not torch.allclose(still.output, seen.output)
    monkeypatch.setattr(torch.optim, "AdamW", None)
    again, same = freed("best", **settings)
    assert torch.equal(again.output, seen.output) and torch.equal(again.target, seen.target)
    assert all(np.array_equal(training[key], same[key]) for key in training)
    with pytest.raises(TypeError):
        freed("best", **settings | {"batch": 3})


def test_a_file_that_could_not_be_written_is_not_there(asked, tmp_path, monkeypatch):
    def half(_, path):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            heatmaps_once("best", scenes=slice(0, 2))
    assert not list(tmp_path.iterdir())
    heatmaps_once("best", scenes=slice(0, 2))
    assert len(asked) == 2 and len(list(tmp_path.iterdir())) == 1


def test_training_pictures_are_the_splits_own(cache):
    data, views = training_pictures(slice(1, 2)), Benchmark("train")[1]
    assert len(data) == 12
    for i, (s, r) in enumerate(PAIRS):
        np.testing.assert_array_equal(data[i]["source"], views[s].image)
        np.testing.assert_array_equal(data[i]["reference"], views[r].image)
    assert len(list(Benchmark("train").folder.glob("s01_*_jpg.npz"))) == 1


# Human3.6M in place of the benchmark

ONE_AND_NINE = {"train": [(1, 2, 1, 1 + 5 * k) for k in range(11)], "test": [(9, 2, 1, 1 + 64 * k) for k in range(130)]}
OTHERS = {"train": (5, 2, 1, 1), "test": (11, 2, 1, 1)}


@pytest.fixture(scope="module")
def human36m(tmp_path_factory):
    """Subjects 1 and 9 among others in karfly's layout, every picture the same grey."""
    folder = tmp_path_factory.mktemp("human36m")
    write_karfly(folder, labels([*ONE_AND_NINE["train"], *ONE_AND_NINE["test"], *OTHERS.values()]))
    for split, subject in (("train", 1), ("test", 9)):
        data = Human36M(folder, split, subjects=(subject,))
        for shot in itertools.chain(*data.shots):
            write_jpeg(folder / shot.picture, np.full((1000, 1000, 3), 128, np.uint8))
    return folder


def test_instants_are_chosen_by_a_slice_or_evenly_by_number():
    assert choose(range(10)) == range(10) and choose("abcde", slice(1, None, 2)) == range(1, 5, 2)
    assert list(choose(range(10), 3)) == [0, 3, 6] and list(choose(range(420), 5)) == [0, 84, 168, 252, 336]
    for there, wanted in itertools.product((1, 2, 7, 840), (1, 2, 3, 100)):
        chosen = list(choose(range(there), wanted))
        assert len(chosen) == min(there, wanted) and chosen == sorted(set(chosen)) and chosen[0] == 0
        assert chosen[-1] < there and len(set(np.diff(chosen))) <= 1


def test_heatmaps_of_human36m_are_computed_once_by_any_checkpoint(asked, human36m, tmp_path):
    def computes(*arguments, **settings):
        before = len(asked)
        given = heatmaps_once(*arguments, dataset=str(human36m), **settings)
        assert heatmaps_once(*arguments, dataset=str(human36m), **settings).output.equal(given.output)
        assert len(asked) == before + 1 and len(written(tmp_path)) == before + 1
        return given.output, [i.image for i in asked[-1]]

    best, test = computes("best", "test")
    assert test == [1, 1 + 64 * 64, 1 + 64 * 128]
    assert computes("best", "test", 2)[1] == test[:2] and computes("best", "train", slice(1, 3))[1] == [26, 51]
    for split, folder, error in (("train-large", human36m, KeyError), ("test", tmp_path, FileNotFoundError)):
        with pytest.raises(error):
            heatmaps_once("best", split, dataset=str(folder))
    assert {instant.subject for instant in asked[0]} == {9} and {instant.subject for instant in asked[-1]} == {1}
    own = tmp_path / "pose_hrnet.safetensors"
    save_checkpoint(own, toy(11))
    assert not torch.equal(computes(str(own), "test")[0], best)
    assert any(path.name.startswith("heatmaps-pose_hrnet-test-") for path in written(tmp_path))
    file = Human36M(human36m, "test", subjects=(9,)).file
    changed = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(changed, changed))  # the annotations were written anew
    computes("best", "test")


def test_what_the_network_sees_in_human36m_is_what_it_sees_in_the_benchmark(cache, human36m):
    predicted = heatmaps_once("best", "test", 1, progress=False, dataset=str(human36m))
    sample = MultiView(Human36M(human36m, "test", subjects=(9,)))[0]
    with torch.no_grad():
        maps = load_checkpoint(studied.CHECKPOINTS["best"])(normalise(sample.pop("image")))
    torch.testing.assert_close(predicted.output[0], maps, rtol=2**-10, atol=1e-4)
    assert predicted.visible.all()
    assert all(torch.equal(getattr(predicted, key)[0], value) for key, value in sample.items())
    pictures = training_pictures(1, str(human36m))
    assert len(pictures) == 12 and pictures[0]["source"].shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("name", "said"), [("coco", "COCO's 17 joints .* NETWORK="), ("mpii", "16 joints, as MPII has")]
)
def test_a_checkpoint_of_other_joints_is_refused_before_the_work(tmp_path, monkeypatch, name, said):
    """The shipped network, its last layer in COCO's order or MPII's: nothing is rendered but the instant that is looked at."""
    monkeypatch.setattr(Benchmark, "prepare", lambda *args, **more: pytest.fail("work was begun"))
    network, place = load_checkpoint(studied.CHECKPOINTS["best"]), bodies.JOINTS["HUMAN36M_17"].index
    face = {"leye": "nose", "reye": "nose", "lear": "head", "rear": "head"}
    order = [place(face.get(joint, joint)) for joint in bodies.JOINTS["COCO_17"]][: 16 if name == "mpii" else 17]
    with torch.no_grad():
        last = nn.Conv2d(network.final_layer.in_channels, len(order), 1)
        last.weight[:], last.bias[:] = network.final_layer.weight[order], network.final_layer.bias[order]
    network.final_layer, network.settings["joints"] = last, len(order)
    save_checkpoint(tmp_path / f"{name}.safetensors", network)
    for look in (heatmaps_once, freed):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: gives {said}"):
            look(str(tmp_path / f"{name}.safetensors"), scenes=2)
