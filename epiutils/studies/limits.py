"""Where fusion ends: calibration that is off, fewer views, hidden joints, other cameras; and oracles that bound it.

Each function changes one thing about what a network predicted, or about the pictures it sees, and leaves the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import torch
from torch import Tensor

from epiutils.cameras import Camera
from epiutils.data import people
from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.views import Predicted, View
from epiutils.epipolar import transfer
from epiutils.fusion import RepairedFusion, pairs
from epiutils.heatmaps import STRIDE, found, probabilities
from epiutils.metrics import joint_mean
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.predict import predict
from epiutils.redirect import Pencil
from epiutils.space import Calibration
from epiutils.studies.predicted import CHECKPOINTS, found_by, kept
from epiutils.triangulate import triangulate

FOCAL = 1145.0  # px, of the uncropped pictures of the embedded rig and of Human3.6M's


def once(name: str, depends: Sequence, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """Arrays that `make()` computes of fused heatmaps, from the cache if the same were computed before.

    depends: what decides them beside the code of fusion, triangulation and the embedded people, see `predicted.kept`.
    """
    code = [Camera, MultiView, View, people.scene, load_checkpoint, predict]  # pictures become heatmaps …
    code += [transfer, Pencil, RepairedFusion, probabilities, found, found_by, triangulate, once]  # … and are fused
    made = kept(
        name, [*code, *depends], lambda: {key: torch.as_tensor(np.asarray(value)) for key, value in make().items()}
    )
    return {key: value.numpy() for key, value in made.items()}


def seen_by(point: str, scenes: Sequence[list[View]]) -> Predicted:
    """What the backbone of an operating point sees in scenes that no split holds."""
    return predict(load_checkpoint(CHECKPOINTS[point]), MultiView(scenes))


def _shifted(predicted: Predicted, px: float, seed: int = 0) -> Predicted:
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
def _by_views(module: RepairedFusion, predicted: Predicted, views: int) -> np.ndarray:
    """Which joints are found where only so many views are present: found (N, C, J), C a view of a subset of them.

    All subsets of the views take part, in order.
    """
    shape, right = tuple(predicted.output.shape[-2:]), []
    subsets = [list(chosen) for chosen in combinations(range(predicted.output.shape[1]), views)]
    for h, F, target in zip(predicted.output, predicted.F, predicted.target, strict=True):
        pencil = Pencil.from_fundamental(F[*pairs(len(h))], shape, module.threshold)  # one for all subsets
        for chosen in subsets:
            present = torch.tensor([[v in chosen for v in range(len(h))]])
            right.append(found(module.all_views(h[None], pencil, present)[0, chosen], target[chosen]))
    return np.concatenate(right).reshape(len(predicted), -1, predicted.output.shape[2])


SHIFTS = (0, 1, 2, 5, 10, 20)  # px, of `_shifted`
SHARES = (0, 0.2, 0.4, 0.6)  # of `_hide`


def reliability(module: RepairedFusion, predicted: Predicted, worth: Calibration, parts: int = 10) -> dict[str, tuple]:
    """Joints from the least to the most that is claimed, in equal parts: (claimed, found), (parts,) shares each.

    "one view" claims, with the odds o of `worth`, o / (1 + o) of its map's mass within HRNet's tolerance of its peak, and
    the rest anywhere; "fused", with a module, the mass of softmax(β fused) there.
    """
    with torch.no_grad():
        fused = torch.stack(
            [module.all_views(h[None], F[None])[0] for h, F in zip(predicted.output, predicted.F, strict=True)]
        )
    odds = torch.exp(worth.slope * predicted.output.amax((-1, -2)) + worth.offset)
    ways = {
        "one view": (predicted, worth.sharpness, odds / (1 + odds)),
        "fused": (replace(predicted, output=fused), module.sharpness, torch.ones_like(odds)),
    }
    shown = {}
    for name, (seen, sharpness, right) in ways.items():
        hit = found_by(None, seen)
        claim = _claimed(probabilities(seen.output, sharpness), right).numpy()[np.isfinite(hit)]
        hit = hit[np.isfinite(hit)]
        some = np.array_split(np.argsort(claim), parts)
        shown[name] = tuple(np.array([values[part].mean() for part in some]) for values in (claim, hit))
    return shown


def _claimed(p: Tensor, right: Tensor) -> Tensor:
    """How likely it is that a joint is within HRNet's tolerance, 3.2 px, of the peak of its map of probabilities.

    p: (..., H, W).  right: (...), how likely that it is drawn from the map, and not from anywhere.
    """
    y, x = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    disk, maps = (x.square() + y.square() <= 3.2**2).to(p), p.flatten(0, -3)[:, None]
    near = torch.conv2d(maps, disk[None, None], padding=3).flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))
    return right * near.view_as(right) + (1 - right) * disk.sum() / (p.shape[-2] * p.shape[-1])


def ends(point: str, module: RepairedFusion, predicted: Predicted, every: int) -> dict[str, np.ndarray]:
    """Accuracy where one thing changes, from the cache.

    "calibration": off by `SHIFTS`.  "cameras": one to all of them.  "patches": (3, K), the share of the joints that are
    hidden, and the accuracy alone and fused, where patches hide `SHARES` of those in every n-th instant of the test.
    """

    def make() -> dict:
        cameras = [found_by(None, predicted), *(_by_views(module, predicted, n) for n in range(2, views + 1))]
        moved = [found_by(module, _shifted(predicted, px)) for px in SHIFTS]
        patched = np.transpose([[*map(joint_mean, under_patches(share))] for share in SHARES])
        moved, cameras = ([*map(joint_mean, each)] for each in (moved, cameras))
        return {"calibration": moved, "cameras": cameras, "patches": patched}

    def under_patches(share: float) -> tuple[np.ndarray, ...]:
        seen = seen_by(point, [_hide(scenes[i], share, i) for i in range(0, len(scenes), every)])
        return 1 - seen.visible.numpy(), found_by(None, seen), found_by(module, seen)

    views, scenes = predicted.output.shape[1], Benchmark("test")
    known = [predicted, module.state_dict(), module.threshold, CHECKPOINTS[point], scenes.folder.name, every]
    return once("ends", [*known, SHIFTS, SHARES], make)


def _hide(views: Sequence[View], share: float, seed: int) -> list[View]:
    """The views with patches painted over that share of the joints of each, which are then not visible.

    A patch is of one colour, has a sixth of the picture's side and its centre near the joint; joints under another's
    patch are hidden too.  Raises ValueError for a view of which nobody knows what is visible.
    """
    rng, hidden = np.random.default_rng(seed), []
    for view in views:
        if view.visible is None:
            raise ValueError(f"view {view.camera.name}: nobody knows which of its joints are visible")
        image, visible = view.image.copy(), view.visible.copy()
        side, pixels = view.camera.size[0] // 6, np.round(view.joints)
        for j in rng.permutation(len(visible)):
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


def oracles(module: RepairedFusion, predicted: Predicted) -> dict[str, float]:
    """Accuracy alone and fused, and what bounds it, from the cache.

    "right sources only", where those whose own peak is wrong are silent; "perfect sources", each is its target; "any
    view" and "two views", the joints that so many views find by themselves.
    """

    def make() -> dict:
        alone = found_by(None, predicted)  # nan where a joint does not count
        views = np.nansum(alone, 1, keepdims=True)  # how many find the joint
        told = {"right sources only": "right", "perfect sources": "perfect"}
        right = {text: found_by(None, _with_oracle(module, predicted, which)) for text, which in told.items()}
        right |= {"any view": alone * 0 + (views >= 1), "two views": alone * 0 + (views >= 2)}
        right = {"HRNet alone": alone, "repaired": found_by(module, predicted)} | right
        return {text: joint_mean(values) for text, values in right.items()}

    made = once("bounds", [predicted, module.state_dict(), module.threshold], make)
    return {text: float(value) for text, value in made.items()}


@torch.no_grad()
def _with_oracle(module: RepairedFusion, predicted: Predicted, sources: str) -> Predicted:
    """The instants as a module fuses them with the help of an oracle: output is then the fused heatmaps.

    sources: "right", those whose own peak is wrong are silent, their odds 0; "perfect", each source is its target.
    """
    given = predicted.target
    if sources == "right":
        wrong = torch.from_numpy(found_by(None, predicted) == 0)
        given = predicted.output.masked_fill(wrong[..., None, None], -10.0)
    elif sources != "perfect":
        raise ValueError(f'sources must be "right" or "perfect", got {sources!r}')
    views = range(predicted.output.shape[1])
    others = torch.tensor([[s for s in views if s != r] for r in views])  # (V, V − 1): the references are a batch
    each = zip(given, predicted.output, predicted.F, strict=True)
    fused = [module(source[others], own, F[others, torch.tensor(views)[:, None]]) for source, own, F in each]
    return replace(predicted, output=torch.stack(fused))
