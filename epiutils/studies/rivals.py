"""Other ways to fuse the same heatmaps, each in a few lines: what `RepairedFusion` is measured against.

Each has `all_views(heatmaps, F)` and `sharpness` as `fusion.RepairedFusion` has them, begins at the reference views
alone, and trains by the same loss.  They are the published ideas on heatmaps, not the published networks, which fuse
features of their own backbones.  `RIVALS` makes them.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from epiutils.epipolar import epipolar_lines
from epiutils.fusion import pairs, sum_at_references
from epiutils.heatmaps import probabilities
from epiutils.redirect import Pencil


class _Alone(nn.Module):
    """No fusion: fused = reference.  One parameter, β, turns heatmaps into probabilities for the loss."""

    def __init__(self):
        super().__init__()
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(10)))

    @property
    def sharpness(self) -> Tensor:
        """β > 0, the inverse temperature at which heatmaps become probabilities."""
        return self.log_sharpness.exp()

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        """Each view fused with all others.  heatmaps: (B, V, J, H, W).  F: (B, V, V, 3, 3).  Returns (B, V, J, H, W)."""
        return heatmaps


class _Line(_Alone):
    """fused = reference + gain Σ_s (sum, mean or maximum of source s over the band of each pixel's line).

    collect: "sum", what the original's nine weights redirect; "mean", the sum over the number of pixels in the band;
    "max" (Zhang et al., AdaFuse, IJCV 2021, without its view weights).  Two parameters.
    """

    def __init__(self, collect: str, threshold: float = 1.0):
        super().__init__()
        if collect not in ("sum", "mean", "max"):
            raise ValueError(f"collect must be 'sum', 'mean' or 'max', got {collect!r}")
        self.collect, self.threshold = collect, threshold
        self.gain = nn.Parameter(torch.tensor(0.0))

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        return heatmaps + self.gain * sum_at_references(self._ridges(heatmaps, F))

    def _ridges(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        """Sum, mean or maximum of each pair's source over the bands: (B, V, J, H, W) → (B, V (V − 1), J, H, W)."""
        source, reference = pairs(heatmaps.shape[1])
        F, sources = F[:, source, reference].flatten(0, 1), heatmaps[:, source].flatten(0, 1)
        pencil = Pencil.from_fundamental(F, tuple(heatmaps.shape[-2:]), self.threshold)
        if self.collect == "max":
            ridges = pencil.max(sources).clamp_min(torch.finfo(sources.dtype).min)
            ridges = ridges.where(pencil.count[:, None] > 0, 0.0)
        else:
            ridges = pencil.sum(sources)
            if self.collect == "mean":
                ridges = ridges / pencil.count.clamp_min(1)[:, None]
        return ridges.unflatten(0, (len(heatmaps), -1))


class _WeightedMax(_Line):
    """As AdaFuse: fused = λ_r reference + gain Σ_s λ_s (maximum of source s along the line), λ learned.

    λ > 0, one for each view and joint, is the exponential of a small network of three numbers: the height of the view's
    peak, the entropy of its map, and the sum of the other views' maxima at the peak.  AdaFuse reads λ from features of
    its backbone too.
    """

    def __init__(self, threshold: float = 1.0, hidden: int = 8):
        super().__init__("max", threshold)
        self.trust = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.trust[2].weight)
        nn.init.zeros_(self.trust[2].bias)

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        ridges = self._ridges(heatmaps, F)  # (B, P, J, H, W)
        peak, at = heatmaps.flatten(-2).max(-1)  # (B, V, J)
        p = probabilities(heatmaps, 10).flatten(-2)
        entropy = -(p * p.clamp_min(1e-12).log()).sum(-1) / math.log(p.shape[-1])
        others = sum_at_references(ridges).flatten(-2).gather(-1, at[..., None])[..., 0] / (heatmaps.shape[1] - 1)
        trust = self.trust(torch.stack([peak, entropy, others], -1)).exp()  # (B, V, J, 1)
        said = self.gain * trust[:, pairs(heatmaps.shape[1])[0], ..., None] * ridges
        return trust[..., None] * heatmaps + sum_at_references(said)


class _Attention(_Alone):
    """As the Epipolar Transformer (He et al., CVPR 2020): each pixel attends to samples of its line in each source.

    fused = reference + Σ_s Σ_i a_i W v_i,  a = softmax over i of (Q u)·(K v_i) / √d, with u the J heatmap values at the
    reference pixel and v_i those at the samples, evenly spread along its epipolar line where it crosses the source map.
    Q and K are d × J, W is J × J and begins at zero.
    """

    def __init__(self, joints: int = 17, samples: int = 32, width: int = 8):
        super().__init__()
        self.samples = samples
        self.query, self.key = nn.Linear(joints, width, bias=False), nn.Linear(joints, width, bias=False)
        self.value = nn.Linear(joints, joints, bias=False)
        nn.init.zeros_(self.value.weight)

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        B, V, J, height, width = heatmaps.shape
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        pixels = torch.stack([x, y], -1).reshape(-1, 2).to(F)  # (N, 2)
        lines = epipolar_lines(F[:, *pairs(V)].flatten(0, 1).mT, pixels).to(heatmaps)  # (B · P, N, 3) in the source
        grid = _along(lines, (height, width), self.samples)  # (B · P, N, K, 2)
        sources, references = (heatmaps[:, index].flatten(0, 1) for index in pairs(V))
        v = nn.functional.grid_sample(sources, grid, align_corners=True)  # (B · P, J, N, K)
        u = self.query(references.flatten(-2).mT) @ self.key.weight  # (B · P, N, J), Kᵀ Q u: no key for each sample
        score = torch.einsum("pnj,pjnk->pnk", u, v) / math.sqrt(self.query.out_features)
        seen = (grid.abs() <= 1).all(-1).any(-1, keepdim=True)  # a line may miss the source map
        mixed = torch.einsum("pnk,pjnk->pnj", torch.softmax(score, -1) * seen, v)
        ridges = self.value(mixed).mT.reshape(B, -1, J, height, width)
        return heatmaps + sum_at_references(ridges)


class _Dense(_Alone):
    """As Cross-View Fusion (Qiu et al., ICCV 2019): a learned matrix from all source to all reference pixels.

    fused = reference + Σ_s W_sr source, one W of (H · W)² for each ordered pair of cameras, beginning at zero.  It knows
    its cameras by heart and nothing of F.  12 · 4096² = 201 million parameters for four views.
    """

    def __init__(self, shape: tuple[int, int] = (64, 64), views: int = 4):
        super().__init__()
        pixels = shape[0] * shape[1]
        self.matrices = nn.Parameter(torch.zeros(views * (views - 1), pixels, pixels))

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        sources = heatmaps[:, pairs(heatmaps.shape[1])[0]].flatten(-2)  # (B, P, J, N)
        ridges = torch.einsum("bpjn,pnm->bpjm", sources, self.matrices)
        return heatmaps + sum_at_references(ridges.unflatten(-1, heatmaps.shape[-2:]))


def _along(lines: Tensor, shape: tuple[int, int], samples: int) -> Tensor:
    """Points evenly spread on the part of each line that crosses a map, for `grid_sample`: (..., 3) → (..., K, 2) in ±1.

    A line that misses the map gives points outside of it.
    """
    half = lines.new_tensor([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    a, b = lines[..., 0] * half[0], lines[..., 1] * half[1]  # in coordinates that run from −1 to 1
    c = lines[..., 2] + lines[..., :2] @ half
    norm = (a * a + b * b).clamp_min(1e-12)
    foot = torch.stack([-a * c / norm, -b * c / norm], -1)  # (..., 2), the point nearest to the centre
    direction = torch.stack([-b, a], -1) / norm.sqrt()[..., None]
    reach = (1 - foot * direction.sign()) / direction.abs().clamp_min(1e-9)  # to the side ahead, by axis
    back = (1 + foot * direction.sign()) / direction.abs().clamp_min(1e-9)
    far, near = reach.amin(-1), -back.amin(-1)
    s = torch.linspace(0, 1, samples, dtype=lines.dtype, device=lines.device)
    at = near[..., None] + (far - near)[..., None] * s
    points = foot[..., None, :] + at[..., None] * direction[..., None, :]
    return points.masked_fill((far < near)[..., None, None], 2.0)


RIVALS = {  # by their names among the methods of `studies.runs`
    "alone": _Alone,
    "line_sum": partial(_Line, "sum"),
    "line_mean": partial(_Line, "mean"),
    "line_max": partial(_Line, "max"),
    "weighted_max": _WeightedMax,
    "attention": _Attention,
    "dense": _Dense,
}
