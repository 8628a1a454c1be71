"""Who is who among several people: matched between views by the distances of whole skeletons, then followed in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from epiutils.cameras import Camera
from epiutils.epipolar import fundamental_from_cameras

MOST = 50  # people of a view, so that an instant stays small
_COMBINATIONS = 1024  # of an instant
_NEAR = 0.05  # of a person's extent, from the epipolar lines, at which two skeletons speak neither for nor against one


def associate(cameras: Sequence[Camera], people: Sequence[Sequence[Sequence[np.ndarray]]]) -> np.ndarray:
    """The place of each person in each camera's list at each instant: (people, V, T), −1 where a person is not in it.

    Each instant is matched for itself: of all combinations of at most one skeleton a view, the one is taken whose pairs
    of views have the largest Σ w (1 − d / near), then the best of what is left, and so on.  d is the mean distance of
    the joints of two skeletons from each other's epipolar lines, over the extent of the person, and w how many joints,
    by confidence, both have.  The combinations are then followed over time by what is nearest in the same views.
    near: 0.05, or three times the median of d where each of two views has one person, if that is more.

    people: for each view and instant a list of (J, 3), nan where undetected; without joints where nobody is.
    Who is seen most comes first.
    """
    if not any(len(one) for view in people for at in view for one in at):
        return np.empty((0, len(people), len(people[0])), int)
    views, found = len(cameras), _skeletons(cameras, people)
    F = np.zeros((views, views, 3, 3))
    for s, r in np.ndindex(F.shape[:2]):
        if s != r:
            F[s, r] = fundamental_from_cameras(cameras[s], cameras[r])
    starts = np.flatnonzero(np.diff(found.t, prepend=-1))
    alone = []  # d of pairs of views with one person each
    for index in _alike(found, starts[:: max(1, len(starts) // 100)], views):
        single = np.bincount(found.view[index[0]], minlength=views)[found.view[index[0]]] == 1
        alone += _distances(found, index, F)[0][:, np.triu(single[:, None] & single, 1)].ravel().tolist()
    near = max(_NEAR, 3 * float(np.nanmedian(alone)) if np.isfinite(alone).any() else 0)
    groups = {}  # by the instant's first skeleton
    for index in _alike(found, starts, views):
        d, w = _distances(found, index, F)
        matched = _groups(np.where(w > 0, w * (1 - d / near), 0), found.view[index[0]], views)
        groups |= zip(index[:, 0].tolist(), matched, strict=True)
    tracks = _Tracks(found, views, len(people[0]))
    for start in starts.tolist():
        tracks.add(start, groups.pop(start))
    return tracks.places()


@dataclass
class _Skeletons:
    """All N skeletons by instant, view and place (N,): xy (N, J, 2) and extent (N,) px, confidence (N, J), 0 unseen."""

    t: np.ndarray
    view: np.ndarray
    place: np.ndarray
    xy: np.ndarray
    confidence: np.ndarray
    extent: np.ndarray


def _skeletons(cameras: Sequence[Camera], people: Sequence[Sequence[Sequence[np.ndarray]]]) -> _Skeletons:
    """Everybody, without lens distortion."""
    by_view = [[(t, i, one) for t, at in enumerate(view) for i, one in enumerate(at) if len(one)] for view in people]
    t, view, place = np.array([(t, v, i) for v, found in enumerate(by_view) for t, i, _ in found]).T
    order = np.lexsort((place, view, t))
    rows = np.split(order.argsort(), np.cumsum([len(found) for found in by_view])[:-1])
    joints = next(one for found in by_view for *_, one in found).shape[0]
    all_of = _Skeletons(
        t[order], view[order], place[order],
        np.empty((len(t), joints, 2)), np.empty((len(t), joints)), np.empty(len(t)),
    )  # fmt: skip
    for camera, found, row in zip(cameras, by_view, rows, strict=True):
        for part in range(0, len(row), 1 << 13):
            at, some = row[part : part + (1 << 13)], np.stack([one for *_, one in found[part : part + (1 << 13)]])
            xy = camera.undistort(some[..., :2]) if camera.bends else some[..., :2]
            known = np.isfinite(xy)
            size = np.where(known, xy, -np.inf).max(1) - np.where(known, xy, np.inf).min(1)  # −inf: nothing seen
            all_of.xy[at], all_of.extent[at] = xy, np.maximum(size.max(1), 1.0)
            all_of.confidence[at] = np.where(known[..., 0], some[..., 2], 0)
    return all_of


def _alike(found: _Skeletons, starts: np.ndarray, views: int) -> Iterator[np.ndarray]:
    """Numbers (B, n) of the skeletons of instants that have as many people in each view, given those instants' first."""
    ends = np.searchsorted(found.t, found.t[starts], side="right")
    counts = np.zeros((len(starts), views), int)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        counts[b] = np.bincount(found.view[start:end], minlength=views)
    kinds, which = np.unique(counts, axis=0, return_inverse=True)
    for k, n in enumerate(kinds.sum(1)):
        of_kind = starts[which.ravel() == k]
        few = max(1, (1 << 20) // (n * n * found.xy.shape[1]))
        for part in range(0, len(of_kind), few):
            yield of_kind[part : part + few, None] + np.arange(n)


def _distances(found: _Skeletons, index: np.ndarray, F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d (B, n, n), nan where no joint is in both, and w (B, n, n), of instants whose skeletons are index (B, n)."""
    xy, confidence, extent, view = found.xy[index], found.confidence[index], found.extent[index], found.view[index[0]]
    x = np.concatenate([xy, np.ones_like(xy[..., :1])], -1)
    d, total = np.empty((2, *xy.shape[:2], len(view)))
    step = max(1, (1 << 20) // (d[:, :, 0].size * xy.shape[2]))
    for some in (np.s_[i : i + step] for i in range(0, len(view), step)):
        lines = x[:, some, None] @ F[view[some, None], view].swapaxes(
            -1, -2
        )  # (B, n, n, J, 3) of n's joints, in m's view
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.abs(np.einsum("bnmja,bmja->bnmj", lines, x)) / np.hypot(lines[..., 0], lines[..., 1])
            off = np.minimum(off / extent[:, None, :, None], 1)
            w = np.minimum(confidence[:, some, None], confidence[:, None])
            w = np.where(np.isfinite(off), w, 0)
            total[:, some] = weight = w.sum(-1)
            d[:, some] = (np.where(w > 0, off, 0) * w).sum(-1) / np.where(weight > 0, weight, np.nan)
    return (d + d.swapaxes(1, 2)) / 2, np.minimum(total, total.swapaxes(1, 2))


def _groups(score: np.ndarray, view: np.ndarray, views: int) -> list[list[np.ndarray]]:
    """The people of each of B instants, each as numbers of skeletons of different views.

    score: (B, n, n) of pairs.  view: (n,).
    """
    groups = [[] for _ in score]
    score = np.pad(score, ((0, 0), (0, 1), (0, 1)))  # the last: not seen
    free, left = np.ones((len(score), len(view)), bool), np.arange(len(score))
    while len(left):
        counts = np.stack([free[left][:, view == v].sum(1) for v in range(views)], 1)
        kinds, which = np.unique(counts, axis=0, return_inverse=True)
        again = []
        for k, count in enumerate(kinds):
            some = left[which.ravel() == k]
            if not (whole := np.prod(count + 1.0) <= _COMBINATIONS):
                some = some[: max(1, (1 << 23) // score[0].size)]
            again.append(np.setdiff1d(left[which.ravel() == k], some))
            table = _candidates(score[some], free[some], view, count, whole)
            numbers = np.arange(len(some))
            total = _totals(score[some], table)  # (B, combinations)
            chosen = np.stack(np.unravel_index(np.arange(total.shape[1]), [one.shape[1] for one in table]))
            while len(numbers):
                best = total[numbers].argmax(1)
                good = total[numbers, best] > 0
                numbers, best = numbers[good], best[good]
                taken = np.stack([one[numbers, of[best]] for one, of in zip(table, chosen, strict=True)], 1)
                for b, group in zip(some[numbers].tolist(), taken, strict=True):
                    group = group[group >= 0]
                    groups[b].append(group)
                    free[b, group] = False
                if not whole:
                    again.append(some[numbers])
                    break
                for v, (one, of) in enumerate(zip(table, chosen, strict=True)):
                    used = (of == of[best][:, None]) & (taken[:, [v]] >= 0)
                    total[numbers] = np.where(used, 0, total[numbers])
        left = np.concatenate(again).astype(int)
    for b, n in zip(*np.nonzero(free), strict=True):
        groups[b].append(np.array([n]))
    return groups


def _candidates(
    score: np.ndarray, free: np.ndarray, view: np.ndarray, count: np.ndarray, whole: bool
) -> list[np.ndarray]:
    """For each view the skeletons to choose from, (B, those and not seen), of instants with `count` free in each view.

    All of them; or else one person at a time: of the best pair the one, and in other views those nearest to it.
    """
    table, rows = [], np.arange(len(score))
    few = 2 if 3 ** (len(count) - 1) <= _COMBINATIONS else 1
    if not whole:
        pairs = np.where(free[:, :, None] & free[:, None], score[:, :-1, :-1], -np.inf)
        seed = np.unravel_index(pairs.reshape(len(score), -1).argmax(1), pairs.shape[1:])[0]
    for v, number in enumerate(count.tolist()):
        of_view = np.flatnonzero(view == v)
        if whole:
            known = np.nonzero(free[:, of_view])[1].reshape(len(score), number)
        else:
            near = np.where(free[:, of_view], -score[rows[:, None], seed[:, None], of_view], np.inf)
            known = np.argsort(near, 1, kind="stable")[:, : min(few, number)]
        known = of_view[known] if number else np.zeros((len(score), 0), int)
        if not whole and number:
            own = view[seed] == v
            known[own] = -1
            known[own, 0] = seed[own]
        table.append(np.pad(known, ((0, 0), (0, 1)), constant_values=-1))
    return table


def _totals(score: np.ndarray, table: list[np.ndarray]) -> np.ndarray:
    """Σ of the scores of the pairs in every combination of one of each view's candidates, (B, combinations)."""
    rows = np.arange(len(score))[:, None]
    total, support = np.zeros((len(score), 1)), np.zeros((len(score), 1, score.shape[1]))  # from one for each skeleton
    for v, known in enumerate(table):
        total = (total[:, :, None] + support[rows, :, known].swapaxes(1, 2)).reshape(len(score), -1)
        if v + 1 < len(table):
            support = (support[:, :, None] + score[rows, known][:, None]).reshape(*total.shape, -1)
    return total


class _Tracks:
    """People followed over time: where (K, V, J, 2), when (K, V) and how large (K, V) each was seen last in each view."""

    def __init__(self, found: _Skeletons, views: int, instants: int):
        self.found, self.shape, self.of_track, self.size = found, (views, instants), [], []
        self.xy = np.zeros((0, views, *found.xy.shape[1:]))
        self.when, self.extent = np.zeros((0, views)), np.ones((0, views))

    def add(self, start: int, groups: list[np.ndarray]) -> None:
        """Give each group of an instant, whose first skeleton is `start`, to the track that fits it best, or to a new one."""
        found, views = self.found, self.shape[0]
        n, t = sum(map(len, groups)), found.t[start]
        of_each = self._gain(np.arange(start, start + n), t)
        gain = np.array([of_each[:, group].sum(1) for group in groups])  # (groups, K)
        taken = dict(zip(*linear_sum_assignment(gain, maximize=True), strict=True))
        for g, group in enumerate(groups):
            if g in taken and gain[g, taken[g]] > 0:
                k = taken[g]
            else:
                k = len(self.of_track)
                self.of_track.append([])
                self.size.append(0.0)
                self.xy = np.concatenate([self.xy, np.full((1, *self.xy.shape[1:]), np.nan)])
                self.when = np.concatenate([self.when, np.zeros((1, views))])
                self.extent = np.concatenate([self.extent, np.ones((1, views))])
            group = start + group
            v = found.view[group]
            self.xy[k, v], self.when[k, v], self.extent[k, v] = found.xy[group], t, found.extent[group]
            self.of_track[k] += group.tolist()
            self.size[k] += found.extent[group].sum()

    def _gain(self, index: np.ndarray, t: int) -> np.ndarray:
        """Joints that a track and a skeleton both have, less what they moved (half the extent, or more later, is 1): (K, n)."""
        found, v = self.found, self.found.view[index]
        allowed = (0.5 + np.minimum(0.02 * (t - self.when[:, v]), 1)) * np.maximum(
            self.extent[:, v], found.extent[index]
        )
        moved = found.xy[index] - self.xy[:, v]
        off = np.hypot(moved[..., 0], moved[..., 1]) / allowed[..., None]
        return np.where(np.isfinite(off), 1 - np.minimum(off, 2), 0).sum(-1)

    def places(self) -> np.ndarray:
        """(K, V, T), whoever is seen most first."""
        places = np.full((len(self.of_track), *self.shape), -1)
        order = sorted(range(len(places)), key=lambda k: (-len(self.of_track[k]), -self.size[k]))
        for row, k in zip(places, order, strict=True):
            group = self.of_track[k]
            row[self.found.view[group], self.found.t[group]] = self.found.place[group]
        return places
