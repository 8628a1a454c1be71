"""Two-view geometry: the fundamental matrix, its lines and epipoles, and distances to them (H&Z 9 and 11).

F maps the source view to the reference view: x_refᵀ F x_src = 0.  Points are (..., 2) as (x, y), without lens
distortion.  Lines, epipoles and distances take numpy arrays and torch tensors alike.
"""

from __future__ import annotations

import cv2
import numpy as np
from array_api_compat import array_namespace

from epiutils.cameras import Camera, homogeneous

METHODS = {"8point": cv2.FM_8POINT, "lmeds": cv2.FM_LMEDS, "ransac": cv2.FM_RANSAC, "magsac": cv2.USAC_MAGSAC}

# A singular value below this share of the largest is nothing but rounding.
_RANK_DEFICIENT = 1e-9


def find_fundamental(
    x_src: np.ndarray,
    x_ref: np.ndarray,
    method: str = "magsac",
    threshold: float = 1.0,
    confidence: float = 0.999,
    max_iterations: int = 10_000,
) -> tuple[np.ndarray, np.ndarray]:
    """F from point correspondences, by OpenCV.

    method: "8point" (all points; H&Z Algorithm 11.1), "lmeds" (least median of squares), "ransac"
    (H&Z 11.6) or "magsac" (MAGSAC++, Barath et al., CVPR 2020).  threshold: px from point to line beyond which a
    point is an outlier, for "ransac" and "magsac".  OpenCV draws its samples alike each time: the same points
    give the same F.

    x_src, x_ref: (N, 2) px, N ≥ 8.  Returns F (3, 3) of rank 2 and unit norm, and the inliers (N,) bool.
    Raises ValueError where no F follows from the points, and says what they look like: too few, repeated, collinear,
    all on one plane (within their noise, too), all on a quadric with the cameras, not finite; and where OpenCV finds
    no F.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    x_src, x_ref = _check_points("x_src", x_src), _check_points("x_ref", x_ref)
    if len(x_src) != len(x_ref):
        raise ValueError(f"x_src and x_ref must correspond one to one, got {len(x_src)} and {len(x_ref)} points")
    distinct = len(np.unique(np.hstack([x_src, x_ref]), axis=0))
    if distinct < 8:
        raise ValueError(
            f"F needs at least 8 different correspondences, got {distinct} ({len(x_src)} with repetitions)"
        )
    _check_determined(x_src, x_ref, "the points")
    try:
        F, inliers = cv2.findFundamentalMat(x_src, x_ref, METHODS[method], threshold, confidence, max_iterations)
    except cv2.error as error:
        raise ValueError(f"OpenCV's {method} failed on {len(x_src)} points: {error}") from error
    if F is None or F.shape != (3, 3) or not np.isfinite(F).all() or not F.any():
        raise ValueError(f"OpenCV's {method} found no fundamental matrix in {len(x_src)} points")
    inliers = inliers.ravel().astype(bool)
    _check_determined(x_src[inliers], x_ref[inliers], f"the {inliers.sum()} inliers that {method} kept")
    robust = F
    if method in ("8point", "lmeds"):  # outliers, or too few points, may have drawn their F away
        other, _ = cv2.findFundamentalMat(x_src, x_ref, METHODS["magsac"], threshold, confidence, max_iterations)
        candidates = [F, other] if np.shape(other) == (3, 3) else [F]
        robust = max(candidates[::-1], key=lambda F: (sampson_distance(F, x_src, x_ref) <= threshold).sum())
    _check_noise(robust, x_src, x_ref, threshold)
    return _rank_two(F, _hartley(x_src), _hartley(x_ref)), inliers


def fundamental_from_cameras(src: Camera, ref: Camera) -> np.ndarray:
    """F from calibration, F = K_ref⁻ᵀ [t]ₓ R K_src⁻¹ with R, t from source to reference (H&Z 9.2.4, 9.6).

    It holds for points without lens distortion (`Camera.undistort`).  Returns (3, 3) of unit norm.
    Raises ValueError where the cameras share a centre: then there is no epipolar geometry.
    """
    R = ref.R @ src.R.T
    t = ref.t - R @ src.t
    baseline = np.linalg.norm(t)
    if baseline <= 1e-9 * max(1.0, np.linalg.norm(src.C), np.linalg.norm(ref.C)):
        raise ValueError(f"cameras {src.name} and {ref.name} share their centre {src.C}: there is no epipolar geometry")
    t_x = np.cross(np.eye(3), t / baseline)  # [t]ₓ, for which [t]ₓ w = t × w (H&Z A4.5)
    F = np.linalg.inv(ref.K).T @ t_x @ R @ np.linalg.inv(src.K)
    return F / np.linalg.norm(F)


def transfer(F: np.ndarray, A_src: np.ndarray, A_ref: np.ndarray) -> np.ndarray:
    """F between pictures that were cropped or resized by x' = A x: F' = A_ref⁻ᵀ F A_src⁻¹.

    F: (..., 3, 3).  A_src, A_ref: (..., 3, 3) affine.  Returns (..., 3, 3).
    """
    xp = array_namespace(F)
    A_src, A_ref = (xp.asarray(np.array(A) if isinstance(A, np.ndarray) else A, dtype=F.dtype) for A in (A_src, A_ref))
    return xp.linalg.inv(A_ref).mT @ F @ xp.linalg.inv(A_src)


def epipolar_lines(F, x_src):
    """Lines in the reference view that must contain the matches of source points.

    From x_refᵀ F x_src = 0 the line is l = F x_src = (a, b, c), with a·x + b·y + c = 0; scaled to
    a² + b² = 1, l·(x, y, 1) is a signed distance in pixels (H&Z 9.2.1).  For lines in the source view pass F.mT.

    F: (..., 3, 3), any scale.  x_src: (..., N, 2).  Returns (..., N, 3); a point at the source epipole has no
    line and gives nan.
    """
    lines = homogeneous(x_src) @ F.mT  # (..., N, 3)
    normal = array_namespace(F).linalg.vector_norm(lines[..., :2], axis=-1, keepdims=True)
    return lines / _nan_where_zero(normal)


def epipoles(F):
    """Epipoles of both views, F e_src = 0 and Fᵀ e_ref = 0 (H&Z 9.2.3).

    F: (..., 3, 3).  Returns e_src and e_ref (..., 3), homogeneous and of unit norm; the third coordinate of an
    epipole at infinity is 0.
    """
    U, _, Vh = array_namespace(F).linalg.svd(F)
    return Vh[..., 2, :], U[..., :, 2]


def symmetric_epipolar_distance(F, x_src, x_ref):
    """Mean of a correspondence's two distances from its epipolar lines, in px.

    ½ (d(x_ref, F x_src) + d(x_src, Fᵀ x_ref)), the distances whose squares H&Z 11.10 sums.

    F: (..., 3, 3).  x_src, x_ref: (..., N, 2).  Returns (..., N); nan for a point at its epipole.
    """
    return (point_line_distance(F, x_src, x_ref) + point_line_distance(F.mT, x_ref, x_src)) / 2


def point_line_distance(F, x_src, x_ref):
    """Distance in px of each reference point from the epipolar line of its source point, d(x_ref, F x_src).

    F: (..., 3, 3).  x_src, x_ref: (..., N, 2).  Returns (..., N); nan where the source point is the epipole.
    """
    xp = array_namespace(F)
    return xp.abs(xp.sum(epipolar_lines(F, x_src) * homogeneous(x_ref), axis=-1))


def sampson_distance(F, x_src, x_ref):
    """First-order distance in px from a correspondence to the nearest exact one (root of H&Z 11.9).

    |x_refᵀ F x_src| / √((F x_src)₁² + (F x_src)₂² + (Fᵀ x_ref)₁² + (Fᵀ x_ref)₂²).

    F: (..., 3, 3).  x_src, x_ref: (..., N, 2).  Returns (..., N); nan where both points are epipoles.
    """
    xp = array_namespace(F)
    to_ref = homogeneous(x_src) @ F.mT  # (..., N, 3)
    to_src = homogeneous(x_ref) @ F
    error = xp.sum(homogeneous(x_ref) * to_ref, axis=-1)
    gradient = xp.concat([to_ref[..., :2], to_src[..., :2]], axis=-1)
    return xp.abs(error) / _nan_where_zero(xp.linalg.vector_norm(gradient, axis=-1))


def _nan_where_zero(x):
    xp = array_namespace(x)
    return xp.where(x == 0, xp.full_like(x, xp.nan), x)


def _check_points(name: str, points: np.ndarray) -> np.ndarray:
    points = np.ascontiguousarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} must be (N, 2) points (x, y), got shape {points.shape}")
    bad = np.flatnonzero(~np.isfinite(points).all(1))
    if len(bad):
        raise ValueError(
            f"{name} has {len(bad)} points that are nan or inf, the first at index {bad[0]}: {points[bad[0]]}"
        )
    return points


def _check_determined(x_src: np.ndarray, x_ref: np.ndarray, what: str) -> None:
    """Raise ValueError if the correspondences leave more than one F: their 8-point system has rank below 8."""
    if len(x_src) < 8:
        raise ValueError(f"{what}: {len(x_src)} left, at least 8 are needed")
    a, b = (homogeneous(x) @ _hartley(x).T for x in (x_src, x_ref))
    for name, x in (("x_src", a), ("x_ref", b)):
        spread = np.linalg.svd(x[:, :2], compute_uv=False)
        if spread[1] <= _RANK_DEFICIENT * max(spread[0], 1e-300):
            raise ValueError(f"{what} are collinear in {name}, or one point: they determine no fundamental matrix")
    system = (b[:, :, None] * a[:, None, :]).reshape(-1, 9)
    singular = np.linalg.svd(system, compute_uv=False)
    rank = int((singular > _RANK_DEFICIENT * singular[0]).sum())
    if rank < 8:
        raise ValueError(
            f"{what} are degenerate (rank {rank} of the 8 needed): many fundamental matrices fit them, as for "
            "points of one plane, or cameras that share their centre"
        )


def _check_noise(F: np.ndarray, x_src: np.ndarray, x_ref: np.ndarray, threshold: float) -> None:
    """Raise ValueError if, within their noise, many fundamental matrices fit the inliers of F as well as F does.

    The noise is what the best fit leaves.  To points of one plane fits a family of F of three dimensions, so that three
    fits are alike (QDEGSAC: Frahm & Pollefeys, CVPR 2006).  The member of that family with the most inliers is one that
    outliers fit by chance, so some inliers, half as many as there are outliers, are left out: those that a homography
    fits least (DEGENSAC: Chum et al., CVPR 2005).
    """
    distance, reach = sampson_distance(F, x_src, x_ref), threshold
    for _ in range(20):  # the correspondences within three standard deviations
        kept = distance <= reach
        n = int(kept.sum())
        if n < 9:  # any eight fit some F exactly, and do not tell their noise
            return
        reach = max(3 * 1.4826 * np.median(distance[kept]) * (1 + 5 / (n - 8)), 1e-6)
    a, b = x_src[kept], x_ref[kept]
    spare = min((len(x_src) - n) // 2, n - 9)
    H = cv2.findHomography(a, b, cv2.LMEDS)[0] if spare > 0 else None
    if H is not None:
        n = n - spare
        nearest = np.linalg.norm(b - cv2.perspectiveTransform(a[None], H)[0], axis=1).argsort()[:n]
        a, b = a[nearest], b[nearest]
    _check_determined(a, b, f"the {n} points that agree")
    fits = _rms_of_fits(a, b)
    noise = fits[0] * np.sqrt(n / (n - 8))
    look, x, places = "", np.hstack([a, b]), 0
    while len(x) and places < 8:
        x, places = x[np.linalg.norm(x - x[0], axis=1) > 8 * noise], places + 1
    widths = [np.linalg.svd(y - y.mean(0), compute_uv=False)[1] / np.sqrt(n) for y in (a, b)]
    if places < 8:
        look = "fewer than 8 different points"
    elif min(widths) < 2 * noise:
        look = f"points collinear in {('x_src', 'x_ref')[np.argmin(widths)]}"
    elif fits[2] < min(2.5, 1.5 + 20 / n) * fits[0]:  # about the 99th percentile on planes, from 30 points on
        look = "points of one plane (a homography fits them as well), or cameras that share their centre"
    if look:
        raise ValueError(
            f"the {n} points that agree are degenerate within their noise of {noise:.2g} px: they look like {look}, "
            "and many fundamental matrices fit them"
        )


def _rms_of_fits(x_src: np.ndarray, x_ref: np.ndarray) -> np.ndarray:
    """How well eight independent F fit correspondences, the best first: root mean square distances in px.

    They are √(fᵀAᵀA f / fᵀN f) where it is stationary in f, with A the 8-point system and N its covariance for noise of
    1 px in each coordinate (Taubin, TPAMI 1991).  Where many F fit alike, several of them are the noise.

    x_src, x_ref: (N, 2) px.  Returns (8,), ascending.
    """
    T_src, T_ref = _hartley(x_src), _hartley(x_ref)
    a, b = homogeneous(x_src) @ T_src.T, homogeneous(x_ref) @ T_ref.T
    system = (b[:, :, None] * a[:, None, :]).reshape(-1, 9)
    px_src, px_ref = (np.diag([T[0, 0] ** 2, T[0, 0] ** 2, 0]) for T in (T_src, T_ref))
    N = (np.kron(px_ref, a.T @ a) + np.kron(b.T @ b, px_src))[:8, :8]
    A = system[:, :8] - system[:, :8].mean(0)  # the ninth, constant entry is free of noise, and takes up the mean
    return np.linalg.svd(A @ np.linalg.inv(np.linalg.cholesky(N)).T, compute_uv=False)[::-1]


def _hartley(x: np.ndarray) -> np.ndarray:
    """Hartley's normalisation T (3, 3) (H&Z 4.4.4): T x has its centroid at the origin and mean distance √2."""
    centre = x.mean(0)
    s = np.sqrt(2) / max(np.linalg.norm(x - centre, axis=1).mean(), 1e-300)
    return np.array([[s, 0, -s * centre[0]], [0, s, -s * centre[1]], [0, 0, 1]])


def _rank_two(F: np.ndarray, T_src: np.ndarray, T_ref: np.ndarray) -> np.ndarray:
    """The nearest F of rank 2 in normalised coordinates, of unit norm: robust methods leave rank 2 only roughly."""
    U, S, Vh = np.linalg.svd(transfer(F, T_src, T_ref))
    F = T_ref.T @ (U[:, :2] * S[:2]) @ Vh[:2] @ T_src
    return F / np.linalg.norm(F)
