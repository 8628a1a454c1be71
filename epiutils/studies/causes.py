"""Why the original module fails, taken apart: ridges and peaks, uneven bands, nine weights solved instead of trained.

Without its sigmoid the original is linear in its nine weights: fused = reference + A w, where column k of A is the
ridge of the source map shifted by the k-th of nine offsets.  HRNet's loss is then a parabola in nine dimensions, and a
pair of views is, for all that the loss or an optimiser can tell, one 9×9 matrix, nine numbers and one more:
`NormalEquations`.  Solving them takes no steps, and training on them takes milliseconds and gives the weights that
training on heatmaps gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.cameras import Camera
from epiutils.data.views import Predicted
from epiutils.epipolar import epipolar_lines, epipoles, find_fundamental, fundamental_from_cameras, transfer
from epiutils.fusion import SimpleFusion
from epiutils.heatmaps import decode, found
from epiutils.networks.loop import batches
from epiutils.redirect import Pencil
from epiutils.studies.fitting import PAIRS, HeatmapPairs, train_pairs
from epiutils.studies.predicted import fingerprint, kept

# Which pairs of views


def each_pair(scenes: Sequence[int]) -> np.ndarray:
    """One pair (scene, source, reference) of every scene, the next of the twelve `PAIRS` each time: (N, 1, 3)."""
    return np.array([[(n, *PAIRS[k % len(PAIRS)])] for k, n in enumerate(scenes)])


def with_next(scenes: Sequence[int]) -> np.ndarray:
    """Each view of every scene with the next camera as its source, as `runs.WithNext`: (N, 4, 3)."""
    return np.array([[(n, (r + 1) % 4, r) for r in range(4)] for n in scenes])


def all_pairs(scenes: Sequence[int]) -> np.ndarray:
    """All pairs of every scene, in the order of `experiments.HeatmapPairs`: (N, 12, 3)."""
    return np.array([[(n, *pair) for pair in PAIRS] for n in scenes])


class Pairs:
    """Chosen pairs of views: their ridges, and quick scores of fusing them.

    chosen: (N, K, 3), K pairs (scene, source, reference) of each of N scenes.  F: (4, 4, 3, 3) for all scenes, in the
    place of each scene's own.  maps: "output", the network's heatmaps, or "target", perfect ones.
    The scores of kernels are `kept` in the cache.
    """

    def __init__(self, predicted: Predicted, chosen: np.ndarray, F: Tensor | None = None, maps: str = "output"):
        self.predicted, self.chosen, self.maps = predicted, np.asarray(chosen), maps
        n, s, r = self._index = torch.from_numpy(self.chosen.reshape(-1, 3).T.copy())
        self.F = predicted.F[n, s, r] if F is None else F[s, r]  # (N · K, 3, 3)
        self.shape = tuple(predicted.output.shape[-2:])
        self._pencils: dict[float, list[Pencil]] = {}
        self._ridges: dict[tuple, Tensor] = {}

    def __len__(self) -> int:
        return len(self.F)

    def at_source(self, key: str) -> Tensor:
        """An entry of `predicted` at the source view of each pair: (N · K, …)."""
        n, s, _ = self._index
        return getattr(self.predicted, key)[n, s]

    def at_reference(self, key: str) -> Tensor:
        """An entry of `predicted` at the reference view of each pair: (N · K, …)."""
        n, _, r = self._index
        return getattr(self.predicted, key)[n, r]

    @cached_property
    def known(self) -> bytes:
        """What stands for these pairs where results of theirs are `kept`."""
        scenes = np.unique(self.chosen[..., 0])
        seen = self.predicted if len(scenes) == len(self.predicted) else self.predicted[scenes]
        return fingerprint([self.chosen, self.F, self.maps, getattr(seen, self.maps), seen.target, seen.weight])

    @cached_property
    def source(self) -> Tensor:
        """Heatmaps of the sources (N · K, J, H, W)."""
        return self.at_source(self.maps)

    @cached_property
    def reference(self) -> Tensor:
        """Heatmaps of the references (N · K, J, H, W)."""
        return self.at_reference(self.maps)

    @cached_property
    def target(self) -> Tensor:
        """Targets of the references (N · K, J, H, W)."""
        return self.at_reference("target")

    def pencils(self, threshold: float) -> list[Pencil]:
        """The `Pencil` of each pair, kept."""
        if threshold not in self._pencils:
            self._pencils[threshold] = pencils = [Pencil.from_fundamental(F, self.shape, threshold) for F in self.F]
            for pencil in pencils:  # what a pencil keeps, made between large maps later, would fragment the memory
                pencil.sum(torch.zeros(1, *self.shape) * pencil.count[0])
        return self._pencils[threshold]

    def ridges(self, threshold: float = 1.0, collect: str = "sum") -> Tensor:
        """What the source throws across the reference, in half precision, kept: (N · K, J, H, W).

        collect: "sum" along the line, as the original with a weight of 1 in the middle; its "mean"; or "max"; 0 where
        a band is empty.  The maximum loses nothing: the cache's heatmaps are in half precision too.
        """
        if (threshold, collect) not in self._ridges:
            ridges = torch.empty_like(self.source, dtype=torch.half)
            for k, (pencil, source) in enumerate(zip(self.pencils(threshold), self.source, strict=True)):
                ridge = getattr(pencil, "max" if collect == "max" else "sum")(source)
                if collect != "sum":
                    count = pencil.count[0]
                    ridge = (ridge / count.clamp_min(1) if collect == "mean" else ridge).where(count > 0, 0.0)
                ridges[k] = ridge
            self._ridges[threshold, collect] = ridges
        return self._ridges[threshold, collect]

    def fused(
        self, gain: float, threshold: float = 1.0, collect: str = "sum", sigmoid: bool = False, which=slice(None)
    ) -> Tensor:
        """reference + gain · ridge of all pairs, or of those that `which` chooses, squashed if asked: (P, J, H, W)."""
        ridges = self.ridges(threshold, collect)[which]
        maps = torch.add(self.reference[which], ridges.to(self.reference.dtype), alpha=gain)
        return maps.sigmoid_() if sigmoid else maps

    def alone(self) -> np.ndarray:
        """Which joints are found in the reference views alone: (N, K, J)."""
        return found(self.reference, self.target).reshape(*self.chosen.shape[:2], -1)

    @torch.no_grad()
    def score(
        self,
        weights: Tensor | float,
        threshold: float = 1.0,
        per_band: float | None = None,
        sigmoid: bool = False,
        collect: str = "sum",
    ) -> np.ndarray:
        """Which joints the original module finds with each of S kernels: (S, N, K, J), see `heatmaps.found`.

        weights: (S, 3, 3), or (S, 9); or (S, J, 3, 3), a kernel for each joint.  per_band: see `NormalEquations.of`.
        A number is the gain of a single weight in the middle: (N, K, J), from `ridges` that are kept, so that the next
        gain takes one multiplication and one arg-max a map.  collect: of `ridges`, for a gain.
        """
        if isinstance(weights, float | int):
            chunks = [slice(first, first + 16) for first in range(0, len(self), 16)]  # stay in the processor's cache
            right = [found(self.fused(weights, threshold, collect, sigmoid, c), self.target[c]) for c in chunks]
            return np.concatenate(right).reshape(*self.chosen.shape[:2], -1)
        weights = torch.as_tensor(weights, dtype=self.predicted.output.dtype)
        depends = [Pairs, Pencil, found, self.known, weights, threshold, per_band, sigmoid]
        make = lambda: {"found": torch.from_numpy(self._score(weights, threshold, per_band, sigmoid)).half()}
        return kept("found", depends, make)["found"].double().numpy()  # of 1, 0 and nan

    def _score(self, weights: Tensor, threshold: float, per_band: float | None, sigmoid: bool) -> np.ndarray:
        output, target = getattr(self.predicted, self.maps), self.predicted.target
        joints = output.shape[2]
        kernels = weights.reshape(len(weights), -1, 9).expand(-1, joints, 9).transpose(0, 1)  # (J, S, 9)
        right = np.empty((len(weights), len(self), joints))
        for k, ((n, s, r), pencil) in enumerate(zip(self._index.T, self.pencils(threshold), strict=True)):
            A = _ridge(pencil, nine_shifts(output[n, s]), per_band).flatten(-2)  # (J, 9, H·W)
            fused = (output[n, r].flatten(-2)[:, None] + kernels @ A).unflatten(-1, self.shape)  # (J, S, H, W)
            right[:, k] = found(fused.sigmoid() if sigmoid else fused, target[n, r][:, None].expand_as(fused)).T
        return right.reshape(-1, *self.chosen.shape[:2], joints)


def _ridge(pencil: Pencil, weighed: Tensor, per_band: float | None) -> Tensor:
    ridge = pencil.sum(weighed)
    return ridge if per_band is None else ridge * per_band / pencil.count[0].clamp_min(1)


# The loss as a parabola


@dataclass(frozen=True)
class NormalEquations:
    """HRNet's loss of the fused maps, a parabola in nine weights: ½ (wᵀ G w − 2 bᵀ w + c) for each pair and joint.

    With A (H·W, 9) the ridges of the nine shifted sources, e = target − reference, and v the joint's weight in the
    loss: gram G = v² AᵀA (P, J, 9, 9), moment b = v² Aᵀe (P, J, 9), constant c = v² eᵀe (P, J), each over H · W, in
    float64.  The loss of some pairs is the mean over them and the joints.
    """

    gram: Tensor
    moment: Tensor
    constant: Tensor

    @classmethod
    def of(cls, pairs: Pairs, threshold: float = 1.0, per_band: float | None = None) -> NormalEquations:
        """Those of pairs of views, `kept` in the cache.

        per_band: what a band counts for, however many pixels it holds, by default as many as it holds: with 1 the
        ridge is a mean along the line, with the usual number of pixels its height stays and only its unevenness goes.
        """
        depends = [NormalEquations, Pencil, pairs.known, threshold, per_band]
        return cls(**kept("equations", depends, lambda: cls._of(pairs, threshold, per_band)))

    @staticmethod
    @torch.no_grad()
    def _of(pairs: Pairs, threshold: float, per_band: float | None) -> dict[str, Tensor]:
        maps, target, weight = (getattr(pairs.predicted, key) for key in (pairs.maps, "target", "weight"))
        products = torch.empty(len(pairs), maps.shape[2], 10, 10, dtype=torch.float64)
        shown, shifts = None, None
        for k, ((n, s, r), F) in enumerate(zip(pairs._index.T.tolist(), pairs.F, strict=True)):
            if shown != (n, s):
                shown, shifts = (n, s), nine_shifts(maps[n, s])
            pencil = Pencil.from_fundamental(F, pairs.shape, threshold)
            A = _ridge(pencil, shifts, per_band).flatten(-2)  # (J, 9, H·W)
            e = (target[n, r] - maps[n, r]).flatten(-2)[:, None]  # (J, 1, H·W)
            rows = weight[n, r, :, None, None] * torch.cat([A, e], 1)  # (J, 10, H·W)
            products[k] = (rows @ rows.mT) / rows.shape[-1]
        gram, moment, constant = products[..., :9, :9], products[..., 9, :9], products[..., 9, 9]
        return {"gram": gram.contiguous(), "moment": moment.contiguous(), "constant": constant.contiguous()}

    def scaled(self, factor: float) -> NormalEquations:
        """Those of ridges that are `factor` times as high."""
        return NormalEquations(factor**2 * self.gram, factor * self.moment, self.constant)

    @cached_property
    def curvature(self) -> Tensor:
        """The Hessian of the loss of all pairs, (9, 9)."""
        return self.gram.mean((0, 1))

    def loss(self, weights: Tensor) -> Tensor:
        """Of all pairs, at weights (..., 9): (...)."""
        w = weights.double()
        quadratic = (w @ self.curvature * w).sum(-1) - 2 * w @ self.moment.mean((0, 1))
        return (quadratic + self.constant.mean()) / 2

    def gradient(self, weights: Tensor) -> Tensor:
        """Of the loss of all pairs, at weights (..., 9): (..., 9)."""
        return weights.double() @ self.curvature - self.moment.mean((0, 1))

    def solve(self) -> Tensor:
        """The weights with the least loss, the smallest where there are several: (9,)."""
        return torch.linalg.pinv(self.gram.mean((0, 1)), hermitian=True) @ self.moment.mean((0, 1))

    def train(
        self, initial: Tensor, seeds: Sequence[int], steps: int, batch: int = 8, lr: float | Sequence[float] = 1e-3
    ) -> Tensor:
        """The weights before and after each step of `training.train` without decay: (S, steps + 1, 9).

        initial: (S, 9), each seed's; the seed orders the pairs.  AdamW scales each number by itself, so the S
        trainings are one.  Of (S, J, 9), weights of each joint's own, (S, steps + 1, J, 9).  lr: or one for each step.
        """
        own = initial.ndim == 3
        grams, moments = (v / v.shape[1] if own else v.mean(1) for v in (self.gram, self.moment))
        weights = nn.Parameter(initial.clone())
        optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0)
        orders = [itertools.islice(batches(len(grams), batch, seed), steps) for seed in seeds]
        rates = [lr] * steps if isinstance(lr, float) else lr
        path = [initial]
        for rate, drawn in zip(rates, zip(*orders, strict=True), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            chosen = torch.tensor([[index for _, index in pairs] for pairs in drawn])  # (S, batch)
            gradient = (grams[chosen].mean(1) @ weights.detach().double()[..., None])[..., 0] - moments[chosen].mean(1)
            weights.grad = gradient.to(weights.dtype)
            optimizer.step()
            path.append(weights.detach().clone())
        return torch.stack(path, 1)


def nine_shifts(maps: Tensor) -> Tensor:
    """What each of the nine weights, at 1 and alone, makes of heatmaps, row by row: (J, H, W) → (J, 9, H, W)."""
    height, width = maps.shape[-2:]
    padded = nn.functional.pad(maps, (1, 1, 1, 1))
    return torch.stack([padded[..., u : u + height, v : v + width] for u in range(3) for v in range(3)], -3)


def initial_weights(seeds: Sequence[int]) -> Tensor:
    """The weights that `OriginalFusion` begins with after `torch.manual_seed` of each seed: (S, 9)."""
    drawn = [torch.empty(3, 3).uniform_(-1 / 3, 1 / 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).flatten(1)


def behind_sigmoid(predicted: Predicted, initial: Tensor, threshold: float = 1.0, steps: int = 50) -> Tensor:
    """The nine weights after training behind the sigmoid, which no parabola gives: (S, 9), `kept` in the cache.

    initial: (S, 9), those that seed 0, 1, … begins with; it orders the pairs.  On the maps of all pairs of views.
    """

    def make() -> dict[str, Tensor]:
        modules = [SimpleFusion(threshold, sigmoid=True, initial=weights.reshape(3, 3)) for weights in initial]
        for seed, module in enumerate(modules):
            train_pairs(module, HeatmapPairs(predicted), steps, seed=seed)
        return {"weights": torch.stack([module.conv.weight.detach().flatten() for module in modules])}

    seen = [getattr(predicted, name) for name in ("output", "target", "weight", "F")]
    depends = [SimpleFusion, Pencil, train_pairs, batches, seen, initial, threshold, steps]
    return kept("sigmoid", depends, make)["weights"]


# Lines, bands, epipoles


def along_line(values: Tensor, line: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of a map that a line crosses, one in each column (or row, where the line is steep), in order.

    values: (H, W).  line: (3,), a·x + b·y + c = 0.  Returns how far along the line each is from the first (px), and
    the values.
    """
    a, b, c = (float(v) for v in line)
    height, width = values.shape[-2:]
    if abs(b) >= abs(a):
        x = np.arange(width)
        y = -(a * x + c) / b
    else:
        y = np.arange(height)
        x = -(b * y + c) / a
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    if not inside.any():
        return np.empty(0), np.empty(0)
    far = np.hypot(x - x[inside][0], y - y[inside][0])[inside]
    return far, np.asarray(values)[row[inside], column[inside]]


def _unevenness(profile: np.ndarray) -> float:
    """By how much a profile varies: (largest − smallest) / mean."""
    return float(np.ptp(profile) / np.mean(profile))


def shape_of_ridges(pairs: Pairs, threshold: float, collect: str = "sum") -> tuple[float, float]:
    """How high ridges are over the reference's peak, and their unevenness along the line: medians over the joints.

    The unevenness is of every seventh pair, along the line of the source's peak.
    """
    ridges, walks = pairs.ridges(threshold, collect).float(), []
    height = (ridges.amax((-2, -1)) / pairs.reference.amax((-2, -1))).nanmedian()
    for k in range(0, len(pairs), 7):
        lines = epipolar_lines(pairs.F[k], decode(pairs.source[k], "argmax")[0].double())
        walks += [along_line(ridge, line)[1] for ridge, line in zip(ridges[k], lines, strict=True)]
    return float(height), float(np.median([_unevenness(walk) for walk in walks if len(walk) > 20]))


def epipole_inside(F: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Whether the epipole lies in the reference heatmap (H, W): F (..., 3, 3) → (...) bool."""
    e = epipoles(F)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.asarray(e[..., 0] / e[..., 2]), np.asarray(e[..., 1] / e[..., 2])
    return (x > -0.5) & (x < shape[1] - 0.5) & (y > -0.5) & (y < shape[0] - 0.5)


def between_pictures(cameras: Sequence[Camera], joints: np.ndarray | None = None) -> np.ndarray:
    """F between whole pictures, whose distortion is taken away: (V, V, 3, 3), F[s, r] from view s to view r.

    From calibration; or, with joints (..., 3) in metres, by OpenCV's least median of squares from their whole pixels,
    as its tutorial does it.
    """
    cameras = [camera.without_distortion() for camera in cameras]
    F = np.zeros((len(cameras), len(cameras), 3, 3))
    for s, r in itertools.permutations(range(len(cameras)), 2):
        if joints is None:
            F[s, r] = fundamental_from_cameras(cameras[s], cameras[r])
        else:
            F[s, r] = find_fundamental(*(np.rint(cameras[v].project(joints.reshape(-1, 3))) for v in (s, r)), "lmeds")[
                0
            ]
    return F


def forgetting_crop(cameras: Sequence[Camera], shape: tuple[int, int], joints: np.ndarray | None = None) -> Tensor:
    """F between heatmaps as if they showed the whole pictures, not crops: (V, V, 3, 3); see `between_pictures`."""
    scales = np.stack([np.diag([shape[1] / c.size[0], shape[0] / c.size[1], 1.0]) for c in cameras])
    return torch.from_numpy(transfer(between_pictures(cameras, joints), scales[:, None], scales[None]))
