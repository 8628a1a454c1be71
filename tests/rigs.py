"""Seeded cameras and points that the tests share; every picture has H ≠ W."""

import itertools

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


def rig(seed, views=4, shape=(8, 11), batch=1):
    """F between the heatmaps of all views of seeded cameras around the scene: (B, V, V, 3, 3), zeros on the diagonal."""
    rng = np.random.default_rng(seed)
    F = torch.zeros(batch, views, views, 3, 3, dtype=torch.float64)
    A = np.diag([shape[1] / 320, shape[0] / 240, 1])
    for b in range(batch):
        angles = rng.uniform(0, 2 * np.pi) + np.linspace(0, 5, views) + rng.uniform(-0.2, 0.2, views)
        centres = np.stack([4 * np.cos(angles), 4 * np.sin(angles), rng.uniform(0.3, 2.5, views)], -1)
        cameras = [look_at(C, (0, 0, 1), roll=rng.uniform(-0.4, 0.4)) for C in centres]
        for s, r in itertools.permutations(range(views), 2):
            F[b, s, r] = torch.from_numpy(transfer(fundamental_from_cameras(cameras[s], cameras[r]), A, A))
    return F


def random_maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def up_to_scale(F):
    """F scaled to unit norm, its largest entry positive."""
    F = np.asarray(F) / np.linalg.norm(F)
    return F * np.sign(F.flat[np.abs(F).argmax()])
