"""Evidence in space: where a joint is, asked of all views at once.

A joint is one point X, and every view has an opinion of it:

    log p(X) = Σ_v log(1 + o_v · HW · p_v(π_v X)),    p_v = softmax(β h_v),    o_v = exp(slope · max h_v + offset)

with h_v the view's heatmap of H × W px, π_v its projection and o_v the odds that it is right.  A view in which X has no
image, or that knows nothing of the joint, adds log 1 = 0.  Epipolar lines ask each pair of views for itself; here all
have to agree at the same depth.  `modes` finds the maxima, `along_bones` chooses among those of a whole body, and
`poses` is both.  Everything takes a batch, any number of views, and any device; gradients reach the heatmaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.heatmaps import STRIDE, probabilities
from epiutils.triangulate import triangulate

SILENT = -1e8  # the log evidence of what is no candidate


@dataclass(frozen=True)
class Calibration:
    """What a network's heatmaps are worth: three numbers, fitted view by view on people whose joints are known.

    sharpness: β of softmax(β h).  slope, offset: of the log odds that a view is right, by the height of its peak.
    """

    sharpness: float
    slope: float
    offset: float

    @classmethod
    def fit(cls, heatmaps: Tensor, joints: Tensor, steps: int = 80, batch: int = 600, seed: int = 0) -> Calibration:
        """The likeliest: the mean of log(r p(x) HW + 1 − r) at the true pixels x, r = odds / (1 + odds), is largest.

        heatmaps: (..., J, H, W) of training views.  joints: (..., J, 2) true px of the network's inputs; those beside
        the map, or nan, are left out.
        """
        height, width = heatmaps.shape[-2:]
        maps, at = heatmaps.reshape(-1, height, width), joints.reshape(-1, 1, 2).to(heatmaps) / STRIDE
        inside = ((at > 0) & (at < torch.tensor([width - 1.0, height - 1.0]).to(at))).all(-1)[:, 0]
        maps, at = maps[inside], at[inside]
        peak = maps.flatten(1).amax(1)
        numbers = torch.tensor([math.log(10), 6.0, -1.0], device=maps.device, requires_grad=True)
        optimiser, draw = torch.optim.Adam([numbers], 0.08), torch.Generator().manual_seed(seed)
        for _ in range(steps):
            some = torch.randint(len(maps), (batch,), generator=draw).to(maps.device)
            density = height * width * _read(probabilities(maps[some], numbers[0].exp()), at[some])[:, 0]
            right = torch.sigmoid(numbers[1] * peak[some] + numbers[2])
            optimiser.zero_grad()
            (-torch.log(right * density + 1 - right).mean()).backward()
            optimiser.step()
        log_sharpness, slope, offset = numbers.tolist()
        return cls(math.exp(log_sharpness), slope, offset)

    def together(self) -> Calibration:
        """For views that are asked together, half as sharp: views that err often err alike, and p(X) is their product.

        The half was chosen on subject 8, for 4 and 8 views, of powers from 0.2 to 1 behind four networks.
        """
        return replace(self, sharpness=self.sharpness / 2)


@dataclass(frozen=True, eq=False)
class Modes:
    """Where joints may be: up to M places each, the likeliest first.

    X: (..., J, M, 3) metres, means of the evidence around each maximum.  mass: (..., J, M), log of the evidence around
    it, −1e8 where there are fewer.  covariance: (..., J, M, 3, 3) of that evidence.
    """

    X: Tensor
    mass: Tensor
    covariance: Tensor

    @property
    def share(self) -> Tensor:
        """The probability of each mode among those of its joint: (..., J, M)."""
        return torch.softmax(self.mass, -1)

    def near_best(self, share: Tensor, within: float = 0.12) -> Tensor:
        """The mean of each joint's best mode and of those within so many metres of it: (..., J, 3).

        share: (..., J, M), the probability of each mode, `share` or that of `along_bones`.
        """
        best = share.argmax(-1)[..., None, None].expand(*share.shape[:-1], 1, 3)
        weight = share * ((self.X - self.X.gather(-2, best)).norm(dim=-1) < within)
        return (weight[..., None] * self.X).sum(-2) / weight.sum(-1, keepdim=True)


def log_evidence(X: Tensor, heatmaps: Tensor, P: Tensor, calibration: Calibration) -> Tensor:
    """log p(X) of points for each joint, the sum over the views of log(1 + o_v · HW · p_v(π_v X)).

    X: (B, J, C, 3) metres.  heatmaps: (B, V, J, H, W).  P: (B, V, 3, 4) of the network's inputs, `STRIDE` px of which
    are one of the heatmap.  Returns (B, J, C).
    """
    return _Views(heatmaps, P, calibration).log_evidence(X)


class _Views:
    """The views' opinions, made once for all points that are asked."""

    def __init__(self, heatmaps: Tensor, P: Tensor, calibration: Calibration):
        B, V, J, height, width = heatmaps.shape
        odds = calibration.slope * heatmaps.flatten(-2).amax(-1) + calibration.offset  # (B, V, J)
        odds = odds.masked_fill((heatmaps == 0).flatten(-2).all(-1), -math.inf)  # an empty map knows nothing
        density = height * width * probabilities(heatmaps, calibration.sharpness)
        self.said = (odds.clamp_max(80).exp()[..., None, None] * density).flatten(0, 2)  # (B · V · J, H, W)
        across = [[2 / STRIDE / (width - 1), 0, -1], [0, 2 / STRIDE / (height - 1), -1], [0, 0, 1]]  # from −1 to 1
        self.P = (torch.tensor(across, dtype=torch.float64, device=P.device) @ P.double()).to(heatmaps.dtype)
        self.shape = B, V, J

    def log_evidence(self, X: Tensor) -> Tensor:
        B, V, J = self.shape
        x, y, depth = (self.P[..., :3] @ X.flatten(1, 2).mT[:, None] + self.P[..., 3:]).unbind(2)  # (B, V, J · C) each
        near = 1 / depth.clamp_min(1e-6)
        x = torch.where(depth > 0, x * near, -9.0)  # behind a camera is beside its picture
        at = torch.stack([x, y * near], -1).view(B * V * J, 1, -1, 2)
        values = nn.functional.grid_sample(self.said[:, None], at, align_corners=True)
        return torch.log1p(values).view(B, V, J, -1).sum(1)


def _read(maps: Tensor, at: Tensor) -> Tensor:
    """Bilinear values of maps (N, H, W) at points (N, C, 2) px, 0 outside: (N, C)."""
    height, width = maps.shape[-2:]
    grid = 2 * at / at.new_tensor([width - 1, height - 1]) - 1
    return nn.functional.grid_sample(maps[:, None], grid[:, None], align_corners=True)[:, 0, 0]


def _candidates(heatmaps: Tensor, P: Tensor, peaks: int = 3) -> Tensor:
    """Points that two views agree on: triangulations of every pair of views' highest peaks, and of more views' first.

    heatmaps: (B, V, J, H, W).  P: (B, V, 3, 4).  Returns (B, J, C, 3) metres, nan where rays do not meet before the
    cameras.
    """
    points = STRIDE * _local_maxima(heatmaps, peaks).double().movedim(1, 2)  # (B, J, V, peaks, 2)
    P, views = P.double()[:, None], range(heatmaps.shape[1])
    of_pairs = torch.tensor(list(combinations(views, 2)), device=P.device).reshape(-1, 2)  # (Q, 2)
    first, second = (points[:, :, of_pairs[:, k]] for k in (0, 1))  # (B, J, Q, peaks, 2)
    both = torch.stack(torch.broadcast_tensors(first[..., :, None, :], second[..., None, :, :]), -2).flatten(3, 4)
    found = [triangulate(both, P[:, :, of_pairs][:, :, :, None]).flatten(2, 3)]  # (B, J, Q · peaks², 3)
    for count in range(3, len(views) + 1) if len(views) < 5 else [len(views)]:
        chosen = torch.tensor(list(combinations(views, count)), device=P.device)
        found.append(triangulate(points[..., 0, :][:, :, chosen], P[:, :, chosen]))
    return torch.cat(found, 2)


def _local_maxima(heatmaps: Tensor, count: int) -> Tensor:
    """The highest local maxima of each map (..., H, W), refined by a parabola of its logarithm: (..., count, 2) px."""
    height, width = heatmaps.shape[-2:]
    maps = heatmaps.detach().reshape(-1, height, width)
    high = nn.functional.pad(maps, (2, 2, 2, 2), value=-math.inf)
    for axis, size in ((-1, width), (-2, height)):  # the highest of 5 × 5, many times quicker so than by pooling
        high = torch.stack([high.narrow(axis, k, size) for k in range(5)]).amax(0)
    index = maps.where(maps == high, -1.0).flatten(1).topk(count, -1)[1]  # (N, count)
    x, y = index % width, index // width
    logs = maps.flatten(1).clamp_min(1e-4).log()

    def at(dx: int, dy: int) -> Tensor:
        return logs.gather(1, (y + dy).clamp(0, height - 1) * width + (x + dx).clamp(0, width - 1))

    def shift(before: Tensor, after: Tensor) -> Tensor:
        bend = before - 2 * at(0, 0) + after
        return torch.where(bend < -1e-6, (before - after) / 2 / bend.clamp_max(-1e-6), 0.0).clamp(-0.5, 0.5)

    points = torch.stack([x + shift(at(-1, 0), at(1, 0)), y + shift(at(0, -1), at(0, 1))], -1)
    return points.reshape(*heatmaps.shape[:-2], count, 2)


def _grid(reach: float, count: int, like: Tensor) -> Tensor:
    """A cube of count³ offsets up to ± reach metres: (count³, 3)."""
    steps = torch.linspace(-reach, reach, count, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(steps, steps, steps)


def modes(
    heatmaps: Tensor, P: Tensor, calibration: Calibration, count: int = 12, peaks: int = 3, apart: float = 0.06
) -> Modes:
    """The maxima of log p(X) for each joint, from `_candidates` on, by local grids from coarse to fine.

    count: of modes a joint.  peaks: of each view and joint that propose.  apart: metres between two maxima to begin
    with.  heatmaps: (B, V, J, H, W), zeros where a view is missing.  P: (B, V, 3, 4).
    Differentiable in the heatmaps: the places around a maximum are fixed, their evidence is not.
    """
    views = _Views(heatmaps, P, calibration)
    X = _candidates(heatmaps, P, peaks).to(heatmaps.dtype)  # (B, J, C, 3)
    with torch.no_grad():
        known = torch.isfinite(X).all(-1)
        X = torch.where(known[..., None], X, 0.0)
        X, value = _spread(X, views.log_evidence(X).masked_fill(~known, SILENT), count, apart)
        for reach, steps in ((0.09, 5), (0.03, 5)):
            around = X[..., None, :] + _grid(reach, steps, X)  # (B, J, M, G, 3)
            best = views.log_evidence(around.flatten(2, 3)).unflatten(2, around.shape[2:4]).argmax(-1)
            X = around.gather(3, best[..., None, None].expand(*best.shape, 1, 3))[..., 0, :]
        around = X[..., None, :] + _grid(0.06, 7, X)
    evidence = views.log_evidence(around.flatten(2, 3)).unflatten(2, around.shape[2:4])  # (B, J, M, G)
    mass = evidence.logsumexp(-1).masked_fill(value <= SILENT, SILENT)
    weight = torch.softmax(evidence, -1)[..., None]
    mean = (weight * around).sum(-2)
    away = around - mean[..., None, :]
    mass, order = mass.sort(-1, descending=True)
    take = lambda values: values.gather(2, order.reshape(*order.shape, *[1] * (values.ndim - 3)).expand_as(values))
    return Modes(take(mean), mass, take((weight * away).mT @ away))


def _spread(X: Tensor, value: Tensor, count: int, apart: float) -> tuple[Tensor, Tensor]:
    """The best of candidates (B, J, C, 3) that lie apart from better ones: (B, J, M, 3) and their values (B, J, M)."""
    chosen, values = [], []
    for _ in range(count):
        best, at = value.max(-1, keepdim=True)
        chosen.append(X.gather(2, at[..., None].expand(*at.shape, 3)))
        values.append(best)
        value = value.masked_fill((X - chosen[-1]).square().sum(-1) < apart**2, 10 * SILENT)
    return torch.cat(chosen, 2), torch.cat(values, 2)


@dataclass(frozen=True, eq=False)
class Body:
    """A tree of bones and how long they are in a body of unit size, from poses of training people.

    bones: (parent, child) joints, a parent's own bone before its children's.  mean, deviation: (K,) lengths as shares of
    their sum.  size: mean and deviation of that sum, in metres.
    """

    bones: tuple[tuple[int, int], ...]
    mean: np.ndarray
    deviation: np.ndarray
    size: tuple[float, float]

    @classmethod
    def of(cls, poses: np.ndarray, bones: Sequence[tuple[int, int]]) -> Body:
        """From poses (N, J, 3) in metres.  A person's proportions vary less than 5 in 10,000 nowhere."""
        a, b = np.array(bones).T
        length = np.linalg.norm(poses[:, a] - poses[:, b], axis=-1)  # (N, K)
        size = length.sum(1)
        share = length / size[:, None]
        return cls(tuple(map(tuple, bones)), share.mean(0), np.maximum(share.std(0), 5e-4), (size.mean(), size.std()))

    def measure(self, X: Tensor, sure: Tensor) -> Tensor:
        """A person's size, robustly: the median over the bones of length / share, weighted by how sure both ends are.

        X: (B, J, 3).  sure: (B, J).  Returns (B,), at most 2.5 deviations from the mean.
        """
        a, b = torch.tensor(self.bones, device=X.device).T
        share = torch.as_tensor(self.mean).to(X)
        long = share > 0.04  # short bones say little
        size = ((X[:, a] - X[:, b]).norm(dim=-1) / share)[:, long]  # (B, K')
        weight = torch.minimum(sure[:, a], sure[:, b])[:, long] + 1e-3
        size, order = size.sort(-1)
        weight = weight.gather(-1, order).cumsum(-1)
        middle = (weight < weight[:, -1:] / 2).sum(-1, keepdim=True)
        low, high = (self.size[0] + sign * 2.5 * self.size[1] for sign in (-1, 1))
        return size.gather(-1, middle)[:, 0].clamp(low, high)


def along_bones(found: Modes, body: Body, slack: float = 0.02, floor: float = 1e-3, rounds: int = 3) -> Tensor:
    """The probability of each mode given those of all joints: sum-product on the tree of bones (Pearl 1988).

    Two modes of a bone's ends fit by floor + exp(−½ ((length − size · share) / σ)²), σ² = (size · deviation)² + slack²:
    the floor is for what no bone explains.  slack: metres.  rounds: the person's size and the modes are found in turn.
    Returns (B, J, M).
    """
    q = found.share
    a, b = torch.tensor(body.bones, device=q.device).T
    length = (found.X[:, a, :, None] - found.X[:, b, None]).norm(dim=-1)  # (B, K, M parent, M child)
    mean, deviation = (torch.as_tensor(v).to(q)[:, None, None] for v in (body.mean, body.deviation))
    for _ in range(rounds):
        best = found.X.gather(2, q.argmax(-1)[..., None, None].expand(-1, -1, 1, 3))[:, :, 0]
        size = body.measure(best, q.amax(-1))[:, None, None, None]
        off = (length - size * mean) / torch.hypot(size * deviation, torch.as_tensor(slack).to(q))
        q = _sum_product(found.mass, torch.log(floor + torch.exp(-0.5 * off.square())), body.bones)
    return q


def _sum_product(U: Tensor, fit: Tensor, bones: Sequence[tuple[int, int]]) -> Tensor:
    """Marginals (B, J, M) of a tree: log unary U (B, J, M), log pairwise fit (B, K, M parent, M child)."""
    depth = {bones[0][0]: 0}
    for parent, child in bones:
        depth[child] = depth[parent] + 1
    levels = [[k for k, (_, c) in enumerate(bones) if depth[c] == d] for d in range(1, max(depth.values()) + 1)]
    ends = torch.tensor(bones, device=U.device)
    up, said = U.clone(), torch.zeros_like(U)  # said[:, child]: what it told its parent
    for level in reversed(levels):  # from the ends of the limbs to the root
        parent, child = ends[level].T
        message = torch.logsumexp(fit[:, level] + up[:, child, None], -1)
        said = said.index_copy(1, child, message)
        up = up.index_add(1, parent, message)
    for level in levels:  # and back, to each what all but itself have said
        parent, child = ends[level].T
        message = torch.logsumexp(fit[:, level] + (up[:, parent] - said[:, child])[..., None], -2)
        up = up.index_add(1, child, message)
    return torch.softmax(up, -1)


def poses(
    heatmaps: Tensor, P: Tensor, calibration: Calibration, body: Body | None = None, batch: int = 8, **settings
) -> Tensor:
    """Joints in space from the heatmaps of all views: the likeliest modes, and with a body those that its bones allow.

    heatmaps: (B, V, J, H, W), zeros where a view is missing.  P: (B, V, 3, 4) of the network's inputs.  batch: instants
    at a time.  settings: of `modes`.  Returns (B, J, 3) metres.
    """
    given = []
    for maps, cameras in zip(heatmaps.split(batch), P.split(batch), strict=True):
        found = modes(maps, cameras, calibration, **settings)
        given.append(found.near_best(found.share if body is None else along_bones(found, body)))
    return torch.cat(given)
