"""Measures of poses against HRNet's and SciPy's, the bootstrap against every resample, SciPy's and by coverage."""

import itertools
import math

import numpy as np
import pytest
from rigs import random_maps
from scipy import stats

from epiutils.heatmaps import accuracy, found
from epiutils.metrics import bootstrap, joint_mean, mpjpe


def literal_joint_mean(values):
    columns = [[v for v in column if not math.isnan(v)] for column in values.reshape(-1, values.shape[-1]).T]
    means = [sum(column) / len(column) for column in columns if column]
    return sum(means) / len(means) if means else math.nan


def outcomes(seed, scenes=30, views=(4, 3), joints=5, missing=0.2, harder=1.5):
    """Right and wrong joints (N, ..., J), alike within a scene as some scenes are hard; some are left out."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0.5, harder, (scenes, *[1] * (len(views) + 1))) + rng.normal(0, 1, joints)
    right = (rng.random((scenes, *views, joints)) < 1 / (1 + np.exp(-logit))).astype(float)
    return np.where(rng.random(right.shape) < missing, np.nan, right)


def every_resample(values, against=None):
    """The statistic of all N^N equally likely draws of N scenes, sorted; those without a number are left out."""
    n = len(values)
    draws = [list(draw) for draw in itertools.product(range(n), repeat=n)]
    scores = [literal_joint_mean(values[d]) - (0 if against is None else literal_joint_mean(against[d])) for d in draws]
    return np.sort([s for s in scores if not math.isnan(s)])


# Means


@pytest.mark.parametrize("shape", [(7,), (1, 3), (6, 2, 5), (2, 3, 4, 2)])
def test_joint_mean_is_the_literal_one_whatever_leads(shape):
    rng = np.random.default_rng(len(shape))
    values = np.where(rng.random(shape) < 0.3, np.nan, rng.normal(size=shape))
    values[..., 0] = math.nan  # a column of nan is no joint
    before = values.copy()
    assert joint_mean(values) == pytest.approx(literal_joint_mean(values), abs=1e-12)
    np.testing.assert_array_equal(values, before)
    values = np.full((10, 2), math.nan)
    values[:, 0], values[3, 1] = 0, 1
    assert joint_mean(values) == 0.5  # every joint weighs the same, however often it is counted


def test_the_joint_mean_of_what_is_found_is_the_accuracy_and_of_nothing_there_is_no_number():
    target = random_maps(9, 5, 20, 30)
    output = target.clone()
    output[::2] = random_maps(5, 5, 20, 30, seed=1)
    target[:6, 2] = target[:, 1] = 0  # a joint with few samples, and one without
    right = found(output, target)
    assert joint_mean(right) == pytest.approx(accuracy(output, target), abs=1e-12)
    assert abs(joint_mean(right) - np.nanmean(right)) > 1e-3
    nothing = np.full((3, 4), math.nan)
    assert math.isnan(joint_mean(nothing)) and math.isnan(joint_mean(np.empty((0, 4))))
    assert np.isnan([bootstrap(nothing), bootstrap(nothing, np.ones((3, 4)))]).all()


# Poses in space


@pytest.mark.parametrize("seed", range(3))
def test_mpjpe_is_the_distance_in_the_unit_given(seed):
    predicted, true = np.random.default_rng(seed).normal(0, 2, (2, 4, 2, 7, 3))
    predicted[1, 0, 2], true[3, 1, 4, 1] = math.nan, math.nan
    values = mpjpe(predicted, true)
    assert values.shape == (4, 2, 7) and np.isnan(values).sum() == 2
    for i, j, k in np.ndindex(4, 2, 7):
        np.testing.assert_allclose(values[i, j, k], math.dist(predicted[i, j, k], true[i, j, k]), atol=1e-12)
    np.testing.assert_allclose(mpjpe(1000 * predicted, 1000 * true), 1000 * values)


# The interval


@pytest.mark.parametrize("level", [0.95, 0.6])
@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
@pytest.mark.parametrize("seed", range(4))
def test_the_ends_are_quantiles_of_every_resample_there_is(seed, paired, level):
    """Scenes without a number, joints without one, and draws of nothing but empty scenes: all in 4⁴ resamples."""
    values, against = outcomes(seed, 4, (2,), 3, 0.4) + np.random.default_rng(seed).normal(0, 0.1, (2, 4, 2, 3))
    values[0], values[1:, :, 2] = math.nan, math.nan  # scene 0, joint 2; 1 of 256 draws is scene 0 alone
    against = against if paired else None
    exact, draws = every_resample(values, against), 20_000
    for p, end in zip(((1 - level) / 2, (1 + level) / 2), bootstrap(values, against, level, draws), strict=True):
        noise = 4.5 * math.sqrt(p * (1 - p) / draws)
        assert np.mean(exact < end - 1e-9) < p + noise and np.mean(exact <= end + 1e-9) > p - noise


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
@pytest.mark.parametrize("seed", range(2))
def test_scipys_percentile_interval_is_the_same_but_for_chance(seed, paired):
    values, better = outcomes(seed), outcomes(seed + 10)
    against = np.where(np.random.default_rng(seed).random(values.shape) < 0.8, values, better) if paired else None
    statistic = lambda i: joint_mean(values[i]) - (joint_mean(against[i]) if paired else 0)
    expected = stats.bootstrap((np.arange(len(values)),), statistic, vectorized=False, method="percentile",
                               n_resamples=1500, confidence_level=0.9, rng=seed).confidence_interval  # fmt: skip
    ours = bootstrap(values, against, 0.9, 20_000)
    np.testing.assert_allclose(ours, expected, atol=0.06 * (expected.high - expected.low))  # about 5 deviations


def test_two_scenes_in_closed_form_and_many_come_to_the_normal_interval():
    """Draws are {A, A}, {A, B} or {B, B} with chances ¼, ½, ¼; a draw pools its samples, it averages no averages."""
    values = np.array([[1, math.nan, math.nan], [0, 0, 0]])[..., None]
    assert bootstrap(values, level=0.4) == (0.25, 0.25) and bootstrap(values, level=0.95) == (0, 1)
    assert bootstrap(values, 1 - values, level=0.4) == (-0.5, -0.5) and bootstrap(values, 1 - values) == (-1, 1)
    n, p = 1000, 0.3
    values = (np.arange(n) < p * n).astype(float)[:, None]
    reach = stats.norm.ppf(0.95) * math.sqrt(p * (1 - p) / n)
    np.testing.assert_allclose(bootstrap(values, level=0.9, draws=4000), (p - reach, p + reach), atol=0.1 * reach)


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
def test_nine_of_ten_intervals_hold_the_truth_but_not_where_samples_of_a_scene_are_drawn_apart(paired):
    """Simulated: a joint is found where its ease exceeds the view's difficulty, which half of a scene's views share.

    The seeds are fixed, so nothing is left to chance; 200 exact intervals would hold the truth in 0.9 ± 0.04.
    """
    scenes, views, runs = 40, 4, 200
    ease = np.array([0.5, 0.7, 0.2])
    truth = ease.mean() - (0.25 if paired else 0)
    covered = np.zeros((2, runs))
    for run in range(runs):
        rng = np.random.default_rng(run)
        shared, own = rng.random((scenes, 1, 1)), rng.random((scenes, views, 1))
        values = (np.where(rng.random((scenes, views, 1)) < 0.5, shared, own) < ease).astype(float)
        against = (rng.random((scenes, 1, 1)) < [0.25] * 3).repeat(views, 1).astype(float) if paired else None
        apart = [None if v is None else v.reshape(-1, 3) for v in (values, against)]
        for k, given in enumerate(((values, against), apart)):
            low, high = bootstrap(*given, level=0.9, draws=150, seed=run)
            covered[k, run] = low <= truth <= high
    whole, wrong = covered.mean(1)
    assert 0.84 < whole < 0.95 and wrong < 0.8


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_obeys_the_arithmetic_of_means(seed):
    values, against = outcomes(seed), outcomes(seed + 10)
    low, high = bootstrap(values, seed=seed)
    assert low < joint_mean(values) < high
    assert bootstrap(values, values.copy(), seed=seed) == (0, 0)
    np.testing.assert_allclose(bootstrap(3 * values - 2, seed=seed), (3 * low - 2, 3 * high - 2))
    np.testing.assert_allclose(bootstrap(values + 0.25, values, seed=seed), (0.25, 0.25))
    np.testing.assert_allclose(bootstrap(values, 0 * against, seed=seed), (low, high))
    low, high = bootstrap(values, against, seed=seed)
    np.testing.assert_allclose(bootstrap(against, values, seed=seed), (-high, -low), atol=1e-12)


def test_scenes_are_drawn_as_wholes():
    values = outcomes(0, views=(4, 3))
    interval = bootstrap(values)
    assert bootstrap(np.concatenate([values, values], axis=2)) == interval
    assert bootstrap(values.reshape(30, 12, 5)) == interval
    assert bootstrap(values[:, ::-1]) == interval
    once = bootstrap(values[:, :1], values[:, :1, :1])
    np.testing.assert_allclose(bootstrap(values[:, :1], values[:, :1, :1].repeat(3, 2)), once)  # other inner shapes
    twice_the_scenes = np.diff(bootstrap(np.concatenate([values, values]), draws=4000))
    assert twice_the_scenes / np.diff(bootstrap(values, draws=4000)) == pytest.approx(math.sqrt(0.5), abs=0.06)


def test_one_scene_has_no_spread_nor_have_two_of_which_one_counts_nothing_and_a_higher_level_is_wider():
    one, two = outcomes(2, scenes=1), outcomes(3, scenes=2, missing=0)
    two[1] = math.nan  # a quarter of the draws count nothing and are left out; the others agree
    for values in (one, two):
        np.testing.assert_allclose(bootstrap(values), [joint_mean(values)] * 2)
    np.testing.assert_allclose(bootstrap(np.zeros_like(two), two), [-joint_mean(two)] * 2)
    values = outcomes(2)
    ends = [bootstrap(values, level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    assert all(b[0] < a[0] < a[1] < b[1] for a, b in itertools.pairwise(ends))
    low, high = bootstrap(values, level=0)
    assert low == high  # the median


def test_the_seed_alone_decides():
    values = outcomes(4)
    before, state = values.copy(), np.random.get_state()[1].copy()
    assert bootstrap(values) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert all(type(end) is float for end in bootstrap(values))


@pytest.mark.parametrize("paired", [False, True])
def test_seeds_are_drawn_too_and_the_same_ones_for_two_methods(paired):
    """Seeds far apart, scenes all alike: only the draw of the seeds is left, three of three, 27 draws in all."""
    levels = np.array([0.1, 0.3, 0.8])
    of_seeds = [np.full((6, 2, 4), level) for level in levels]
    against = [np.full((6, 2, 4), level**2) for level in levels] if paired else [np.full((6, 2, 4), 0.2)]
    exact = levels - (levels**2 if paired else 0.2)
    exact = np.sort([exact[list(drawn)].mean() for drawn in itertools.product(range(3), repeat=3)])
    low, high = bootstrap(of_seeds, against, 0.5, 20_000)
    np.testing.assert_allclose((low, high), (exact[6], exact[20]))  # the quarters of 27
    assert bootstrap(of_seeds[:1], against[:1]) == bootstrap(of_seeds[0], against[0])  # one seed says nothing of seeds


def test_methods_without_scenes_or_of_other_scenes_are_refused():
    for wrong, message in (((outcomes(0), outcomes(0, scenes=29)), r"\[30, 29\]"), ((np.empty((0, 4, 5)),), r"\[0\]")):
        with pytest.raises(ValueError, match=f"the same scenes, at least one, got {message}"):
            bootstrap(*wrong)
