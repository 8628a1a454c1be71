"""Why the original module fails, taken apart: ridges and peaks, uneven bands, nine weights solved instead of trained.

Without its sigmoid the original is linear in its nine weights: fused = reference + A w, where column k of A is the
ridge of the source map shifted by the k-th of nine offsets.  HRNet's loss is then a parabola in nine dimensions, and a
pair of views is, for all that the loss or an optimiser can tell, one 9×9 matrix, nine numbers and one more:
`NormalEquations`.  Solving them takes no steps, and training on them takes milliseconds and gives the weights that
training on heatmaps gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.views import Predicted
from epiutils.epipolar import epipolar_lines
from epiutils.heatmaps import decode, found
from epiutils.networks.loop import batches
from epiutils.redirect import Pencil
from epiutils.studies.fitting import PAIRS
from epiutils.studies.predicted import kept


class Pairs:
    """Chosen pairs of views: their ridges, and quick scores of fusing them.

    chosen: (N, K, 3), K pairs (scene, source, reference) of each of N scenes; or by `all_of`, `with_next`, `one_each`,
    of those scenes, or of all.  F: (4, 4, 3, 3) for all scenes, in the place of each scene's own.  maps: "output", the
    network's heatmaps, or "target", perfect ones.  The scores of kernels are `kept` in the cache.
    """

    def __init__(self, predicted: Predicted, chosen: np.ndarray, F: Tensor | None = None, maps: str = "output"):
        self.predicted, self.chosen, self.maps = predicted, np.asarray(chosen), maps
        n, s, r = self._index = torch.from_numpy(self.chosen.reshape(-1, 3).T.copy())
        self.F = predicted.F[n, s, r] if F is None else F[s, r]  # (N · K, 3, 3)
        self.shape = tuple(predicted.output.shape[-2:])
        self._pencils: dict[float, list[Pencil]] = {}
        self._ridges: dict[tuple, Tensor] = {}

    @classmethod
    def all_of(cls, predicted: Predicted, scenes: Sequence[int] | None = None, **settings) -> Pairs:
        """All pairs of every scene, in the order of `fitting.ViewPairs`: K = 12."""
        return cls(predicted, [[(n, *pair) for pair in PAIRS] for n in _scenes(predicted, scenes)], **settings)

    @classmethod
    def with_next(cls, predicted: Predicted, scenes: Sequence[int] | None = None, **settings) -> Pairs:
        """Each view of every scene with the next camera as its source, as `runs.WithNext`: K = 4."""
        return cls(predicted, [[(n, (r + 1) % 4, r) for r in range(4)] for n in _scenes(predicted, scenes)], **settings)

    @classmethod
    def one_each(cls, predicted: Predicted, scenes: Sequence[int] | None = None, **settings) -> Pairs:
        """One pair of every scene, the next of the twelve `PAIRS` each time: K = 1."""
        chosen = [[(n, *PAIRS[k % len(PAIRS)])] for k, n in enumerate(_scenes(predicted, scenes))]
        return cls(predicted, chosen, **settings)

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

    @property
    def known(self) -> list:
        """All that decides what comes of these pairs, where it is `kept`."""
        scenes = np.unique(self.chosen[..., 0])
        seen = self.predicted if len(scenes) == len(self.predicted) else self.predicted[scenes]
        return [self.chosen, self.F, self.maps, getattr(seen, self.maps), seen.target, seen.weight]

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

    def columns(self, threshold: float = 1.0, per_band: float | None = None) -> Iterator[Tensor]:
        """A of each pair in turn, (J, 9, H·W): what each of the nine weights, at 1 and alone, throws across the reference.

        per_band: see `NormalEquations.of`.  `pencils` are used where they are kept.
        """
        maps, (height, width), shown = getattr(self.predicted, self.maps), self.shape, None
        new = (Pencil.from_fundamental(F, self.shape, threshold) for F in self.F)
        for (n, s, _), pencil in zip(self._index.T.tolist(), self._pencils.get(threshold, new), strict=True):
            if shown != (n, s):
                shown, padded = (n, s), nn.functional.pad(maps[n, s], (1, 1, 1, 1))
                shifts = [padded[..., u : u + height, v : v + width] for u, v in np.ndindex(3, 3)]
                shifts = torch.stack(shifts, -3)  # (J, 9, H, W)
            A = pencil.sum(shifts)
            yield (A if per_band is None else A * per_band / pencil.count[0].clamp_min(1)).flatten(-2)

    def shape_of_ridges(self, threshold: float, collect: str = "sum") -> tuple[float, float]:
        """How high ridges are over the reference's peak, and their unevenness along the line: medians over the joints.

        The unevenness, (largest − smallest) / mean, is of every seventh pair, along the line of the source's peak.
        """
        ridges, uneven = self.ridges(threshold, collect).float(), []
        height = (ridges.amax((-2, -1)) / self.reference.amax((-2, -1))).nanmedian()
        for k in range(0, len(self), 7):
            lines = epipolar_lines(self.F[k], decode(self.source[k], "argmax")[0].double())
            walks = [along_line(ridge, line)[1] for ridge, line in zip(ridges[k], lines, strict=True)]
            uneven += [np.ptp(walk) / np.mean(walk) for walk in walks if len(walk) > 20]
        return float(height), float(np.median(uneven))

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
        output, target, right = getattr(self.predicted, self.maps), self.predicted.target, []
        kernels = weights.reshape(len(weights), -1, 9).expand(-1, output.shape[2], 9).transpose(0, 1)  # (J, S, 9)
        self.pencils(threshold)  # the next kernels find them
        for (n, _, r), A in zip(self._index.T, self.columns(threshold, per_band), strict=True):
            fused = (output[n, r].flatten(-2)[:, None] + kernels @ A).unflatten(-1, self.shape)  # (J, S, H, W)
            right.append(found(fused.sigmoid() if sigmoid else fused, target[n, r][:, None].expand_as(fused)).T)
        return np.stack(right, 1).reshape(len(weights), *self.chosen.shape[:2], -1)


def _scenes(predicted: Predicted, scenes: Sequence[int] | None) -> Sequence[int]:
    return range(len(predicted)) if scenes is None else scenes


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
        maps, target, weight = (getattr(pairs.predicted, key) for key in (pairs.maps, "target", "weight"))
        seen = ((target[n, r] - maps[n, r], weight[n, r]) for n, _, r in pairs.chosen.reshape(-1, 3))
        make = lambda: vars(cls.of_columns(pairs.columns(threshold, per_band), seen))
        return cls(**kept("equations", [NormalEquations, Pencil, pairs.known, threshold, per_band], make))

    @classmethod
    @torch.no_grad()
    def of_columns(cls, columns: Iterable[Tensor], seen: Iterable[tuple[Tensor, Tensor]]) -> NormalEquations:
        """Those of each A (J, 9, H·W) with its e (J, H, W) and v (J,), one after the other."""
        products = []
        for A, (e, weight) in zip(columns, seen, strict=True):
            rows = weight[:, None, None] * torch.cat([A, e.flatten(-2)[:, None]], 1)  # (J, 10, H·W)
            products.append(((rows @ rows.mT) / rows.shape[-1]).double())
        products = torch.stack(products)
        parts = products[..., :9, :9], products[..., 9, :9], products[..., 9, 9]
        return cls(*(part.contiguous() for part in parts))

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
        """The weights before and after each step of `networks.loop.train` without decay: (S, steps + 1, 9).

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


def initial_weights(seeds: Sequence[int]) -> Tensor:
    """The weights that `OriginalFusion` begins with after `torch.manual_seed` of each seed: (S, 9)."""
    drawn = [torch.empty(3, 3).uniform_(-1 / 3, 1 / 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).flatten(1)


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
