"""Shapley's shares against all orders one by one, and the sets of causes against trainings on the heatmaps themselves."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rigs import LENS, look_at, world_points
from scenes import WEIGHTS, made_up

from epiutils.data.views import HEATMAP_FROM_INPUT
from epiutils.epipolar import fundamental_from_cameras, point_line_distance
from epiutils.fusion import OriginalFusion, SimpleFusion
from epiutils.heatmaps import hit_loss, joints_mse
from epiutils.studies import shares
from epiutils.studies.causes import NormalEquations, Pairs, initial_weights
from epiutils.studies.fitting import ViewPairs, train_pairs
from epiutils.studies.predicted import found_by
from epiutils.studies.runs import WithNext


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """What these tests keep is not for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPIUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_share_is_the_mean_over_all_orders_of_what_a_removal_adds(n):
    values = np.random.default_rng(n).normal(size=(2**n, 3))
    expected = np.zeros((n, 3))
    for order in itertools.permutations(range(n)):
        removed = 0
        for i in order:
            expected[i] += (values[removed | 1 << i] - values[removed]) / math.factorial(n)
            removed |= 1 << i
    given = shares.shapley(values)
    np.testing.assert_allclose(given, expected)
    np.testing.assert_allclose(given.sum(0), values[-1] - values[0])
    with pytest.raises(ValueError, match="2ⁿ sets, got 6"):
        shares.shapley(np.zeros(6))


@pytest.fixture(scope="module")
def rigged():
    """Two instants before one rig, in crops of whole pictures; the same for training and testing, but not the same maps."""
    cameras = [look_at((4 * math.cos(a), 4 * math.sin(a), h), (0, 0, 1), 300, (640, 400), name=f"{a}")
               for a, h in ((0.2, 1), (1.4, 2), (3.0, 0.5), (4.6, 1.5))]  # fmt: skip
    both = []
    for seed in (1, 2):
        seen = made_up(seed, scenes=2, twice=0.5)
        K = seen.K.clone()
        for v, camera in enumerate(cameras):
            K[:, v] = torch.from_numpy(np.array([[0.4, 0, -30 + 7 * v], [0, 0.4, -9 * v], [0, 0, 1]]) @ camera.K)
        R, t = (
            torch.tensor(np.array([getattr(c, key) for c in cameras])).expand_as(getattr(seen, key)) for key in "Rt"
        )
        X = torch.from_numpy(np.stack([world_points(seed + n) for n in range(2)]))
        both.append(replace(seen, K=K, R=R, t=t, joints_3d=X))
    return both, (cameras, cameras)


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("points", [False, True])
def test_f_of_points_is_placed_in_the_crops_or_not(rigged, points, forgotten):
    (seen, _), (cameras, _) = rigged
    X, (height, width) = seen.joints_3d[0].numpy(), seen.output.shape[-2:]
    F = shares._fundamentals(seen, [replace(c, distortion=LENS) for c in cameras], points, forgotten)
    assert F.shape == seen.F.shape and (points or forgotten or F is seen.F)
    for s, r in ((0, 1), (3, 2)) if points or forgotten else ():
        x = []
        for v in (s, r):  # of the pictures without distortion
            pixels = np.c_[cameras[v].project(X), np.ones(len(X))]
            placed = HEATMAP_FROM_INPUT @ seen.K[1, v].numpy() @ np.linalg.inv(cameras[v].K)
            scaled = np.diag([width / cameras[v].size[0], height / cameras[v].size[1], 1])
            x.append(torch.from_numpy((pixels @ (scaled if forgotten else placed).T)[:, :2]))
        off = point_line_distance(F[1, s, r], *x).median()
        assert (0 < off < 0.3) if points else off < 1e-6


def test_the_epipole_is_inside_where_the_source_camera_is_in_the_picture():
    reference = look_at((0, -4, 1), (0, 0, 1))
    for x, z in ((0, 1), (1.9, 1), (2.3, 1), (0, 2.4), (0, 2.7), (-1, 0.2), (-2.3, 1)):
        source = look_at((x, 1, z), (0, 0, 1))
        at = reference.project(source.C)
        inside = bool((at > -0.5).all() and (at < np.array(reference.size) - 0.5).all())
        F = torch.from_numpy(fundamental_from_cameras(source, reference))
        assert shares._epipole_inside(F[None], reference.size[::-1]).tolist() == [inside]
    sideways = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)  # the epipole at infinity
    assert not shares._epipole_inside(sideways, (7, 9))


@pytest.fixture(scope="module")
def wrong(rigged):
    """As the original may have had it: F from points, and without the crops."""
    maps, rigs = rigged
    return [replace(seen, F=shares._fundamentals(seen, rig, True, True)) for seen, rig in zip(maps, rigs, strict=True)]


def of_sets(rigged, *causes):
    (lesson, test), cameras = rigged
    return shares._every_set(lesson, test, cameras, 2, (2, 5), causes)


def trained_on_heatmaps(lesson, seed, steps, start=None, lr=1e-3, **settings):
    start = initial_weights(range(2)) if start is None else start
    module = SimpleFusion(1.0, initial=start[seed].reshape(3, 3), **settings)
    train_pairs(module, ViewPairs(lesson), steps, lr=lr, seed=seed)
    return WithNext(module)


@pytest.mark.parametrize(
    "removed", [(), ("start",), ("steps", "rate"), ("points", "crop"), ("points", "steps"), ("crop",)]
)
def test_a_set_is_the_module_trained_without_those_causes(rigged, removed):
    (lesson, test), (cameras, _) = rigged
    F = [shares._fundamentals(maps, cameras, "points" not in removed, "crop" not in removed) for maps in (lesson, test)]
    lesson, test = (replace(maps, F=of) for maps, of in zip((lesson, test), F, strict=True))
    start = torch.zeros(2, 9) if "start" in removed else None
    settings = (5 if "steps" in removed else 2), start, (1e-2 if "rate" in removed else 1e-3)
    given = of_sets(rigged, *removed)[-1]
    for seed in range(2):
        module = trained_on_heatmaps(lesson, seed, *settings)
        np.testing.assert_array_equal(given[seed], found_by(module, test))
    if removed == ():
        assert 0 < np.nanmean(given) < 1 and (np.nan_to_num(given[0]) != np.nan_to_num(given[1])).any()


def test_weights_of_each_joint_are_those_that_it_alone_would_learn(rigged, wrong):
    given = of_sets(rigged, "shared")[1]
    for j in (0, 3):
        lesson, test = (
            replace(seen, **{key: getattr(seen, key)[:, :, [j]] for key in ("output", "target", "weight")})
            for seen in wrong
        )
        right = found_by(trained_on_heatmaps(lesson, 1, 2), test)
        np.testing.assert_array_equal(given[1, ..., [j]], np.moveaxis(right, -1, 0))


def test_low_and_even_bands_are_a_mean_along_the_line(rigged, wrong):
    mean = NormalEquations.of(Pairs.all_of(wrong[0]), per_band=1.0)
    weights = mean.train(initial_weights(range(2)), range(2), 2)[:, -1]
    right = Pairs.with_next(wrong[1]).score(weights, per_band=1.0)
    given = of_sets(rigged, "bands", "steps", "height")
    assert np.mean(given[0b101] != right, where=~np.isnan(right)) < 0.01  # but for rounding
    assert all(np.mean(given[k] != right, where=~np.isnan(right)) > 0.01 for k in (0b000, 0b001))


def test_the_first_step_sums_the_ridges_of_all_sources(rigged):
    (lesson, _), _ = rigged
    ridge = SimpleFusion(1.0, initial=WEIGHTS / 30).requires_grad_(False)
    literal = lesson.output.clone()
    for n, (s, r) in itertools.product(range(2), itertools.permutations(range(4), 2)):
        literal[n, r] += ridge(lesson.output[n, s, None], 0 * lesson.output[n, r, None], lesson.F[n, s, r])[0]
    (right,) = shares._with_all_sources(lesson, WEIGHTS.reshape(1, 9) / 30)
    np.testing.assert_array_equal(right, found_by(None, replace(lesson, output=literal)))
    equations = shares._of_all_sources(lesson)
    both = shares._by_instant(equations)
    for n in range(2):
        loss = joints_mse(literal[n], lesson.target[n], lesson.weight[n])
        for each, part in ((equations, slice(4 * n, 4 * n + 4)), (both, slice(n, n + 1))):
            own = NormalEquations(*(v[part].double() for v in vars(each).values()))
            torch.testing.assert_close(own.loss(WEIGHTS.flatten() / 30).float(), loss, rtol=1e-4, atol=1e-7)


def test_each_change_of_the_first_step_is_made(rigged):
    (lesson, test), _ = rigged
    sets = shares._first_step(lesson, test, 1, (3, 5))
    assert sets.shape == (32, 1, 2, 4, test.output.shape[2])
    np.testing.assert_array_equal(sets[0, 0], found_by(trained_on_heatmaps(lesson, 0, 3), test))


def by_place(module, batch, done):
    fused = module(batch["source"], batch["reference"], batch["F"])
    return hit_loss(10 * fused, batch["target"], batch["weight"])


@pytest.mark.parametrize("what", ["sigmoid", "place"])
def test_what_is_no_parabola_is_trained_on_the_heatmaps_once(wrong, monkeypatch, what):
    (lesson, _), start = wrong, initial_weights(range(2)) / 20
    weights = shares._on_heatmaps(what, lesson, start, 3)
    for seed, of_seed in enumerate(weights):
        initial = start[seed].reshape(3, 3)
        module = OriginalFusion(1.0, what == "sigmoid", shape=lesson.output.shape[-2:], initial=initial)
        train_pairs(module, ViewPairs(lesson), 3, seed=seed, loss=by_place if what == "place" else None)
        torch.testing.assert_close(of_seed, module.weight.detach().flatten(), rtol=1e-4, atol=1e-6)
    assert (weights - start).abs().amax() > 1e-3 and not torch.equal(weights[0], weights[1])
    monkeypatch.setattr(SimpleFusion, "forward", lambda *_: pytest.fail("made anew"))
    assert torch.equal(shares._on_heatmaps(what, lesson, start, 3), weights)
    with pytest.raises(pytest.fail.Exception):
        shares._on_heatmaps(what, replace(lesson, F=lesson.F.mT), start, 3)


def test_what_is_changed_alone_is_changed_in_the_module_that_failed(rigged, wrong):
    (lesson, test), cameras = rigged
    given = shares.causes_removed(lesson, test, cameras, 1, (3, 4), ())
    assert given.pop("sets").shape == (1, 1, 2, 4, test.output.shape[2])
    assert given.keys() == {"sigmoid", "epipole", "loss", "threshold", "sources"}
    assert all(found.shape == (1, 2, 4, test.output.shape[2]) for found in given.values())
    for name, threshold in (("sigmoid", 1.0), ("threshold", 3.0)):
        initial = initial_weights([0])[0].reshape(3, 3)
        module = OriginalFusion(threshold, name == "sigmoid", shape=test.output.shape[-2:], initial=initial)
        train_pairs(module, ViewPairs(wrong[0]), 3, seed=0)
        np.testing.assert_array_equal(given[name][0], found_by(WithNext(module), wrong[1]))
    source = shares._perfect_sources(wrong[1])
    assert torch.equal(source.output[:, 4:], wrong[1].target) and torch.equal(source.F[:, 4, 1], wrong[1].F[:, 0, 1])
