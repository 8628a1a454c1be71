"""How good poses are, in the picture and in space, and how sure that is: paired bootstrap over scenes.

Each measure gives a value for every joint, (..., J), and nan where there is none: `joint_mean` and `bootstrap` leave
those out.  A joint that was not found has no distance, and `mpjpe` is the mean of fewer joints: report it
beside what is `heatmaps.found`.
"""

from __future__ import annotations

import numpy as np


def mpjpe(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distance of each joint from the true one, in their unit: MPJPE is its mean (Ionescu et al., TPAMI 2014).

    Nothing is moved to a root: the distances include where the person is.
    predicted, true: (..., J, 3).  Returns (..., J), nan where either is nan.
    """
    return np.linalg.norm(np.asarray(predicted, dtype=float) - np.asarray(true, dtype=float), axis=-1)


def joint_mean(values: np.ndarray) -> float:
    """The mean over samples for each joint, then over the joints that have one: HRNet's order.

    Of `heatmaps.found` it is `heatmaps.accuracy`, but nan, not 0, where nothing counts.
    values: (..., J); nan is left out.  Returns nan where nothing is left.
    """
    return float(_over_joints(*_joint_sums(values[None]))[0])


def bootstrap(values, against=None, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of `joint_mean` over scenes drawn with replacement (Efron & Tibshirani 1993, 13.3).

    values: (N, ..., J), scenes lead: what belongs to a scene is drawn together.  against: another method's on the same
    scenes; the interval is then of the difference, values less against, each draw scoring both on the same scenes
    (paired).  Either may be a list of S arrays, one a training seed: the score is their mean, and each draw draws seeds
    with replacement too, the same ones for two lists of equal length.  A draw in which nothing is counted is left out.
    Returns (low, high), nan where there is no other draw.  Raises ValueError without scenes, or where they differ.
    """
    methods = [v if isinstance(v, list) else [v] for v in (values, against) if v is not None]
    scenes = [len(v) for seeds in methods for v in seeds]
    if not scenes or min(scenes) != max(scenes) or not scenes[0]:
        raise ValueError(f"each method needs values of the same scenes, at least one, got {scenes}")
    rng = np.random.default_rng(seed)
    drawn = lambda count: rng.multinomial(count, np.full(count, 1 / count), draws).astype(float)  # (D, count)
    weights = drawn(scenes[0])
    of_seeds = {count: drawn(count) / count if count > 1 else 1.0 for count in {len(seeds): None for seeds in methods}}
    each = lambda v: _over_joints(*(weights @ sums for sums in _joint_sums(v)))  # (D,)
    scores = [(of_seeds[len(seeds)] * np.stack([each(v) for v in seeds], -1)).sum(-1) for seeds in methods]
    score = scores[0] if against is None else scores[0] - scores[1]
    score = score[~np.isnan(score)]
    if not len(score):
        return float("nan"), float("nan")
    return tuple(np.quantile(score, ((1 - level) / 2, (1 + level) / 2)).tolist())


def _joint_sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each scene and joint, the sum of the values and how many are counted: (N, J) each."""
    values = values.reshape(len(values), -1, values.shape[-1])
    return np.nansum(values, axis=1), (~np.isnan(values)).sum(1).astype(float)


def _over_joints(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Each joint's mean, then the mean over the joints with a count: (..., J) each → (...), nan where there is none."""
    means = sums / np.maximum(counts, 1)  # 0 where the count is
    joints = (counts > 0).sum(-1)
    return np.where(joints > 0, means.sum(-1) / np.maximum(joints, 1), np.nan)
