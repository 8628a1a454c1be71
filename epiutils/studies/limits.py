"""Where fusion ends: calibration that is off, fewer views, hidden joints, other cameras; and what bounds it.

Each function changes one thing about what a network predicted, or about the pictures it sees, and leaves the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import torch
from torch import Tensor

from epiutils.cameras import Camera
from epiutils.data import people
from epiutils.data.dataset import Instant
from epiutils.data.views import Predicted, View
from epiutils.epipolar import transfer
from epiutils.fusion import RepairedFusion, view_pairs
from epiutils.heatmaps import STRIDE
from epiutils.metrics import found
from epiutils.redirect import Pencil
from epiutils.studies.predicted import found_by

FOCAL = 1145.0  # px, of the uncropped pictures of the embedded rig and of Human3.6M's


def shifted(predicted: Predicted, px: float, seed: int = 0) -> Predicted:
    """The same heatmaps with a calibration that is off: each camera's picture moved by `px` in a random direction.

    px: of the uncropped picture, of focal length `FOCAL`, as a camera that was turned a little or its principal point
    moved.  F[s, r] becomes that of the moved pictures; nothing else changes.
    """
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, predicted.K.shape[:2])  # (N, V)
    scale = predicted.K[..., 0, :2].norm(dim=-1).numpy() / FOCAL / STRIDE  # heatmap px a px
    A = torch.eye(3, dtype=predicted.F.dtype).repeat(*angle.shape, 1, 1)
    A[..., 0, 2], A[..., 1, 2] = (torch.from_numpy(px * scale * f(angle)) for f in (np.cos, np.sin))
    return replace(predicted, F=transfer(predicted.F, A[:, :, None], A[:, None]))


@torch.no_grad()
def by_views(module: RepairedFusion, predicted: Predicted, views: int) -> np.ndarray:
    """Which joints are found where only so many views are present: found (N, C, J), C a view of a subset of them.

    All subsets of the views take part, in order.
    """
    shape, right = tuple(predicted.output.shape[-2:]), []
    subsets = [list(chosen) for chosen in combinations(range(predicted.output.shape[1]), views)]
    for h, F, target in zip(predicted.output, predicted.F, predicted.target, strict=True):
        pencil = Pencil.from_fundamental(view_pairs(F[None]), shape, module.threshold)  # one for all subsets
        for chosen in subsets:
            present = torch.zeros(1, len(h), dtype=torch.bool)
            present[0, chosen] = True
            fused = module.all_views(h[None], pencil, present)[0]
            right.append(found(fused[chosen], target[chosen]))
    return np.concatenate(right).reshape(len(predicted), -1, predicted.output.shape[2])


def hide(views: Sequence[View], share: float, seed: int) -> list[View]:
    """The views with patches painted over that share of the joints of each, which are then not visible.

    A patch is of one colour, has a sixth of the picture's side and its centre near the joint; joints under another's patch are
    hidden too.
    """
    rng, hidden = np.random.default_rng(seed), []
    for view in views:
        if view.visible is None:
            raise ValueError(f"view {view.camera.name}: nobody knows which of its joints are visible")
        image, visible = view.image.copy(), view.visible.copy()
        side, pixels = view.camera.size[0] // 6, np.round(view.joints)
        order = rng.permutation(len(visible))
        for j in order:
            if 1 - (visible & view.visible).sum() / max(1, view.visible.sum()) >= share or not visible[j]:
                continue
            centre = view.joints[j] + rng.uniform(-side / 6, side / 6, 2)
            low, high = (np.round(centre + d * side / 2).astype(int) for d in (-1, 1))
            colour = tuple(int(c) for c in rng.integers(60, 200, 3))
            cv2.rectangle(image, low.tolist(), high.tolist(), colour, -1)
            visible &= ~((low <= pixels) & (pixels <= high)).all(-1)
        hidden.append(replace(view, image=image, visible=visible))
    return hidden


def other_rig(seed: int = 0) -> list[Camera]:
    """Four cameras elsewhere: around the room at other angles, heights from 0.6 to 2.6 m, other focal lengths."""
    rng, cameras = np.random.default_rng(seed), []
    for number, usual in enumerate(people.rig()):
        angle = np.pi / 2 * number + rng.uniform(-0.6, 0.6)
        C = np.array([4.4 * np.cos(angle), 4.4 * np.sin(angle), rng.uniform(0.6, 2.6)])
        z = np.append(rng.uniform(-0.15, 0.15, 2), 0.9) - C
        z /= np.linalg.norm(z)
        x = np.cross(z, (0, 0, 1)) / np.linalg.norm(np.cross(z, (0, 0, 1)))
        R = np.stack([x, np.cross(z, x), z])
        K = np.diag([*(usual.K[0, 0] * rng.uniform(0.8, 1.1) * np.ones(2)), 1.0])
        K[:2, 2] = usual.K[:2, 2]
        cameras.append(Camera(K, R, -R @ C, size=usual.size, name=f"other{number + 1}"))
    return cameras


def seen_by(rig: Sequence[Camera], instants: Sequence[Instant]) -> list[list[View]]:
    """Those instants of the embedded benchmark before other cameras."""
    return [people.scene(**vars(instant), rig=rig) for instant in instants]


def silenced(output: Tensor, target: Tensor) -> Tensor:
    """Heatmaps (V, J, H, W) of one instant, those whose own peak is wrong without any: their odds are then 0."""
    wrong = torch.from_numpy(found(output, target) == 0)
    return output.masked_fill(wrong[..., None, None], -10.0)


@torch.no_grad()
def fused_with(module: RepairedFusion, sources: Tensor, output: Tensor, F: Tensor) -> Tensor:
    """Each view of one instant fused with other heatmaps of the other views.

    sources, output: (V, J, H, W).  F: (V, V, 3, 3).  Returns (V, J, H, W).
    """
    others = [[s for s in range(len(output)) if s != r] for r in range(len(output))]
    said = torch.stack([sources[o] for o in others])  # (V, V − 1, J, H, W): the views are a batch
    return module(said, output, torch.stack([F[o, r] for r, o in enumerate(others)]))


@torch.no_grad()
def bounds(module: RepairedFusion, predicted: Predicted) -> dict[str, np.ndarray]:
    """Which joints the module finds with oracles, found (N, V, J) each: what bounds it on these heatmaps.

    "right sources only": a source whose own peak is wrong says nothing.  "perfect sources": every source is its
    target.  "any view": joints that at least one view finds by itself, "two views": at least two; no fusion of
    peaks can find more without a second thought in the maps.
    """
    output, target, F = predicted.output, predicted.target, predicted.F
    alone = found_by(None, predicted)  # (N, V, J)
    made = {"right sources only": [], "perfect sources": []}
    for h, t, f in zip(output, target, F, strict=True):
        for name, sources in (("right sources only", silenced(h, t)), ("perfect sources", t)):
            made[name].append(found(fused_with(module, sources, h, f), t))
    made = {name: np.stack(each) for name, each in made.items()}
    count = np.nansum(alone, 1, keepdims=True)
    nan = np.where(np.isnan(alone), np.nan, 0.0)
    return made | {"any view": nan + (count >= 1), "two views": nan + (count >= 2)}
