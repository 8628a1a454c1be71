"""Triangulation: points in space from their pixels in several calibrated views.

Pixels are (..., V, 2), without lens distortion, and belong to P (..., V, 3, 4) = K [R | t], whose scale is free; the
world is in metres.  A view that has not seen a point is left out: its pixel is nan, or its weight not above 0.
Functions whose signature names no type take numpy arrays and torch tensors alike, and are differentiable in torch.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from array_api_compat import array_namespace
from scipy.optimize import least_squares
from scipy.sparse import csr_array

from epiutils.cameras import homogeneous

_PARALLEL = 1e-10  # (angle in rad · ratio of weights)² below which two rays meet nowhere in particular
_NEAREST = 1e-3  # metres from a camera's plane within which there is no scene, only where rays of one centre meet


def project(X, P):
    """Pixels of a point in each view, x ~ P (X, 1) (H&Z 6.1).

    X: (..., 3) metres.  P: (..., V, 3, 4).  Returns (..., V, 2) px.  As in `Camera.project`, a point in or behind the
    camera's plane has no image and gives nan: sign(det M) (P X)₃ ≤ 0, with M the left 3×3 of P (H&Z 6.2.3).
    """
    xp = array_namespace(X, P)
    x = (P @ homogeneous(X)[..., None, :, None])[..., 0]  # (..., V, 3)
    front = (x[..., 2:] * xp.sign(xp.linalg.det(P[..., :3]))[..., None]) > 0
    pixels = x[..., :2] / xp.where(front, x[..., 2:], xp.ones_like(x[..., 2:]))
    return xp.where(front, pixels, xp.full_like(pixels, xp.nan))


def reprojection_error(X, points, P):
    """Distance from the image of a point to its pixel in each view, |project(X, P) − x| (H&Z 12.3).

    X: (..., 3) metres.  points: (..., V, 2).  P: (..., V, 3, 4).  Returns (..., V) px; nan where a view has not both.
    """
    return array_namespace(X, points, P).linalg.vector_norm(project(X, P) - points, axis=-1)


def triangulate(points, P, weights=None):
    """The point in space nearest to the rays of its pixels, by weighted linear least squares (DLT; H&Z 12.2).

    A pixel (x, y) puts X on two planes, (x P₃ − P₁)·(X, 1) = 0 and (y P₃ − P₂)·(X, 1) = 0, with Pᵢ the rows of P.
    Divided by the length of its normal, each is the distance of X from its plane in metres, whatever the scale of P
    and the size of a pixel; then it is multiplied by the view's weight (Iskakov et al., ICCV 2019).  The sum of the
    squares is least at X, the last coordinate fixed at 1: H&Z's inhomogeneous solution, which unlike that of unit
    length moves with the world.

    points: (..., V, 2).  P: (..., V, 3, 4).  weights: (..., V) ≥ 0, of which only the ratios count.
    Returns (..., 3) in the points' dtype, computed in float64, with finite gradients.  nan where fewer than two views
    are left, where their rays are parallel (or one view outweighs the rest by 1e5), and where they meet behind a
    camera or in its centre.
    """
    xp = array_namespace(points, P)
    x, P = xp.astype(points, xp.float64), xp.astype(P, xp.float64)
    w = xp.ones_like(x[..., 0]) if weights is None else xp.astype(weights, xp.float64)
    seen = xp.all(xp.isfinite(x), axis=-1) & (w > 0)  # (..., V)
    x = xp.where(seen[..., None], x, xp.zeros_like(x))
    w = xp.where(seen, w, xp.zeros_like(w))
    planes = x[..., None] * P[..., 2:, :] - P[..., :2, :]  # (..., V, 2, 4)
    planes = planes / xp.linalg.vector_norm(planes[..., :3], axis=-1, keepdims=True)
    planes = planes * w[..., None, None]
    G = xp.sum(planes.mT @ planes, axis=-3)  # (..., 4, 4)
    N, b = G[..., :3, :3], -G[..., :3, 3]  # N X = b
    mean = (N[..., 0, 0] + N[..., 1, 1] + N[..., 2, 2]) / 3
    meet = (xp.linalg.det(N) > _PARALLEL * mean**3)[..., None]
    N = xp.where(meet[..., None], N, xp.eye(3, dtype=N.dtype, device=N.device))
    X = xp.linalg.solve(N, xp.where(meet, b, xp.zeros_like(b))[..., None])[..., 0]
    facing = xp.sign(xp.linalg.det(P[..., :3])) / xp.linalg.vector_norm(P[..., 2, :3], axis=-1)
    depth = facing * (P[..., 2:, :] @ homogeneous(X)[..., None, :, None])[..., 0, 0]  # (..., V) metres
    before = xp.all((depth > _NEAREST) | ~seen, axis=-1)[..., None]
    X = xp.where(meet & before, X, xp.full_like(X, xp.nan))
    return xp.astype(X, points.dtype) if xp.isdtype(points.dtype, "real floating") else X


def triangulate_robust(
    points: np.ndarray, P: np.ndarray, weights: np.ndarray | None = None, threshold: float = 12.8
) -> tuple[np.ndarray, np.ndarray]:
    """The point in space on which most views agree: RANSAC over views, then the least reprojection error.

    Views are few, so nothing is drawn (H&Z 4.7): each pair, and all views together, propose a point, which scores
    Σ w max(0, 1 − (error / threshold)²) over the views (MSAC; Torr & Zisserman 2000).  The inliers of the best are
    those within `threshold` px.  They are triangulated together, and from there SciPy's `least_squares` finds the
    X of least Σ ρ(w · offset), the offsets in x and y in px, ρ the soft L1 loss that turns from quadratic to linear
    at `threshold` (H&Z 12.3).

    points: (..., V, 2).  P: (..., V, 3, 4).  weights: (..., V) ≥ 0, of which only the ratios count.  threshold: px; as
    HRNet's accuracy has it, 12.8 px of the network's input are 3.2 px of the heatmap.
    Returns X (..., 3) metres and the inliers (..., V) bool: nan, and none, where no two views agree.
    Raises ValueError for a threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, in px, got {threshold}")
    points = np.asarray(points, dtype=np.float64)  # (..., V, 2)
    P = np.broadcast_to(np.asarray(P, dtype=np.float64), (*points.shape[:-1], 3, 4))
    w = np.ones(points.shape[:-1]) if weights is None else np.asarray(weights, dtype=np.float64)
    w = np.where(np.isfinite(points).all(-1) & (w > 0), w, 0)
    w = w / np.maximum(w.max(-1, keepdims=True), 1e-300)
    points = np.where(w[..., None] > 0, points, np.nan)
    pairs = np.stack(np.triu_indices(points.shape[-2], 1), -1)  # (H, 2)
    X = triangulate(points[..., pairs, :], P[..., pairs, :, :])  # (..., H, 3)
    X = np.concatenate([triangulate(points, P, w)[..., None, :], X], -2)
    error = reprojection_error(X, points[..., None, :, :], P[..., None, :, :, :])  # (..., 1 + H, V)
    agree = error <= threshold
    score = (w[..., None, :] * np.where(agree, 1 - (error / threshold) ** 2, 0)).sum(-1) * (agree.sum(-1) > 1)
    w = w * np.take_along_axis(agree, score.argmax(-1)[..., None, None], -2)[..., 0, :]
    X = triangulate(points, P, w)
    found = np.isfinite(X).all(-1)
    if found.any():
        X[found] = _refine(X[found], points[found], P[found], w[found], threshold)
    return X, (w > 0) & found[..., None]


def _refine(X: np.ndarray, points: np.ndarray, P: np.ndarray, w: np.ndarray, threshold: float) -> np.ndarray:
    """`triangulate_robust`'s last step, for N points at once: X (N, 3) → (N, 3), w (N, V) 0 for outliers.

    The unknowns are z in X + T z, T Tᵀ = (JᵀJ)⁻¹: pixels move alike with each of them, well determined or not, and
    the sparse problem of N points converges as one point does.
    """
    n, v = np.nonzero(w)  # the inliers, M in all, in the order of their points
    points, P, w = points[n, v], P[n, v], w[n, v, None]

    def jacobian(X):
        """Of w · project(X, P): (M, 2, 3)."""
        x = P @ homogeneous(X[n])[..., None]  # (M, 3, 1)
        return w[..., None] * (P[:, :2, :3] - x[:, :2] / x[:, 2:] * P[:, 2:, :3]) / x[:, 2:]

    J = jacobian(X)
    size, axes = np.linalg.eigh(np.add.reduceat(J.mT @ J, np.flatnonzero(np.diff(n, prepend=-1))))
    T = axes / np.sqrt(np.maximum(size, 1e-12 * size[:, 2:]))[:, None, :]  # (N, 3, 3)
    columns = np.repeat(3 * n[:, None] + np.arange(3), 2, 0)  # (2M, 3) of the sparse Jacobian
    rows = np.arange(0, columns.size + 1, 3)

    def at(z):
        return X + (T @ z.reshape(-1, 3, 1))[..., 0]

    def offsets(z):
        return (w * (project(at(z)[n], P[:, None])[:, 0] - points)).ravel()

    def slopes(z):
        return csr_array(((jacobian(at(z)) @ T[n]).ravel(), columns.ravel(), rows), shape=(2 * len(n), X.size))

    z = np.zeros(X.size)
    tolerances = {"ftol": None, "xtol": None, "gtol": 1e-6, "max_nfev": 100}  # of each point, not of their sum
    return at(least_squares(offsets, z, slopes, loss="soft_l1", f_scale=threshold, tr_solver="lsmr", **tolerances).x)


def best_subset(points: np.ndarray, P: np.ndarray, true: np.ndarray) -> np.ndarray:
    """An oracle that bounds what a choice of views can give: of all that two or more triangulate, the nearest to truth.

    points: (..., V, 2).  P: (..., V, 3, 4).  true: (..., 3) metres.  Returns (..., 3), nan where no two views have a
    point.
    """
    points, true = np.asarray(points, dtype=np.float64), np.asarray(true, dtype=np.float64)
    best, least = np.full(true.shape, np.nan), np.full(true.shape[:-1], np.inf)
    views = range(points.shape[-2])
    for chosen in (list(c) for n in views if n > 0 for c in combinations(views, n + 1)):
        X = triangulate(points[..., chosen, :], P[..., chosen, :, :])
        error = np.linalg.norm(X - true, axis=-1)
        nearer = error < least  # never where X is nan
        best, least = np.where(nearer[..., None], X, best), np.where(nearer, error, least)
    return best
