"""A small recording of a standing person, as Pose2Sim's folders have it."""

import json
from dataclasses import replace

import numpy as np
from rigs import look_at

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import write_calib

WIDTH, HEIGHT = 160, 240
STANDING = {  # a person of 1.8 m facing +y, in metres: x to the person's left, z up
    "nose": (0, 0.1, 1.62), "eye": (0.03, 0.09, 1.66), "ear": (0.07, 0, 1.64), "neck": (0, 0, 1.5),
    "head": (0, 0, 1.8), "sho": (0.18, 0, 1.45), "elb": (0.25, 0, 1.15), "wri": (0.27, 0.1, 0.9),
    "hip": (0.1, 0, 0.95), "midhip": (0, 0, 0.95), "kne": (0.11, 0.03, 0.5), "ank": (0.11, 0, 0.08),
    "face": (0, 0.1, 1.6), "hand": (0.27, 0.13, 0.86), "bigtoe": (0.12, 0.2, 0.02),
    "smalltoe": (0.16, 0.17, 0.02), "heel": (0.11, -0.05, 0.02),
}  # fmt: skip


def body(model, place=(0, 0, 0)):
    """The standing person's joints (J, 3) in the model's order."""
    X = []
    for joint in JOINTS[model]:
        number = int("".join(c for c in joint if c.isdecimal()) or 0)  # of a point of the face or a hand
        joint = joint.rstrip("0123456789")
        side = 1 if joint in STANDING else {"l": 1, "r": -1}[joint[0]]
        X.append(np.array(STANDING.get(joint) or STANDING[joint[1:]]) * (side, 1, 1) + place)
        X[-1] += 0.002 * np.array([number % 5, number % 7, number % 3])
    return np.array(X)


def camera(i):
    """Camera i of a ring, 4 m from the person, looking at its middle; H ≠ W, off-centre, fx ≠ fy, distorted."""
    C, K = (4 * np.sin(0.4 + 1.9 * i), 4 * np.cos(0.4 + 1.9 * i), 1.3), [[300, 0, 77 + i], [0, 302, 124 - i], [0, 0, 1]]
    lens = (-0.1, 0.05, 1e-3, -2e-3)
    return replace(look_at(C, (0, 0, 0.9), size=(WIDTH, HEIGHT), distortion=lens, name=f"cam{i + 1:02}"), K=K)


def keypoints(x, confidence):
    return np.column_stack([x, confidence]).ravel().tolist()


def write_json(file, people):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": p} for p in people]})
    )


def write_recording(
    path, model="BODY_25B", frames=range(3), n=2, folder="pose/{}_json", name="{}_{:012}_keypoints.json"
):
    """A recording of the standing person walking sideways.  Returns its cameras, and detections (V, T, J, 3)."""
    cameras = [camera(i) for i in range(n)]
    (path / "calibration").mkdir(parents=True)
    write_calib(path / "calibration" / "Calib.toml", cameras)
    rng = np.random.default_rng(5)
    detections = np.empty((n, len(frames), len(JOINTS[model]), 3))
    for v, c in enumerate(cameras):
        for t, number in enumerate(frames):
            detections[v, t, :, :2] = c.project(body(model, (0.02 * t, 0, 0)))
            detections[v, t, :, 2] = rng.uniform(0.3, 1, len(JOINTS[model]))
            file = path / folder.format(c.name) / name.format(c.name, number)
            write_json(file, [keypoints(detections[v, t, :, :2], detections[v, t, :, 2])])
    return cameras, detections
