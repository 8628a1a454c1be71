"""Heatmaps: render, decode and score them as HRNet does.

This is the one place that knows how pixels of a heatmap and of the network's input correspond:
heatmap pixel i lies at input pixel 4 i (`HEATMAP_FROM_INPUT`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

STRIDE = 4
HEATMAP_FROM_INPUT = np.diag([1 / STRIDE, 1 / STRIDE, 1.0])  # (3, 3) affine for Camera.crop and epipolar.transfer
HEATMAP_FROM_INPUT.flags.writeable = False


def render(points: Tensor, shape: tuple[int, int], sigma: float = 2.0, peak: Tensor | float = 1.0) -> Tensor:
    """Gaussians of the given height: H[y, x] = peak · exp(−((x − px)² + (y − py)²) / 2σ²).

    points: (..., 2) heatmap px (x, y), anywhere.  shape: (H, W).  sigma: px.  peak: scalar or (...).
    Returns (..., H, W); a point that is nan gives a map of zeros.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    points = torch.as_tensor(points)
    points = points if points.is_floating_point() else points.double()
    height, width = shape
    x = torch.arange(width, dtype=points.dtype, device=points.device)
    y = torch.arange(height, dtype=points.dtype, device=points.device)
    gx = torch.exp(-((x - points[..., 0, None]) ** 2) / (2 * sigma**2))  # (..., W)
    gy = torch.exp(-((y - points[..., 1, None]) ** 2) / (2 * sigma**2))  # (..., H)
    peak = torch.as_tensor(peak, dtype=points.dtype, device=points.device)
    maps = peak[..., None, None] * gy[..., :, None] * gx[..., None, :]
    return torch.nan_to_num(maps, nan=0.0)


def hrnet_targets(joints: Tensor, shape: tuple[int, int], sigma: float = 2.0) -> tuple[Tensor, Tensor]:
    """HRNet's training targets: a Gaussian cut to 13×13 px around the rounded joint, its peak 1 (σ = 2).

    The centre is μ = int(x / 4 + 0.5) (truncated towards zero, as there); the window reaches 3 σ each way.  The
    weight is 0 and the map empty where the joint is nan or its window lies wholly outside the map (HRNet's test
    lets one pixel more pass on the left and the top: an empty map with weight 1).

    joints: (..., J, 2) px of the network's input.  shape: (H, W) of the map.
    Returns float32 targets (..., J, H, W) and weights (..., J).
    """
    height, width = shape
    known = torch.isfinite(joints).all(-1)
    mu = torch.trunc(torch.nan_to_num(joints) / STRIDE + 0.5)  # (..., J, 2)
    reach = 3 * sigma
    size = torch.tensor([width, height], dtype=mu.dtype, device=mu.device)
    weight = known & ((mu + reach + 1 >= 0) & (mu - reach < size)).all(-1)
    gauss = []
    for axis, count in ((0, width), (1, height)):
        d = torch.arange(count, dtype=mu.dtype, device=mu.device) - mu[..., axis, None]
        gauss.append(torch.where(d.abs() <= reach, torch.exp(-(d**2) / (2 * sigma**2)), 0.0).float())
    target = (gauss[1] * weight[..., None])[..., :, None] * gauss[0][..., None, :]  # (..., J, H, W)
    return target, weight.float()


def decode(heatmaps: Tensor, method: str = "quarter") -> tuple[Tensor, Tensor]:
    """The joint of each heatmap: its highest pixel, refined.

    method: "argmax", the pixel itself; "quarter", HRNet's: a quarter pixel towards the larger
    neighbour; "dark", the maximum of a Taylor expansion of the log-heatmap (Zhang et al., CVPR 2020),
    exact for a Gaussian.  Pixels within a border too thin to look around are not refined.

    heatmaps: (..., H, W).  Returns points (..., 2), heatmap px (x, y), and their heights (...).
    """
    if method not in ("argmax", "quarter", "dark"):
        raise ValueError(f'method must be "argmax", "quarter" or "dark", got {method!r}')
    height, width = heatmaps.shape[-2:]
    peak, index = heatmaps.flatten(-2).max(-1)
    x, y = index % width, index // width
    points = torch.stack([x, y], -1).to(heatmaps.dtype)
    if method == "argmax":
        return points, peak

    def at(dx: int, dy: int) -> Tensor:
        """The map around the peak, read at an offset (clamped at the border, where it is not used)."""
        i = (y + dy).clamp(0, height - 1) * width + (x + dx).clamp(0, width - 1)
        return heatmaps.flatten(-2).gather(-1, i[..., None])[..., 0]

    if method == "quarter":
        inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
        shift = 0.25 * torch.stack([torch.sign(at(1, 0) - at(-1, 0)), torch.sign(at(0, 1) - at(0, -1))], -1)
        return points + torch.where(inside[..., None], shift, torch.zeros_like(shift)), peak

    def log_at(dx: int, dy: int) -> Tensor:
        return at(dx, dy).clamp_min(1e-10).log()

    dx = 0.5 * (log_at(1, 0) - log_at(-1, 0))
    dy = 0.5 * (log_at(0, 1) - log_at(0, -1))
    dxx = 0.25 * (log_at(2, 0) - 2 * log_at(0, 0) + log_at(-2, 0))
    dyy = 0.25 * (log_at(0, 2) - 2 * log_at(0, 0) + log_at(0, -2))
    dxy = 0.25 * (log_at(1, 1) - log_at(-1, 1) - log_at(1, -1) + log_at(-1, -1))
    det = dxx * dyy - dxy * dxy
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2) & (peak > 0)
    peaked = inside & (dxx < 0) & (det > 0)  # a maximum, not a saddle or a plateau
    safe = torch.where(peaked, det, torch.ones_like(det))
    shift = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1) / safe[..., None]
    return points + torch.where(peaked[..., None], shift, torch.zeros_like(shift)), peak


def probabilities(logits: Tensor, sharpness: float | Tensor = 1.0) -> Tensor:
    """softmax(β logits) over the pixels of each map, β the sharpness: (..., H, W) → (..., H, W), each of sum 1."""
    return torch.softmax(sharpness * logits.flatten(-2), -1).view_as(logits)  # over (..., H·W)


def joints_mse(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """HRNet's JointsMSELoss: the mean over joints of ½ · MSE(w · output, w · target).

    output, target: (..., J, H, W).  weight: (..., J).  Returns a scalar.
    """
    w = weight[..., None, None]
    return 0.5 * nn.functional.mse_loss(output * w, target * w)


def hit_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """−log of the probability that the joint is where HRNet's accuracy counts it as right.

    −log Σ p[x] over the pixels x less than half of a tenth of the map from the target's highest pixel, with
    p = softmax(logits); averaged over the joints with weight > 0.  It asks for the right place, not for a shape.

    logits, target: (..., J, H, W).  weight: (..., J).  Returns a scalar.
    """
    height, width = target.shape[-2:]
    index = target.flatten(-2).argmax(-1)  # (..., J)
    x, y = (torch.arange(n, device=target.device) for n in (width, height))
    dx = (x - index[..., None] % width) / (height / 10)  # HRNet's own order of the units: see `found`
    dy = (y - index[..., None] // width) / (width / 10)
    near = (dy**2)[..., :, None] + (dx**2)[..., None, :] < 0.25  # (..., J, H, W)
    log_p = nn.functional.log_softmax(logits.float().flatten(-2), -1)
    hit = log_p.masked_fill(~near.flatten(-2), -math.inf).logsumexp(-1)  # (..., J)
    return -(hit * weight).sum() / weight.sum().clamp_min(1)


def _hrnet_points(heatmaps: np.ndarray) -> np.ndarray:
    """HRNet's get_max_preds: arg-max pixels (B, J, 2) in float32; (0, 0) where the maximum is not above 0."""
    B, J, _, width = heatmaps.shape
    flat = heatmaps.reshape(B, J, -1)
    index = flat.argmax(2).astype(np.float32)
    points = np.stack([index % width, np.floor(index / width)], -1)
    return points * (flat.max(2) > 0)[..., None].astype(np.float32)


def found(output, target) -> np.ndarray:
    """Which joints HRNet's accuracy counts as right: (B, J) of 1 and 0, nan where it leaves a joint out.

    A joint is right when the arg-max pixels of output and target are less than half of a tenth of the map apart:
    under 3.2 px for 64×64; a tenth of its height for x and of its width for y, HRNet's own order.  It is left out
    where the target peak has x ≤ 1 or y ≤ 1 (so is an all-zero target).  The mean of all that are counted, each joint
    of each sample once, is the pooled PCK; `accuracy` takes the mean of each joint first.

    output, target: (B, J, H, W), tensors or arrays.  Raises ValueError for other shapes.
    """
    output, target = (np.asarray(a.detach().cpu() if isinstance(a, Tensor) else a) for a in (output, target))
    if output.shape != target.shape or output.ndim != 4 or 0 in output.shape:
        raise ValueError(f"output and target must both be (B, J, H, W), got {output.shape} and {target.shape}")
    predicted, true = _hrnet_points(output), _hrnet_points(target)
    unit = np.array(output.shape[2:]) / 10  # (H, W) / 10
    distances = np.linalg.norm(predicted / unit - true / unit, axis=-1)
    counted = (true[..., 0] > 1) & (true[..., 1] > 1)
    return np.where(counted, distances < 0.5, np.nan)


def accuracy(output, target) -> float:
    """HRNet's accuracy (lib/core/evaluate.py), to the last digit: the mean of what is `found`.

    The mean is first over samples for each joint, then over the joints that have a sample; so it depends on what is
    in the batch.

    output, target: (B, J, H, W), tensors or arrays.  Returns a number in [0, 1]; 0 where nothing counts.
    """
    total, joints = 0.0, 0
    for column in found(output, target).T:  # summed in HRNet's order: the last digit depends on it
        column = column[~np.isnan(column)]
        if len(column):
            total += column.sum() / len(column)
            joints += 1
    return float(total / joints) if joints else 0.0
