"""Evidence in space against literal sums, brute force over trees, finite differences and bodies of known size."""

import itertools
import math

import numpy as np
import pytest
import torch
from scenes import JOINTS, SHAPE, made_up
from scipy.ndimage import map_coordinates

from epiutils import space
from epiutils.heatmaps import render
from epiutils.space import Body, Calibration, Modes

CALIBRATION = Calibration(12.0, 6.0, -1.0)
TREE = ((0, 1), (1, 2), (1, 3), (0, 4))  # of five joints


def seen(seed=0, scenes=2, **settings):
    """Heatmaps (N, V, J, H, W) in double precision, their cameras, and the true joints."""
    predicted = made_up(seed, scenes, shape=settings.pop("shape", SHAPE), **settings)
    return predicted.output.double(), predicted.P, predicted.joints_3d


def literal_evidence(X, heatmaps, P) -> float:
    """log p of one point for one joint, view by view: heatmaps (V, H, W)."""
    total = 0.0
    for h, camera in zip(heatmaps.numpy(), P.numpy(), strict=True):
        p = np.exp(CALIBRATION.sharpness * (h - h.max()))
        odds = math.exp(CALIBRATION.slope * h.max() + CALIBRATION.offset) if h.any() else 0.0
        x = camera @ np.append(X, 1)
        at = x[:2] / x[2] / 4
        there = map_coordinates(p / p.sum(), at[::-1, None], order=1, mode="grid-constant")[0] if x[2] > 0 else 0.0
        total += math.log1p(odds * h.size * there)
    return total


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_the_evidence_is_a_literal_sum_over_the_views(seed, views):
    heatmaps, P, true = seen(seed, lost=0.3)
    heatmaps[0, 1, 2] = 0  # a view that knows nothing of a joint
    X = true[:, :, None] + torch.randn(2, JOINTS, 6, 3, generator=torch.Generator().manual_seed(seed)).double() / 10
    X[:, :, 5, 2] += 50.0  # above every picture
    given = space.log_evidence(X, heatmaps[:, :views], P[:, :views], CALIBRATION)
    for n, j, c in np.ndindex(*given.shape):
        expected = literal_evidence(X[n, j, c].numpy(), heatmaps[n, :views, j], P[n, :views])
        assert given[n, j, c].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (given[:, :, 5] == 0).all() and given.max() > 5


def test_a_point_behind_a_camera_has_no_image_in_it():
    heatmaps, P, true = seen()
    before = space.log_evidence(true[:, :, None], heatmaps[:, :1], P[:, :1], CALIBRATION)
    centre = -torch.linalg.solve(P[:, 0, :, :3], P[:, 0, :, 3])  # (N, 3)
    mirrored = 2 * centre[:, None, None] - true[:, :, None]
    assert before.min() > 3
    assert (space.log_evidence(mirrored, heatmaps[:, :1], P[:, :1], CALIBRATION) == 0).all()


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_what_perfect_views_see_is_where_the_joints_are(seed, views):
    heatmaps, P, true = seen(seed, shape=(60, 80))
    inside = (heatmaps[:, :views].flatten(-2).amax(-1) > 0.9).all(1)  # (N, J)
    X = space.poses(heatmaps[:, :views], P[:, :views], CALIBRATION)
    off = (X - true).norm(dim=-1)[inside]
    assert inside.sum() > 5 and off.max() < (0.02 if views > 2 else 0.06)


def test_candidates_hold_the_crossing_of_any_two_peaks():
    heatmaps, P, true = seen(1, shape=(60, 80), lost=0.4)
    right = (heatmaps.flatten(-2).argmax(-1) == made_up(1, 2, shape=(60, 80)).output.flatten(-2).argmax(-1)).sum(1)
    away = (space._candidates(heatmaps, P) - true[:, :, None]).norm(dim=-1)
    nearest = torch.where(away.isnan(), 9.0, away).amin(-1)
    assert (right >= 2).sum() > 3 and nearest[right >= 2].max() < 0.08


@pytest.mark.parametrize("seed", range(2))
def test_views_in_another_order_and_instants_alone_give_the_same(seed):
    heatmaps, P, _ = seen(seed, scenes=3, lost=0.3)
    whole = space.modes(heatmaps, P, CALIBRATION)
    other = space.modes(heatmaps[:, [2, 0, 3, 1]], P[:, [2, 0, 3, 1]], CALIBRATION)
    torch.testing.assert_close(other.X[:, :, 0], whole.X[:, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(other.mass[:, :, 0], whole.mass[:, :, 0], rtol=1e-6, atol=0)
    for n in range(3):
        one = space.modes(heatmaps[n : n + 1], P[n : n + 1], CALIBRATION)
        for name in ("X", "mass", "covariance"):
            torch.testing.assert_close(getattr(one, name)[0], getattr(whole, name)[n], rtol=1e-6, atol=1e-9)
    assert torch.equal(space.poses(heatmaps, P, CALIBRATION, batch=2), space.poses(heatmaps, P, CALIBRATION, batch=3))


def test_a_view_that_is_missing_is_as_if_it_had_never_been():
    heatmaps, P, _ = seen(4, lost=0.2)
    without = space.modes(heatmaps[:, :3], P[:, :3], CALIBRATION)
    heatmaps[:, 3] = 0
    empty = space.modes(heatmaps, P, CALIBRATION)
    torch.testing.assert_close(empty.mass[:, :, 0], without.mass[:, :, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(empty.X[:, :, 0], without.X[:, :, 0], rtol=0, atol=1e-6)


def test_modes_are_sorted_and_their_covariance_is_long_where_rays_are_nearly_parallel():
    heatmaps, P, true = seen(2, shape=(60, 80))
    found = space.modes(heatmaps[:, :2], P[:, :2], CALIBRATION)
    assert (found.mass.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(found.share.sum(-1), torch.ones(2, JOINTS).double())
    assert torch.linalg.eigvalsh(found.covariance).min() > -1e-12
    ahead = true[:, :, None] - found.X[:, :, :1]
    assert ahead.norm(dim=-1).median() < 0.05


@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_in_a_heatmap_is_that_of_finite_differences(seed):
    heatmaps, P, _ = seen(seed, scenes=1, shape=(28, 40))
    heatmaps = heatmaps + 0.01 * torch.rand(heatmaps.shape, generator=torch.Generator().manual_seed(seed)).double()
    heatmaps.requires_grad_()

    def asked(maps):
        found = space.modes(maps, P, CALIBRATION, count=2)
        return found.X[0, 1, 0].sum() + 0.1 * found.mass[0, 1, 0]

    (gradient,) = torch.autograd.grad(asked(heatmaps), heatmaps)
    assert gradient[0, :, [0, 2, 3, 4]].abs().max() == 0  # another joint's maps have no part in it
    y, x = torch.meshgrid(torch.arange(28), torch.arange(40), indexing="ij")
    for v in range(4):  # beside the peak, by which the places are proposed
        peak_y, peak_x = divmod(int(heatmaps[0, v, 1].argmax()), 40)
        beside = torch.maximum((y - peak_y).abs(), (x - peak_x).abs()) > 1
        k = int((gradient[0, v, 1].abs() * beside).argmax())
        nudge = torch.zeros_like(heatmaps)
        nudge[0, v, 1].view(-1)[k] = 1e-6
        with torch.no_grad():
            finite = (asked(heatmaps + nudge) - asked(heatmaps - nudge)) / 2e-6
        assert gradient[0, v, 1].view(-1)[k].item() == pytest.approx(finite.item(), rel=1e-3, abs=1e-7)


# The tree of bones


def chosen_modes(seed=0, instants=2, joints=5, count=3) -> Modes:
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(instants, joints, count, 3, generator=draw, dtype=torch.float64)
    mass = torch.randn(instants, joints, count, generator=draw, dtype=torch.float64)
    return Modes(X, mass, torch.eye(3).double().expand(instants, joints, count, 3, 3))


@pytest.mark.parametrize("seed", range(4))
def test_marginals_on_the_tree_are_those_of_all_combinations(seed):
    found, draw = chosen_modes(seed), torch.Generator().manual_seed(seed + 50)
    fit = torch.randn(2, len(TREE), 3, 3, generator=draw, dtype=torch.float64)
    given = space._sum_product(found.mass, fit, TREE)
    for n in range(2):
        expected = torch.zeros(5, 3, dtype=torch.float64)
        for choice in itertools.product(range(3), repeat=5):
            score = sum(found.mass[n, j, m] for j, m in enumerate(choice))
            score = score + sum(fit[n, k, choice[a], choice[b]] for k, (a, b) in enumerate(TREE))
            for j, m in enumerate(choice):
                expected[j, m] += score.exp()
        torch.testing.assert_close(given[n], expected / expected.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def people_of(seed=0, count=200, height=(0.9, 1.2)):
    """Poses (N, 5, 3) of people whose bones have fixed shares of their size, in any attitude; and their sizes."""
    rng, length = np.random.default_rng(seed), np.array([0.5, 0.4, 0.3, 0.6])
    size, X = rng.uniform(*height, count), np.zeros((count, 5, 3))
    for k, (a, b) in enumerate(TREE):
        way = rng.normal(size=(count, 3))
        X[:, b] = X[:, a] + way / np.linalg.norm(way, axis=1, keepdims=True) * (length[k] * size)[:, None]
    return X, size * length.sum()


def test_a_body_knows_its_shares_and_measures_people_whatever_one_joint_says():
    poses, size = people_of()
    body = Body.of(poses, TREE)
    np.testing.assert_allclose(body.mean, np.array([0.5, 0.4, 0.3, 0.6]) / 1.8, rtol=1e-6)
    assert (body.deviation == 5e-4).all() and body.size[0] == pytest.approx(size.mean())
    X, sure = torch.from_numpy(poses[:20]), torch.ones(20, 5).double()
    torch.testing.assert_close(body.measure(X, sure), torch.from_numpy(size[:20]), rtol=1e-6, atol=0)
    X[:, 4] += 3.0  # at the end of a limb
    torch.testing.assert_close(body.measure(X, sure), torch.from_numpy(size[:20]), rtol=1e-6, atol=0)
    sure[:, [2, 3, 4]] = 0.0
    X[:, [2, 3]] += 1.0
    torch.testing.assert_close(body.measure(X, sure), torch.from_numpy(size[:20]), rtol=1e-6, atol=0)
    giant = body.measure(10 * X, sure)
    assert torch.allclose(giant, torch.tensor(body.size[0] + 2.5 * body.size[1]).double())


def test_the_mode_that_fits_the_bones_is_chosen_over_a_likelier_one():
    poses, _ = people_of(1)
    body, true = Body.of(poses, TREE), torch.from_numpy(poses[:10])
    wrong = true + torch.randn(true.shape, generator=torch.Generator().manual_seed(3)).double()
    mass = torch.tensor([2.0, 0.0]).double().expand(10, 5, 2).clone()  # the true one is the likelier …
    mass[:, 3] = torch.tensor([0.0, 2.0])  # … but for one joint
    found = Modes(torch.stack([true, wrong], 2), mass, torch.eye(3).double().expand(10, 5, 2, 3, 3))
    q = space.along_bones(found, body)
    torch.testing.assert_close(q.sum(-1), torch.ones(10, 5).double())
    assert (found.share[:, 3, 0] < 0.2).all() and (q[..., 0] > 0.9).all()
    torch.testing.assert_close(found.near_best(q, within=0.01), true)
    loose = space.along_bones(found, body, floor=1e9)  # whatever the bones say counts for nothing
    torch.testing.assert_close(loose, found.share, rtol=1e-6, atol=1e-9)


# Its three numbers


def test_the_calibration_learns_how_sharp_maps_are_and_when_their_peaks_are_right():
    draw = torch.Generator().manual_seed(0)
    at = torch.rand(1200, 2, generator=draw) * torch.tensor([35.0, 23.0])
    right = torch.arange(1200) < 900
    shown = torch.where(
        right[:, None], at + torch.randn(1200, 2, generator=draw), torch.rand(1200, 2, generator=draw) * 20
    )
    maps = render(shown, SHAPE, peak=torch.where(right, 0.9, 0.3))[:, None]
    fitted = Calibration.fit(maps, 4 * at[:, None], steps=150)
    odds = {peak: fitted.slope * peak + fitted.offset for peak in (0.3, 0.9)}
    assert odds[0.9] > 3 and odds[0.3] < -1  # they were right always, and hardly ever
    assert fitted == Calibration.fit(maps, 4 * at[:, None], steps=150)
    blunt = Calibration.fit(render(at + 3 * torch.randn(1200, 2, generator=draw), SHAPE)[:, None], 4 * at[:, None])
    assert blunt.sharpness < fitted.sharpness
    beside = torch.cat([4 * at[:, None], torch.full((50, 1, 2), math.nan)])
    assert Calibration.fit(torch.cat([maps, maps[:50]]), beside, steps=150) == fitted


@pytest.mark.parametrize("seed", range(3))
def test_a_view_asked_twice_together_says_of_places_what_it_says_alone(seed):
    """Of two copies of a view, each half as sharp: the differences of log p between pixels are those of one alone."""
    maps = torch.rand(1, 1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    P = torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 1]]).double()[None, None]  # X is a pixel of the map
    y, x = (axis.flatten().double() for axis in torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij"))
    X = torch.stack([x, y, 0 * x], -1)[None, None]
    sure = Calibration(9.0, 3.0, 40.0)  # log(1 + o p) is log o + log p
    alone = space.log_evidence(X, maps, P, sure)
    twice = space.log_evidence(X, maps.expand(1, 2, -1, -1, -1), P.expand(1, 2, -1, -1), sure.together())
    torch.testing.assert_close(twice - twice[..., :1], alone - alone[..., :1], atol=1e-9, rtol=0)
    torch.testing.assert_close(alone - alone[..., :1], 9 * (maps.flatten(2) - maps[..., :1, :1].flatten(2)))
