"""Fusion modules: another view's heatmaps, sent along epipolar lines, repair the reference view's.

the original     fused = reference + redirect(pad(source) * w, F, threshold)                   w: 3×3, nine parameters
the repaired     fused = reference * w + (gain / β) Σ log(1 + odds · redirect(softmax(β source * w), F, threshold))
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from epiutils.heatmaps import probabilities
from epiutils.redirect import Pencil, redirect


class OriginalFusion(nn.Module):
    """The original module, step by step as it was: pad to 66×66, weigh each 3×3 window, redirect, add.

    fused = reference + redirect(pad(source) * w, F, threshold)

    For every source coordinate (y, x) of the list, Σ_uv w[u, v] · padded[y + u, x + v] is one value; it goes to every
    reference pixel within `threshold` px of that coordinate's epipolar line.  The nine weights w are those of all
    joints, and the only parameters.

    threshold: px of the reference heatmap (1 or 3 in the original).  sigmoid: squash the result, as the
    original did at first.  shape: (H, W) of the source heatmaps.  method: of `redirect`; "loop" is the original's
    own.  initial: (3, 3) weights to begin with, by default uniform in ±1/3 as PyTorch initialises a 3×3 convolution.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        sigmoid: bool = False,
        shape: tuple[int, int] = (64, 64),
        method: str = "pencil",
        initial: Tensor | None = None,
    ):
        super().__init__()
        self.threshold, self.sigmoid, self.shape, self.method = threshold, sigmoid, tuple(shape), method
        height, width = self.shape
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        self.register_buffer("coordinates", torch.stack([rows, columns], -1).reshape(-1, 2), persistent=False)
        self.weight = nn.Parameter(torch.empty(3, 3).uniform_(-1 / 3, 1 / 3) if initial is None else _nine(initial))

    def convolve(self, source: Tensor) -> Tensor:
        """Σ_uv w[u, v] · padded[y + u, x + v] for every coordinate: (..., H, W) → (..., H, W)."""
        if tuple(source.shape[-2:]) != self.shape:
            raise ValueError(
                f"source heatmaps must be (..., {self.shape[0]}, {self.shape[1]}), got {tuple(source.shape)}"
            )
        width = self.shape[1] + 2
        padded = nn.functional.pad(source, (1, 1, 1, 1)).flatten(-2)  # (..., (H + 2) · (W + 2))
        rows, columns = self.coordinates.unbind(-1)
        at = rows * width + columns  # of the window's top-left corner
        window = [padded.index_select(-1, at + u * width + v) for u in range(3) for v in range(3)]  # nine of (..., H·W)
        return sum(w * x for w, x in zip(self.weight.flatten(), window, strict=True)).unflatten(-1, self.shape)

    def forward(self, source: Tensor, reference: Tensor, F: Tensor | Pencil) -> Tensor:
        """Fuse heatmaps of two views.

        source: (B, J, H, W).  reference: (B, J, H', W').  F: (3, 3) or (B, 3, 3) from source to reference heatmap
        pixels, or the `Pencil` made of it, whose own threshold then counts.  Returns (B, J, H', W').
        Raises ValueError where the shapes do not fit each other.
        """
        return _add_ridge(self.convolve(source), reference, F, self.threshold, self.method, self.sigmoid)


class SimpleFusion(nn.Module):
    """The second attempt, "make another epipolar heatmap": the same redirection after a plain `nn.Conv2d`.

    fused = reference + redirect(conv(source), F, threshold)

    The Conv2d is from one channel to one, 3×3, padding 1, no bias, and applied to each joint: the same function of
    the same nine weights as `OriginalFusion`, whose arguments and `forward` it shares.
    """

    def __init__(
        self, threshold: float = 1.0, sigmoid: bool = False, method: str = "pencil", initial: Tensor | None = None
    ):
        super().__init__()
        self.threshold, self.sigmoid, self.method = threshold, sigmoid, method
        self.conv = nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=False)
        if initial is not None:
            self.conv.weight = nn.Parameter(_nine(initial)[None, None])

    def convolve(self, source: Tensor) -> Tensor:
        """The Conv2d of each map by itself: (..., H, W) → (..., H, W)."""
        return self.conv(source.reshape(-1, 1, *source.shape[-2:])).reshape(source.shape)  # (B · J, 1, H, W) and back

    def forward(self, source: Tensor, reference: Tensor, F: Tensor | Pencil) -> Tensor:
        return _add_ridge(self.convolve(source), reference, F, self.threshold, self.method, self.sigmoid)


class RepairedFusion(nn.Module):
    """The module that works: reference + ridge as in the original, but a ridge of evidence, weighed by confidence.

    fused = reference * w + (gain / β) Σ_s log(1 + odds_s · redirect(p_s, F_s, threshold))
    p_s = softmax(β source_s * w)

    p_s is a probability for each pixel, so its sum over a band is the probability that the source's joint lies there;
    odds_s = exp(slope · max(source_s * w) + offset) says how far to trust it, by the height of its peak.  Logarithms
    add as probabilities multiply, and a source that is not trusted adds nothing and contradicts nobody.
    softmax(β fused) is the probability of the joint's pixel.

    Thirteen parameters for all joints and views: the nine weights w, β, slope, offset and gain; none belongs to a
    camera.  At first w is the identity and the gain 0, so that fused = reference.

    threshold: px of the reference heatmap.  collect: over each pixel's band "sum", or "max", the likeliest place in it,
    which leaves a ridge as narrow as the peak and takes several times as long.  For ablation, normalise=False sends
    source * w as it is, multiply=False adds the redirected values without a logarithm, confidence=False trusts each
    source alike.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        normalise: bool = True,
        multiply: bool = True,
        confidence: bool = True,
        collect: str = "sum",
    ):
        super().__init__()
        if collect not in ("sum", "max"):
            raise ValueError(f'collect must be "sum" or "max", got {collect!r}')
        self.threshold, self.normalise, self.multiply, self.collect = threshold, normalise, multiply, collect
        self.weight = nn.Parameter(torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(10)))
        self.slope = nn.Parameter(torch.tensor(8.0 if confidence else 0.0), requires_grad=confidence)
        self.offset = nn.Parameter(torch.tensor(1.0))
        self.gain = nn.Parameter(torch.tensor(0.0))

    @property
    def sharpness(self) -> Tensor:
        """β > 0, the inverse temperature at which heatmaps become probabilities."""
        return self.log_sharpness.exp()

    def forward(self, sources: Tensor, reference: Tensor, F: Tensor | Pencil, present: Tensor | None = None) -> Tensor:
        """Fuse one reference view with S sources, whose order does not matter.

        sources: (B, S, J, H, W), or (B, J, H, W) for one.  reference: (B, J, H', W').  F: (B, S, 3, 3), or (B, 3, 3)
        or (3, 3) for one source, from its to the reference's heatmap pixels; or the `Pencil` of those B · S, whose own
        threshold then counts.  present: (B, S) bool, false where a view is missing; its maps may hold anything.
        Returns (B, J, H', W').  Raises ValueError where the shapes do not fit each other.
        """
        sources = sources if sources.ndim == 5 else sources[:, None]
        batch, shape = sources.shape[:2], tuple(reference.shape[-2:])
        if not isinstance(F, Pencil):
            if F.ndim < 4 and batch[1] != 1:
                raise ValueError(f"F {tuple(F.shape)} is of one source, but there are {batch[1]}: give (B, S, 3, 3)")
            F = F.expand(*batch, 3, 3) if F.ndim != 3 else F[:, None].expand(*batch, 3, 3)
        if present is not None:
            sources = sources.masked_fill(~present[:, :, None, None, None], 0.0)
        evidence = self._evidence(self.weigh(sources), present).flatten(0, 1)  # (B · S, J, H, W)
        ridges = self._ridges(evidence, F, shape).unflatten(0, batch)  # (B, S, J, H', W')
        return self.weigh(reference) + self.gain / self.sharpness * ridges.sum(1)

    def all_views(self, heatmaps: Tensor, F: Tensor | Pencil, present: Tensor | None = None) -> Tensor:
        """Fuse each of V views with all others, as `forward` does for each in turn, but weigh each view once.

        heatmaps: (B, V, J, H, W).  F: (B, V, V, 3, 3), F[:, s, r] from view s to view r (its diagonal is not read), or
        the `Pencil` of its `pairs`.  present: (B, V) bool; a view that is missing gives nothing, and receives
        what the others send.  Returns (B, V, J, H, W).
        """
        if present is not None:
            heatmaps = heatmaps.masked_fill(~present[:, :, None, None, None], 0.0)
        weighed, (source, reference) = self.weigh(heatmaps), pairs(heatmaps.shape[1])
        evidence = self._evidence(weighed, present)[:, source].flatten(0, 1)  # (B · V (V − 1), J, H, W)
        F = F if isinstance(F, Pencil) else F[:, source, reference].flatten(0, 1)
        if not len(evidence):  # one view, and no other to fuse it with
            return weighed
        ridges = self._ridges(evidence, F, tuple(heatmaps.shape[-2:])).unflatten(0, (len(heatmaps), -1))
        return weighed + self.gain / self.sharpness * sum_at_references(ridges)

    def weigh(self, heatmaps: Tensor) -> Tensor:
        """Σ_uv w[u, v] · padded[y + u, x + v], (..., H, W) → (..., H, W): the original's padding and convolution."""
        maps = heatmaps.reshape(1, -1, *heatmaps.shape[-2:])  # a channel each: 25 times faster on a CPU than a batch
        weight = self.weight.expand(maps.shape[1], 1, 3, 3)
        return nn.functional.conv2d(maps, weight, padding=1, groups=maps.shape[1]).view_as(heatmaps)

    def _evidence(self, weighed: Tensor, present: Tensor | None) -> Tensor:
        """odds · p of each source, 0 where it is missing: (B, S, J, H, W) → (B, S, J, H, W)."""
        trust = self.slope * weighed.flatten(-2).amax(-1)[..., None, None] + self.offset
        odds = trust.clamp_max(80).exp()  # single precision ends at exp(88)
        evidence = odds * (probabilities(weighed, self.sharpness) if self.normalise else weighed)
        return evidence if present is None else evidence.masked_fill(~present[:, :, None, None, None], 0.0)

    def _ridges(self, evidence: Tensor, F: Tensor | Pencil, shape: tuple[int, int]) -> Tensor:
        """log(1 + redirect(evidence)) of each pair of views: (P, J, H, W) → (P, J, H', W')."""
        if not isinstance(F, Pencil):
            F = Pencil.from_fundamental(F.reshape(-1, 3, 3), tuple(evidence.shape[-2:]), self.threshold, shape)
        elif F.out_shape != shape:
            raise ValueError(f"the Pencil is for a reference of {F.out_shape}, got {shape}")
        ridges = F.sum(evidence) if self.collect == "sum" else F.max(evidence)  # −inf where no source pixel is near
        return ridges.clamp_min(0).log1p() if self.multiply else ridges  # differences of running sums may be −1e-7


def pairs(views: int) -> tuple[list[int], list[int]]:
    """Source and reference of each ordered pair of views: [0, 0, 0, 1, …] and [1, 2, 3, 0, …] for four."""
    both = list(itertools.permutations(range(views), 2))
    return [source for source, _ in both], [reference for _, reference in both]


def sum_at_references(values: Tensor) -> Tensor:
    """Sum, for each view, over the `pairs` that have it as reference: (B, V (V − 1), …) → (B, V, …)."""
    views = (1 + math.isqrt(1 + 4 * values.shape[1])) // 2
    index = torch.tensor(pairs(views)[1], device=values.device)
    return values.new_zeros(len(values), views, *values.shape[2:]).index_add(1, index, values)


def _add_ridge(
    weighed: Tensor, reference: Tensor, F: Tensor | Pencil, threshold: float, method: str, sigmoid: bool
) -> Tensor:
    """reference + redirect(weighed, F, threshold), squashed if asked."""
    if weighed.shape[:-2] != reference.shape[:-2]:
        raise ValueError(
            f"source {tuple(weighed.shape)} and reference {tuple(reference.shape)} must agree but for H, W"
        )
    if isinstance(F, Pencil):
        if F.out_shape != tuple(reference.shape[-2:]):
            raise ValueError(f"the Pencil is for a reference of {F.out_shape}, got {tuple(reference.shape)}")
        ridge = F.sum(weighed)
    else:
        ridge = redirect(weighed, F, threshold, method, out_shape=tuple(reference.shape[-2:]))
    fused = reference + ridge
    return torch.sigmoid(fused) if sigmoid else fused


def _nine(initial: Tensor) -> Tensor:
    initial = torch.as_tensor(initial, dtype=torch.get_default_dtype())
    if initial.shape != (3, 3):
        raise ValueError(f"the initial weights must be (3, 3), got {tuple(initial.shape)}")
    return initial.clone()
