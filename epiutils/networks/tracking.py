"""Where a person is in videos of calibrated cameras, found by the pose network itself and by what the views agree on.

A network wants the person cut out, and nobody has detected one.  So it sees the whole picture first, then what lies
around the joints that it found; after that, what lies around the last instant's.  Views must agree on one pose in space:
one that sees somebody else, or nobody, looks again where the others' pose is in its picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from tqdm.auto import tqdm

from epiutils.cameras import Camera
from epiutils.data.recordings import Recording
from epiutils.data.views import View
from epiutils.heatmaps import STRIDE, decode
from epiutils.networks.pictures import PoseNetwork
from epiutils.triangulate import project, triangulate

SEEN = 0.2  # the height of a peak from which a joint is taken for seen
_FEW = 4  # joints, at least, to know where a person is
_NEAR = 0.1  # of a person's extent, within which a joint agrees with the pose in space


def track(recording: Recording, network: PoseNetwork, progress: bool | None = True) -> np.ndarray:
    """What a network detects in all frames of a recording: (V, T, J, 3), px as recorded and the height of the peak.

    The person's box is that of the recording's own detections where it has some.  A joint is undetected, nan, nan, 0,
    where its peak is below `SEEN`, where it lies outside the picture, and in a view that does not see the person on whom
    most views agree.  progress: None shows it on a terminal only.
    """
    cameras = [camera.without_distortion() for camera in recording.cameras]
    P, places = np.stack([camera.P for camera in cameras]), [None] * len(cameras)
    made = []
    bar = tqdm(
        total=len(recording),
        desc=f"{network.name} looks",
        unit="frame",
        disable=None if progress is None else not progress,
    )
    with bar:
        for t, pictures in enumerate(recording.pictures()):
            views = [_undistorted(recording, v, t, picture) for v, picture in enumerate(pictures)]
            given = [view.joints[np.isfinite(view.joints).all(-1)] for view in views]
            places = [own if len(own) > 1 else place for own, place in zip(given, places, strict=True)]
            x, heights = _searched(network, views, places)
            agree, X = _together(x, heights, P)
            if agree.any():
                back = project(X, P).swapaxes(0, 1)  # (V, J, 2)
                lost = [v for v in np.flatnonzero(~agree) if len(_inside(back[v], cameras[v])) >= _FEW]
                if lost:
                    again = [_inside(back[v], cameras[v]) for v in lost]
                    x[lost], heights[lost] = _look(network, [views[v] for v in lost], again)
                    agree, X = _together(x, heights, P)
                    back = project(X, P).swapaxes(0, 1)
                heights[~agree] = 0
            seen = heights >= SEEN
            places = []
            for v, camera in enumerate(cameras):
                known = [x[v][seen[v]], *([_inside(back[v], camera)] if agree.any() else [])]
                known = np.concatenate(known)
                places.append(known if len(known) >= _FEW else None)
            made.append(np.where(seen[..., None], np.dstack([x, np.minimum(heights, 1)]), (np.nan, np.nan, 0)))
            bar.update()
    found = np.stack(made, 1)  # (V, T, J, 3)
    for v, camera in enumerate(recording.cameras):
        found[v, ..., :2] = _as_recorded(camera, found[v, ..., :2])
    return found


def _undistorted(recording: Recording, v: int, t: int, picture: np.ndarray) -> View:
    joints = recording.detections[v, t]
    return View(picture, recording.cameras[v], joints[:, :2], joints[:, 2]).undistorted()


def _searched(network: PoseNetwork, views: Sequence[View], places: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """`_look`, twice where no place is known: at the whole picture, then around what was found there."""
    places, unknown = list(places), [v for v, place in enumerate(places) if place is None]
    if unknown:
        x, heights = _look(network, [views[v] for v in unknown], [None] * len(unknown))
        for v, points, height in zip(unknown, x, heights, strict=True):
            known = points[height >= SEEN]
            places[v] = known if len(known) >= _FEW else None
    return _look(network, views, places)


def _look(network: PoseNetwork, views: Sequence[View], places: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Joints in the whole pictures, (V, J, 2) px without distortion, and the heights of their peaks (V, J).

    places: points that say where the person is; None for the whole picture.
    """
    crops = []
    for view, place in zip(views, places, strict=True):
        width, height = view.camera.size
        corners = (
            np.array([[0.0, 0], [width - 1, height - 1]]) if place is None else np.stack([place.min(0), place.max(0)])
        )
        if (least := 0.02 * max(width, height)) > np.ptp(corners, 0).max():
            corners = corners + np.array([[-least], [least]]) / 2
        cut = replace(view, joints=corners, confidence=np.ones(2))
        crops.append(cut.crop_to_person((network.side,) * 2, 1.0 if place is None else 1.25))
    maps = network(np.stack([crop.image for crop in crops]))
    points, heights = (a.double().numpy() for a in decode(maps, "dark"))
    for v, (view, crop) in enumerate(zip(views, crops, strict=True)):
        back = view.camera.K @ np.linalg.inv(network.aligned(crop).camera.K)
        points[v] = STRIDE * points[v] @ back[:2, :2].T + back[:2, 2]
        heights[v, ~_is_inside(points[v], view.camera)] = 0
    return points, heights


def _together(x: np.ndarray, heights: np.ndarray, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The views (V,) that see the same person, the most there are, and the person's joints in space (J, 3).

    Each pair of views proposes a pose; a view agrees where two thirds of the joints that it sees are near it.  Nobody agrees,
    and all is nan, where no pair agrees with itself.
    """
    seen = heights >= SEEN
    extents = [np.ptp(points[known], 0).max() for points, known in zip(x, seen, strict=True) if known.sum() >= _FEW]
    best, agree, X = (0, 0), np.zeros(len(x), bool), np.full((x.shape[1], 3), np.nan)
    if len(extents) < 2:
        return agree, X
    near_enough, points = _NEAR * np.median(extents), x.swapaxes(0, 1)  # (J, V, 2)
    for pair in map(list, combinations(range(len(x)), 2)):
        proposed = triangulate(points[:, pair], P[pair], seen.T[:, pair].astype(float))
        off = np.linalg.norm(project(proposed, P) - points, axis=-1).T  # (V, J)
        known = seen & np.isfinite(off)
        near = known & (np.nan_to_num(off, nan=np.inf) < near_enough)
        views = (near.sum(1) >= _FEW) & (3 * near.sum(1) >= 2 * known.sum(1))
        score = (int(views.sum()), int(near[views].sum()))
        if views[pair].all() and score > best:
            best, agree = score, views
            X = triangulate(points, P, (near & views[:, None]).T * np.maximum(heights, 0).T)
    return agree, X


def _is_inside(points: np.ndarray, camera: Camera) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return ((points >= -0.5) & (points <= np.array(camera.size) - 0.5)).all(-1)


def _inside(points: np.ndarray, camera: Camera) -> np.ndarray:
    """Those points that lie in the picture."""
    return points[_is_inside(points, camera)]


def _as_recorded(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Undistorted points, with the lens' distortion: what `Camera.undistort` undoes."""
    if not camera.bends:
        return points
    rays = np.concatenate([points, np.ones_like(points[..., :1])], -1) @ np.linalg.inv(camera.K).T
    return camera.project((rays - camera.t) @ camera.R)
