"""Real pictures: what MoveNet sees of a person before four cameras, hidden by patches and by a second person.

    python -m epiutils.studies.real path/to/balancing path/to/second_person     # stores data/real/balancing.npz

Both recordings are in PyPI's `pose2sim`: one person, and the same 100 frames with a rendered second person who stands
before the first, so that the truth of what is hidden lies beside it.  The pseudo-truth is OpenPose's detections,
triangulated robustly from the unhidden views; MoveNet, another network, has no part in it.  No picture is stored, only
heatmaps, of which notebook 08 is made.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from epiutils.cameras import Camera
from epiutils.data import bodies
from epiutils.data.dataset import Benchmark
from epiutils.data.recordings import Recording, read_recording, realigned
from epiutils.data.views import JOINTS, Predicted, heatmap_fundamentals
from epiutils.fusion import RepairedFusion
from epiutils.networks.pictures import PoseNetwork, open_network
from epiutils.redirect import Pencil
from epiutils.space import Body, Calibration, along_bones, modes
from epiutils.studies.predicted import triangulated
from epiutils.studies.runs import repaired
from epiutils.studies.stored import load_arrays, save_arrays
from epiutils.triangulate import project, triangulate_robust

STORED = Path(__file__).resolve().parents[2] / "data" / "real" / "balancing.npz"
ANSWERS = STORED.with_name("answers.npz")
COCO = bodies.JOINTS["COCO_17"]
BODY = range(5, 17)  # of COCO: shoulders to ankles
PATCHES = ("grey", "noise", "texture")
NEAR = 3.2  # heatmap px within which a joint is found, as in HRNet's accuracy


def _gather(single: str, second: str, step: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Heatmaps of every `step`-th frame, and what is true there, as `load` gives them."""
    network, rng = open_network("movenet"), np.random.default_rng(seed)
    calibrated = recording = read_recording(single)
    cameras, shifts = realigned(recording.cameras, recording.detections)
    recording = replace(recording, cameras=cameras)
    frames = [int(frame) for frame in recording.frames[:-1:step]]
    others = [_Second(Path(second) / "videos" / f"cam{v + 1:02d}.mp4", recording, v) for v in range(len(cameras))]
    rows: dict[str, list] = {}
    for frame in tqdm(frames, unit="frame"):
        views = [network.aligned(view) for view in recording.views(frame)]
        names = [recording.joints.index(name) for name in COCO]
        P = np.stack([view.camera.P for view in views])
        x = np.stack([view.joints[names] for view in views], 1)  # (J, V, 2)
        X, _ = triangulate_robust(x, P, np.stack([view.confidence[names] for view in views], 1))
        truth = project(X, P).swapaxes(0, 1)  # (V, J, 2)
        patched, boxes = zip(
            *(_patched(view.image, at[list(BODY)], rng) for view, at in zip(views, truth, strict=True))
        )
        hidden = [other.picture(frame) for other in others]
        images = np.stack([view.image for view in views])
        maps = [_seen(network, images), _seen(network, np.concatenate(patched)), _seen(network, np.stack(hidden))]
        row = {"clean": maps[0], "patched": maps[1].reshape(len(views), 3, *maps[1].shape[1:]), "second": maps[2]}
        row |= {"boxes": boxes, "X": X, "residual": np.linalg.norm(truth - x.swapaxes(0, 1), axis=-1)}
        row |= {"differs": [_difference(*pair) for pair in zip(images, hidden, truth, strict=True)]}
        row |= {key: [getattr(view.camera, key) for view in views] for key in ("K", "R", "t")}
        row |= {"K_calibrated": [network.aligned(view).camera.K for view in calibrated.views(frame)]}
        for key, value in row.items():
            rows.setdefault(key, []).append(np.asarray(value))
    worth = vars(_calibrated(network))
    arrays = {key: np.stack(each) for key, each in rows.items()}
    return arrays | {"frames": np.array(frames), "shifts": shifts, "calibration": np.array(list(worth.values()))}


def _calibrated(network: PoseNetwork, every: int = 24) -> Calibration:
    """What MoveNet's maps are worth: fitted on synthetic people, instants of subject 1, and never on a recording."""
    shared, maps, joints = [JOINTS.index(COCO[j]) for j in BODY], [], []
    for n in range(0, 840, every):
        views = Benchmark("train")[n]
        maps.append(_seen(network, np.stack([view.image for view in views]))[:, list(BODY)] / np.float32(255))
        joints.append(np.stack([network.aligned(view).joints[shared] for view in views]))
    return Calibration.fit(torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(joints)))


def _seen(network: PoseNetwork, images: np.ndarray) -> np.ndarray:
    return (255 * network(images)).round().byte().numpy()


def _patched(image: np.ndarray, joints: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture with a patch near a joint, grey, of noise, and of its own texture: (3, H, W, 3), and (3, 4) boxes."""
    made, boxes = np.repeat(image[None], 3, 0), []
    for k, kind in enumerate(PATCHES):
        size = rng.integers(44, 100, 2)
        low = (joints[rng.integers(len(joints))] + rng.uniform(-10, 10, 2) - size / 2).clip(0, 255 - size).astype(int)
        (left, top), (right, bottom) = low, low + size
        away = (low + 128) % (256 - size)
        texture = image[away[1] : away[1] + size[1], away[0] : away[0] + size[0], :][:, ::-1]
        fill = {"grey": 128, "noise": rng.integers(0, 256, (size[1], size[0], 3)), "texture": texture}[kind]
        made[k, top:bottom, left:right] = fill
        boxes.append((left, top, right, bottom))
    return made, np.array(boxes)


class _Second:
    """One camera's video with the second person: one frame later, and slightly rescaled."""

    def __init__(self, path: Path, recording: Recording, v: int):
        self.recording, self.v, self.video = recording, v, cv2.VideoCapture(str(path))
        if not self.video.isOpened():
            raise ValueError(f"{path} is no video that OpenCV reads")
        self.A = _similarity(self._frame(51), recording.picture(v, 50))

    def _frame(self, number: int) -> np.ndarray:
        self.video.set(cv2.CAP_PROP_POS_FRAMES, number)
        return cv2.cvtColor(self.video.read()[1], cv2.COLOR_BGR2RGB)

    def picture(self, frame: int) -> np.ndarray:
        """What the view of a frame would show with the second person in it."""
        camera, t = self.recording.cameras[self.v], int(np.flatnonzero(self.recording.frames == frame)[0])
        image = cv2.warpAffine(self._frame(frame + 1), self.A, camera.size, flags=cv2.INTER_LINEAR)
        return self.recording.crop(self.v, t, image).image


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity (2, 3) that moves one picture onto another, by SIFT and RANSAC."""
    sift = cv2.SIFT_create(3000)
    (ks, ds), (kt, dt) = (sift.detectAndCompute(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), None) for p in (source, target))
    pairs = [a for a, b in cv2.BFMatcher().knnMatch(ds, dt, 2) if a.distance < 0.7 * b.distance]
    x, y = np.float32([ks[m.queryIdx].pt for m in pairs]), np.float32([kt[m.trainIdx].pt for m in pairs])
    return cv2.estimateAffinePartial2D(x, y, ransacReprojThreshold=6)[0]


def _difference(image: np.ndarray, other: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How far the one picture is from the other around each joint (J,), 0 to 255, colours fitted to each other."""
    a, b = (p.reshape(-1, 3).astype(np.float32) for p in (image, other))
    A, good = np.c_[a, np.ones(len(a))], np.ones(len(a), bool)
    for _ in range(4):  # what differs is left out of the fit
        off = abs(A @ np.linalg.lstsq(A[good], b[good], rcond=None)[0] - b).max(1)
        good = off < 2 * np.median(off) + 4
    off = cv2.blur(off.reshape(image.shape[:2]), (9, 9))
    x, y = np.rint(at + 1.5).clip(0, 255).astype(int).T
    return off[y, x]


def load() -> tuple[dict[str, np.ndarray], dict[str, dict[str, dict[str, np.ndarray]]]]:
    """What is stored of the pictures, and what each method answers in each of the `cases`.

    The first: clean (N, V, J, 64, 64), patched (N, V, 3, J, 64, 64) and second (N, V, J, 64, 64), MoveNet's heatmaps of
    every third frame, unhidden, patched and behind the second person, in eight bits, 255 for 1, of COCO's joints; boxes
    (N, V, 3, 4) of the patches and differs (N, V, J), how far a picture with the second person is from the one without
    at each joint; K, R, t of the cameras as realigned, with maps at every fourth pixel, shifts (V, 2) px of the
    pictures, K_calibrated before that; X (N, J, 3) metres, and residual (N, V, J) px of the input, of the pseudo-truth;
    calibration (3,), of `Calibration`.  The second, by case and method: found (N', V', J), nan where nobody asks, and
    mm (N', J) from the pseudo-truth; and beside the methods of a case its "frame" (N',).
    """
    shown: dict[str, dict] = {}
    for name, values in load_arrays(ANSWERS).items():
        case, method, key = name.split("/")
        shown.setdefault(case, {}).setdefault(method, {})[key] = values
    return load_arrays(STORED), shown


def cases(data: dict[str, np.ndarray]) -> dict[str, dict[str, Predicted | np.ndarray]]:
    """The questions that are asked, each of N' instants of V' views.

    seen: what MoveNet sees there, in eight bits, and the pseudo-truth; asked (N', V', J), the joints that the question
    is about; frame (N',), whose frame it is.  "unhidden": all joints; "one_view": the first view is patched, the others
    are clean; "two_sources": the same with two others; "every_view": all are patched; "second_person": all views as
    they are behind the second person; "as_calibrated": "one_view" before realignment.
    """
    kinds, views = len(PATCHES), data["K"].shape[1]
    frames, unhidden, nominal = np.arange(len(data["K"])), _seen_as(data, "K"), _seen_as(data, "K_calibrated")
    at = unhidden.joints.numpy() / 4  # (N, V, J, 2) px of the map
    known = (data["residual"] / 4 < 1.6).sum(1, keepdims=True) >= 3
    known = known & ((at >= 0) & (at <= 63)).all(-1) & np.isin(np.arange(at.shape[2]), BODY)
    boxes = data["boxes"][:, :, :, None] / 4  # (N, V, K, 1, 4)
    inside = ((at[:, :, None] >= boxes[..., :2]) & (at[:, :, None] <= boxes[..., 2:])).all(-1) & known[:, :, None]
    patched = torch.from_numpy(data["patched"])  # (N, V, K, J, h, w)
    second = replace(unhidden, output=torch.from_numpy(data["second"]))
    every = replace(unhidden[frames.repeat(kinds)], output=patched.swapaxes(1, 2).flatten(0, 1))
    made = {
        "unhidden": {"seen": unhidden, "asked": known, "frame": frames},
        "second_person": {"seen": second, "asked": known & (data["differs"] > 20), "frame": frames},
        "every_view": {"seen": every, "asked": np.concatenate(inside.swapaxes(1, 2)), "frame": frames.repeat(kinds)},
    }
    for name, sources, base in (("one_view", 3, unhidden), ("two_sources", 2, unhidden), ("as_calibrated", 3, nominal)):
        order = [[(r + k) % views for k in range(sources + 1)] for r in range(views)]
        of_all = {field: torch.cat([getattr(base.of_views(some), field) for some in order]) for field in _SEEN}
        n, r = np.tile(frames, views), np.arange(views).repeat(len(frames))
        k, asked = (n + r) % kinds, np.zeros((len(n), sources + 1, at.shape[2]), bool)  # a frame and view has one patch
        of_all["output"][:, 0], asked[:, 0] = patched[n, r, k], inside[n, r, k]
        made[name] = {"seen": Predicted(**of_all), "asked": asked, "frame": n}
    return made


_SEEN = ("output", "F", "K", "R", "t", "joints", "joints_3d")


def _seen_as(data: dict[str, np.ndarray], K: str) -> Predicted:
    """The clean maps of all views, with these cameras, and where the pseudo-truth is as the realigned ones see it."""
    rigs = [[Camera(*one) for one in zip(*rig, strict=True)] for rig in zip(data[K], data["R"], data["t"], strict=True)]
    P = data["K"] @ np.concatenate([data["R"], data["t"][..., None]], -1)
    joints = project(data["X"], P[:, None]).swapaxes(1, 2)  # (N, V, J, 2) px of the input
    given = (data["clean"], np.stack([*map(heatmap_fundamentals, rigs)]), data[K], data["R"], data["t"], joints)
    return Predicted(**dict(zip(_SEEN, map(torch.from_numpy, (*given, data["X"])), strict=True)))


@torch.no_grad()
def _answers(
    case: dict[str, Predicted | np.ndarray],
    module: RepairedFusion,
    calibration: Calibration,
    body: Body,
    batch: int = 8,
) -> dict[str, dict[str, np.ndarray]]:
    """What each method answers, as `load` gives it."""
    right: dict[str, list] = {}
    away: dict[str, list] = {}
    told = _told(calibration)
    for first in range(0, len(case["seen"]), batch):
        some, asked = (case[key][first : first + batch] for key in ("seen", "asked"))
        maps, P = some.output.float() / 255, some.P
        fused, found = _fused(maps, some.F, module, told), modes(maps, P.float(), calibration.together())
        X = {name: triangulated(None, replace(some, output=fused[name]))[1]["robust"] for name in ("alone", "repaired")}
        X |= {"robust_reprojected": X["alone"], "space": found.near_best(found.share).double().numpy()}
        X["space_tree"] = found.near_best(along_bones(found, body)).double().numpy()
        pixels = {name: _argmax(at) for name, at in fused.items()}
        for name in X.keys() - fused.keys():
            pixels[name] = np.rint(project(X[name], P.numpy()[:, None]).swapaxes(1, 2) / 4)
        for name, at in pixels.items():
            off = np.linalg.norm(at - some.joints.numpy() / 4, axis=-1)
            right.setdefault(name, []).append(np.where(asked, off < NEAR, np.nan))
            if name in X:
                away.setdefault(name, []).append(1000 * np.linalg.norm(X[name] - some.joints_3d.numpy(), axis=-1))
    made = {name: {"found": np.concatenate(each)} for name, each in right.items()}
    return {name: of | ({"mm": np.concatenate(away[name])} if name in away else {}) for name, of in made.items()}


def _told(calibration: Calibration, pixels: int = 64 * 64) -> RepairedFusion:
    """The repaired module as it becomes for another network: nothing but that network's three numbers, none trained.

    The narrowest band and its likeliest place were chosen on MoveNet's maps of synthetic people of subject 8, patched.
    """
    module = RepairedFusion(0.5, collect="max").requires_grad_(False)
    module.log_sharpness.fill_(math.log(calibration.sharpness))
    module.slope.fill_(calibration.slope)
    module.offset.fill_(calibration.offset + math.log(pixels))  # of a pixel among so many
    module.gain.fill_(1.0)
    return module


def _fused(maps: Tensor, F: Tensor, module: RepairedFusion, told: RepairedFusion) -> dict[str, Tensor]:
    """The maps (N, V, J, h, w) alone, and fused along lines by each method."""
    made = {"alone": maps, "repaired": module.all_views(maps, F), "repaired_told": told.all_views(maps, F)}
    one, three, maxima, narrow = (torch.zeros_like(maps) for _ in range(4))
    views = maps.shape[1]
    for r in range(views):
        for k in range(1, views):
            s = (r + k) % views
            wide, thin = (Pencil.from_fundamental(F[:, s, r], tuple(maps.shape[-2:]), t) for t in (1.0, told.threshold))
            ridge = wide.sum(maps[:, s])
            one[:, r] += ridge if k == 1 else 0
            three[:, r] += ridge
            maxima[:, r] += wide.max(maps[:, s]).clamp_min(0)
            narrow[:, r] += thin.max(maps[:, s]).clamp_min(0)
    sums = {"original": one, "original_three": three, "line_max": maxima, "line_max_narrow": narrow}
    return made | {name: maps + each for name, each in sums.items()}


def _argmax(maps: Tensor) -> np.ndarray:
    place = maps.flatten(-2).argmax(-1)
    return torch.stack([place % maps.shape[-1], place // maps.shape[-1]], -1).double().numpy()


def _answer(data: dict[str, np.ndarray]) -> None:
    """Ask all cases, and store the answers."""
    arrays, calibration = {}, Calibration(*map(float, data["calibration"]))
    for name, case in tqdm(cases(data).items(), unit="case"):
        arrays[f"{name}/case/frame"] = case["frame"]
        for method, of in _answers(case, repaired("best"), calibration, bodies.grown("COCO_17")).items():
            arrays |= {f"{name}/{method}/{key}": values for key, values in of.items()}
    save_arrays(ANSWERS, arrays)


def _main(arguments: list[str] | None = None) -> int:
    """Store what MoveNet sees of both recordings."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.studies.real", description=_main.__doc__)
    parser.add_argument("single", help="folder of the recording of one person, with its detections")
    parser.add_argument("second", help="folder of the same with the second person")
    chosen = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gathered = _gather(chosen.single, chosen.second)
    save_arrays(STORED, gathered)
    _answer(gathered)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
