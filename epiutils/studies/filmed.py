"""What a pose network sees in your own videos: a recording of its detections, and its maps of an instant.

Videos and a calibration are enough: `networks.tracking` finds the person.  What was detected is kept in the cache.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epiutils.data import dataset, human36m
from epiutils.data.bodies import guess_model, guess_seventeen
from epiutils.data.checks import check_detections, check_geometry
from epiutils.data.layouts import detections_below, find_calib
from epiutils.data.recordings import Recording, Status, heatmaps, read_recording, read_videos
from epiutils.data.views import Predicted, View
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.movenet import MoveNet
from epiutils.networks.onnx import OnnxPose
from epiutils.networks.pictures import PoseNetwork, open_network, predict_views
from epiutils.networks.tracking import track
from epiutils.studies.predicted import kept


def read_film(path: str | os.PathLike, network: str, progress: bool | None = True, **options) -> Recording:
    """A recording in which a network detected the person, whose box is found by detections in the folder, or by itself.

    network: see `open_network`.  options: for `read_recording`, or `read_videos` where the folder has no detections;
    `model` is whose joints the network's are.  progress: see `track`.  What was detected is `kept`, by the contents of
    videos and network.  Raises ValueError, before the work, for what `open_network` and the readers refuse, for cameras
    without a video, and after it where nobody was found.
    """
    eye, path = open_network(network, options.pop("model", "auto")), Path(path)
    _, detected = detections_below(path)
    if not detected and (more := set(options) - {"cameras", "unit", "video_start"}):
        raise ValueError(f"{path}: {', '.join(sorted(more))} is for detections, of which there are none")
    unit = options.get("unit", "auto")
    if detected:
        given = read_recording(path, **options)
    else:
        given = read_videos(path, **options | {"unit": "m" if unit == "auto" else unit})
    if bare := [c.name for c, video in zip(given.cameras, given.videos, strict=True) if video is None]:
        raise ValueError(f"{path}: a network needs videos, and there is none of {', '.join(bare)}")
    numbers = [[c.K, c.R, c.t, c.distortion, c.size, int(c.fisheye)] for c in given.cameras]
    known = [eye.name, list(eye.files), numbers, given.detections, given.frames, given.lags, given.video_start]
    known += [list(given.videos), track, PoseNetwork, MoveNet, OnnxPose, load_checkpoint]
    found = kept("film", known, lambda: {"found": torch.from_numpy(track(given, eye, progress))})["found"].numpy()
    notes = list(given.notes)

    def warn(text: str) -> None:
        notes.append(text)
        warnings.warn(text, stacklevel=3)

    person = np.where(np.isfinite(found[..., 0]).sum(-1) > 1, 0, -1)
    if (person < 0).all():
        raise ValueError(f"{path}: {eye.name} finds nobody in any of {len(given)} frames")
    model = _model(eye, found)
    notes.append(f"{path}: {model} detected by {eye.name}, in {', '.join(_shares(given, person))}")
    check_detections(given.cameras, found, path, warn)
    rig = check_geometry(list(given.cameras), found, model, unit, path, find_calib(path), warn, notes.append)
    status = np.where(person < 0, Status.NO_PERSON, Status.OK)
    return replace(given, model=model, cameras=rig, detections=found, status=status, person=person, notes=tuple(notes))


def _model(eye: PoseNetwork, found: np.ndarray) -> str:
    """Which of a network's orders its joints are in, by what it found."""
    if len(eye.models) == 1:
        return eye.models[0]
    people = found.reshape(-1, *found.shape[2:])
    people = people[np.isfinite(people[..., 0]).all(1)]
    try:
        return (guess_seventeen if found.shape[2] == 17 else guess_model)(people)
    except ValueError as error:
        raise ValueError(f"{eye.name}: {error}: say it by -p model, one of {', '.join(eye.models)}") from error


def _shares(recording: Recording, person: np.ndarray) -> list[str]:
    return [f"{c.name} {100 * np.mean(row >= 0):.0f} %" for c, row in zip(recording.cameras, person, strict=True)]


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
