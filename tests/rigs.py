"""Seeded cameras and points that the tests share; every picture has H ≠ W."""

import contextlib
import itertools
import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from epiutils.cameras import Camera
from epiutils.epipolar import fundamental_from_cameras, transfer

LENS = (-0.12, 0.06, 1.5e-3, -1e-3, 0.02)


def look_at(C, target, focal=300.0, size=(320, 240), roll=0.0, distortion=(0, 0, 0, 0, 0), centre=None, name="camera"):
    """The camera at C that looks at a target, world z up; principal point in the middle unless told."""
    z = np.subtract(target, C) / np.linalg.norm(np.subtract(target, C))
    x = np.cross(z, (0, 0, 1)) / np.linalg.norm(np.cross(z, (0, 0, 1)))
    R = Rotation.from_rotvec((0, 0, roll)).as_matrix() @ np.array([x, np.cross(z, x), z])
    cx, cy = ((size[0] - 1) / 2, (size[1] - 1) / 2) if centre is None else centre
    return Camera([[focal, 0, cx], [0, focal, cy], [0, 0, 1]], R, -R @ C, distortion, size, name)


def camera_pair(seed, distortion=(0, 0, 0, 0, 0)):
    """Two cameras 3 to 5 m from a scene of about 2 m, in general position: own focal length, size, roll and centre."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 2 * np.pi) + np.array([0, rng.uniform(0.4, 2.4)])
    pair = []
    for name, angle, size in zip(("src", "ref"), angles, ((320, 240), (300, 400)), strict=True):
        C = np.append(rng.uniform(3, 5) * np.array([np.cos(angle), np.sin(angle)]), rng.uniform(0.5, 2.5))
        centre = np.array(size) / 2 + rng.uniform(-15, 15, 2)
        target, focal, roll = rng.uniform(-0.2, 0.2, 3) + (0, 0, 1), rng.uniform(250, 400), rng.uniform(-0.5, 0.5)
        pair.append(look_at(C, target, focal, size, roll, distortion, centre, name))
    return pair


def world_points(seed, n=40):
    """Points of the scene, (n, 3) metres."""
    return np.random.default_rng(seed + 1000).uniform((-1, -1, 0), (1, 1, 2), (n, 3))


def heatmap_F(pair, shape, out_shape):
    """F of two cameras, in the pixels of their heatmaps."""
    A = [np.diag([w / c.size[0], h / c.size[1], 1]) for c, (h, w) in zip(pair, (shape, out_shape), strict=True)]
    return transfer(fundamental_from_cameras(*pair), *A)


def views_F(cameras, shape):
    """F between the heatmaps of all views: (1, V, V, 3, 3), zeros on the diagonal."""
    F = torch.zeros(1, len(cameras), len(cameras), 3, 3, dtype=torch.float64)
    for s, r in itertools.permutations(range(len(cameras)), 2):
        F[0, s, r] = torch.from_numpy(heatmap_F((cameras[s], cameras[r]), shape, shape))
    return F


def rig(seed, views=4, shape=(8, 11), batch=1):
    """`views_F` of seeded cameras around the scene, other ones for each of the batch: (B, V, V, 3, 3)."""
    rng, F = np.random.default_rng(seed), []
    for _ in range(batch):
        angles = rng.uniform(0, 2 * np.pi) + np.linspace(0, 5, views) + rng.uniform(-0.2, 0.2, views)
        centres = np.stack([4 * np.cos(angles), 4 * np.sin(angles), rng.uniform(0.3, 2.5, views)], -1)
        F.append(views_F([look_at(C, (0, 0, 1), roll=rng.uniform(-0.4, 0.4)) for C in centres], shape))
    return torch.cat(F)


def brute_distances(F, shape, out_shape):
    """Distance of each reference pixel to each source pixel's line, (N', N) long double; inf where there is no line.

    A source pixel within 1e-9 px of the epipole, the cross product of two rows of F, has no line.
    """
    F = np.asarray(F, dtype=np.longdouble)
    y, x = np.divmod(np.arange(math.prod(shape)), shape[1])
    y_ref, x_ref = np.divmod(np.arange(math.prod(out_shape)), out_shape[1])
    a, b, c = F @ np.stack([x, y, np.ones_like(x)]).astype(np.longdouble)
    e = max((np.cross(F[i], F[j]) for i, j in ((0, 1), (0, 2), (1, 2))), key=lambda v: (v * v).sum())
    at_epipole = np.hypot(e[0] - x * e[2], e[1] - y * e[2]) <= 1e-9 * abs(e[2])
    normal = np.where(at_epipole, 1, np.hypot(a, b))
    distance = np.abs(a * x_ref[:, None] + b * y_ref[:, None] + c) / normal
    return np.where(at_epipole, np.inf, distance)


def brute_members(F, shape, threshold, out_shape=None):
    """Who is in whose band, (N', N) bool, after checking that rounding decides about nobody."""
    distance = brute_distances(F, shape, out_shape or shape)
    assert (np.abs(distance - threshold) > 1e-9 * threshold).all(), "choose another seed"
    return distance <= threshold


def brute_convolution(maps, w):
    """Σ_uv w[u, v] · padded[y + u, x + v] of one map (H, W), by loops over pixels and weights."""
    padded = np.pad(np.asarray(maps), 1)
    windows = lambda y, x: sum(w[u][v] * padded[y + u, x + v] for u in range(3) for v in range(3))
    return np.array([[windows(y, x) for x in range(maps.shape[1])] for y in range(maps.shape[0])])


@contextlib.contextmanager
def warn_always():
    """In which torch warns of a read-only array each time, not once a process."""
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(False)


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def up_to_scale(F):
    """F scaled to unit norm, its largest entry positive."""
    F = np.asarray(F) / np.linalg.norm(F)
    return F * np.sign(F.flat[np.abs(F).argmax()])
