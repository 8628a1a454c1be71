"""Triangulation: theorems on seeded rigs, OpenCV, NumPy and SciPy as oracles, and points that nothing determines."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from rigs import camera_pair, look_at, world_points
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from epiutils.cameras import crop_affine
from epiutils.heatmaps import HEATMAP_FROM_INPUT, decode, render
from epiutils.triangulate import best_subset, project, reprojection_error, triangulate, triangulate_robust

SEEDS = range(5)
INPUT, HEATMAP = (192, 256), (64, 48)  # (width, height) of the network's input, (H, W) of its heatmaps


def rig(seed, views=4):
    """Cameras in general position, each of its own focal length, size, roll and principal point."""
    return [camera for s in range((views + 1) // 2) for camera in camera_pair(seed + 20 * s)][:views]


def matrices(cameras):
    return np.stack([camera.P for camera in cameras])


def seen(seed, views=4, sigma=0.0, n=30):
    """Points X (n, 3), their pixels (n, V, 2) with noise, the matrices (V, 3, 4)."""
    cameras, X = rig(seed, views), world_points(seed, n)
    points = np.stack([camera.project(X) for camera in cameras], 1)
    return X, points + np.random.default_rng(seed).normal(0, sigma, points.shape), matrices(cameras)


def spoiled(seed, views=4, bad=1, n=40, sigma=0.0):
    """As `seen`, with `bad` views of each point moved by 30 to 200 px, and which ones."""
    X, points, P = seen(seed, views, sigma, n)
    rng = np.random.default_rng(seed)
    wrong = rng.permuted(np.arange(views) < np.full((n, 1), bad), axis=1)
    angle, length = rng.uniform(0, 2 * np.pi, (n, views)), rng.uniform(30, 200, (n, views))
    return X, points + (wrong * length * [np.cos(angle), np.sin(angle)]).transpose(1, 2, 0), P, wrong


def weights_for(points, seed=0):
    return np.random.default_rng(seed + 7).uniform(0.1, 1, points.shape[:-1])


def literal_planes(points, P, weights):
    """One point: each pixel's column and row, as planes n·X + d = 0 with |n| = 1, by NumPy's lstsq."""
    A, b = [], []
    for (x, y), matrix, w in zip(points, P, weights, strict=True):
        for line in ((-1, 0, x), (0, -1, y)):  # of the picture: l·(x, y, 1) = 0; its plane is Pᵀ l (H&Z 8.2)
            *n, d = matrix.T @ line / np.linalg.norm((matrix.T @ line)[:3])
            A.append(w * np.array(n))
            b.append(-w * d)
    return np.linalg.lstsq(np.array(A), np.array(b))[0]


def literal_svd(points, P):
    """One point: the textbook's DLT, the last right singular vector of the stacked rows (H&Z 12.2)."""
    A = [row for (x, y), p in zip(points, P, strict=True) for row in (x * p[2] - p[0], y * p[2] - p[1])]
    h = np.linalg.svd(np.array(A))[2][-1]
    return h[:3] / h[3]


def pixels_of(X, P):
    """One point in every view, by the pinhole alone: (V, 2)."""
    x = P @ np.append(X, 1)
    return x[:, :2] / x[:, 2:]


def likeliest(start, points, P, weights, scale):
    """One point: SciPy on its offsets in px, with finite differences."""
    offsets = lambda X: (weights[:, None] * (pixels_of(X, P) - points))[weights > 0].ravel()
    exactly = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-9}
    return least_squares(offsets, start, jac="3-point", loss="soft_l1", f_scale=scale, **exactly).x


# Projection


@pytest.mark.parametrize("seed", SEEDS)
def test_projection_is_the_cameras_and_opencvs_and_its_error_the_distance_in_px(seed):
    cameras, X = rig(seed), world_points(seed)
    P = matrices(cameras)
    pixels = project(X, P)
    assert pixels.shape == (40, 4, 2)
    for v, camera in enumerate(cameras):
        np.testing.assert_allclose(pixels[:, v], camera.project(X))
        opencv, _ = cv2.projectPoints(X, cv2.Rodrigues(camera.R)[0], camera.t, camera.K, None)
        np.testing.assert_allclose(pixels[:, v], opencv[:, 0])
    np.testing.assert_allclose(project(torch.from_numpy(X), torch.from_numpy(P)), pixels)
    scales = np.array([2, -1, -1e-4, 1e5])[:, None, None]
    np.testing.assert_allclose(project(X, scales * P), pixels)
    offset = np.random.default_rng(seed).normal(0, 5, pixels.shape)
    offset[3, 1] = np.nan
    expected = np.hypot(offset[..., 0], offset[..., 1])
    np.testing.assert_allclose(reprojection_error(X, pixels + offset, P), expected, atol=1e-9)


def test_a_point_in_or_behind_the_cameras_plane_has_no_image_whatever_the_sign_of_P():
    camera = look_at((3, 0, 1), (0, 0, 1))
    X = np.array([(0.0, 0, 1), (3, 0.5, 1), (5, 0.2, 1.3)])  # before, in, behind
    for P in (camera.P[None], -camera.P[None]):
        pixels = project(X, P)
        np.testing.assert_allclose(pixels[:, 0], camera.project(X))
        np.testing.assert_array_equal(np.isnan(pixels).all((1, 2)), (False, True, True))
        X_tensor, P_tensor = torch.from_numpy(X).requires_grad_(), torch.from_numpy(P)
        project(X_tensor, P_tensor).nan_to_num().sum().backward()
        assert X_tensor.grad.isfinite().all() and X_tensor.grad[0].abs().sum() > 1 and not X_tensor.grad[1:].any()


# The linear one


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_triangulation_undoes_projection_and_of_two_views_is_opencvs(seed, views):
    X, points, P = seen(seed, views)
    for weights in (None, weights_for(points)):
        np.testing.assert_allclose(triangulate(points, P, weights), X, atol=1e-10)
    h = cv2.triangulatePoints(*P[:2], *(np.ascontiguousarray(points[:, v].T) for v in range(2)))
    np.testing.assert_allclose(triangulate(points[:, :2], P[:2]), (h[:3] / h[3]).T, atol=1e-8)


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_noisy_views_give_the_point_nearest_to_the_planes_of_their_pixels(seed, views):
    _, points, P = seen(seed, views, sigma=4.0)
    for weights in (np.ones(points.shape[:-1]), weights_for(points)):
        expected = [literal_planes(x, P, w) for x, w in zip(points, weights, strict=True)]
        np.testing.assert_allclose(triangulate(points, P, weights), expected, atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_point_is_near_the_likeliest_and_the_textbooks_but_moves_with_the_world_as_that_does_not(seed):
    X, points, P = seen(seed, sigma=1.0)
    textbook, ours = np.array([literal_svd(x, P) for x in points]), triangulate(points, P)
    assert np.linalg.norm(ours - textbook, axis=-1).max() < np.median(np.linalg.norm(ours - X, axis=-1))
    away = np.eye(4)
    away[:3, 3] = (30, -40, 20)  # X = X' + (30, −40, 20)
    assert np.abs(triangulate(points, P @ away) + away[:3, 3] - ours).max() < 1e-9
    assert np.abs([literal_svd(x, P @ away) + away[:3, 3] for x in points] - textbook).max() > 1e-5
    best = np.array([likeliest(a, x, P, np.ones(4), 1e3) for a, x in zip(X[:15], points, strict=False)])
    rms = lambda Y: np.sqrt(((Y - X[:15]) ** 2).sum(-1).mean())
    assert 0.002 < rms(best) < rms(ours[:15]) * 1.1 < 1.3 * rms(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_neither_order_nor_scale_matters_of_either_one(seed):
    _, points, P, _ = spoiled(seed, sigma=2.0)
    rng, weights = np.random.default_rng(seed), weights_for(points)
    order, scales = rng.permutation(4), rng.choice([-1, 1], (4, 1, 1)) * 10.0 ** rng.uniform(-6, 6, (4, 1, 1))
    X, (robust, inliers) = triangulate(points, P, weights), triangulate_robust(points, P, weights)
    for views, same in (
        (order, (points[:, order], P[order], weights[:, order])),
        (range(4), (points, scales * P, weights)),
        (range(4), (points, P, 1e-7 * weights)),
    ):
        np.testing.assert_allclose(triangulate(*same), X, atol=1e-10)
        found, kept = triangulate_robust(*same)
        np.testing.assert_allclose(found, robust, atol=1e-6)
        np.testing.assert_array_equal(kept, inliers[:, views])


@pytest.mark.parametrize("seed", SEEDS)
def test_pixels_do_not_matter_and_the_point_moves_turns_and_grows_with_the_world(seed):
    _, points, P = seen(seed, sigma=3.0)
    rng, X = np.random.default_rng(seed), triangulate(points, P)
    A = np.stack([np.diag([*10.0 ** rng.uniform(-2, 2, 2), 1]) for _ in range(4)])
    A[:, :2, 2] = rng.normal(0, 300, (4, 2))
    resized = (A[:, :2, :2] @ points[..., None])[..., 0] + A[:, :2, 2]
    np.testing.assert_allclose(triangulate(resized, A @ P), X, atol=1e-9)
    R, old_from_new = Rotation.random(rng=rng).as_matrix(), np.eye(4)
    old_from_new[:3] = np.column_stack([2.5 * R, (7, -3, 11)])
    np.testing.assert_allclose(triangulate(points, P @ old_from_new) @ (2.5 * R).T + (7, -3, 11), X, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_view_with_weight_0_or_a_point_that_is_nan_is_missing_and_may_look_away(seed):
    _, points, P = seen(seed, sigma=3.0)
    weights = weights_for(points)
    for v in range(4):
        rest = [u for u in range(4) if u != v]
        expected = triangulate(points[:, rest], P[rest], weights[:, rest])
        for nothing in (0, -1, np.nan):
            without = weights.copy()
            without[:, v] = nothing
            np.testing.assert_allclose(triangulate(points, P, without), expected, atol=1e-12)
        robust, kept = triangulate_robust(points[:, rest], P[rest], weights[:, rest])
        for nothing in (np.nan, np.inf):
            unknown = points.copy()
            unknown[:, v, seed % 2] = nothing  # one coordinate is enough
            np.testing.assert_allclose(triangulate(unknown, P, weights), expected, atol=1e-12)
            found, inliers = triangulate_robust(unknown, P, weights)
            np.testing.assert_allclose(found, robust, atol=1e-6)
            np.testing.assert_array_equal(inliers, np.insert(kept, v, False, axis=1))
    assert np.abs(triangulate(points, P, weights) - expected).max() > 1e-3
    X, points, P = seen(seed, 2)
    P = np.concatenate([P, look_at((3, 0, 1), (6, 0, 1)).P[None]])  # the points are behind the third view
    points = np.concatenate([points, 0 * points[:, :1] + 5], 1)
    for weights, expected in (((1, 1, 0), X), ((1, 1, 1), np.full_like(X, np.nan))):
        np.testing.assert_allclose(triangulate(points, P, np.tile(weights, (30, 1))), expected, atol=1e-10)


WAYS = {
    "numpy": triangulate,
    "torch": lambda *given: triangulate(*(torch.from_numpy(a) for a in given)).numpy(),
    "robust": lambda *given: triangulate_robust(*given)[0],
    "inliers": lambda *given: triangulate_robust(*given)[1],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_point_is_the_same_alone_and_among_others_whatever_leads_and_inputs_stay_as_they_are(way):
    scenes = [spoiled(seed, 4, n=4, sigma=3.0) for seed in range(6)]
    points, P = (np.stack([scene[k] for scene in scenes]) for k in (1, 2))
    weights, points[3, 1] = weights_for(points), np.random.default_rng(0).uniform(0, 300, (4, 2))
    points[2, 1, 0], points[5, 2, :3], weights[4, 2, 1] = np.nan, np.nan, 0  # two of three views, and one, are missing
    given = points.reshape(2, 3, 4, 4, 2), P.reshape(2, 3, 1, 4, 3, 4), weights.reshape(2, 3, 4, 4)
    before = [a.copy() for a in given]
    together = way(*given).reshape(6, 4, -1)
    alone = [[way(points[i, j], P[i], weights[i, j]) for j in range(4)] for i in range(6)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6 if way is WAYS["robust"] else 1e-12)
    for old, new in zip(before, given, strict=True):
        np.testing.assert_array_equal(old, new)
    assert way(points[0, :0], P[0], weights[0, :0]).shape == (0, together.shape[-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_float32_stays_float32_and_is_computed_in_float64(seed):
    _, points, P = (a.astype(np.float32) for a in seen(seed, 3))
    expected = triangulate(points.astype(np.float64), P.astype(np.float64)).astype(np.float32)
    for found in (triangulate(points, P), WAYS["torch"](points, P)):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def undetermined():
    """Pixels and matrices of views from which no point follows, by what is wrong with them."""
    one, two = camera_pair(0)
    same_centre = look_at(one.C, (0.3, -0.2, 0.7), focal=200)
    X = world_points(0, 1)[0]
    away = one.R[2] + 0.1 * one.R[0]  # a direction that both see
    far = one.project(one.C + away), two.project(two.C + two.R[2])
    beside = look_at(one.C + 0.5 * one.R[0], one.C + 0.5 * one.R[0] + one.R[2], focal=200)
    cases = {
        "one view": ([one.project(X)], [one]),
        "one view of two": ([one.project(X), (np.nan, 3)], [one, two]),
        "no view": ([(np.nan, np.nan)] * 2, [one, two]),
        "one ray twice": ([one.project(X), same_centre.project(X)], [one, same_centre]),
        "one centre": ([one.project(X), same_centre.project(X) + (2, 1)], [one, same_centre]),
        "parallel rays": ([far[0], beside.project(beside.C + away)], [one, beside]),
        "rays that part": ([one.project(one.C + one.R[2]), beside.project(beside.C + away)], [one, beside]),
    }
    return [pytest.param(np.array(points), matrices(cameras), id=name) for name, (points, cameras) in cases.items()]


@pytest.mark.parametrize("points, P", undetermined())
def test_what_nothing_determines_is_nan_without_a_warning_and_has_finite_gradients(points, P):
    for dtype in (np.float64, np.float32):
        assert np.isnan(triangulate(points.astype(dtype), P.astype(dtype))).all()
    X, inliers = triangulate_robust(points, P)
    assert np.isnan(X).all() and not inliers.any()
    inputs = [torch.from_numpy(a).requires_grad_() for a in (points, P, np.ones(len(P)))]
    triangulate(*inputs).nan_to_num().sum().backward()
    assert all(a.grad.isfinite().all() for a in inputs)


def test_two_rays_a_hundredth_of_a_degree_apart_still_meet_and_a_wild_pixel_hides_nothing():
    one = look_at((4, 0, 1), (0, 0, 1))
    two = look_at((4, 7e-4, 1), (0, 0, 1), focal=500)
    X = np.array([0.2, 0.1, 1.1])
    points = np.stack([camera.project(X) for camera in (one, two)])
    np.testing.assert_allclose(triangulate(points, matrices([one, two])), X, atol=1e-6)
    X, points, P = seen(2)
    points[:, 1] = (1e9, -1e9)
    np.testing.assert_allclose(triangulate(points, P, np.tile((1, 1e-9, 1, 1), (30, 1))), X, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_finite_differences_also_where_views_are_left_out(seed):
    _, points, P = seen(seed, sigma=2.0, n=3)
    P = P / np.linalg.norm(P, axis=(1, 2), keepdims=True)
    weights = weights_for(points)
    points[0, 1], weights[1, 2], points[2, :3] = np.nan, 0, np.nan  # the third is seen once: nan
    left_out = np.isnan(points).any(-1) | (weights == 0)
    inputs = [torch.from_numpy(a).requires_grad_() for a in (np.nan_to_num(points), P, weights)]
    unknown = torch.from_numpy(np.isnan(points))

    def solve(x, P, w):
        return triangulate(torch.where(unknown, torch.nan, x), P, torch.where(w == 0, 0.0, w)).nan_to_num()

    fixed = torch.from_numpy(np.where(weights == 0, 0, 1.0))  # a step away from 0 would bring the view in
    assert torch.autograd.gradcheck(lambda x, P, w: solve(x, P, w * fixed), inputs, atol=1e-5)
    solve(*inputs).sum().backward()
    x, _, w = (a.grad.numpy() for a in inputs)
    assert np.isfinite(x).all() and np.isfinite(w).all()
    assert not x[left_out].any() and not w[left_out].any() and np.abs(x[~left_out][:6]).min() > 0


# The robust one


@pytest.mark.parametrize("views, bad", [(3, 1), (4, 1), (4, 2), (5, 2)])
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_views_are_rejected_and_the_others_give_the_exact_point(seed, views, bad):
    X, points, P, wrong = spoiled(seed, views, bad)
    found, inliers = triangulate_robust(points, P)
    assert inliers.dtype == bool and inliers.shape == (40, views)
    decided = (inliers == ~wrong).all(1)  # where two views are left, a wrong one may lie on their epipolar lines
    assert decided.all() if views - bad > 2 else decided.mean() > 0.8
    np.testing.assert_allclose(found[decided], X[decided], atol=1e-7)
    assert np.median(np.linalg.norm(triangulate(points, P) - X, axis=-1)) > 0.05


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("seed", range(3))
def test_the_refined_point_is_scipys_for_each_point_alone(seed, weighted):
    X, points, P, _ = spoiled(seed, n=10, sigma=3.0)
    weights = weights_for(points) if weighted else np.ones(points.shape[:-1])
    found, inliers = triangulate_robust(points, P, weights, threshold=10.0)
    assert 0.4 < inliers.mean() < 0.8
    relative = weights / weights.max(-1, keepdims=True) * inliers
    for start, near in ((found, 1e-7), (X, 1e-6)):
        expected = [likeliest(a, x, P, w, 10.0) for a, x, w in zip(start, points, relative, strict=True)]
        np.testing.assert_allclose(found, expected, atol=near)
    linear = triangulate(points, P, weights * inliers)
    assert 1e-4 < np.abs(found - linear).max() < 0.5  # refined indeed


def literal_inliers(points, P, weights, threshold):
    """One point: each pair and all views propose, the best score wins, in plain loops."""
    views = range(len(points))
    best, inliers = 0, np.zeros(len(points), bool)
    proposals = [triangulate(points, P, weights)]
    proposals += [triangulate(points[[a, b]], P[[a, b]]) for a in views for b in views[a + 1 :]]
    for X in proposals:
        errors = np.linalg.norm(pixels_of(X, P) - points, axis=1)
        score = sum(w * (1 - (e / threshold) ** 2) for w, e in zip(weights, errors, strict=True) if e <= threshold)
        if (errors <= threshold).sum() > 1 and score > best:
            best, inliers = score, errors <= threshold
    return inliers


@pytest.mark.parametrize("seed", SEEDS)
def test_the_inliers_are_those_of_plain_loops_and_more_with_a_larger_threshold(seed):
    _, points, P, _ = spoiled(seed, n=40, sigma=6.0)
    weights, counts, kinds = weights_for(points), [], set()
    for threshold in (5.0, 10.0, 20.0):
        X, inliers = triangulate_robust(points, P, weights, threshold)
        expected = [literal_inliers(x, P, w, threshold) for x, w in zip(points, weights, strict=True)]
        np.testing.assert_array_equal(inliers, expected)
        assert (inliers.sum(1) != 1).all() and (np.isnan(X).any(1) == (inliers.sum(1) == 0)).all()
        assert reprojection_error(X, points, P)[inliers].max() < 2 * threshold
        counts.append(inliers.sum())
        kinds |= set(map(tuple, inliers))
    assert counts[0] < counts[1] < counts[2] and len(kinds) > 8


def test_confidence_decides_between_two_pairs_that_agree():
    """Views 0 and 1 see one point, views 2 and 3 another."""
    cameras = rig(0)
    a, b = np.array([0.3, 0.2, 1.2]), np.array([-0.5, -0.4, 0.6])
    points = np.stack([camera.project(X) for camera, X in zip(cameras, (a, a, b, b), strict=True)])
    for weights, X, pair in (
        ((0.9, 0.8, 0.5, 0.6), a, (1, 1, 0, 0)),
        ((0.5, 0.6, 0.9, 0.8), b, (0, 0, 1, 1)),
        ((1e-3, 1e-3, 1, 0), a, (1, 1, 0, 0)),  # the surest view has nobody to agree with
    ):
        found, inliers = triangulate_robust(points, matrices(cameras), np.array(weights))
        np.testing.assert_allclose(found, X, atol=1e-8)
        np.testing.assert_array_equal(inliers, np.array(pair, bool))


def test_views_of_which_no_two_agree_give_nothing_and_extreme_weights_no_error():
    X, points, P = seen(0, 2)
    points[::2, 0] += 100
    for weights in ((1, 1), (1, 0.01)):
        found, inliers = triangulate_robust(points, P, np.tile(weights, (30, 1)))
        np.testing.assert_allclose(found, np.where(np.arange(30)[:, None] % 2, X, np.nan), atol=1e-8)
        np.testing.assert_array_equal(inliers, np.isfinite(found[:, :2]))
    much_larger = np.diag([1e5, 1e5, 1.0])  # the first picture's pixels: the other one's count for nothing
    points[:, 0] *= 1e5
    found, inliers = triangulate_robust(points[1::2], np.stack([much_larger @ P[0], P[1]]), np.tile((1, 1e-4), (15, 1)))
    np.testing.assert_allclose(found, X[1::2], atol=1e-4)
    _, points, P = seen(0, 3, sigma=1.0)
    for weights in ((1, 1e-12, 1e-200), (1e-7, 0, 1), (1, 1e-4, 1e-4)):
        weights = np.tile(weights, (30, 1))
        for found in (triangulate(points, P, weights), triangulate_robust(points, P, weights)[0]):
            known = np.isfinite(found)
            assert known.all() == (weights[0, 1] == 1e-4) and known.any() == known.all()
    for wrong in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match="threshold must be positive, in px, got"):
            triangulate_robust(points, P, threshold=wrong)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_subset_is_that_of_plain_loops(seed, views):
    X, points, P = seen(seed, views, sigma=6.0, n=8)
    points[0, 0], points[1, 1:] = np.nan, np.nan  # two views left if there were three; one view
    before, found = points.copy(), best_subset(points.reshape(2, 4, views, 2), P[None, None], X.reshape(2, 4, 3))
    for i, best in enumerate(found.reshape(8, 3)):
        subsets = [list(c) for n in range(2, views + 1) for c in itertools.combinations(range(views), n)]
        made = np.array([triangulate(points[i, c], P[c]) for c in subsets])
        errors = np.linalg.norm(made - X[i], axis=-1)
        expected = np.full(3, np.nan) if np.isnan(errors).all() else made[np.nanargmin(errors)]
        np.testing.assert_allclose(best, expected, atol=1e-12)
    assert np.isnan(found[0, 1]).all() and np.isnan(found[0, 0]).all() == (views == 2)
    np.testing.assert_array_equal(points, before)


# From heatmaps


@pytest.mark.parametrize("seed", SEEDS)
def test_heatmaps_of_known_joints_give_them_back_as_finely_as_they_are_decoded(seed):
    crop = lambda v, camera: camera.crop(crop_affine(np.array(camera.size) / 2, 190, INPUT, 0.1 * v), INPUT)
    cameras, rng = [crop(v, camera) for v, camera in enumerate(rig(seed))], np.random.default_rng(seed)
    X = rng.uniform((-0.25, -0.25, 0.8), (0.25, 0.25, 1.2), (5, 3))
    pixels = np.stack([camera.crop(HEATMAP_FROM_INPUT, HEATMAP[::-1]).project(X) for camera in cameras], 1)
    assert (pixels > 5).all() and (pixels < np.array(HEATMAP[::-1]) - 6).all()
    maps = render(torch.from_numpy(pixels), HEATMAP, peak=torch.from_numpy(rng.uniform(0.3, 1, (5, 4))))  # (J, V, H, W)
    error = {}
    for method in ("dark", "quarter", "argmax"):
        points, peaks = (a.numpy() for a in decode(maps, method))
        for way in (triangulate, lambda *given: triangulate_robust(*given, 12.8)[0]):
            error.setdefault(method, []).append(np.abs(way(4 * points, matrices(cameras), peaks) - X).max())
    assert max(error["dark"]) < 1e-7 and max(error["quarter"]) < 0.05 and min(error["argmax"]) > 2e-3
