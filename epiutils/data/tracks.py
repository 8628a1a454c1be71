"""Who is who among several people: matched between views by the distances of whole skeletons, then followed in time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
    tracks: list[_Track] = []
    for t, at in instants:
        instant = _Instant(*at)
        groups = instant.groups(F, len(cameras), near)
        of_each = np.stack([track.gain(instant, t) for track in tracks]) if tracks else np.zeros((0, len(instant.view)))
        gain = np.array([of_each[:, group].sum(1) for group in groups])  # (groups, tracks)
        taken = dict(zip(*linear_sum_assignment(gain, maximize=True), strict=True)) if tracks else {}
        for g, group in enumerate(groups):
            if g in taken and gain[g, taken[g]] > 0:
                track = tracks[taken[g]]
            else:
                tracks.append(track := _Track(len(cameras), instant.xy.shape[1]))
            track.add(instant, group, t)
    tracks.sort(key=lambda track: (-len(track.seen), -track.size))
    places = np.full((len(tracks), len(cameras), len(people[0])), -1)
    for k, track in enumerate(tracks):
        for v, t, place in track.seen:
            places[k, v, t] = place
    return places


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
            off = np.abs(np.einsum("nmja,mja->nmj", lines, x)) / np.linalg.norm(lines[..., :2], axis=-1)
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
            if whole := np.prod([len(known) + 1.0 for known in of_view]) <= _MOST:
                most = [len(known) for known in of_view]
            else:  # one person at a time: of the best pair the one, and in other views those nearest to it
                seed = np.unravel_index(np.where(free[:, None] & free, score[:-1, :-1], -np.inf).argmax(), d.shape)[0]
                of_view = [known[np.argsort(-score[seed, known], kind="stable")] for known in of_view]
                of_view[self.view[seed]] = np.array([seed])
                few = 2 if 3 ** (views - 1) <= _MOST else 1
                most = [min(few, len(known)) for known in of_view]
            chosen = _combinations(tuple(most))
            chosen = np.stack([np.append(of_view[v][: most[v]], -1)[chosen[:, v]] for v in range(views)], 1)  # (C, V)
            pairs = (score[chosen[:, s], chosen[:, r]] for s in range(views) for r in range(s))
            total = sum(pairs, np.zeros(len(chosen)))
            while total[c := int(np.argmax(total))] > 0:
                group = chosen[c][chosen[c] >= 0]
                groups.append(group)
                free[group] = False
                total[np.isin(chosen, group).any(1)] = 0
                if not whole:
                    break
            else:
                break
        return groups + [np.array([n]) for n in np.flatnonzero(free)]


@lru_cache(maxsize=256)
def _combinations(sizes: tuple[int, ...]) -> np.ndarray:
    """All choices of one of each view, or none (the last): (C, V)."""
    return np.indices([size + 1 for size in sizes]).reshape(len(sizes), -1).T


class _Track:
    """A person followed over time: where (V, J, 2), when (V,) and how large (V,) it was seen last in each view."""

    def __init__(self, views: int, joints: int):
        self.seen, self.size = [], 0.0
        self.xy, self.when, self.extent = np.full((views, joints, 2), np.nan), np.zeros(views), np.ones(views)

    def add(self, instant: _Instant, group: np.ndarray, t: int) -> None:
        for n in group:
            v = int(instant.view[n])
            self.seen.append((v, t, int(instant.place[n])))
            self.xy[v], self.when[v], self.extent[v] = instant.xy[n], t, instant.extent[n]
            self.size += instant.extent[n]

    def gain(self, instant: _Instant, t: int) -> np.ndarray:
        """For each skeleton (N,) the joints that both have, less what they moved: half the extent, or more later, is 1."""
        v = instant.view
        allowed = (0.5 + np.minimum(0.02 * (t - self.when[v]), 1)) * np.maximum(self.extent[v], instant.extent)
        off = np.linalg.norm(instant.xy - self.xy[v], axis=-1) / allowed[:, None]
        return np.where(np.isfinite(off), 1 - np.minimum(off, 2), 0).sum(-1)
