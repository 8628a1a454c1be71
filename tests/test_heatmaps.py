"""Heatmaps: HRNet's accuracy, decoding, targets and loss as its code has them, the renderer as its formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import random_maps

from epiutils.heatmaps import (
    HEATMAP_FROM_INPUT,
    STRIDE,
    accuracy,
    decode,
    found,
    hit_loss,
    hrnet_targets,
    joints_mse,
    render,
)
from epiutils.networks.training import maps_loss

SHAPES = [(64, 48), (20, 33), (50, 100), (7, 5)]


# HRNet's lib/core/evaluate.py, written out as it is


def hrnet_dists(output, target):
    preds = np.zeros((2, *output.shape[:2], 2), np.float32)
    for k, n, c in np.ndindex(preds.shape[:3]):
        flat = (output, target)[k][n, c].reshape(-1)
        idx, mask = np.float32(np.argmax(flat)), np.float32(np.greater(np.amax(flat), 0.0))
        preds[k, n, c] = idx % output.shape[3] * mask, np.floor(idx / output.shape[3]) * mask
    norm, (pred, true) = np.array(output.shape[2:]) / 10, preds
    dists = np.full((output.shape[1], output.shape[0]), -1.0)
    for n, c in np.ndindex(*output.shape[:2]):
        if true[n, c, 0] > 1 and true[n, c, 1] > 1:
            dists[c, n] = np.linalg.norm(pred[n, c, :] / norm - true[n, c, :] / norm)
    return dists


def hrnet_accuracy(output, target):
    avg_acc, cnt = 0, 0
    for dists in hrnet_dists(output, target):
        dist_cal = np.not_equal(dists, -1)
        if dist_cal.sum() > 0:
            avg_acc += np.less(dists[dist_cal], 0.5).sum() * 1.0 / dist_cal.sum()
            cnt += 1
    return avg_acc / cnt if cnt != 0 else 0


def one_hot(shape, points, height=1.0):
    """Maps (1, J, H, W) that are zero but for one pixel (x, y) each."""
    maps = np.zeros((1, len(points), *shape), np.float32)
    for j, (x, y) in enumerate(points):
        maps[0, j, y, x] = height
    return maps


def assert_hrnets(output, target):
    dists = hrnet_dists(output, target).T
    for given_as in (np.asarray, torch.from_numpy):
        maps = given_as(output), given_as(target)
        assert accuracy(*maps) == hrnet_accuracy(output, target)
        np.testing.assert_array_equal(found(*maps), np.where(dists == -1, np.nan, dists < 0.5))


@settings(derandomize=True, deadline=None, max_examples=120, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 7),
    joints=st.sampled_from([1, 2, 6, 17]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)).filter(lambda s: s[0] != s[1]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
    levels=st.sampled_from([2, 5, 1000]),  # with few levels, ties
    near=st.booleans(),
    odd=st.sampled_from(["", "all-negative", "all-zero target", "nan", "inf", "joint without samples"]),
)
def test_accuracy_is_hrnets_to_the_last_digit(seed, batch, joints, shape, dtype, levels, near, odd):
    rng = np.random.default_rng(seed)
    target = rng.integers(-levels, levels, (batch, joints, *shape)).astype(dtype)
    output = rng.integers(-levels, levels, target.shape).astype(dtype)
    some = rng.random((batch, joints)) < 0.5
    if near:  # peaks at and near the right ones, so that more than half of them count
        output = np.where(some[..., None, None], target, np.roll(target, rng.integers(-3, 4, 2), (2, 3)))
    if odd == "all-negative":
        output[some] = -np.abs(output[some]) - 1
    if odd == "all-zero target":
        target[some] = 0
    if odd in ("nan", "inf"):
        output[rng.random(output.shape) < 0.01] = float(odd)
        target[rng.random(target.shape) < 0.01] = float(odd)
    if odd == "joint without samples":
        target[:, 0] = 0
    assert_hrnets(output, target)


@pytest.mark.parametrize("shape", [(64, 48), (30, 50), (60, 44), (140, 36), (44, 60), (36, 140)])
def test_every_displacement_counts_as_for_hrnet_also_where_rounding_decides_at_exactly_half_a_tenth(shape):
    steps = np.array([s for s in itertools.product(range(-7, 8), repeat=2) if 0 in s or abs(s[0]) == abs(s[1])])
    true = np.arange(2, min(shape))[:, None, None].repeat(len(steps), 1).repeat(2, 2)
    inside = ((true + steps >= 0) & (true + steps < shape[::-1])).all(-1)
    maps = one_hot(shape, (true + steps)[inside]), one_hot(shape, true[inside])
    assert_hrnets(*maps)
    ties = (d := hrnet_dists(*maps))[np.abs(d - 0.5) < 1e-6]
    assert max(shape) % 20 or 0 < (ties < 0.5).mean() < 1, "else no rounding is tested"


@pytest.mark.parametrize(
    "shape, true, point, right",
    [  # (100, 40): units of 10 px along x and of 4 px along y, HRNet's own order
        ((100, 40), (20, 50), (24, 50), 1),
        ((100, 40), (20, 50), (20, 54), 0),
        ((40, 60), (20, 20), (22, 20), 0),
        ((40, 60), (20, 20), (21, 20), 1),
        ((40, 60), (2, 2), (2, 2), 1),
        ((40, 60), (1, 9), (1, 9), math.nan),
        ((40, 60), (9, 1), (9, 1), math.nan),
    ],
)
def test_a_joint_is_right_within_half_a_tenth_of_the_height_for_x_and_of_the_width_for_y(shape, true, point, right):
    np.testing.assert_array_equal(found(one_hot(shape, [point]), one_hot(shape, [true])), [[right]])


def test_the_accuracy_averages_over_joints_not_over_all_that_counts():
    target = np.concatenate([one_hot((40, 60), [(20, 20), p, (0, 0)]) for p in ((20, 20), (0, 0), (0, 0))])
    output = np.concatenate([one_hot((40, 60), [p, (20, 20), (5, 5)]) for p in ((20, 20), (40, 20), (1, 39))])
    assert accuracy(output, target) == (1 / 3 + 1) / 2  # joint 0: 1 of 3, joint 1: 1 of 1, joint 2: left out
    assert np.nanmean(found(output, target)) == 2 / 4
    assert accuracy(output, 0 * target) == 0 and np.isnan(found(output, 0 * target)).all()  # nothing counts


def test_accuracy_takes_tensors_that_are_tracked_or_strided_and_changes_nothing():
    output, target = random_maps(3, 4, 9, 12).requires_grad_(), random_maps(3, 4, 12, 9, seed=1).mT
    before = output.detach().clone(), target.clone()
    assert accuracy(output, target) == hrnet_accuracy(before[0].numpy(), before[1].numpy())
    assert torch.equal(output.detach(), before[0]) and torch.equal(target, before[1])


@pytest.mark.parametrize("score", [accuracy, found])
@pytest.mark.parametrize(
    "shapes", [((1, 2, 8, 6), (1, 2, 6, 8)), ((2, 8, 6), (2, 8, 6)), ((0, 2, 8, 6), (0, 2, 8, 6))], ids=str
)
def test_maps_that_cannot_be_compared_are_refused(score, shapes):
    with pytest.raises(ValueError, match=r"must both be \(B, J, H, W\)"):
        score(np.ones(shapes[0]), np.ones(shapes[1]))


# Decoding


def literal_argmax(hm):
    """(x, y) of the first highest pixel, by looking at each."""
    best = (0, 0)
    for y, x in np.ndindex(*hm.shape):
        if hm[y, x] > hm[best[1], best[0]]:
            best = (x, y)
    return best


def literal_quarter(hm):
    """HRNet's get_final_preds before its inverse crop."""
    px, py = literal_argmax(hm)
    coords = np.array([px, py], float)
    if 1 < px < hm.shape[1] - 1 and 1 < py < hm.shape[0] - 1:
        diff = np.array([hm[py][px + 1] - hm[py][px - 1], hm[py + 1][px] - hm[py - 1][px]])
        coords += np.sign(diff) * 0.25
    return coords


def literal_dark(hm):
    """DARK's taylor() of the log-heatmap, where it has a maximum."""
    px, py = literal_argmax(hm)
    if 1 < px < hm.shape[1] - 2 and 1 < py < hm.shape[0] - 2 and hm[py][px] > 0:
        hm = np.log(np.maximum(hm, 1e-10))
        dx, dy = 0.5 * (hm[py][px + 1] - hm[py][px - 1]), 0.5 * (hm[py + 1][px] - hm[py - 1][px])
        dxx = 0.25 * (hm[py][px + 2] - 2 * hm[py][px] + hm[py][px - 2])
        dxy = 0.25 * (hm[py + 1][px + 1] - hm[py - 1][px + 1] - hm[py + 1][px - 1] + hm[py - 1][px - 1])
        dyy = 0.25 * (hm[py + 2][px] - 2 * hm[py][px] + hm[py - 2][px])
        hessian = np.array([[dxx, dxy], [dxy, dyy]])
        if (np.linalg.eigvalsh(hessian) < 0).all():
            return np.array([px, py]) - np.linalg.inv(hessian) @ (dx, dy)
    return np.array([px, py], float)


LITERAL = {"argmax": literal_argmax, "quarter": literal_quarter, "dark": literal_dark}


@pytest.mark.parametrize("method", LITERAL)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4), (2, 7), (1, 5), (4, 6), (6, 5)])
def test_decoding_is_that_of_literal_loops(shape, method):
    rng = np.random.default_rng(3)
    maps = rng.normal(size=(100, *shape))
    maps[20:40] = rng.integers(-2, 3, (20, *shape))  # ties, in the peak and beside it
    y, x = rng.integers(shape[0], size=20), rng.integers(shape[1], size=20)
    maps[40:60] += render(torch.tensor(np.stack([x, y], -1)), shape, peak=9.0).numpy()
    y, x = np.divmod(np.arange(40) % math.prod(shape), shape[1])  # of small maps each pixel, at every border
    maps[60:] = render(torch.tensor(np.stack([x + 0.2, y - 0.3], -1)), shape).numpy()
    maps[50], maps[51] = -np.abs(maps[50]) - 1, 0
    points, heights = decode(torch.from_numpy(maps), method)
    np.testing.assert_allclose(points, [LITERAL[method](m) for m in maps], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(heights, maps.max((1, 2)))


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_finds_what_was_rendered_and_dark_gaussians_of_any_orientation_exactly(seed, sigma):
    rng = np.random.default_rng(seed)
    true = rng.uniform((8, 8), (24, 36), (20, 2))[:, ::-1].copy()  # (x, y) within H, W = 32, 44
    for method, limit in (("argmax", 0.5), ("quarter", 0.25), ("dark", 1e-6)):
        points, heights = decode(render(torch.from_numpy(true), (32, 44), sigma, peak=0.7), method)
        np.testing.assert_allclose(points, true, rtol=0, atol=limit)
        assert (heights > 0.5).all() and (heights <= 0.7).all()
    L = np.array([[1, 0], [rng.uniform(-0.7, 0.7), rng.uniform(0.7, 1.4)]]) / sigma
    yy, xx = np.mgrid[:32, :44]
    d = np.stack([xx - true[:, 0, None, None], yy - true[:, 1, None, None]], -1) @ L.T
    turned = torch.from_numpy(np.exp(-(d**2).sum(-1) / 2))
    np.testing.assert_allclose(decode(turned, "dark")[0], true, atol=1e-6)


@pytest.mark.parametrize("method", LITERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_keeps_leading_dimensions_dtype_and_input(method, dtype):
    maps = random_maps(2, 3, 12, 9, dtype=dtype)
    before = maps.clone()
    points, heights = decode(maps, method)
    assert points.shape == (2, 3, 2) and heights.shape == (2, 3) and points.dtype == heights.dtype == dtype
    assert torch.equal(decode(maps[1, 2], method)[0], points[1, 2]) and torch.equal(maps, before)
    assert torch.equal(decode(maps.mT.contiguous().mT, method)[0], points)


# Rendering and pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_rendering_is_the_gaussian_of_its_formula_and_zero_for_an_unknown_point(shape, sigma, dtype):
    rng = np.random.default_rng(0)
    points, peaks = (
        torch.tensor(rng.uniform(-10, 50, (2, 4, 2)), dtype=dtype),
        torch.tensor(rng.uniform(0.1, 2, (2, 4))),
    )
    whole, points[1, 2:, 0], points[0, 3] = points.round(), math.nan, math.nan
    before = points.clone()
    maps, precision = render(points, shape, sigma, peaks), 1e-9 if dtype == torch.float64 else 1e-4
    assert maps.shape == (2, 4, *shape) and maps.dtype == dtype
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    for (px, py), peak, each in zip(points.flatten(0, 1).tolist(), peaks.flatten(), maps.flatten(0, 1), strict=True):
        expected = peak.item() * np.exp(-((xx - px) ** 2 + (yy - py) ** 2) / (2 * sigma**2))
        np.testing.assert_allclose(each, np.nan_to_num(expected), rtol=precision, atol=1e-30)
    torch.testing.assert_close(points, before, equal_nan=True)
    torch.testing.assert_close(render(whole.long(), shape), render(whole.double(), shape))  # integers are points too


def test_an_unknown_decoder_and_a_sigma_that_is_not_positive_are_refused():
    with pytest.raises(ValueError, match='"argmax", "quarter" or "dark", got \'soft\''):
        decode(torch.ones(4, 5), "soft")
    for sigma in (0, -1.0):
        with pytest.raises(ValueError, match=f"sigma must be positive, got {sigma}"):
            render(torch.zeros(1, 2), (4, 5), sigma)


def test_heatmap_pixel_i_lies_at_input_pixel_4_i():
    assert STRIDE == 4
    np.testing.assert_array_equal(HEATMAP_FROM_INPUT @ (4 * 7, 4 * 11, 1), (7, 11, 1))
    with pytest.raises(ValueError, match="read-only"):
        HEATMAP_FROM_INPUT[0, 0] = 1


# HRNet's targets and loss, written out as they are


def hrnet_target(joints, visible, shape, sigma=2):
    """lib/dataset/JointsDataset.py, generate_target."""
    height, width = shape
    weight = visible.astype(np.float32)
    target = np.zeros((len(joints), height, width), np.float32)
    reach = sigma * 3
    for j in range(len(joints)):
        mu_x, mu_y = int(joints[j, 0] / 4 + 0.5), int(joints[j, 1] / 4 + 0.5)
        ul, br = [mu_x - reach, mu_y - reach], [mu_x + reach + 1, mu_y + reach + 1]
        if ul[0] >= width or ul[1] >= height or br[0] < 0 or br[1] < 0:
            weight[j] = 0
            continue
        size = 2 * reach + 1
        x = np.arange(0, size, 1, np.float32)
        g = np.exp(-((x - size // 2) ** 2 + (x[:, None] - size // 2) ** 2) / (2 * sigma**2))
        g_x, g_y = (max(0, -ul[0]), min(br[0], width) - ul[0]), (max(0, -ul[1]), min(br[1], height) - ul[1])
        i_x, i_y = (max(0, ul[0]), min(br[0], width)), (max(0, ul[1]), min(br[1], height))
        if weight[j] > 0.5:
            target[j, i_y[0] : i_y[1], i_x[0] : i_x[1]] = g[g_y[0] : g_y[1], g_x[0] : g_x[1]]
    return target, weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_targets_are_hrnets(shape, seed):
    rng = np.random.default_rng(seed)
    joints = rng.uniform(-60, 4 * max(shape) + 60, (200, 2))
    joints[:60] = np.round(joints[:60] / 2) * 2  # halves of a heatmap pixel, where rounding decides
    joints[60:90, 0] = rng.choice([-32, -30, -28, -26, -24, -2, 0, 4 * shape[1], 4 * shape[1] + 22], 30)
    expected, expected_weight = hrnet_target(joints, np.ones(200), shape)
    joints[::9, seed % 2] = rng.choice([math.nan, math.inf], 23)  # unknown ones
    expected[::9], expected_weight[::9] = 0, 0
    target, weight = hrnet_targets(torch.from_numpy(joints).reshape(4, 50, 2), shape)
    np.testing.assert_array_equal(weight.flatten(), expected_weight)
    np.testing.assert_allclose(target.flatten(0, 1), expected, rtol=0, atol=1e-7)
    assert target.dtype == weight.dtype == torch.float32 and 0 < expected_weight.mean() < 1


def test_the_loss_is_hrnets():
    """lib/core/loss.py: for each joint half the MSE of the weighed maps, then the mean over joints."""
    rng = np.random.default_rng(0)
    (output, target), weight = rng.uniform(0, 1, (2, 3, 5, 8, 6)), rng.integers(0, 2, (3, 5)).astype(float)
    weighed = [[m[:, j] * weight[:, j, None, None] for m in (output, target)] for j in range(5)]
    expected = np.mean([0.5 * ((a - b) ** 2).mean() for a, b in weighed])
    assert joints_mse(*map(torch.from_numpy, (output, target, weight))).item() == pytest.approx(expected, rel=1e-12)
    target, weight = hrnet_targets(torch.tensor([[[128.0, 128.0]]]), (64, 64))  # all-zero maps cost what it holds
    assert joints_mse(torch.zeros_like(target), target, weight).item() == pytest.approx(0.00153, rel=0.01)


def position_cross_entropy(output, target, weight):
    """The part of the training's loss that fades, which begins at a half of it."""
    begin, half, end = (maps_loss(output, {"target": target, "weight": weight}, done) for done in (0, 0.5, 1))
    torch.testing.assert_close(end, 100 * joints_mse(output, target, weight))
    torch.testing.assert_close(half, (begin + end) / 2)
    return 2 * (begin - end)


@pytest.mark.parametrize("seed", range(3))
def test_the_training_adds_a_divergence_of_pixel_distributions_that_fades(seed):
    generator = torch.Generator().manual_seed(seed)
    output, target = (torch.rand(2, 3, 9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([[1.0, 0, 1], [1, 1, 0]])
    p, q = (np.exp(10 * m[weight > 0].numpy()) for m in (output, target))
    p, q = (m / m.sum((1, 2), keepdims=True) for m in (p, q))
    expected = (q * np.log(q / p)).sum((1, 2)).mean()
    assert position_cross_entropy(output, target, weight).item() == pytest.approx(expected, rel=1e-4)
    assert position_cross_entropy(target + 3.7, target, weight).item() == pytest.approx(0, abs=1e-5)
    assert expected > 0.1
    assert position_cross_entropy(output, target, torch.zeros(2, 3)).item() == 0


def test_cross_entropy_leaves_the_all_zero_map_where_the_mse_hardly_moves():
    target, weight = hrnet_targets(torch.tensor([[[128.0, 96.0]]]), (64, 64))
    slopes = []
    for loss in (joints_mse, position_cross_entropy):
        output = torch.zeros_like(target, requires_grad=True)
        loss(output, target, weight).backward()
        slopes.append(-output.grad[0, 0, 24, 32].item() / loss(output, target, weight).item())
    assert slopes[1] > 3 * slopes[0] > 0


# The loss that asks for the right place


def counted_right(target):
    """For each pixel of the map, whether HRNet counts a prediction whose only peak is there: (H, W) bool."""
    alone = torch.eye(target.numel()).reshape(1, -1, *target.shape)
    return found(alone, target.expand_as(alone)).reshape(target.shape) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(16, 23), (22, 15), (32, 24), (12, 30)])
def test_the_hit_loss_is_that_of_all_pixels_that_the_accuracy_counts_right(shape, seed):
    rng = np.random.default_rng(seed)
    peaks = [(x, y) for x, y in zip(rng.integers(2, shape[1], 3), rng.integers(2, shape[0], 3), strict=True)]
    target = torch.from_numpy(one_hot(shape, [*peaks, (shape[1] - 1, 2)]))
    logits = torch.from_numpy(rng.normal(0, 3, (1, 4, *shape)))
    weight = torch.tensor([[1.0, 0, 1, 1]])
    expected = []
    for j in (0, 2, 3):
        p = np.exp(logits[0, j].numpy())
        expected.append(-np.log(p[counted_right(target[0, j])].sum() / p.sum()))
    assert hit_loss(logits, target, weight).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert hit_loss(logits + 50, target, weight).item() == pytest.approx(np.mean(expected), rel=1e-4)
    whole = hit_loss(logits.expand(2, 3, 4, *shape), target.expand(2, 3, 4, *shape), weight.expand(2, 3, 4))
    assert whole.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_hit_losss_gradient_moves_probability_into_the_place(seed):
    """It is p − p(x | right), zero in sum."""
    rng, shape = np.random.default_rng(seed), (16, 23)
    target = torch.from_numpy(one_hot(shape, [(rng.integers(2, 23), rng.integers(2, 16)) for _ in range(3)]))
    logits = torch.from_numpy(rng.normal(0, 2, target.shape)).requires_grad_()
    hit_loss(logits, target, torch.tensor([[1.0, 0, 3]])).backward()
    for j, share in enumerate((1 / 4, 0, 3 / 4)):
        p = torch.softmax(logits[0, j].detach().flatten(), 0).reshape(shape).numpy()
        inside = np.where(counted_right(target[0, j]), p, 0)
        np.testing.assert_allclose(logits.grad[0, j], share * (p - inside / inside.sum()), rtol=1e-4, atol=1e-6)
    loss = lambda z: hit_loss(z, target, torch.ones(1, 3))
    assert torch.autograd.gradcheck(loss, logits, eps=0.1, atol=2e-3, rtol=0.05, fast_mode=True)  # single precision
    for other in (logits.detach().bfloat16(), logits.detach()):  # joints that do not weigh give nothing
        none = hit_loss(other.requires_grad_(), target, torch.zeros(1, 3))
        none.backward()
        assert none == 0 and not other.grad.any()
        assert torch.isfinite(hit_loss(other, 0 * target, torch.tensor([[1.0, 0, 0]])))  # a map without a peak
