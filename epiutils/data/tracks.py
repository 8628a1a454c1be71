"""Who is who among several people: matched between views by the distances of whole skeletons, then followed in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from epiutils.cameras import Camera
from epiutils.epipolar import fundamental_from_cameras

_MOST = 1024  # combinations of an instant
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
    straight = [_straight(camera, view) for camera, view in zip(cameras, people, strict=True)]
    instants = [(t, at) for t, at in enumerate(zip(*straight, strict=True)) if any(map(len, sum(map(list, at), [])))]
    F = np.zeros((len(cameras), len(cameras), 3, 3))
    for s, r in np.ndindex(F.shape[:2]):
        if s != r:
            F[s, r] = fundamental_from_cameras(cameras[s], cameras[r])
    alone = []  # d of pairs of views with one person each
    for _, at in instants[:: max(1, len(instants) // 100)]:
        instant = _Instant(*at)
        d, _ = instant.distances(F)
        single = np.bincount(instant.view, minlength=len(cameras))[instant.view] == 1
        alone += d[np.triu(single[:, None] & single, 1)].tolist()
    near = max(_NEAR, 3 * float(np.nanmedian(alone)) if np.isfinite(alone).any() else 0)
    tracks = _Tracks(len(cameras), len(people[0]))
    for t, at in instants:
        instant = _Instant(*at)
        tracks.add(instant, instant.groups(F, len(cameras), near), t)
    return tracks.places()


def _straight(camera: Camera, view: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """The view's people without lens distortion, all undistorted at once."""
    everybody = [person for people in view for person in people if len(person)]
    if not everybody or not camera.bends:
        return [list(people) for people in view]
    flat = np.concatenate(everybody)
    flat = np.column_stack([camera.undistort(flat[:, :2]), flat[:, 2]])
    straight = iter(np.split(flat, np.cumsum([len(person) for person in everybody])[:-1]))
    return [[next(straight) if len(person) else person for person in people] for people in view]


class _Instant:
    """All skeletons of an instant: view and place (N,), xy (N, J, 2), confidence (N, J) and extent (N,) in px."""

    def __init__(self, *views: list[np.ndarray]):
        found = [(v, i, person) for v, people in enumerate(views) for i, person in enumerate(people) if len(person)]
        self.view = np.array([v for v, _, _ in found], int)
        self.place = np.array([i for _, i, _ in found], int)
        joints = np.array([person for _, _, person in found]).reshape(len(found), -1, 3)
        self.xy, self.confidence = joints[..., :2], np.where(np.isfinite(joints[..., 0]), joints[..., 2], 0)
        known = np.isfinite(self.xy)
        size = np.where(known, self.xy, -np.inf).max(1) - np.where(known, self.xy, np.inf).min(1)  # −inf: nothing seen
        self.extent = np.maximum(size.max(1), 1.0)

    def distances(self, F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """d (N, N), nan where no joint is in both, and w (N, N)."""
        x = np.concatenate([self.xy, np.ones_like(self.xy[..., :1])], -1)
        lines = x[:, None] @ F[self.view[:, None], self.view[None]].swapaxes(-1, -2)  # of n's joints, in m's view
        with np.errstate(divide="ignore", invalid="ignore"):
            off = np.abs(np.einsum("nmja,mja->nmj", lines, x)) / np.hypot(lines[..., 0], lines[..., 1])
            off = np.minimum(off / self.extent[None, :, None], 1)
        w = np.minimum(self.confidence[:, None], self.confidence[None])
        w = np.where(np.isfinite(off), w, 0)
        total = w.sum(-1)
        with np.errstate(invalid="ignore"):
            d = (np.where(w > 0, off, 0) * w).sum(-1) / np.where(total > 0, total, np.nan)
        return (d + d.T) / 2, np.minimum(total, total.T)

    def groups(self, F: np.ndarray, views: int, near: float) -> list[np.ndarray]:
        """The instant's people, each as numbers of skeletons of different views."""
        d, w = self.distances(F)
        score = np.zeros((len(d) + 1,) * 2)  # the last: not seen
        score[:-1, :-1] = np.where(w > 0, w * (1 - d / near), 0)
        groups, free = [], np.ones(len(d), bool)
        while free.any():
            of_view = [np.flatnonzero(free & (self.view == v)) for v in range(views)]
            if not (whole := np.prod([len(known) + 1.0 for known in of_view]) <= _MOST):
                # one person at a time: of the best pair the one, and in other views those nearest to it
                seed = np.unravel_index(np.where(free[:, None] & free, score[:-1, :-1], -np.inf).argmax(), d.shape)[0]
                few = 2 if 3 ** (views - 1) <= _MOST else 1
                of_view = [known[np.argsort(-score[seed, known], kind="stable")][:few] for known in of_view]
                of_view[self.view[seed]] = np.array([seed])
            of_view = [np.append(known, -1) for known in of_view]  # or not seen there
            total, support = np.zeros(1), np.zeros((1, len(score)))  # of combinations, and from one for each skeleton
            for v, known in enumerate(of_view):
                total = (total[:, None] + support[:, known]).ravel()
                if v + 1 < views:
                    support = (support[:, None] + score[known]).reshape(len(total), -1)
            total = total.reshape([len(known) for known in of_view])
            while total.flat[best := total.argmax()] > 0:
                chosen = np.unravel_index(best, total.shape)
                group = np.array([known[i] for known, i in zip(of_view, chosen, strict=True) if known[i] >= 0])
                groups.append(group)
                free[group] = False
                for v, i in enumerate(chosen):
                    if of_view[v][i] >= 0:
                        total[(slice(None),) * v + (i,)] = 0
                if not whole:
                    break
            else:
                break
        return groups + [np.array([n]) for n in np.flatnonzero(free)]


class _Tracks:
    """People followed over time: where (K, V, J, 2), when (K, V) and how large (K, V) each was seen last in each view."""

    def __init__(self, views: int, instants: int):
        self.seen, self.size, self.shape = [], [], (views, instants)
        self.xy, self.when, self.extent = None, np.zeros((0, views)), np.ones((0, views))

    def add(self, instant: _Instant, groups: list[np.ndarray], t: int) -> None:
        """Give each group to the track that fits it best, or to a new one."""
        views, joints = self.shape[0], instant.xy.shape[1]
        if self.xy is None:
            self.xy = np.zeros((0, views, joints, 2))
        of_each = self._gain(instant, t)
        gain = np.array([of_each[:, group].sum(1) for group in groups])  # (groups, K)
        taken = dict(zip(*linear_sum_assignment(gain, maximize=True), strict=True))
        for g, group in enumerate(groups):
            if g in taken and gain[g, taken[g]] > 0:
                k = taken[g]
            else:
                k = len(self.seen)
                self.seen.append([])
                self.size.append(0.0)
                self.xy = np.concatenate([self.xy, np.full((1, views, joints, 2), np.nan)])
                self.when = np.concatenate([self.when, np.zeros((1, views))])
                self.extent = np.concatenate([self.extent, np.ones((1, views))])
            v = instant.view[group]
            self.xy[k, v], self.when[k, v], self.extent[k, v] = instant.xy[group], t, instant.extent[group]
            self.seen[k] += [(v, t, place) for v, place in zip(v, instant.place[group], strict=True)]
            self.size[k] += instant.extent[group].sum()

    def _gain(self, instant: _Instant, t: int) -> np.ndarray:
        """Joints that a track and a skeleton both have, less what they moved (half the extent, or more later, is 1): (K, N)."""
        v = instant.view
        allowed = (0.5 + np.minimum(0.02 * (t - self.when[:, v]), 1)) * np.maximum(self.extent[:, v], instant.extent)
        moved = instant.xy - self.xy[:, v]
        off = np.hypot(moved[..., 0], moved[..., 1]) / allowed[..., None]
        return np.where(np.isfinite(off), 1 - np.minimum(off, 2), 0).sum(-1)

    def places(self) -> np.ndarray:
        """(K, V, T), whoever is seen most first."""
        places = np.full((len(self.seen), *self.shape), -1)
        order = sorted(range(len(places)), key=lambda k: (-len(self.seen[k]), -self.size[k]))
        for row, k in zip(places, order, strict=True):
            v, t, place = np.array(self.seen[k]).T
            row[v, t] = place
        return places
