"""The failure's causes against literal loops, NumPy's least squares, autograd and the trainings that they stand for."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from rigs import LENS, camera_pair, look_at, random_maps, world_points
from scenes import JOINTS, SHAPE, WEIGHTS, found_literally, made_up

from epiutils.data.views import Predicted
from epiutils.epipolar import fundamental_from_cameras, point_line_distance, transfer
from epiutils.fusion import OriginalFusion, SimpleFusion
from epiutils.heatmaps import joints_mse
from epiutils.metrics import joint_mean
from epiutils.networks.loop import train
from epiutils.redirect import redirect
from epiutils.studies import causes, fitting
from epiutils.studies.causes import NormalEquations, Pairs
from epiutils.studies.fitting import PAIRS, HeatmapPairs, fusion_loss
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


def explicit(predicted, at, threshold=1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns A (J, H·W, 9), the wanted change e (J, H·W) and the weights of one pair, by nested loops."""
    n, s, r = at
    maps, F = predicted.output[n], predicted.F[n, s, r]
    columns = []
    for k in range(9):
        fusion = OriginalFusion(threshold, shape=maps.shape[-2:], method="loop", initial=torch.eye(9)[k].reshape(3, 3))
        with torch.no_grad():
            columns.append(fusion.double()(maps[s, None], 0 * maps[r, None], F)[0].flatten(-2))
    return (np.stack(columns, -1), (predicted.target[n, r] - maps[r]).flatten(-2).numpy(),
            predicted.weight[n, r].numpy())  # fmt: skip


# Which pairs, and their scores


def test_every_pair_of_cameras_comes_up_once_in_twelve_scenes():
    chosen = causes.each_pair(range(5, 29))
    assert chosen.shape == (24, 1, 3)
    assert chosen[:, 0, 0].tolist() == list(range(5, 29))
    assert sorted(map(tuple, chosen[7:19, 0, 1:])) == sorted(PAIRS)


def test_all_pairs_are_in_the_order_of_the_training_data():
    predicted = made()
    pairs, data = Pairs(predicted, causes.all_pairs(range(3))), HeatmapPairs(predicted)
    assert len(pairs) == len(data) == 36
    for k, sample in enumerate(data):
        for name in ("source", "reference", "target"):
            assert torch.equal(getattr(pairs, name)[k], sample[name])
        assert torch.equal(pairs.F[k], sample["F"])
        assert torch.equal(pairs.at_reference("weight")[k], sample["weight"])


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_are_scored_as_the_original_module_with_each_source(seed, sigmoid):
    predicted, kernels = made(seed), [WEIGHTS / 30, MIDDLE / 20, -WEIGHTS / 50]
    scored = Pairs(predicted, causes.with_next(range(3))).score(torch.stack(kernels), 1.5, sigmoid=sigmoid)
    assert scored.shape == (3, 3, 4, JOINTS)
    for kernel, found in zip(kernels, scored, strict=True):
        fusion = OriginalFusion(1.5, sigmoid, shape=SHAPE, initial=kernel)
        np.testing.assert_array_equal(found, found_by(WithNext(fusion), predicted))
        with torch.no_grad():
            maps = WithNext(fusion).all_views(predicted.output, predicted.F)
        np.testing.assert_array_equal(found, found_literally(maps, predicted.target))
    assert len({joint_mean(found) for found in scored}) > 1


def test_each_joint_may_have_its_own_kernel_and_all_scenes_one_f():
    predicted, chosen = made(4), causes.each_pair(range(3))
    own = torch.randn(2, JOINTS, 3, 3, generator=torch.Generator().manual_seed(0)) / 60
    scored = Pairs(predicted, chosen).score(own)
    for j in range(JOINTS):
        np.testing.assert_array_equal(scored[..., j], Pairs(predicted, chosen).score(own[:, j])[..., j])
    F = predicted.F[1]
    elsewhere = Pairs(replace(predicted, F=F.expand(3, -1, -1, -1, -1)), chosen).score(own)
    np.testing.assert_array_equal(Pairs(predicted, chosen, F).score(own), elsewhere)


@pytest.mark.parametrize("collect", ["sum", "mean", "max"])
def test_ridges_are_what_a_dense_mask_collects(collect):
    predicted = made(1)
    pairs = Pairs(predicted, causes.each_pair(range(3)))
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
    pairs = Pairs(predicted, causes.with_next(range(5)))
    fusion = OriginalFusion(1.0, sigmoid, shape=SHAPE, initial=gain * MIDDLE)
    literal = found_by(WithNext(fusion), predicted)
    np.testing.assert_array_equal(pairs.score(gain, sigmoid=sigmoid), literal)
    np.testing.assert_array_equal(pairs.score(0.0), pairs.alone())
    np.testing.assert_array_equal(pairs.alone(), found_by(None, predicted))


def test_perfect_heatmaps_are_all_right_alone_and_survive_a_maximum_of_any_gain():
    pairs = Pairs(made(3), causes.each_pair(range(3)), maps="target")
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
    chosen = causes.with_next(range(1))[:, :2]
    equations = NormalEquations.of(Pairs(predicted, chosen))
    systems = [explicit(predicted, at) for at in chosen[0]]
    A = np.concatenate([weight[:, None, None] * A for A, _, weight in systems])  # (pairs · J, H·W, 9)
    e = np.concatenate([weight[:, None] * e for _, e, weight in systems])
    best, residual, rank, _ = np.linalg.lstsq(A.reshape(-1, 9), e.ravel(), rcond=None)
    assert rank == 9
    np.testing.assert_allclose(equations.solve(), best, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(equations.loss(equations.solve()), residual[0] / e.size / 2, rtol=1e-9)


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_the_parabola_is_the_loss_of_the_module_and_its_gradient_is_autograds(threshold):
    predicted = as_double(made(5))
    pairs = Pairs(predicted, causes.with_next(range(3)))
    equations = NormalEquations.of(pairs, threshold)
    fusion = OriginalFusion(threshold, shape=SHAPE, initial=WEIGHTS).double()
    loss = joints_mse(fusion(pairs.source, pairs.reference, pairs.F), pairs.target, pairs.at_reference("weight"))
    loss.backward()
    torch.testing.assert_close(equations.loss(fusion.weight.detach().flatten()), loss.detach(), rtol=1e-9, atol=0)
    gradient = fusion.weight.grad.flatten()
    torch.testing.assert_close(equations.gradient(WEIGHTS.flatten()), gradient, rtol=1e-6, atol=1e-9)
    alone = joints_mse(pairs.reference, pairs.target, pairs.at_reference("weight"))
    torch.testing.assert_close(equations.loss(torch.zeros(9)), alone, rtol=1e-9, atol=0)


def test_nothing_is_better_than_the_best_weights_and_descent_ends_there():
    equations = NormalEquations.of(Pairs(as_double(made(6)), causes.with_next(range(3))))
    best = equations.solve()
    assert equations.gradient(best).abs().max() < 1e-12
    others = best + torch.randn(200, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 100
    assert (equations.loss(others) > equations.loss(best)).all()
    values, vectors = torch.linalg.eigh(equations.curvature)
    weights, losses = torch.zeros(9, dtype=torch.float64), []
    for _ in range(50):  # gradient descent, in coordinates in which the parabola is round
        weights = weights - 0.5 * vectors @ ((vectors.T @ equations.gradient(weights)) / values)
        losses.append(equations.loss(weights))
    assert (torch.stack(losses).diff() <= 1e-15).all()
    torch.testing.assert_close(weights, best, rtol=1e-6, atol=1e-9)


def test_training_on_the_equations_is_training_on_the_heatmaps():
    predicted, seeds, settings = made(7), (3, 8), {"steps": 12, "batch": 5, "lr": 1e-2}
    equations = NormalEquations.of(Pairs(predicted, causes.all_pairs(range(3))))
    path = equations.train(causes.initial_weights(seeds), seeds, **settings)
    assert path.shape == (2, 13, 9)
    for seed, of_seed in zip(seeds, path, strict=True):
        torch.manual_seed(seed)
        fusion = OriginalFusion(shape=SHAPE)
        _, rows = train(fusion, fusion_loss, HeatmapPairs(predicted), weight_decay=0, schedule="constant", seed=seed,
                        log=fitting._watch, progress=False, **settings)  # fmt: skip
        literal = torch.tensor([[row[f"w{k}"] for k in range(9)] for row in rows])
        torch.testing.assert_close(of_seed[:-1], literal, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_seed[-1], fusion.weight.detach().flatten(), rtol=1e-4, atol=1e-6)
    assert (path[:, 0] - path[:, -1]).abs().max() > 0.05


def test_behind_the_sigmoid_training_goes_through_the_heatmaps_once(monkeypatch):
    predicted, initial = made(11, scenes=2), causes.initial_weights((0, 1)) / 20
    weights = causes.behind_sigmoid(predicted, initial, 1.5, 3)
    for seed, of_seed in enumerate(weights):
        fusion = OriginalFusion(1.5, sigmoid=True, shape=SHAPE, initial=initial[seed].reshape(3, 3))
        train(fusion, fusion_loss, HeatmapPairs(predicted), steps=3, batch=8, lr=1e-3, weight_decay=0, seed=seed,
              schedule="constant", progress=False)  # fmt: skip
        torch.testing.assert_close(of_seed, fusion.weight.detach().flatten(), rtol=1e-4, atol=1e-6)
    assert (weights - initial).abs().amax() > 1e-3 and not torch.equal(weights[0], weights[1])
    monkeypatch.setattr(
        causes, "SimpleFusion", functools.wraps(SimpleFusion, updated=())(lambda *_, **__: pytest.fail())
    )
    assert torch.equal(causes.behind_sigmoid(predicted, initial, 1.5, 3), weights)
    with pytest.raises(pytest.fail.Exception):
        causes.behind_sigmoid(replace(predicted, F=predicted.F.mT), initial, 1.5, 3)


def test_what_a_band_counts_for_divides_the_ridge_by_the_number_of_its_pixels():
    predicted = as_double(made(8, 1))
    pairs = Pairs(predicted, causes.each_pair(range(1)))
    mean, even = (NormalEquations.of(pairs, per_band=count) for count in (1.0, 40.0))
    (n, s, r), F = pairs.chosen[0, 0], pairs.F[0]
    count = redirect(torch.ones(SHAPE, dtype=torch.float64), F, 1.0).clamp_min(1)
    A = (redirect(causes.nine_shifts(predicted.output[n, s]), F, 1.0) / count).flatten(-2)
    weight = predicted.weight[n, r]
    gram = weight[:, None, None] * (A @ A.mT) / A.shape[-1]
    torch.testing.assert_close(mean.gram[0], gram, rtol=1e-9, atol=1e-15)
    for ours, theirs in zip(vars(mean.scaled(40.0)).values(), vars(even).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    kernel = 3 * WEIGHTS[None]
    np.testing.assert_array_equal(pairs.score(kernel, per_band=40.0), pairs.score(40 * kernel, per_band=1.0))


def test_the_nine_shifts_are_the_modules_windows_and_its_initial_weights_pytorchs():
    maps = random_maps(4, *TINY)
    for k in range(9):
        fusion = OriginalFusion(shape=TINY, initial=torch.eye(9)[k].reshape(3, 3)).double()
        torch.testing.assert_close(causes.nine_shifts(maps)[:, k], fusion.convolve(maps).detach(), rtol=0, atol=0)
    for seed, weights in zip((0, 7), causes.initial_weights((0, 7)), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(OriginalFusion().weight.detach().flatten(), weights)


def test_scores_and_equations_are_read_again_and_made_anew_for_whatever_differs(cache, monkeypatch):
    first, chosen, kernels = made(9), causes.all_pairs(range(2)), torch.stack([WEIGHTS / 30, MIDDLE / 20])
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
    for name in ("_score", "_ridge"):
        monkeypatch.setattr(Pairs if name == "_score" else causes, name, None)
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
    line = torch.tensor([*normal, -normal @ through])
    F = random_maps(3, 3, seed=5) @ torch.diag(torch.tensor([1.0, 1, 0], dtype=torch.float64))  # of rank 2
    ridge = redirect(random_maps(*TINY, seed=seed), F, 1.5, "loop")
    far, values = causes.along_line(ridge, line)
    steep = abs(normal[0]) > abs(normal[1])
    wanted = []
    for k in range(TINY[0] if steep else TINY[1]):
        x, y = (-(normal[1] * k + line[2]) / normal[0], k) if steep else (k, -(normal[0] * k + line[2]) / normal[1])
        x, y = round(float(x)), round(float(y))
        if 0 <= x < TINY[1] and 0 <= y < TINY[0]:
            wanted.append(float(ridge[y, x]))
    np.testing.assert_array_equal(values, wanted)
    assert far[0] == 0 and (np.diff(far) >= 1).all() and (np.diff(far) <= 2**0.5 + 1e-9).all()


@pytest.mark.parametrize("collect", ["sum", "max"])
def test_ridges_are_as_high_and_as_uneven_as_their_profiles(collect):
    predicted = made(3, scenes=8)
    pairs = Pairs(predicted, causes.each_pair(range(8)), maps="target")
    high, walks = [], []
    for k, (n, s, r) in enumerate(pairs.chosen[:, 0]):
        for source, reference in zip(predicted.target[n, s], predicted.target[n, r], strict=True):
            ridge = pairs.ridges(1.0, collect)[k][
                int((predicted.target[n, s] == source).all((-2, -1)).int().argmax())
            ].float()
            high.append(float(ridge.max() / reference.max()))
            y, x = np.unravel_index(int(source.argmax()), source.shape)
            line = predicted.F[n, s, r] @ torch.tensor([x, y, 1.0], dtype=torch.float64)
            walk = causes.along_line(ridge, line)[1]
            if k % 7 == 0 and len(walk) > 20:
                walks.append((walk.max() - walk.min()) / walk.mean())
    given = causes.shape_of_ridges(pairs, 1.0, collect)
    assert given == pytest.approx((np.sort(high)[(len(high) - 1) // 2], np.median(walks)), rel=1e-3)


def test_a_line_beside_the_map_has_no_profile_and_a_flat_one_no_unevenness():
    far, values = causes.along_line(torch.ones(TINY), torch.tensor([0.0, 1, 30]))
    assert len(far) == len(values) == 0
    assert causes._unevenness(np.full(5, 3.0)) == 0
    assert causes._unevenness(np.array([1.0, 2, 3])) == 1


def test_the_epipole_is_inside_where_the_source_camera_is_in_the_picture():
    reference = look_at((0, -4, 1), (0, 0, 1))
    for x, z in ((0, 1), (1.9, 1), (2.3, 1), (0, 2.4), (0, 2.7), (-1, 0.2), (-2.3, 1)):
        source = look_at((x, 1, z), (0, 0, 1))
        at = reference.project(source.C)
        inside = bool((at > -0.5).all() and (at < np.array(reference.size) - 0.5).all())
        F = torch.from_numpy(fundamental_from_cameras(source, reference))
        width, height = reference.size
        assert causes.epipole_inside(F[None], (height, width)).tolist() == [inside]
    sideways = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)  # the epipole at infinity
    assert not causes.epipole_inside(sideways, TINY)


@pytest.mark.parametrize("seed", range(3))
def test_forgetting_the_crop_takes_f_of_the_whole_pictures(seed):
    cameras, X = camera_pair(seed), world_points(seed)
    lenses = camera_pair(seed, LENS)  # the pictures are undistorted
    F = causes.forgetting_crop(lenses, SHAPE)
    assert F.shape == (2, 2, 3, 3) and not F[0, 0].any()
    small = [camera.project(X) * np.array([SHAPE[1], SHAPE[0]]) / camera.size for camera in cameras]
    for s, r in ((0, 1), (1, 0)):
        assert point_line_distance(F[s, r], *(torch.from_numpy(small[v]) for v in (s, r))).max() < 1e-6
    estimated = causes.forgetting_crop(cameras, SHAPE, X)
    for s, r in ((0, 1), (1, 0)):
        off = point_line_distance(estimated[s, r], *(torch.from_numpy(small[v]) for v in (s, r)))
        assert 0 < off.median() < 0.5  # whole pixels of the picture, read in small ones
