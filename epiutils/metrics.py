"""How good poses are, and how sure that is: joints found by HRNet's rule, and paired bootstrap over scenes."""

from __future__ import annotations

import numpy as np

from epiutils.heatmaps import hrnet_distances


def found(output, target) -> np.ndarray:
    """Which joints HRNet's accuracy counts as right: (B, J) of 1 and 0, nan where it leaves a joint out.

    output, target: (B, J, H, W), tensors or arrays.  `joint_mean` of it is `heatmaps.accuracy` (but nan, not 0, where
    nothing counts), and the plain mean of what is counted is `heatmaps.pck`.
    """
    distances = hrnet_distances(output, target)
    return np.where(np.isnan(distances), np.nan, distances < 0.5)


def joint_mean(values: np.ndarray) -> float:
    """The mean over samples for each joint, then over the joints that have one: HRNet's order.

    values: (..., J); nan is left out.  Returns nan where nothing is left.
    """
    return float(_over_joints(*_joint_sums(values[None]))[0])


def bootstrap(
    values: np.ndarray, against: np.ndarray | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of `joint_mean` over scenes drawn with replacement (Efron & Tibshirani 1993, 13.3).

    values: (N, ..., J), scenes lead: what belongs to a scene is drawn together.  against: another method's on the same
    scenes; the interval is then of the difference, values less against, each draw scoring both on the same scenes
    (paired).  A draw in which nothing is counted is left out.
    Returns (low, high), nan where there is no other draw.  Raises ValueError without scenes, or where they differ.
    """
    methods = [v for v in (values, against) if v is not None]
    scenes = [len(v) for v in methods]
    if min(scenes) != max(scenes) or not scenes[0]:
        raise ValueError(f"each method needs values of the same scenes, at least one, got {scenes}")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), draws).astype(float)  # (D, N)
    scores = [_over_joints(*(weights @ sums for sums in _joint_sums(v))) for v in methods]  # of (D,)
    score = scores[0] if against is None else scores[0] - scores[1]
    score = score[~np.isnan(score)]
    if not len(score):
        return float("nan"), float("nan")
    low, high = np.quantile(score, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _joint_sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each scene and joint, the sum of the values and how many are counted: (N, J) each."""
    values = values.reshape(len(values), -1, values.shape[-1])
    return np.nansum(values, axis=1), (~np.isnan(values)).sum(1).astype(float)


def _over_joints(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Each joint's mean, then the mean over the joints with a count: (..., J) each → (...), nan where there is none."""
    means = sums / np.maximum(counts, 1)  # 0 where the count is
    joints = (counts > 0).sum(-1)
    return np.where(joints > 0, means.sum(-1) / np.maximum(joints, 1), np.nan)
