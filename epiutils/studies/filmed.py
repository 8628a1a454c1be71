"""What a pose network sees in your own videos: a recording of its detections, and its maps of an instant.

Videos and a calibration are enough.  A network wants the person cut out, and nobody has detected one: so it sees the
whole picture first, then what lies around the joints that it found; after that, what lies around the last instant's.
Views must agree on one pose in space: one that sees somebody else, or nobody, looks again where the others' pose is in
its picture.  What was detected is kept in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from epiutils.cameras import Camera
from epiutils.data import dataset, human36m
from epiutils.data.bodies import guess_model
from epiutils.data.checks import check_detections, check_videos
from epiutils.data.files import check_file
from epiutils.data.layouts import Folder
from epiutils.data.recordings import Recording, Status, heatmaps, read_recording
from epiutils.data.views import Predicted, View
from epiutils.heatmaps import STRIDE, decode
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.movenet import MoveNet
from epiutils.networks.onnx import OnnxPose
from epiutils.networks.pictures import PoseNetwork, open_network, predict_views
from epiutils.studies.predicted import kept
from epiutils.triangulate import project, triangulate

SEEN = 0.2  # the height of a peak from which a joint is taken for seen
_FEW = 4  # joints, at least, to know where a person is
_NEAR = 0.1  # of a person's extent, within which a joint agrees with the pose in space


def read_film(path: str | os.PathLike, network: str, progress: bool | None = True, **options) -> Recording:
    """A recording in which a network detected the person, whose box is found by detections in the folder, or by itself.

    network: see `open_network`.  options: for `read_recording`; where the folder has no detections, cameras, unit and
    video_start alone, and the frames are those of which every camera has a picture.  `model` is whose joints the
    network's are.  progress: None shows it on a terminal only.
    detections: px as recorded and the height of the peak.  A joint is undetected where its peak is below `SEEN`, where
    it lies outside the picture, and in a view that does not see the person on whom most views agree.  They are `kept`,
    by the contents of videos and network.
    Raises ValueError, before the work, for what `open_network` and the reader refuse, for cameras without a video, and
    after it where nobody was found.
    """
    eye, folder = open_network(network, options.pop("model", "auto")), Folder(path)
    path, unit = folder.path, options.get("unit", "auto")
    if not folder.entries and (more := set(options) - {"cameras", "unit", "video_start"}):
        raise ValueError(f"{path}: {', '.join(sorted(more))} is for detections, of which there are none")
    if folder.entries:
        given = read_recording(path, **options)
        folder.notes += given.notes
    else:
        given = _undetected(folder, **options | {"unit": "m" if unit == "auto" else unit})
    if bare := [c.name for c, video in zip(given.cameras, given.videos, strict=True) if video is None]:
        raise ValueError(f"{path}: a network needs videos, and there is none of {', '.join(bare)}")
    numbers = [[c.K, c.R, c.t, c.distortion, c.size, int(c.fisheye)] for c in given.cameras]
    known = [eye.name, list(eye.files), numbers, given.detections, given.frames, given.lags, given.video_start]
    known += [list(given.videos), _track, PoseNetwork, MoveNet, OnnxPose, load_checkpoint]
    found = kept("film", known, lambda: {"found": torch.from_numpy(_track(given, eye, progress))})["found"].numpy()
    person = np.where(np.isfinite(found[..., 0]).sum(-1) > 1, 0, -1)
    if (person < 0).all():
        raise ValueError(f"{path}: {eye.name} finds nobody in any of {len(given)} frames")
    people = found.reshape(-1, *found.shape[2:])
    try:
        model = guess_model(people[np.isfinite(people[..., 0]).all(1)], eye.models)
    except ValueError as error:
        raise ValueError(f"{eye.name}: {error}: say it by -p model, one of {', '.join(eye.models)}") from error
    shares = [f"{c.name} {100 * np.mean(row >= 0):.0f} %" for c, row in zip(given.cameras, person, strict=True)]
    folder.notes.append(f"{path}: {model} detected by {eye.name}, in {', '.join(shares)}")
    rig = check_detections(given.cameras, found, model, unit, path, folder)
    status, notes = np.where(person < 0, Status.NO_PERSON, Status.OK), tuple(folder.notes)
    return replace(given, model=model, cameras=rig, detections=found, status=status, person=person, notes=notes)


def _undetected(folder: Folder, unit: str, cameras: str | Sequence[str] = (), video_start: int = 0) -> Recording:
    """The recording of a calibration and videos alone: nobody is detected in it yet, and it has no model."""
    path = folder.path
    rig, wanted = folder.cameras(cameras, unit)
    known = [camera.name for camera in rig]
    found = dict(zip(known, folder.videos(known), strict=True))
    chosen = [name for name in wanted or known if found[name] is not None]
    if len(chosen) < max(len(wanted), 1):
        raise ValueError(f"{path}: no video of {', '.join(wanted or known)}, here or in videos/")
    rig, videos = [rig[known.index(name)] for name in chosen], tuple(found[name] for name in chosen)
    counts = {video.name: _count(check_file(video, within=path)) for video in videos}
    length = min(counts.values())
    if length < 1:
        raise ValueError(f"{path}: {min(counts, key=counts.get)}: no pictures in it that OpenCV reads")
    if length < max(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        folder.warn(f"{path}: videos of {told} pictures: the first {length} are taken")
    check_videos(rig, videos, (video_start, video_start + length - 1), video_start, folder)
    folder.notes.append(
        f"{path}: no detections; calibration {folder.calib.name}, {len(rig)} videos of {length} pictures"
    )
    nobody = np.full((len(rig), length), Status.NO_FILE)
    return Recording(path, "", rig, np.arange(length) + video_start, np.zeros((*nobody.shape, 0, 3)), nobody,
                     np.full(nobody.shape, -1), videos, (0,) * len(rig), video_start)  # fmt: skip


def _count(video: Path) -> int:
    capture = cv2.VideoCapture(str(video))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return count


def open_instant(
    frame: int, recording: str = "", network: str = "", subject: int = 9, action: str = "walk", **options
) -> tuple:
    """`data.dataset.open_instant`; of a recording seen by a network, see `read_film`, where one is named."""
    if not network:
        return dataset.open_instant(frame, recording, subject, action, **options)
    if not recording or human36m.is_there(recording):
        raise ValueError("a network of your choice looks at a recording of videos: name its folder too")
    return dataset.open_instant(frame, read_film(recording, network, progress=None, **options))


def seen(data, frame: int, network: str = "") -> tuple[list[View], list[Tensor]]:
    """The views of one instant, and what a network sees in each, (J, 64, 64); without one, Gaussians at the joints.

    Map pixel i lies at pixel 4 i of its view.
    """
    if not network:
        views = data.views(frame)
        return views, [heatmaps(view) for view in views]
    eye = open_network(network, data.model)
    views = data.views(frame, size=(eye.side,) * 2)
    return [eye.aligned(view) for view in views], list(predict_views(eye, [views]).output[0].double())


def look_again(frame: int, recording: str, network: str, **options) -> tuple[np.ndarray, Predicted, PoseNetwork]:
    """The pictures (V, S, S, 3) of one instant's views, what a network sees in them, N = 1, and the network itself."""
    data, frame = open_instant(frame, recording, network, **options)
    eye = open_network(network, data.model)
    views = data.views(frame, size=(eye.side,) * 2)
    return np.stack([view.image for view in views]), predict_views(eye, [views]), eye


def _track(recording: Recording, network: PoseNetwork, progress: bool | None) -> np.ndarray:
    """What a network detects in all frames of a recording, (V, T, J, 3), see `read_film`."""
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
