"""Made-up scenes, a tiny network, and literal loops that the tests of studies share."""

import math

import numpy as np
import torch
from rigs import look_at, world_points

from epiutils.data.views import Predicted, heatmap_fundamentals
from epiutils.fusion import RepairedFusion
from epiutils.heatmaps import render
from epiutils.networks.hrnet import PoseHRNet

TOY = {"width": 4, "modules": (1, 1, 1), "blocks": 1, "stem": (8, 8), "stem_blocks": 1}  # a tiny network
SHAPE, JOINTS = (24, 36), 5  # of made-up heatmaps, and how many a view has
WEIGHTS = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.6, -0.1], [0.1, 0.0, 0.2]])  # no symmetry hides a flip


def toy(seed=0, **settings) -> PoseHRNet:
    """A tiny network with random weights whose heatmaps are not flat."""
    torch.manual_seed(seed)
    network = PoseHRNet(**TOY | settings).eval()
    torch.nn.init.normal_(network.final_layer.weight)
    return network


def made_up(seed=0, scenes=3, shape=SHAPE, lost=0.0, twice=0.0) -> Predicted:
    """What a network might see in scenes of four cameras of their own, J joints in general position.

    lost: the share of maps whose peak is elsewhere.  twice: of maps with a second, higher one elsewhere.
    """
    rng, (height, width) = np.random.default_rng(seed), shape
    cameras, X = [], np.stack([world_points(10 * seed + n, JOINTS) for n in range(scenes)])
    for _ in range(scenes):
        angles = rng.uniform(0, 2 * np.pi) + np.array([0, 1.3, 2.9, 4.4])
        centres = np.stack([4 * np.cos(angles), 4 * np.sin(angles), rng.uniform(0, 3, 4)], -1)
        rolls = rng.uniform(-0.6, 0.6, 4)
        lens = {"focal": 3.8 * width, "size": (4 * width, 4 * height)}
        cameras.append([look_at(C, (0, 0, 1), roll=roll, **lens) for C, roll in zip(centres, rolls, strict=True)])
    joints = np.array([[c.project(x) for c in rig] for rig, x in zip(cameras, X, strict=True)])
    at, drawn = torch.from_numpy(joints) / 4, joints.shape[:-1]
    elsewhere = torch.from_numpy(rng.uniform((4, 4), (width - 5, height - 5), joints.shape))
    away, more = (torch.from_numpy(rng.random(drawn) < share) for share in (lost, twice))
    output = render(torch.where(away[..., None], elsewhere, at), shape, peak=0.7 if twice else 1.0)
    weight, visible = rng.random(drawn) < 0.8, rng.random(drawn) < 0.6
    K, R, t = (torch.tensor(np.array([[getattr(c, k) for c in rig] for rig in cameras])) for k in "KRt")
    return Predicted(
        output=(output + render(elsewhere, shape, peak=more.double())).float(),
        F=torch.from_numpy(np.stack([heatmap_fundamentals(rig) for rig in cameras])),
        K=K, R=R, t=t,
        joints=torch.from_numpy(joints),
        target=render(at.round(), shape).float(),
        weight=torch.from_numpy(weight).float(),
        visible=torch.from_numpy(visible),
        joints_3d=torch.from_numpy(X),
    )  # fmt: skip


def literal_right(output, target):
    """HRNet's rule for one map, in Python; nan where the joint is left out."""
    (y, x), (y0, x0) = (np.unravel_index(int(m.argmax()), m.shape) if m.max() > 0 else (0, 0) for m in (output, target))
    unit = np.array(target.shape) / 10
    return float(np.hypot((x - x0) / unit[0], (y - y0) / unit[1]) < 0.5) if x0 > 1 and y0 > 1 else math.nan


def found_literally(maps, target) -> np.ndarray:
    """`literal_right` of every map (..., J, H, W)."""
    each = zip(maps.flatten(0, -3).numpy(), target.flatten(0, -3).numpy(), strict=True)
    return np.array([literal_right(*pair) for pair in each]).reshape(maps.shape[:-2])


def repaired(gain=0.8, **settings):
    """A repaired module in the middle of its training."""
    module = RepairedFusion(1.5, **settings)
    with torch.no_grad():
        module.weight.copy_(WEIGHTS)
        module.gain.fill_(gain)
    return module


def literal_views(module, maps, F):
    """Each view of each instant fused with all others, one at a time: maps (B, V, J, H, W)."""
    views = range(maps.shape[1])
    rows = [
        [module(maps[None, n, [s for s in views if s != r]], maps[None, n, r], F[None, n, [s for s in views if s != r], r])
         for r in views]
        for n in range(len(maps))
    ]  # fmt: skip
    return torch.stack([torch.cat(row) for row in rows])
