"""Calibrated cameras: project, undistort, crop.

Points are (..., 2) as (x, y); the centre of the top-left pixel is (0, 0), as in OpenCV.  World units are metres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from array_api_compat import array_namespace


def homogeneous(x):
    """Points with a last coordinate of 1: (..., 2) → (..., 3) (H&Z 2.2)."""
    xp = array_namespace(x)
    return xp.concat([x, xp.ones_like(x[..., :1])], axis=-1)


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera with lens distortion: x ~ K · distort(R X + t) (H&Z 6.1, 7.4).

    K: (3, 3) intrinsics in pixels.  R: (3, 3) rotation and t: (3,) translation in metres, world to camera, on OpenCV's
    axes (x right, y down, z forward).  distortion: OpenCV's (k1, k2, p1, p2[, k3[, k4, k5, k6]]), or (k1, k2, k3, k4)
    of its fisheye model with fisheye=True.  size: (width, height) in pixels.  The arrays are read-only float64 copies.
    Raises ValueError, naming the camera and the field, where one of them cannot be a camera's.
    """

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    distortion: np.ndarray = (0.0, 0.0, 0.0, 0.0, 0.0)
    size: tuple[int, int] = (256, 256)
    name: str = "camera"
    fisheye: bool = False

    def __post_init__(self):
        K = self._array("K", (3, 3))
        if np.linalg.det(K[:2, :2]) <= 0 or np.abs(K[2] - (0, 0, 1)).max() > 1e-8:  # a crop may have rotated it
            raise ValueError(f"{self.name}: K needs positive focal lengths and the last row (0, 0, 1), got\n{K}")
        R = self._array("R", (3, 3))
        if np.abs(R @ R.T - np.eye(3)).max() > 1e-6 or np.linalg.det(R) < 0:
            raise ValueError(f"{self.name}: R is not a rotation (R Rᵀ = I, det R = 1), got\n{R}")
        self._array("t", (3,))
        k, least = np.ravel(np.asarray(self.distortion, dtype=float)), 4 if self.fisheye else 5
        if k.size not in ((0, 4) if self.fisheye else (0, 4, 5, 8)):
            needs = "k1 k2 k3 k4 of a fisheye lens" if self.fisheye else "k1 k2 p1 p2 [k3 [k4 k5 k6]]"
            raise ValueError(f"{self.name}: distortion needs {needs}, got {k.size} numbers")
        object.__setattr__(self, "distortion", np.pad(k, (0, max(least - k.size, 0))))
        self._array("distortion", self.distortion.shape)
        object.__setattr__(self, "fisheye", bool(self.fisheye))
        width, height = (int(v) for v in self.size)
        if width <= 0 or height <= 0:
            raise ValueError(f"{self.name}: size must be (width, height) in pixels, both positive, got {self.size}")
        object.__setattr__(self, "size", (width, height))

    def _array(self, field: str, shape: tuple[int, ...]) -> np.ndarray:
        """Replace a field by its checked, read-only copy."""
        array = np.array(getattr(self, field), dtype=np.float64)
        if array.size != np.prod(shape) or not np.isfinite(array).all():
            raise ValueError(f"{self.name}: {field} must hold {shape} finite numbers, got shape {array.shape}: {array}")
        array = array.reshape(shape)
        array.flags.writeable = False
        object.__setattr__(self, field, array)
        return array

    @property
    def C(self) -> np.ndarray:
        """Camera centre in the world, C = −Rᵀ t, in metres (H&Z 6.1)."""
        return -self.R.T @ self.t

    @property
    def P(self) -> np.ndarray:
        """Projection matrix P = K [R | t], (3, 4), of the undistorted camera (H&Z 6.8)."""
        return self.K @ np.column_stack([self.R, self.t])

    def project(self, X: np.ndarray) -> np.ndarray:
        """Pixels of world points, x ~ K · distort(R X + t), lens distortion included (OpenCV's model; H&Z 7.4).

        X: (..., 3) metres.  Returns (..., 2) px; a point in or behind the camera's plane has no image and gives nan.
        """
        x_cam = np.asarray(X, dtype=np.float64) @ self.R.T + self.t
        with np.errstate(divide="ignore", invalid="ignore"):
            x = x_cam[..., :2] / np.where(x_cam[..., 2:] > 0, x_cam[..., 2:], np.nan)
        return self._pixels(self._distort(x))

    def undistort(self, points: np.ndarray) -> np.ndarray:
        """Where recorded points would be seen without lens distortion, K · distort⁻¹(K⁻¹ x).

        Epipolar geometry holds for these points, not for the recorded ones.
        points: (..., 2) px as recorded.  Returns (..., 2) px; nan where the distortion has no inverse.
        """
        points = np.asarray(points, dtype=np.float64)
        distorted = (points - self.K[:2, 2]) @ np.linalg.inv(self.K[:2, :2]).T
        x = distorted
        with np.errstate(all="ignore"):
            for _ in range(50 if self.bends else 0):  # Newton's method, distort(x) = distorted
                (uu, uv, vv), error = self._distortion_jacobian(x), distorted - self._distort(x)
                step = [vv * error[..., 0] - uv * error[..., 1], uu * error[..., 1] - uv * error[..., 0]]
                before, x = x, x + np.stack(step, -1) / (uu * vv - uv * uv)[..., None]
                if not (np.abs(x - before) > 1e-15 * (1 + np.abs(x))).any():
                    break
            exact = np.abs(self._distort(x) - distorted).max(-1) < 1e-9
            # Beyond the circle where the lens folds the picture over, other solutions are not what it shows.
            uu, uv, vv = self._distortion_jacobian(x)
            this_side = (uu * vv > uv * uv) & ((x * distorted).sum(-1) >= 0)
            found = (exact & this_side)[..., None]
        return self._pixels(np.where(found, x, np.nan))

    @property
    def bends(self) -> bool:
        """Whether the lens bends straight lines; a fisheye lens does with all its coefficients 0."""
        return self.fisheye or bool(self.distortion.any())

    def without_distortion(self) -> Camera:
        """The camera that takes the undistorted picture: the same K, R, t and no distortion."""
        return replace(self, distortion=np.zeros(5), fisheye=False)

    def crop(self, A: np.ndarray, size: tuple[int, int]) -> Camera:
        """The camera of the picture cropped, scaled or rotated by x_new = A x: its intrinsics are A K.

        A: (3, 3) affine in pixels, last row (0, 0, 1).  size: (width, height) of the new picture.
        """
        A = np.asarray(A, dtype=np.float64)
        if A.shape != (3, 3) or not np.allclose(A[2], (0, 0, 1)) or abs(np.linalg.det(A)) < 1e-12:
            raise ValueError(f"{self.name}: A must be an invertible (3, 3) affine with last row (0, 0, 1), got\n{A}")
        return replace(self, K=A @ self.K, size=size)

    def _distort(self, x: np.ndarray) -> np.ndarray:
        """OpenCV's radial and tangential model (H&Z 7.4), or its fisheye model, on normalised coordinates (..., 2)."""
        r2 = (x * x).sum(-1, keepdims=True)
        tangential = self._tangential
        return x * (self._radial(r2)[0] + 2 * x @ tangential[:, None]) + r2 * tangential

    def _distortion_jacobian(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Derivative of `_distort`, a symmetric matrix [[uu, uv], [uv, vv]], each (...)."""
        u, v = x[..., 0], x[..., 1]
        radial, slope = self._radial(u * u + v * v)
        p2, p1 = self._tangential
        uu = radial + 2 * u * u * slope + 2 * p1 * v + 6 * p2 * u
        uv = 2 * u * v * slope + 2 * p1 * u + 2 * p2 * v
        vv = radial + 2 * v * v * slope + 6 * p1 * v + 2 * p2 * u
        return uu, uv, vv

    @property
    def _tangential(self) -> np.ndarray:
        return np.zeros(2) if self.fisheye else self.distortion[3:1:-1]  # p2, p1

    def _radial(self, r2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The factor by which the lens moves points at a squared distance r2 from the axis, and its derivative by r2."""
        if self.fisheye:  # θ (1 + k1 θ² + … + k4 θ⁸) / r with r = tan θ
            r2 = np.maximum(r2, 1e-12)
            ratio = np.arctan(np.sqrt(r2)) / np.sqrt(r2)  # θ / r
            bent = np.polynomial.Polynomial([1, *self.distortion])
            square, of_ratio = ratio * ratio * r2, (1 / (1 + r2) - ratio) / (2 * r2)
            return ratio * bent(square), of_ratio * bent(square) + ratio * ratio * bent.deriv()(square) / (1 + r2)
        k1, k2, _, _, k3, *below = self.distortion
        above, below = (np.polynomial.Polynomial([1, *k]) for k in ((k1, k2, k3), below))
        factor = above(r2) / below(r2)
        return factor, (above.deriv()(r2) - factor * below.deriv()(r2)) / below(r2)

    def _pixels(self, x: np.ndarray) -> np.ndarray:
        """K (x, 1) of normalised coordinates (..., 2)."""
        return x @ self.K[:2, :2].T + self.K[:2, 2]


def crop_affine(
    center: tuple[float, float], side: float, size: tuple[int, int] = (256, 256), rotation: float = 0.0
) -> np.ndarray:
    """The affine A of HRNet's crop: a square of `side` px around `center` becomes a picture of `size`.

    x_new = s Rot(rotation) (x − center) + size / 2 with s = width / side.  HRNet's `scale` is side / 200.

    center: (x, y) px.  size: (width, height).  rotation: radians, clockwise on the screen.  Returns (3, 3).
    """
    if not side > 0:
        raise ValueError(f"side must be positive, got {side}")
    s = size[0] / side
    c, d = s * np.cos(rotation), s * np.sin(rotation)
    M = np.array([[c, -d], [d, c]])
    A = np.eye(3)
    A[:2, :2] = M
    A[:2, 2] = np.array(size) / 2 - M @ np.asarray(center, dtype=float)
    return A
