"""A small recording of a standing person, as Pose2Sim's folders have it."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
from rigs import look_at

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import read_calib, write_calib

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


def camera(i, distortion=(-0.1, 0.05, 1e-3, -2e-3), fisheye=False):
    """Camera i of a ring, 4 m from the person, looking at its middle; H ≠ W, off-centre, fx ≠ fy, distorted."""
    C, K = (4 * np.sin(0.4 + 1.9 * i), 4 * np.cos(0.4 + 1.9 * i), 1.3), [[300, 0, 77 + i], [0, 302, 124 - i], [0, 0, 1]]
    whole = look_at(C, (0, 0, 0.9), size=(WIDTH, HEIGHT), name=f"cam{i + 1:02}")
    return replace(whole, K=K, distortion=distortion, fisheye=fisheye)


def keypoints(x, confidence):
    return np.column_stack([x, confidence]).ravel().tolist()


def write_json(file, people):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        json.dumps({"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": p} for p in people]})
    )


def calib(path):
    """The rig file of a recording."""
    return path / "calibration" / "Calib.toml"


def qualisys(cameras, first="", **changes):
    """Cameras as Qualisys writes them, with some attributes changed."""
    lines = ["<?xml version='1.0' encoding='ASCII'?>", "<calibration>", "<cameras>", first]
    for camera in cameras:
        k, M = camera.distortion, np.diag([1, -1, -1]) @ camera.R
        values = {f"r{i}{j}": M[i - 1, j - 1] for i in (1, 2, 3) for j in (1, 2, 3)}
        values |= dict(zip("xyz", 1000 * camera.C, strict=True))
        inside = {"focalLengthU": camera.K[0, 0], "focalLengthV": camera.K[1, 1], "radialDistortion1": k[0]}
        inside |= {"radialDistortion2": k[1], "tangentalDistortion1": k[2], "tangentalDistortion2": k[3]}
        inside |= {"centerPointU": camera.K[0, 2] + 8, "centerPointV": camera.K[1, 2] + 4}
        field = {"left": 8, "top": 4, "right": camera.size[0] + 7, "bottom": camera.size[1] + 3}
        parts = {"fov_video": field, "transform": values, "intrinsic": {k: 64 * v for k, v in inside.items()}}
        lines.append(f'<camera serial="{camera.name}" model="Miqus Video">')
        for part, known in parts.items():
            known = {k: repr(float(v)) for k, v in known.items()} | changes
            lines.append(f"<{part} " + " ".join(f'{k}="{v}"' for k, v in known.items() if v is not None) + "/>")
        lines.append("</camera>")
    return "\n".join([*lines, "</cameras>", "</calibration>"])


def write_video(file, pictures):
    """A video of these pictures (H, W, 3) BGR; an .avi's are kept exactly."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = cv2.VideoWriter_fourcc(*("FFV1" if file.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(file), kind, 30, pictures[0].shape[1::-1])
    assert writer.isOpened()
    for picture in pictures:
        writer.write(picture)
    writer.release()


def write_recording(
    path, model="BODY_25B", frames=range(3), n=2, folder="pose/{}_json", name="{}_{:012}_keypoints.json", **lens
):
    """A recording of the standing person walking sideways.  Returns its cameras, and detections (V, T, J, 3)."""
    cameras = [camera(i, **lens) for i in range(n)]
    write_calib(calib(path), cameras)
    rng = np.random.default_rng(5)
    detections = np.empty((n, len(frames), len(JOINTS[model]), 3))
    for v, c in enumerate(cameras):
        for t, number in enumerate(frames):
            detections[v, t, :, :2] = c.project(body(model, (0.02 * t, 0, 0)))
            detections[v, t, :, 2] = rng.uniform(0.3, 1, len(JOINTS[model]))
            file = path / folder.format(c.name) / name.format(c.name, number)
            write_json(file, [keypoints(detections[v, t, :, :2], detections[v, t, :, 2])])
    return cameras, detections


def write_qualisys(path):
    """The recording's rig as Qualisys writes it, instead of its Calib.toml.  Returns the file."""
    file = calib(path).with_name("Calib.qca.txt")
    file.write_text(qualisys(read_calib(calib(path))))
    calib(path).unlink()
    return file


def write_alphapose(path, name="{}.json", ending=".jpg"):
    """The recording's detections as one JSON file a camera for all frames.  Returns the files."""
    files = []
    for old in sorted((path / "pose").iterdir()):
        found = []
        for t, file in enumerate(sorted(old.iterdir())):
            (person,) = json.loads(file.read_text())["people"]
            found.append({"image_id": f"{t}{ending}", "category_id": 1, "keypoints": person["pose_keypoints_2d"]})
        shutil.rmtree(old)
        files.append(path / "pose" / name.format(old.name.removesuffix("_json")))
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(json.dumps(found))
    return files
