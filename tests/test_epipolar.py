"""Two-view geometry: theorems on seeded rigs, OpenCV as oracle, and points from which no F follows."""

import itertools
import warnings

import cv2
import numpy as np
import pytest
import torch
from rigs import LENS, camera_pair, look_at, up_to_scale, warn_always, world_points
from scipy.optimize import least_squares, minimize_scalar

from epiutils.cameras import crop_affine
from epiutils.data.dataset import open_dataset
from epiutils.data.views import heatmap_fundamentals
from epiutils.epipolar import (
    METHODS,
    epipolar_lines,
    epipoles,
    find_fundamental,
    fundamental_from_cameras,
    homogeneous,
    point_line_distance,
    sampson_distance,
    symmetric_epipolar_distance,
    transfer,
)
from epiutils.heatmaps import HEATMAP_FROM_INPUT

SEEDS = range(6)


def exact_pair(seed, n=40):
    """F from calibration and n exact correspondences."""
    return noisy_pair(seed, 0.0, n)


def noisy_pair(seed, sigma=2.0, n=40):
    pair, X, rng = camera_pair(seed), world_points(seed, n), np.random.default_rng(seed)
    return fundamental_from_cameras(*pair), *(c.project(X) + rng.normal(0, sigma, (n, 2)) for c in pair)


def literal_line(F, x):
    """F (x, y, 1) with a² + b² = 1, in plain Python."""
    a, b, c = (row[0] * x[0] + row[1] * x[1] + row[2] for row in F)
    n = (a * a + b * b) ** 0.5
    return np.array([a / n, b / n, c / n])


def brute_distance(F, x_src, x_ref):
    """Distance from x_ref to its line: the nearest of points that lie on the line, found by minimisation."""
    a, b, c = literal_line(F, x_src)
    return np.sqrt(minimize_scalar(lambda s: np.sum((np.array([-a * c - b * s, a * s - b * c]) - x_ref) ** 2)).fun)


def nearest_exact(F, x_src, x_ref):
    """Distance in ℝ⁴ to the nearest exact correspondence: the source moves by m, the other drops onto its line."""
    best = least_squares(lambda m: [*m, literal_line(F, x_src + m) @ (*x_ref, 1)], (0, 0), xtol=1e-12, gtol=1e-12)
    return np.sqrt(2 * best.cost)


@pytest.mark.parametrize("seed", SEEDS)
def test_matches_satisfy_the_constraint_without_distortion_and_others_do_not(seed):
    F, x_src, x_ref = exact_pair(seed)
    error = np.einsum("ni,ij,nj->n", homogeneous(x_ref), F, homogeneous(x_src))
    shuffled = np.einsum("ni,ij,nj->n", homogeneous(x_ref[::-1]), F, homogeneous(x_src))
    assert np.abs(error).max() < 1e-12 and np.median(np.abs(shuffled)) > 1e-6
    pair, X = camera_pair(seed, LENS), world_points(seed)
    F, recorded = fundamental_from_cameras(*pair), [camera.project(X) for camera in pair]
    straight = [camera.undistort(x) for camera, x in zip(pair, recorded, strict=True)]
    assert point_line_distance(F, *straight).max() < 1e-5 and point_line_distance(F, *recorded).max() > 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_F_has_rank_2_its_epipoles_are_images_of_the_centres_on_every_line_and_the_views_exchanged_transpose_it(seed):
    src, ref = camera_pair(seed)
    F, back = fundamental_from_cameras(src, ref), fundamental_from_cameras(ref, src)
    np.testing.assert_allclose(np.linalg.norm(F), 1)
    np.testing.assert_array_equal(np.linalg.svd(F, compute_uv=False) > 1e-12, (True, True, False))
    np.testing.assert_allclose(up_to_scale(F), up_to_scale(back.T), atol=1e-12)
    e_src, e_ref = epipoles(F)
    np.testing.assert_allclose(np.cross(e_ref, ref.P @ np.append(src.C, 1)), 0, atol=1e-8)
    np.testing.assert_allclose(np.cross(e_src, src.P @ np.append(ref.C, 1)), 0, atol=1e-8)
    np.testing.assert_allclose([np.linalg.norm(e_src), np.linalg.norm(e_ref)], 1)
    x = np.random.default_rng(seed).uniform(0, 300, (50, 2))
    assert np.abs(epipolar_lines(F, x) @ e_ref).max() < 1e-9
    assert np.abs(epipolar_lines(F.T, x) @ e_src).max() < 1e-9
    for e in epipoles(np.array([[0, 0, 0], [0, 0, -1.0], [0, 1, 0]])):  # of a rectified pair: at infinity
        np.testing.assert_allclose(np.abs(e), (1, 0, 0), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_to_transfer_F_is_to_crop_the_cameras(seed):
    src, ref = camera_pair(seed)
    A_src = crop_affine((150, 110), 200, (64, 48), rotation=0.4)
    A_ref = np.array([[0.2, 0.03, 4], [-0.01, 0.3, -6], [0, 0, 1]])
    moved = transfer(fundamental_from_cameras(src, ref), A_src, A_ref)
    cropped = fundamental_from_cameras(src.crop(A_src, (64, 48)), ref.crop(A_ref, (60, 90)))
    np.testing.assert_allclose(up_to_scale(moved), up_to_scale(cropped), atol=1e-10)


def test_transfers_undo_and_take_affines_of_either_library_even_read_only():
    F, A = fundamental_from_cameras(*camera_pair(2)), HEATMAP_FROM_INPUT
    expected = transfer(F, A, A)
    np.testing.assert_allclose(transfer(expected, np.linalg.inv(A), np.linalg.inv(A)), F, atol=1e-12)
    with warn_always():
        for affine in (A, torch.tensor(A.copy())):
            np.testing.assert_allclose(transfer(torch.from_numpy(F), affine, affine), expected)


@pytest.mark.parametrize("scale", [1, -3e5, 1e-9])
@pytest.mark.parametrize("seed", SEEDS)
def test_lines_and_sampson_distances_are_opencvs(seed, scale):
    F, x_src, x_ref = noisy_pair(seed)
    squared = [cv2.sampsonDistance(np.append(a, 1), np.append(b, 1), F) for a, b in zip(x_src, x_ref, strict=True)]
    np.testing.assert_allclose(sampson_distance(scale * F, x_src, x_ref) ** 2, squared, rtol=1e-9)
    for index, (matrix, x) in enumerate([(F, x_src), (F.T, x_ref)], start=1):
        opencv = cv2.computeCorrespondEpilines(x[:, None], index, F)[:, 0]
        lines = epipolar_lines(scale * matrix, x)
        np.testing.assert_allclose(lines * np.sign(scale), opencv, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(lines[3] * np.sign(scale), literal_line(matrix, x[3]), rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_distances_are_those_to_the_nearest_points_of_the_lines(seed):
    F, x_src, x_ref = noisy_pair(seed, n=6)
    there = [brute_distance(F, a, b) for a, b in zip(x_src, x_ref, strict=True)]
    back = [brute_distance(F.T, b, a) for a, b in zip(x_src, x_ref, strict=True)]
    np.testing.assert_allclose(point_line_distance(F, x_src, x_ref), there, rtol=1e-5, atol=1e-6)
    symmetric = symmetric_epipolar_distance(7 * F, x_src, x_ref)
    np.testing.assert_allclose(symmetric, np.add(there, back) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(symmetric, symmetric_epipolar_distance(F.T, x_ref, x_src))


@pytest.mark.parametrize("seed", SEEDS)
def test_sampson_is_to_first_order_the_distance_to_the_nearest_exact_correspondence(seed):
    F, exact_src, exact_ref = exact_pair(seed, 5)
    noise = np.random.default_rng(seed).normal(0, 1, (5, 4))
    for sigma, first_order in ((0.3, 2e-2), (0.03, 2e-3)):
        x_src, x_ref = exact_src + sigma * noise[:, :2], exact_ref + sigma * noise[:, 2:]
        for a, b, claimed in zip(x_src, x_ref, sampson_distance(F, x_src, x_ref), strict=True):
            np.testing.assert_allclose(claimed, nearest_exact(F, a, b), rtol=first_order, atol=1e-6)


DISTANCES = [epipolar_lines, epipoles, symmetric_epipolar_distance, point_line_distance, sampson_distance, transfer]


@pytest.mark.parametrize("function", DISTANCES, ids=lambda f: f.__name__)
def test_torch_equals_numpy_and_a_batch_equals_a_loop(function):
    triples = [noisy_pair(seed, n=7) for seed in range(3)]
    F, x_src, x_ref = (np.stack(arrays) for arrays in zip(*triples, strict=True))
    A = np.stack([crop_affine((90 + i, 80), 100, (64, 48), 0.3 * i) for i in range(3)])
    names = {"epipolar_lines": (F, x_src), "epipoles": (F,), "transfer": (F, A, A[::-1].copy())}
    arguments = names.get(function.__name__, (F, x_src, x_ref))
    before = [a.copy() for a in arguments]
    batched = np.stack([*function(*arguments)])
    looped = np.stack([np.stack([*function(*(a[i] for a in arguments))]) for i in range(3)])
    looped = looped.swapaxes(0, 1) if function is epipoles else looped
    tensors = function(*(torch.from_numpy(a) for a in arguments))
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors)
    for other in (looped, torch.stack([*tensors]).numpy()):
        if function is epipoles:  # of either sign
            assert np.allclose(np.abs((batched * other).sum(-1)), 1, atol=1e-9)
        else:
            np.testing.assert_allclose(batched, other, rtol=1e-8, atol=1e-10)
    for old, new in zip(before, arguments, strict=True):
        np.testing.assert_array_equal(old, new)


def test_distances_are_differentiable_in_torch():
    F, x_src, x_ref = (torch.from_numpy(a) for a in noisy_pair(1, n=2))
    size = F.abs()  # its entries differ by 1e5: finite differences need them scaled
    for distance in (symmetric_epipolar_distance, sampson_distance):
        inputs = [a.clone().requires_grad_() for a in (F.sign(), x_src, x_ref)]
        assert torch.autograd.gradcheck(lambda f, *x, of=distance: of(f * size, *x), inputs, atol=1e-4)


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_a_point_at_the_epipole_has_no_line_and_gives_nan(as_array):
    F = np.cross(np.eye(3), (3.0, 2, 1))  # forward motion: both epipoles at (3, 2)
    x_src, x_ref = as_array(np.array([[3.0, 2], [5, 2]])), as_array(np.array([[4.0, 7], [5, 3]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = epipolar_lines(as_array(F), x_src)
        distances = symmetric_epipolar_distance(as_array(F), x_src, x_ref)
        sampson = sampson_distance(as_array(F), x_src, as_array(np.array([[3.0, 2], [5, 3]])))
    for result in (lines, distances, sampson):
        result = np.asarray(result)
        assert np.isnan(result[0]).all() and np.isfinite(result[1]).all()


def test_cameras_that_share_their_centre_have_no_F():
    src = look_at((4, 0, 1), (0, 0, 1), name="one")
    ref = look_at((4, 0, 1), (0, 1, 1), focal=200, size=(200, 300), name="two")
    with pytest.raises(ValueError, match="cameras one and two share their centre"):
        fundamental_from_cameras(src, ref)
    fundamental_from_cameras(src, look_at((4, 1e-3, 1), (0, 0, 1)))  # a small baseline is one


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_correspondences_give_the_calibrated_F(seed, method):
    F, x_src, x_ref = exact_pair(seed)
    found, inliers = find_fundamental(x_src, x_ref, method)
    assert inliers.dtype == bool and inliers.shape == (40,) and inliers.all()
    np.testing.assert_allclose(np.linalg.norm(found), 1)
    assert np.linalg.svd(found, compute_uv=False)[2] < 1e-12
    assert symmetric_epipolar_distance(found, x_src, x_ref).max() < 1e-2
    np.testing.assert_allclose(up_to_scale(found), up_to_scale(F), atol=1e-4)


@pytest.mark.parametrize("method", ["lmeds", "ransac", "magsac"])
@pytest.mark.parametrize("seed", SEEDS)
def test_outliers_are_marked_and_do_not_move_F(seed, method):
    F, x_src, x_ref = exact_pair(seed, 60)
    rng = np.random.default_rng(seed)
    outlier = np.arange(60) % 4 == 0
    x_ref = np.where(outlier[:, None], rng.uniform(0, 300, (60, 2)), x_ref + rng.normal(0, 0.05, (60, 2)))
    far = point_line_distance(F, x_src, x_ref) > 5  # an outlier by chance near its line is none
    found, inliers = find_fundamental(x_src, x_ref, method)
    assert not inliers[far & outlier].any() and inliers[~outlier].mean() > 0.8
    assert np.median(symmetric_epipolar_distance(found, x_src, x_ref)[~outlier]) < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_same_points_give_the_same_F_and_the_threshold_decides_who_is_an_outlier(method):
    _, *points = noisy_pair(3, sigma=1.0, n=80)
    before = np.copy(points)
    first, kept = find_fundamental(*points, method)
    find_fundamental(*(x[::-1] for x in points), method)
    again, kept_again = find_fundamental(*points, method)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(kept, kept_again)
    np.testing.assert_array_equal(points, before)
    if method == "ransac":
        counts = [find_fundamental(*points, method, threshold=t)[1].sum() for t in (0.3, 1.0, 6.0)]
        assert counts[0] < counts[1] == kept.sum() < counts[2]


def two_at_once(x_src, _):
    """Matches of two fundamental matrices at once: the points lie on a critical surface."""
    lines = (homogeneous(x_src) @ fundamental_from_cameras(*camera_pair(seed)).T for seed in (2, 3))
    x_ref = np.cross(*lines)
    return x_src, x_ref[:, :2] / x_ref[:, 2:]


SPOILT = {  # by what is done to correspondences in general position
    "critical surface": two_at_once,
    "collinear in src": lambda p, q: (np.c_[p[:, 0], 0.5 * p[:, 0] + 20], q),
    "collinear in ref": lambda p, q: (p, q * (0, 1) + (120, 0)),
    "one point": lambda p, q: (0 * p + p[0], q),
    "too few": lambda p, q: (p[:7], q[:7]),
    "repeated": lambda p, q: (np.tile(p[:7], (5, 1)), np.tile(q[:7], (5, 1))),
    "seven places": lambda p, q: (np.tile(p[:7], (30, 1)), np.tile(q[:7], (30, 1))),
    "none": lambda p, q: (p[:0], q[:0]),
    "nan": lambda p, q: (np.where(np.arange(60).reshape(30, 2) == 9, np.nan, p), q),
    "inf": lambda p, q: (p, np.where(np.isin(np.arange(60).reshape(30, 2), (10, 18)), np.inf, q)),
    "lengths": lambda p, q: (p, q[:-1]),
    "homogeneous": lambda p, q: (np.c_[p, np.ones(len(p))], q),
}


def degenerate(kind, seed=2, n=30):
    """Correspondences from which no F follows."""
    (src, ref), X = camera_pair(seed), world_points(seed, n)
    if "one plane" in kind:
        on = X[n // 5 if "mostly" in kind else 0 :]
        on[:, 2] = 0.3 * on[:, 0] + 0.2 * on[:, 1] + 1
    if kind == "a line in space":
        X = X[:1] + np.random.default_rng(0).uniform(-1, 1, (n, 1)) * (0.3, 0.4, 0.5)
    if kind == "pure rotation":
        ref = look_at(src.C, (0.2, -0.3, 0.8), focal=350, size=(300, 400), roll=0.3)
    return SPOILT.get(kind, lambda *pair: pair)(src.project(X), ref.project(X))


MESSAGES = {
    "too few": "at least 8 different correspondences, got 7",
    "repeated": r"at least 8 different correspondences, got 7 \(35 with repetitions\)",
    "none": "at least 8 different correspondences, got 0",
    "collinear in src": "collinear in x_src",
    "collinear in ref": "collinear in x_ref",
    "one point": "collinear in x_src, or one point",
    "a line in space": "collinear in x_src",
    "one plane": "degenerate .*rank 6 .*one plane",
    "pure rotation": "degenerate .*share their centre",
    "critical surface": "degenerate .*rank 7 of the 8 needed",
    "nan": "x_src has 1 points that are nan or inf, the first at index 4",
    "inf": "x_ref has 2 points that are nan or inf, the first at index 5",
    "lengths": "correspond one to one, got 30 and 29",
    "homogeneous": r"x_src must be \(N, 2\)",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MESSAGES)
def test_points_from_which_no_F_follows_give_a_clear_error(kind, method):
    x_src, x_ref = degenerate(kind)
    with pytest.raises(ValueError, match=MESSAGES[kind]):
        find_fundamental(x_src, x_ref, method)


def test_the_same_scene_is_not_degenerate_when_nothing_is_done_to_it_and_eight_points_are_enough():
    find_fundamental(*degenerate("nothing"))
    F, x_src, x_ref = exact_pair(1, 8)
    np.testing.assert_allclose(up_to_scale(find_fundamental(x_src, x_ref, "8point")[0]), up_to_scale(F), atol=1e-6)
    with pytest.raises(ValueError, match="8point, lmeds, ransac, magsac, got 'usac'"):
        find_fundamental(x_src, x_ref, method="usac")


NOISY = {
    "one plane": "one plane .a homography fits them as well",
    "pure rotation": "one plane .*share their centre",
    "a line in space": "collinear in x_(src|ref)",
    "collinear in src": "collinear in x_src",
    "collinear in ref": "collinear in x_ref",
    "seven places": "fewer than 8 different points",
}


def estimate(x_src, x_ref, method, noise, outliers=0.0, seed=0):
    """`find_fundamental` from disturbed points, at a threshold that has little to do with their noise."""
    rng = np.random.default_rng(seed)
    x_src, x_ref = (x + rng.normal(0, noise, x.shape) for x in (x_src, x_ref))
    x_ref = np.where(rng.random((len(x_ref), 1)) < outliers, rng.uniform(0, 300, x_ref.shape), x_ref)
    return find_fundamental(x_src, x_ref, method, threshold=1.5, max_iterations=1000)


@pytest.mark.parametrize("noise", [1e-3, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NOISY)
def test_points_from_which_no_F_follows_are_known_in_their_noise_too(kind, method, noise):
    for seed in (2, 3):
        with pytest.raises(ValueError, match=f"agree are .*within their noise of [0-9.e-]+ px.*{NOISY[kind]}"):
            estimate(*degenerate(kind, seed, n=150), method, noise, seed=seed)


@pytest.mark.parametrize("noise", [1e-3, 0.5, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_points_of_no_such_kind_are_not_refused_for_their_noise_and_outliers_hide_no_plane(method, noise):
    with pytest.raises(ValueError, match="one plane"):
        estimate(*degenerate("one plane", n=200), method, max(noise, 0.1), outliers=0.1)
    for seed in range(6):
        for n in (20, 150):
            estimate(*exact_pair(seed, n)[1:], method, noise, outliers=0.2 * (n > 20), seed=seed)


def test_a_plane_with_a_fifth_of_the_points_off_it_is_refused_only_where_F_is_wrong():
    wrong = []
    for seed in range(12):
        src, ref = camera_pair(seed)
        X = world_points(seed + 99, 200)
        try:
            F, _ = estimate(*degenerate("mostly one plane", seed, n=100), "magsac", 0.2, seed=seed)
            wrong.append(np.median(symmetric_epipolar_distance(F, src.project(X), ref.project(X))))
        except ValueError:
            wrong.append(np.nan)
    assert np.nanmax(wrong) < 1 and np.isnan(wrong).sum() < 3


@pytest.mark.parametrize("frames", [1, 12])
def test_the_joints_of_a_person_who_walks_are_not_refused_for_their_noise(frames):
    data = open_dataset("", 9, "walk")
    joints = np.stack([c.undistort(d[..., :2]) for c, d in zip(data.cameras, data.detections, strict=True)])
    joints = joints[:, np.linspace(0, joints.shape[1] - 1, frames).astype(int)].reshape(4, -1, 2)
    for seed, (method, (s, r)) in enumerate(itertools.product(METHODS, itertools.combinations(range(4), 2))):
        estimate(joints[s], joints[r], method, noise=2.0, seed=seed)
        if frames > 1:
            estimate(joints[s], joints[r], method, noise=0.5, outliers=0.3, seed=seed)


def test_the_heatmaps_F_is_that_of_the_inputs_at_a_quarter_of_the_pixels():
    pair, X = camera_pair(4), world_points(4)
    F = heatmap_fundamentals(pair)[0, 1]
    assert point_line_distance(F, *(camera.project(X) / 4 for camera in pair)).max() < 1e-9
