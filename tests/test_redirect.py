"""The redirection operator: three methods against each other and against brute force in long double."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import brute_distances, brute_members, camera_pair, heatmap_F, look_at, random_maps, warn_always, world_points

from epiutils.epipolar import find_fundamental, fundamental_from_cameras, transfer
from epiutils.redirect import _TIE, Pencil, _half_size, _normalized_fundamental, _ranges, redirect

METHODS = ("loop", "dense", "pencil")
RECTIFIED = np.array([[0, 0, 0], [0, 0, -1.0], [0, 1, 0]])  # same rows: the line of (x, y) is y_ref = y
BITS = 50  # so many source pixels fit into one map of powers of two, whose sums float64 holds exactly


def members(method, F, shape, threshold, out_shape):
    """Who is in whose band, (N', N) bool: each source pixel is sent as a power of two, and read back as a bit."""
    pixel = np.arange(math.prod(shape))
    values = np.zeros((-(-len(pixel) // BITS), len(pixel)))
    values[pixel // BITS, pixel] = 2.0 ** (pixel % BITS)
    out = redirect(torch.from_numpy(values).unflatten(-1, shape), F, threshold, method, out_shape)
    sums = out.flatten(-2).numpy()
    assert (sums == sums.round()).all() and (sums >= 0).all()
    return (sums.astype(np.int64)[pixel // BITS] >> (pixel % BITS)[:, None] & 1).T.astype(bool)


# Fundamental matrices, from each of which H ≠ W


def skew(e):
    """[e]ₓ of a homogeneous point: the F of forward motion towards e."""
    return np.cross(np.eye(3), e)


def from_epipoles(rng, e_src, e_ref, shape, out_shape):
    """A random F with these epipoles (homogeneous px): well-conditioned in coordinates of the pictures' size."""

    def centred(e, shape):
        unit = max(shape) / 2
        e = np.array([(e[0] - e[2] * (shape[1] - 1) / 2) / unit, (e[1] - e[2] * (shape[0] - 1) / 2) / unit, e[2]])
        T = np.array([[1, 0, -(shape[1] - 1) / 2], [0, 1, -(shape[0] - 1) / 2], [0, 0, unit]]) / unit
        return e / np.linalg.norm(e), T

    (e_src, T_src), (e_ref, T_ref) = centred(e_src, shape), centred(e_ref, out_shape)
    while True:
        F = skew(e_ref) @ rng.normal(size=(3, 3)) @ skew(e_src)
        singular = np.linalg.svd(F, compute_uv=False)
        if singular[1] > 0.1 * singular[0]:
            return T_ref.T @ F @ T_src


def direction(rng):
    angle = rng.choice([rng.uniform(0, 2 * np.pi), 0, np.pi / 2, np.pi, -np.pi / 2, np.pi / 4])
    return np.array([np.cos(angle), np.sin(angle)])


def border(rng, H, W):
    x, y = rng.uniform(-0.5, W - 0.5), rng.uniform(-0.5, H - 0.5)
    edges = [(0, y), (-0.5, y), (W - 1, y), (W - 0.5, y), (x, 0), (x, -0.5), (x, H - 1), (0, 0), (W - 0.5, H - 0.5)]
    return *edges[rng.integers(len(edges))], 1


PLACES = {  # of an epipole (homogeneous px) in or about a picture of height H and width W
    "inside": lambda rng, H, W: (rng.uniform(-0.5, W - 0.5), rng.uniform(-0.5, H - 0.5), 1),
    "pixel": lambda rng, H, W: (float(rng.integers(W)), float(rng.integers(H)), 1),
    "border": border,
    "far": lambda rng, H, W: (*10 ** rng.uniform(3, 14) * direction(rng), 1),
    "infinity": lambda rng, H, W: (*direction(rng), 0),
}


def generic(rng, shape, out_shape):
    return heatmap_F(camera_pair(int(rng.integers(1000))), shape, out_shape)


def mirror_symmetric(rng, shape, out_shape):
    """Cameras that are each other's mirror image in the plane x = 0: many angles tie, also at the wrap."""
    b, y, height = rng.uniform(0.5, 3), rng.uniform(2, 5), rng.choice([1.0, 1.6])
    pair = [look_at((side * b, y, height), (0, 0, 1.0), 60, (60, 44)) for side in (-1, 1)]
    resized = lambda H, W: np.array([[W / 60, 0, (W / 60 - 1) / 2], [0, H / 44, (H / 44 - 1) / 2], [0, 0, 1]])
    return transfer(fundamental_from_cameras(*pair), resized(*shape), resized(*out_shape))


def forward_motion(rng, shape, out_shape):
    """Straight ahead, the same lens: F = [e]ₓ, one epipole in both views."""
    return skew(PLACES[rng.choice(["inside", "pixel", "border"])](rng, *shape))


def rectified(rng, shape, out_shape):
    """Epipoles at infinity; shifted by whole or half pixels, so that distances tie with thresholds exactly."""
    shift = np.array([[1, 0, 0], [0, 1, rng.integers(-4, 5) / 2], [0, 0, 1]])
    F = RECTIFIED @ shift
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    return [F, swap @ F @ swap, swap @ F][rng.integers(3)]


def epipoles_at(src, ref):
    return lambda rng, shape, out: from_epipoles(rng, PLACES[src](rng, *shape), PLACES[ref](rng, *out), shape, out)


def integer_epipoles(rng, shape, out_shape):
    """F e = 0 and e'ᵀ F = 0 without any rounding, both epipoles pixels."""
    e_src, e_ref = (PLACES["pixel"](rng, *s) for s in (shape, out_shape))
    while True:
        F = skew(e_ref) @ rng.integers(-3, 4, (3, 3)) @ skew(e_src)
        singular = np.linalg.svd(F, compute_uv=False)
        if singular[1] > 1e-2 * singular[0]:
            return F


KINDS = {
    "generic": generic,
    "mirror-symmetric": mirror_symmetric,
    "forward motion": forward_motion,
    "rectified": rectified,
    "reference epipole in the picture": epipoles_at("inside", "inside"),
    "reference epipole on the border": epipoles_at("border", "border"),
    "epipoles at pixels, exactly": integer_epipoles,
    "epipoles at pixels, but for rounding": epipoles_at("pixel", "pixel"),
    "epipoles at infinity": epipoles_at("infinity", "infinity"),
    "source epipole at infinity": epipoles_at("infinity", "inside"),
    "reference epipole at infinity": epipoles_at("pixel", "infinity"),
    "epipoles nearly at infinity": epipoles_at("far", "far"),
    "reference epipole nearly at infinity": epipoles_at("inside", "far"),
}

PIXELS, ROUNDED = "epipoles at pixels, exactly", "epipoles at pixels, but for rounding"
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 8)).filter(lambda s: s[0] != s[1])


def draw(kind, seed, shape, out_shape):
    return KINDS[kind](np.random.default_rng(seed), shape, out_shape)


def pencil_of(kind, seed, shape=(3, 4), out_shape=(4, 3), threshold=0.8):
    F = draw(kind, seed, shape, out_shape)
    return F, Pencil.from_fundamental(torch.from_numpy(F), shape, threshold, out_shape)


# Who is in whose band


@pytest.mark.parametrize("kind", KINDS)
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=SIZES,
    out_shape=st.one_of(st.none(), SIZES),
    threshold=st.one_of(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, math.sqrt(2), math.sqrt(0.5)]), st.floats(0.5, 30.0)),
    scale=st.sampled_from([1.0, -1.0, 3e-9, -7e8]),
)
def test_every_method_finds_the_bands_of_brute_force(kind, seed, shape, out_shape, threshold, scale):
    F = scale * draw(kind, seed, shape, out_shape or shape)
    distance = brute_distances(F, shape, out_shape or shape)
    tied = np.abs(distance - threshold) < 1e-9 * threshold
    for method in METHODS:
        wrong = (members(method, F, shape, threshold, out_shape) != (distance <= threshold)) & ~tied
        assert not wrong.any(), f"{method}: {wrong.sum()} memberships differ from brute force"


@pytest.mark.parametrize("kind", KINDS)
def test_so_do_the_fast_methods_on_larger_maps_a_pencils_counts_and_the_set_up_in_torch_that_a_gpu_uses(kind):
    shape, out_shape, threshold = (18, 24), (27, 20), 1.234
    F = np.stack([draw(kind, seed, shape, out_shape) for seed in range(3)])
    bands = np.stack([brute_members(f, shape, threshold, out_shape) for f in F])
    for f, band, method in zip(F, bands, ("dense", "pencil", "pencil"), strict=True):
        np.testing.assert_array_equal(members(method, f, shape, threshold, out_shape), band)
    count = Pencil.from_fundamental(torch.from_numpy(F), shape, threshold, out_shape).count
    assert count.dtype == torch.int64 and count.shape == (3, *out_shape)
    np.testing.assert_array_equal(count.flatten(-2), bands.sum(-1))
    single = Pencil.from_fundamental(torch.from_numpy(F[1]), shape, threshold, out_shape).count
    np.testing.assert_array_equal(single, count[1:2])
    normalized = _normalized_fundamental(torch.from_numpy(F), shape, out_shape)
    t = threshold * (1 + _TIE) / _half_size(out_shape)
    found = _ranges(*(torch.as_tensor(a) for a in normalized), shape, out_shape, t)
    assert all(isinstance(part, torch.Tensor) for part in found)
    values = random_maps(3, 2, *shape)
    out = Pencil(shape, out_shape, True, *found).sum(values)
    np.testing.assert_allclose(out.flatten(-2), values.flatten(-2).numpy() @ bands.swapaxes(1, 2), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("threshold", "reach"), [(0.5, 0), (1 - 2e-9, 0), (1, 1), (2 - 4e-9, 1), (2.0, 2), (30, 9)])
def test_a_rectified_pairs_band_is_closed_at_the_threshold(method, threshold, reach):
    values = random_maps(5, 9)
    rows = values.sum(-1)
    expected = torch.stack([rows[max(0, y - reach) : y + reach + 1].sum() for y in range(5)])
    out = redirect(values, torch.from_numpy(RECTIFIED), threshold, method)
    torch.testing.assert_close(out, expected[:, None].expand(5, 9))


@pytest.mark.parametrize("method", METHODS)
def test_a_diagonal_at_distance_exactly_the_threshold_belongs_to_the_band(method):
    diagonal = np.array([[0, 0, 1.0], [0, 0, -1], [-1, 1, 0]])  # lines x_ref − y_ref = x − y, √2 / 2 apart
    found = members(method, diagonal, (4, 6), math.sqrt(0.5), (6, 5))
    y, x = np.divmod(np.arange(24), 6)
    y_ref, x_ref = np.divmod(np.arange(30), 5)
    np.testing.assert_array_equal(found, np.abs((x_ref - y_ref)[:, None] - (x - y)) <= 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("e_src", [(3, 2), (0, 0), (6, 4), (0, 3), (5, 0)])
def test_a_source_pixel_at_the_epipole_gives_nothing_and_where_the_lines_meet_all_others_arrive(e_src, method):
    shape, out_shape, e_ref = (5, 7), (8, 6), (4, 1)
    F = skew((*e_ref, 1)) @ np.array([[1, 1, 0], [-1, 2, 1], [0, 1, -3]]) @ skew((*e_src, 1.0))
    values = random_maps(*shape)
    out = redirect(values, F, 0.5, method, out_shape)
    lone = torch.zeros(shape, dtype=torch.float64)
    lone[e_src[1], e_src[0]] = 1
    torch.testing.assert_close(out[e_ref[1], e_ref[0]], (values * (1 - lone)).sum())
    assert not redirect(lone, F, 100.0, method, out_shape).any()


# Values, batches, dtypes


@pytest.mark.parametrize("method", METHODS)
def test_values_of_any_lead_and_stride_are_summed_over_the_bands_and_have_the_shape_asked_for(method):
    F = draw("generic", 4, (5, 8), (9, 6))
    band = torch.from_numpy(brute_members(F, (5, 8), 1.2, (9, 6))).double()
    strided = random_maps(2, 10, 3, 16)[:, ::2, :, ::2].transpose(1, 2)  # (2, 3, 5, 8)
    whole, expanded = (
        (random_maps(*lead, 5, 8) for lead in ((), (3,), (2, 3))),
        random_maps(1, 1, 5, 8).expand(2, 3, 5, 8),
    )
    for values in (*whole, strided, expanded, random_maps(2, 3, 8, 5).mT):
        out = redirect(values, torch.from_numpy(F), 1.2, method, (9, 6))
        torch.testing.assert_close(out, (values.flatten(-2) @ band.T).unflatten(-1, (9, 6)))
    everywhere = redirect(random_maps(6, 8), skew((4.1, 2.3, 1)), 11.0, method)  # lines cross within the diagonal
    torch.testing.assert_close(everywhere, random_maps(6, 8).sum().expand(6, 8))


OPERATIONS = {m: lambda values, F, m=m: redirect(values, F, 1.1, m) for m in METHODS}
for sharpness in (math.inf, 2.0):
    OPERATIONS[f"max {sharpness}"] = lambda values, F, s=sharpness: Pencil.from_fundamental(F, (5, 7), 1.1).max(
        values, s
    )


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_batch_with_an_F_each_equals_a_loop_over_it_and_changes_no_input(operation):
    rng = np.random.default_rng(1)
    kinds = ["generic", "rectified", PIXELS, "reference epipole at infinity", "forward motion"]
    F = torch.from_numpy(np.stack([KINDS[k](rng, (5, 7), (5, 7)) for k in kinds]))
    values = random_maps(5, 3, 5, 7).requires_grad_()
    before = F.clone(), values.detach().clone()
    together = operation(values, F)
    looped = torch.stack([operation(v, f) for v, f in zip(values, F, strict=True)])
    torch.testing.assert_close(together, looped, rtol=0, atol=1e-12)
    torch.testing.assert_close(operation(values, F[:1].expand(5, 3, 3)), operation(values, F[0]))
    if together.requires_grad:
        together.square().nan_to_num(0, 0, 0).sum().backward()
    assert torch.equal(F, before[0]) and torch.equal(values.detach(), before[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["generic", "mirror-symmetric", "reference epipole in the picture"])
def test_float32_values_give_the_sums_of_float64_to_their_precision(kind, method):
    shape = (7, 10) if method == "loop" else (30, 40)
    F = torch.from_numpy(draw(kind, 3, shape, shape))
    values = random_maps(2, *shape, dtype=torch.float32)
    out, exact = redirect(values, F, 1.0, method), redirect(values.double(), F, 1.0, method)
    assert out.dtype == torch.float32 and exact.dtype == torch.float64
    assert (out - exact).abs().max() <= 2e-7 * values.abs().sum(dim=(-2, -1)).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_a_float32_F_is_used_at_its_own_precision_even_a_read_only_array(seed, method):
    shape, out_shape = (6, 9), (8, 7)
    F = generic(np.random.default_rng(seed), shape, out_shape).astype(np.float32)
    F.flags.writeable = False
    distance = brute_distances(F, shape, out_shape)
    clear = np.abs(distance - 1) > 1e-4
    with warn_always():
        for given_as in (np.asarray, torch.tensor):
            found = members(method, given_as(F), shape, 1.0, out_shape)
            assert ((found == (distance <= 1)) | ~clear).all() and clear.mean() > 0.99


@pytest.mark.parametrize("estimator", ["8point", "lmeds", "ransac", "magsac", "raw"])
def test_the_F_of_an_estimator_is_accepted_with_its_rounding(estimator):
    X, rng = world_points(2), np.random.default_rng(0)
    points = [c.project(X) + rng.normal(0, 0.3, (40, 2)) for c in camera_pair(2)]
    F, _ = (
        cv2.findFundamentalMat(*points, cv2.FM_8POINT) if estimator == "raw" else find_fundamental(*points, estimator)
    )
    F, values = transfer(F, np.diag([0.05, 0.05, 1]), np.diag([0.04, 0.04, 1])), random_maps(12, 16)
    dense, pencil = (redirect(values, F, 1.0, m, (16, 12)) for m in ("dense", "pencil"))
    torch.testing.assert_close(pencil, dense)


# Linearity and gradients

GRADIENT_CASES = [(k, seed) for k in ("generic", "rectified", "mirror-symmetric", PIXELS, ROUNDED) for seed in (1, 2)]


def test_the_cases_of_the_gradient_tests_hold_wraps_and_epipole_pixels():
    pencils = [pencil_of(*case)[1] for case in GRADIENT_CASES]
    assert sum(p.wraps is not None for p in pencils) >= 6
    assert [p.valid is not None for p in pencils] == [kind in (PIXELS, ROUNDED) for kind, _ in GRADIENT_CASES]


@pytest.mark.parametrize(("kind", "seed"), GRADIENT_CASES)
def test_gradients_of_first_and_second_order_are_those_of_finite_differences(kind, seed):
    (_, pencil), values = pencil_of(kind, seed), random_maps(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(pencil.sum, values)
    assert torch.autograd.gradgradcheck(lambda v: pencil.sum(v) ** 3, values)


@pytest.mark.parametrize("method", ["dense", "pencil"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_linear_and_its_gradient_the_adjoint(kind, method):
    shape, out_shape = (6, 9), (8, 7)
    F = np.stack([draw(kind, seed, shape, out_shape) for seed in range(4)])
    bands = torch.from_numpy(np.stack([brute_members(f, shape, 1.234, out_shape) for f in F])).double()
    A = lambda values: redirect(values, F, 1.234, method, out_shape)
    x, y = random_maps(4, 2, *shape).requires_grad_(), random_maps(4, 2, *out_shape, seed=9)
    (Aty,) = torch.autograd.grad(A(x), x, y)
    torch.testing.assert_close((A(x) * y).sum(), (x * Aty).sum())
    torch.testing.assert_close(Aty, (y.flatten(-2) @ bands).unflatten(-1, shape))
    torch.testing.assert_close(A(2.5 * x - 3 * x.flip(0)), 2.5 * A(x) - 3 * A(x.flip(0)))


# A kept set-up


def test_one_pencil_serves_many_heatmaps_in_any_order_and_precision():
    F, pencil = pencil_of(PIXELS, 2, (5, 8), (7, 6), 1.1)
    bands = torch.from_numpy(brute_members(F, (5, 8), 1.1, (7, 6))).double()
    for lead, dtype in zip(((), (3,), (2, 3), (2, 3, 4)), (torch.float64, torch.float32) * 2, strict=True):
        values, g = (random_maps(*lead, *shape, dtype=dtype).requires_grad_() for shape in ((5, 8), (7, 6)))
        out, exactly = pencil.sum(values), {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
        pencil.max(values), pencil.count
        assert out.dtype == dtype
        torch.testing.assert_close(out, (values.flatten(-2).double() @ bands.T).unflatten(-1, (7, 6)), **exactly)
        (gradient,) = torch.autograd.grad(out, values, g)
        torch.testing.assert_close(gradient, (g.flatten(-2).double() @ bands).unflatten(-1, (5, 8)), **exactly)


# The maximum along the line


def brute_max(values, bands):
    """Maximum of values (M, N) over each band (N', N): (M, N'), −inf for an empty one."""
    return np.where(bands, values[:, None], -np.inf).max(-1)


def brute_soft(values, bands, sharpness):
    """log Σ exp(β v) / β in long double."""
    values = values.astype(np.longdouble)
    highest = brute_max(values, bands)
    with np.errstate(invalid="ignore", divide="ignore"):
        below = np.where(bands, values[:, None] - highest[..., None], -np.inf)
        return np.where(bands.any(-1), highest + np.log(np.exp(sharpness * below).sum(-1)) / sharpness, -np.inf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sharpness", [1e-3, 0.3, 1.0, 40.0, 1e6, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_the_maximum_is_that_of_brute_force_exactly_and_the_soft_one_its_log_sum_exp(kind, sharpness, dtype):
    for seed, (shape, out_shape) in enumerate([((6, 9), (8, 7)), ((7, 4), (3, 12)), ((2, 5), (9, 14))]):
        F, pencil = pencil_of(kind, seed, shape, out_shape, 0.61)
        bands, normal = brute_members(F, shape, 0.61, out_shape), random_maps(2, *shape, seed=seed)
        values = torch.cat([normal, (2 * normal).round(), -normal.abs() - 5, 1e4 * normal]).to(dtype)  # ties, huge ones
        out, v = pencil.max(values, sharpness).flatten(-2), values.flatten(-2).numpy()
        assert out.dtype == dtype
        if sharpness == math.inf:
            np.testing.assert_array_equal(out, brute_max(v, bands))
            continue
        for k, row in enumerate(brute_soft(v, bands, sharpness).astype(float)):
            precision = 20 * torch.finfo(dtype).eps * (np.abs(v[k]).max() + np.log(54) / sharpness)
            np.testing.assert_allclose(out[k], row, rtol=0, atol=precision)


@pytest.mark.parametrize("sharpness", [0.5, 5.0, math.inf])
@pytest.mark.parametrize(("kind", "seed"), GRADIENT_CASES)
def test_gradients_of_the_maximum_are_those_of_finite_differences(kind, seed, sharpness):
    _, pencil = pencil_of(kind, seed)
    values = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).double().reshape(1, 3, 4) / 8
    filled = pencil.count[0] > 0
    assert filled.any()
    assert torch.autograd.gradcheck(lambda v: pencil.max(v, sharpness)[:, filled], values.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 50.0, 1e6, math.inf])
@pytest.mark.parametrize("kind", ["generic", "rectified", PIXELS, ROUNDED])
def test_gradients_of_the_maximum_stay_finite_and_spread_one_over_each_band(kind, sharpness, dtype):
    shape, out_shape = (6, 9), (12, 7)
    F, pencil = pencil_of(kind, 2, shape, out_shape, 0.61)
    bands = brute_members(F, shape, 0.61, out_shape)
    values = (1e4 * random_maps(2, *shape)).to(dtype).requires_grad_()
    out = pencil.max(values, sharpness)
    (gradient,) = torch.autograd.grad(out.masked_fill(out.isinf(), 0).sum(), values)
    assert gradient.isfinite().all() and (gradient >= 0).all()
    torch.testing.assert_close(gradient.sum().double(), torch.tensor(2.0 * bands.any(-1).sum()), rtol=1e-3, atol=0)
    assert not gradient.flatten(-2)[:, ~bands.any(0)].any(), "pixels in no band, the epipole's among them, get nothing"


def test_an_empty_band_is_minus_infinity_and_the_gradient_goes_to_one_of_equal_values():
    values, F = torch.zeros(4, 6, dtype=torch.float64).requires_grad_(), torch.from_numpy(RECTIFIED)
    (gradient,) = torch.autograd.grad(Pencil.from_fundamental(F, (4, 6), 0.5).max(values).sum(), values)
    assert gradient.sum(-1).tolist() == [6.0] * 4 and (gradient > 0).sum() <= 24
    for sharpness in (math.inf, 5.0):
        out = Pencil.from_fundamental(F, (3, 6), 1.0, (7, 5)).max(random_maps(3, 6), sharpness)
        assert (out[4:] == -math.inf).all() and out[:4].isfinite().all()


# Errors, each of which says which

GOOD = torch.from_numpy(generic(np.random.default_rng(0), (5, 7), (5, 7)))
TWO = GOOD.expand(2, 3, 3)
REFUSED = [  # the message, and which argument is wrong
    ("F is all zeros", {"F": torch.zeros(3, 3)}),
    ("rank 1", {"F": torch.outer(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 1, 2]))}),
    ("rank 3", {"F": torch.eye(3)}),
    ("rank 3, a fundamental", {"F": GOOD / GOOD.abs().max() + 1e-4 * torch.eye(3)}),
    ("nan or inf", {"F": GOOD * torch.tensor([1, 1, math.nan])}),
    ("holds nan or inf", {"F": GOOD * torch.tensor([1, 1, math.inf])}),
    (r"F must be \(3, 3\) or \(B, 3, 3\), got \(2, 3\)", {"F": torch.ones(2, 3)}),
    (r"F must be .*got \(3,\)", {"F": torch.ones(3)}),
    (r"F must be .*got \(1, 1, 3, 3\)", {"F": GOOD[None, None]}),
    ("F is all", {"F": torch.stack([GOOD, torch.zeros(3, 3)])}),
    ("has rank 1", {"F": torch.stack([GOOD, torch.ones(3, 3)])}),
    ("has rank 3", {"F": torch.stack([torch.eye(3), GOOD.float()])}),
    (r"F of shape \(3, 3, 3\) needs values \(3, J, H, W\), got \(2, 4, 5, 7\)", {"F": GOOD.expand(3, 3, 3)}),
    *[(f"threshold must be a positive number of pixels, got {t}", {"threshold": t}) for t in (0.0, -1.0, math.nan)],
    *[(f"threshold must be a positive number of pixels, got {t}", {"threshold": t}) for t in (math.inf, -math.inf)],
    *[(r"shape is \(H, W\), two positive integers", {"out_shape": s}) for s in ((0, 4), (3,), (3, 4, 5), (2.5, 4))],
    ("method must be one of pencil, dense, loop, got 'fast'", {"method": "fast"}),
    (r"values must be a floating tensor .*got \(5, 7\) of torch.int64", {"values": torch.ones(5, 7).long()}),
    (r"values must be a floating tensor .*got \(7,\)", {"values": torch.ones(7)}),
    (r"values must be a floating tensor .*got \(1, 1, 1, 5, 7\)", {"values": torch.ones(1, 1, 1, 5, 7)}),
    ("values must be a floating tensor .*got ndarray", {"values": np.ones((5, 7))}),
    (r"F of shape \(2, 3, 3\) needs values \(2, J, H, W\), got \(2, 5, 7\)", {"values": torch.ones(2, 5, 7), "F": TWO}),
    (r"F of shape \(2, 3, 3\) needs .*, got \(3, 2, 5, 7\)", {"values": torch.ones(3, 2, 5, 7), "F": TWO}),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("message", "wrong"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_redirected_is_refused_by_what_it_is(message, wrong, method):
    with pytest.raises(ValueError, match=message):
        redirect(**{"values": random_maps(2, 4, 5, 7), "F": GOOD, "threshold": 1.0, "method": method, **wrong})


@pytest.mark.parametrize("use", [Pencil.sum, Pencil.max], ids=["sum", "max"])
def test_a_pencil_refuses_values_that_do_not_fit_it_and_a_sharpness_that_is_not_positive(use):
    one, two = (Pencil.from_fundamental(F, (5, 7), 1.0) for F in (GOOD, GOOD.expand(2, 3, 3)))
    for values in (random_maps(7, 5), random_maps(5, 7).long()):
        with pytest.raises(ValueError, match=r"values must be floating \(..., 5, 7\), got"):
            use(one, values)
    for values in (random_maps(2, 5, 7), random_maps(3, 4, 5, 7)):
        with pytest.raises(ValueError, match="2 fundamental matrices need values"):
            use(two, values)
    for sharpness in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sharpness must be positive"):
            one.max(random_maps(5, 7), sharpness)
