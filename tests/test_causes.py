"""The failure's causes against literal loops, NumPy's least squares, autograd and the trainings that they stand for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rigs import random_maps
from scenes import JOINTS, SHAPE, WEIGHTS, found_literally, made_up

from epiutils.data.views import Predicted
from epiutils.epipolar import transfer
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import joints_mse
from epiutils.metrics import joint_mean
from epiutils.redirect import redirect
from epiutils.studies.causes import NormalEquations, Pairs, along_line, initial_weights
from epiutils.studies.fitting import PAIRS, ViewPairs, train_pairs
from epiutils.studies.predicted import found_by
from epiutils.studies.runs import WithNext

TINY = (7, 9)
MIDDLE = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """What these tests keep is not for others."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EPIUTILS_CACHE", str(folder))
    return folder


def made(*arguments, **settings) -> Predicted:
    """Half of the maps have a higher peak elsewhere."""
    return made_up(*arguments, twice=0.5, **settings)


def as_double(predicted) -> Predicted:
    return replace(predicted, **{key: getattr(predicted, key).double() for key in ("output", "target", "weight")})


def explicit(predicted, at) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns A (J, H·W, 9), the wanted change e (J, H·W) and the weights of one pair, by nested loops."""
    n, s, r = at
    maps, F = predicted.output[n], predicted.F[n, s, r]
    columns = []
    for k in range(9):
        fusion = OriginalFusion(shape=maps.shape[-2:], method="loop", initial=torch.eye(9)[k].reshape(3, 3))
        with torch.no_grad():
            columns.append(fusion.double()(maps[s, None], 0 * maps[r, None], F)[0].flatten(-2))
    return (np.stack(columns, -1), (predicted.target[n, r] - maps[r]).flatten(-2).numpy(),
            predicted.weight[n, r].numpy())  # fmt: skip


# Which pairs, and their scores


def test_pairs_are_the_training_datas_or_each_of_the_twelve_in_turn():
    predicted = made()
    pairs, data = Pairs.all_of(predicted), ViewPairs(predicted)
    assert len(pairs) == len(data) == 36
    for k, sample in enumerate(data):
        given = {name: getattr(pairs, name)[k] for name in ("source", "reference", "target", "F")}
        assert all(torch.equal(value, sample[name]) for name, value in given.items())
        assert torch.equal(pairs.at_reference("weight")[k], sample["weight"])
    chosen = Pairs.one_each(made(scenes=24), range(5, 24)).chosen
    assert chosen.shape == (19, 1, 3) and chosen[:, 0, 0].tolist() == list(range(5, 24))
    assert sorted(map(tuple, chosen[7:19, 0, 1:])) == sorted(PAIRS)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_are_scored_as_the_original_module_with_each_source(seed, sigmoid):
    predicted, kernels = made(seed), [WEIGHTS / 30, MIDDLE / 20, -WEIGHTS / 50]
    scored = Pairs.with_next(predicted).score(torch.stack(kernels), 1.5, sigmoid=sigmoid)
    assert scored.shape == (3, 3, 4, JOINTS)
    for kernel, found in zip(kernels, scored, strict=True):
        fusion = OriginalFusion(1.5, sigmoid, shape=SHAPE, initial=kernel)
        np.testing.assert_array_equal(found, found_by(WithNext(fusion), predicted))
        with torch.no_grad():
            maps = WithNext(fusion).all_views(predicted.output, predicted.F)
        np.testing.assert_array_equal(found, found_literally(maps, predicted.target))
    assert len({joint_mean(found) for found in scored}) > 1


def test_each_joint_may_have_its_own_kernel_and_all_scenes_one_f():
    predicted = made(4)
    pairs, own = Pairs.one_each(predicted), torch.randn(2, JOINTS, 3, 3, generator=torch.manual_seed(0)) / 60
    for j in range(JOINTS):
        np.testing.assert_array_equal(pairs.score(own)[..., j], pairs.score(own[:, j])[..., j])
    F = predicted.F[1]
    elsewhere = Pairs.one_each(replace(predicted, F=F.expand(3, -1, -1, -1, -1))).score(own)
    np.testing.assert_array_equal(Pairs.one_each(predicted, F=F).score(own), elsewhere)


@pytest.mark.parametrize("collect", ["sum", "mean", "max"])
def test_ridges_are_what_a_dense_mask_collects(collect):
    pairs = Pairs.one_each(made(1))
    for k, (source, F) in enumerate(zip(pairs.source, pairs.F, strict=True)):
        one_each = torch.eye(SHAPE[0] * SHAPE[1]).unflatten(-1, SHAPE)
        band = redirect(one_each, F, 1.0, "dense").flatten(-2) > 0  # (source pixel, reference pixel)
        each = torch.where(band, source.flatten(-2)[:, :, None], 0.0 if collect != "max" else -torch.inf)
        count = band.sum(0).clamp_min(1)
        wanted = {"sum": each.sum(1), "mean": each.sum(1) / count, "max": each.amax(1)}[collect]
        wanted = wanted.where(band.any(0), 0.0).unflatten(-1, SHAPE)
        torch.testing.assert_close(pairs.ridges(1.0, collect)[k].float(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gain", [-0.02, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_quick_scores_of_a_gain_are_those_of_the_original_module(gain, sigmoid):
    predicted = made(2, scenes=5)
    pairs = Pairs.with_next(predicted)
    fusion = OriginalFusion(1.0, sigmoid, shape=SHAPE, initial=gain * MIDDLE)
    literal = found_by(WithNext(fusion), predicted)
    np.testing.assert_array_equal(pairs.score(gain, sigmoid=sigmoid), literal)
    np.testing.assert_array_equal(pairs.score(0.0), pairs.alone())
    np.testing.assert_array_equal(pairs.alone(), found_by(None, predicted))


def test_perfect_heatmaps_are_all_right_alone_and_survive_a_maximum_of_any_gain():
    pairs = Pairs.one_each(made(3), maps="target")
    for gain in (0.1, 1.0, 10.0):
        assert np.nanmin(pairs.score(gain, collect="max")) == 1
    assert joint_mean(pairs.score(10.0)) < 0.5


# The loss as a parabola


@pytest.mark.parametrize("seed", range(3))
def test_the_best_weights_are_numpys_least_squares(seed):
    predicted = as_double(made(seed, 1))
    small = torch.diag(torch.tensor([TINY[1] / SHAPE[1], TINY[0] / SHAPE[0], 1], dtype=torch.float64))
    output, target = (random_maps(1, 4, JOINTS, *TINY, seed=seed + other) for other in (0, 9))
    predicted = replace(predicted, output=output, target=target, F=transfer(predicted.F, small, small))
    pairs = Pairs(predicted, [[(0, 1, 0), (0, 2, 1)]])
    equations = NormalEquations.of(pairs)
    systems = [explicit(predicted, at) for at in pairs.chosen[0]]
    A = np.concatenate([weight[:, None, None] * A for A, _, weight in systems])  # (pairs · J, H·W, 9)
    e = np.concatenate([weight[:, None] * e for _, e, weight in systems])
    best, residual, rank, _ = np.linalg.lstsq(A.reshape(-1, 9), e.ravel(), rcond=None)
    assert rank == 9
    for columns, (A, _, _) in zip(pairs.columns(), systems, strict=True):
        np.testing.assert_allclose(columns.mT, A, rtol=0, atol=1e-12)
    np.testing.assert_allclose(equations.solve(), best, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(equations.loss(equations.solve()), residual[0] / e.size / 2, rtol=1e-9)


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_the_parabola_is_the_loss_of_the_module_and_its_gradient_is_autograds(threshold):
    pairs = Pairs.with_next(as_double(made(5)))
    equations = NormalEquations.of(pairs, threshold)
    fusion = OriginalFusion(threshold, shape=SHAPE, initial=WEIGHTS).double()
    loss = joints_mse(fusion(pairs.source, pairs.reference, pairs.F), pairs.target, pairs.at_reference("weight"))
    loss.backward()
    torch.testing.assert_close(equations.loss(fusion.weight.detach().flatten()), loss.detach(), rtol=1e-9, atol=0)
    gradient = fusion.weight.grad.flatten()
    torch.testing.assert_close(equations.gradient(WEIGHTS.flatten()), gradient, rtol=1e-6, atol=1e-9)
    alone = joints_mse(pairs.reference, pairs.target, pairs.at_reference("weight"))
    torch.testing.assert_close(equations.loss(torch.zeros(9)), alone, rtol=1e-9, atol=0)


def test_training_on_the_equations_is_training_on_the_heatmaps():
    predicted, seeds, settings = made(7), (3, 8), {"steps": 12, "batch": 5, "lr": 1e-2}
    path = NormalEquations.of(Pairs.all_of(predicted)).train(initial_weights(seeds), seeds, **settings)
    assert path.shape == (2, 13, 9)
    for seed, of_seed in zip(seeds, path, strict=True):
        torch.manual_seed(seed)
        fusion = OriginalFusion(shape=SHAPE)
        assert torch.equal(of_seed[0], fusion.weight.detach().flatten())
        literal = train_pairs(fusion, ViewPairs(predicted), seed=seed, **settings)["path"][:, 0]
        np.testing.assert_allclose(of_seed[:-1], literal, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_seed[-1], fusion.weight.detach().flatten(), rtol=1e-4, atol=1e-6)
    assert (path[:, 0] - path[:, -1]).abs().max() > 0.05


def test_what_a_band_counts_for_divides_the_ridge_by_the_number_of_its_pixels():
    predicted = as_double(made(8, 1))
    pairs = Pairs.one_each(predicted)
    mean, even = (NormalEquations.of(pairs, per_band=count) for count in (1.0, 40.0))
    A, _, weight = explicit(predicted, pairs.chosen[0, 0])
    count = redirect(torch.ones(SHAPE, dtype=torch.float64), pairs.F[0], 1.0).clamp_min(1).reshape(-1, 1).numpy()
    A = weight[:, None, None] * A / count
    np.testing.assert_allclose(mean.gram[0], A.swapaxes(1, 2) @ A / len(count), rtol=1e-9, atol=1e-15)
    for ours, theirs in zip(vars(mean.scaled(40.0)).values(), vars(even).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    kernel = 3 * WEIGHTS[None]
    np.testing.assert_array_equal(pairs.score(kernel, per_band=40.0), pairs.score(40 * kernel, per_band=1.0))


def test_scores_and_equations_are_read_again_and_made_anew_for_whatever_differs(cache, monkeypatch):
    first, kernels = made(9), torch.stack([WEIGHTS / 30, MIDDLE / 20])
    chosen = Pairs.all_of(first, range(2)).chosen
    different = [
        {}, {"maps": "target"}, {"F": first.F[1]}, {"chosen": chosen[:1]}, {"predicted": made(10)},
        {"predicted": replace(first, weight=1 - first.weight)}, {"predicted": replace(first, target=first.target / 2)},
    ]  # fmt: skip
    settings = [{"threshold": 2.0}, {"per_band": 1.0}]

    def results(change, setting, more=()):
        pairs = Pairs(**{"predicted": first, "chosen": chosen} | change)
        return pairs.score(kernels, **setting, **dict(more)), *vars(NormalEquations.of(pairs, **setting)).values()

    cases = [(change, {}) for change in different] + [({}, each) for each in settings] + [({}, {}, {"sigmoid": True})]
    given = [results(*case) for case in cases]
    assert len(list(cache.glob("found-*"))) == len(cases) and len(list(cache.glob("equations-*"))) == len(cases) - 1
    monkeypatch.setattr(Pairs, "columns", None)
    for case, before in zip(cases, given, strict=True):
        for old, new in zip(before, results(*case), strict=True):
            np.testing.assert_array_equal(old, new)
    assert len({b"".join(np.asarray(value).tobytes() for value in each) for each in given}) == len(cases) - 1
    with pytest.raises(TypeError):
        Pairs(first, chosen).score(kernels + 1e-6)


# Lines, bands, epipoles


@pytest.mark.parametrize("seed", range(4))
def test_a_profile_reads_the_ridge_at_the_pixels_nearest_to_the_line(seed):
    rng = np.random.default_rng(seed)
    normal, through = rng.normal(size=2), rng.uniform(0.3, 0.7, 2) * (TINY[1], TINY[0])
    line, ridge = torch.tensor([*normal, -normal @ through]), random_maps(*TINY, seed=seed)
    far, values = along_line(ridge, line)
    steep = abs(normal[0]) > abs(normal[1])
    wanted = []
    for k in range(TINY[0] if steep else TINY[1]):
        x, y = (-(normal[1] * k + line[2]) / normal[0], k) if steep else (k, -(normal[0] * k + line[2]) / normal[1])
        x, y = round(float(x)), round(float(y))
        if 0 <= x < TINY[1] and 0 <= y < TINY[0]:
            wanted.append(float(ridge[y, x]))
    np.testing.assert_array_equal(values, wanted)
    assert far[0] == 0 and (np.diff(far) >= 1).all() and (np.diff(far) <= 2**0.5 + 1e-9).all()
    assert [len(part) for part in along_line(ridge, torch.tensor([0.0, 1, 30]))] == [0, 0]  # beside the map


@pytest.mark.parametrize("collect", ["sum", "max"])
def test_ridges_are_as_high_and_as_uneven_as_their_profiles(collect):
    predicted = made(3, scenes=8)
    pairs, high, uneven = Pairs.one_each(predicted, maps="target"), [], []
    for k, (n, s, r) in enumerate(pairs.chosen[:, 0]):
        for j, (source, reference) in enumerate(zip(predicted.target[n, s], predicted.target[n, r], strict=True)):
            ridge = pairs.ridges(1.0, collect)[k, j].float()
            high.append(float(ridge.max() / reference.max()))
            y, x = np.unravel_index(int(source.argmax()), source.shape)
            walk = along_line(ridge, predicted.F[n, s, r] @ torch.tensor([x, y, 1.0], dtype=torch.float64))[1]
            if k % 7 == 0 and len(walk) > 20:
                uneven.append((walk.max() - walk.min()) / walk.mean())
    expected = np.sort(high)[(len(high) - 1) // 2], np.median(uneven)
    assert pairs.shape_of_ridges(1.0, collect) == pytest.approx(expected, rel=1e-3)
