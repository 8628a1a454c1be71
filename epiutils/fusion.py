"""Fusion modules: another view's heatmaps, sent along epipolar lines, repair the reference view's.

fused = reference + redirect(pad(source) * w, F, threshold)          w: 3×3, nine parameters
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from epiutils.redirect import Pencil, redirect


class OriginalFusion(nn.Module):
    """The original module, step by step as it was: pad to 66×66, weigh each 3×3 window, redirect, add.

    For every source coordinate (y, x) of the list, Σ_uv w[u, v] · padded[y + u, x + v] is one value; it goes
    to every reference pixel within `threshold` px of that coordinate's epipolar line, and the reference
    heatmap is added.  One weight for all joints: exactly nine parameters.

    threshold: px of the reference heatmap (1 or 3 in the original).  sigmoid: squash the result, as the
    original did at first.  method: of `redirect`; "loop" is the original's own.  initial: the weights to
    begin with, by default uniform in ±1/3 as PyTorch initialises a 3×3 convolution.
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
        """Fuse heatmaps of two views: source (B, J, H, W), reference (B, J, H', W') → (B, J, H', W').

        F: (3, 3) or (B, 3, 3) from source to reference heatmap pixels, or the `Pencil` made of it, whose own
        threshold then counts.
        """
        return _add_ridge(self.convolve(source), reference, F, self.threshold, self.method, self.sigmoid)


class SimpleFusion(nn.Module):
    """The second attempt, "make another epipolar heatmap": the same redirection after a plain `nn.Conv2d`.

    A Conv2d from one channel to one, 3×3, padding 1, no bias, applied to each joint: the same function of
    the same nine weights as `OriginalFusion`.  Arguments and `forward` are those of `OriginalFusion`.
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
        return self.conv(source.reshape(-1, 1, *source.shape[-2:])).reshape(source.shape)

    def forward(self, source: Tensor, reference: Tensor, F: Tensor | Pencil) -> Tensor:
        return _add_ridge(self.convolve(source), reference, F, self.threshold, self.method, self.sigmoid)


def _add_ridge(
    weighed: Tensor, reference: Tensor, F: Tensor | Pencil, threshold: float, method: str, sigmoid: bool
) -> Tensor:
    """reference + the ridge that the weighed source throws across it, squashed if asked."""
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
