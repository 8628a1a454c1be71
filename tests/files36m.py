"""Human3.6M's annotations and pictures as its two layouts have them, made of the embedded people."""

import pickle
from dataclasses import replace
from functools import cache

import cv2
import numpy as np

from epiutils.data import people
from epiutils.data.views import JOINTS

CAMERAS = ("54138969", "55011271", "58860488", "60457274")
ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Posing", "Purchases", "Sitting", "SittingDown",
           "Smoking", "TakingPhoto", "Waiting", "Walking", "WalkingDog", "WalkingTogether")  # fmt: skip
# The joints that karfly's labels list, by name: right leg up, left leg down, trunk, right arm up, left arm down, nose
KARFLY = ("rank", "rkne", "rhip", "lhip", "lkne", "lank", "root", "belly", "neck", "head",
          "rwri", "relb", "rsho", "lsho", "lelb", "lwri", "nose")  # fmt: skip
TO_KARFLY = [JOINTS.index(name) for name in KARFLY]
TO_TOOLBOX = [KARFLY.index(name) for name in JOINTS]
PAIRED = ("hip", "kne", "ank", "sho", "elb", "wri")
OTHER = {f"{a}{name}": f"{b}{name}" for name in PAIRED for a, b in ("lr", "rl")}
MIRRORED = [JOINTS.index(OTHER.get(name, name)) for name in JOINTS]
DIRECTIONS, GREETING, SITTING_DOWN, WAITING = 2, 5, 10, 13
SHOWN = [(9, DIRECTIONS, 1, 1), (9, DIRECTIONS, 1, 6), (11, WAITING, 2, 1)]  # instants with pictures


@cache
def rig(subject):
    """The subject's four cameras, as in Human3.6M: named by number, with lens distortion."""
    cameras = []
    for v, camera in enumerate(people.rig()):
        K = camera.K + np.array([[0.1 * subject, 0, 0], [0, 0, 0], [0, 0, 0]])
        lens = (-0.3 + 0.01 * v, 0.25, 1e-3, -2e-3 + 1e-4 * subject, 0.01)
        cameras.append(replace(camera, K=K, distortion=lens, name=CAMERAS[v]))
    return cameras


@cache
def body(instant):
    """The person's joints at that instant, (17, 3) metres, in the toolbox's order."""
    subject, action, subaction, image = instant
    return people.pose(subject, people.ACTIONS[action % len(people.ACTIONS)], 3 * image, seed=subaction)


def pixels(camera, X, distortion=True):
    """OpenCV's projection of world points (N, 3)."""
    lens = camera.distortion if distortion else np.zeros(5)
    return cv2.projectPoints(X, cv2.Rodrigues(camera.R)[0], camera.t, camera.K, lens)[0][:, 0]


def square(camera, X):
    """The person's box: left, top, right, bottom in whole px, as wide as high."""
    x = pixels(camera, X)
    low, side = np.floor(x.min(0) - 60).astype(int), int((np.ptp(x, axis=0)).max() + 120)
    return np.concatenate([low, low + side])


def toolbox_record(instant, v):
    """What H36M-Toolbox's generate_labels.py writes for a picture."""
    subject, action, subaction, image = instant
    camera, X = rig(subject)[v], body(instant)
    box, k = square(camera, X).astype(float), camera.distortion
    folder = f"s_{subject:02d}_act_{action:02d}_subact_{subaction:02d}_ca_{v + 1:02d}"
    return {
        "image": f"{folder}/{folder}_{image:06d}.jpg",
        "joints_2d": pixels(camera, X),
        "joints_3d": X * 1000 + 7,  # another, universal skeleton; not to be used
        "joints_3d_camera": (X @ camera.R.T + camera.t) * 1000,
        "joints_vis": np.ones((17, 3)),
        "video_id": 0,
        "image_id": image,
        "subject": subject,
        "action": action,
        "subaction": subaction,
        "camera_id": v,
        "source": "h36m",
        "camera": {
            "R": np.array(camera.R),
            "T": 1000 * camera.C[:, None],
            "fx": camera.K[:1, 0],
            "fy": camera.K[1:2, 1],
            "cx": camera.K[:1, 2],
            "cy": camera.K[1:2, 2],
            "k": k[[0, 1, 4], None],
            "p": k[2:4, None],
        },
        "center": (0.5 * (box[0] + box[2]), 0.5 * (box[1] + box[3])),
        "scale": ((box[2] - box[0]) / 200.0, (box[3] - box[1]) / 200.0),
        "box": box,
    }


def records(instants):
    return [toolbox_record(instant, v) for v in range(4) for instant in instants]  # whole videos, one after the other


def write_toolbox(path, content, name="h36m_validation.pkl", protocol=4):
    (path / "annot").mkdir(parents=True, exist_ok=True)
    (path / "images").mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (path / "annot" / name).write_bytes(data)
    return path


def labels(instants):
    """What generate-labels-npy-multiview.py of learnable-triangulation-pytorch saves."""
    subjects = [1, 5, 6, 7, 8, 9, 11]
    names = [f"{action}-{n}" for action in ACTIONS for n in (1, 2)]
    cameras = np.empty(
        (7, 4),
        [("R", np.float32, (3, 3)), ("t", np.float32, (3, 1)), ("K", np.float32, (3, 3)), ("dist", np.float32, 5)],
    )
    for s, subject in enumerate(subjects):
        for v, camera in enumerate(rig(subject)):
            cameras[s, v] = camera.R, 1000 * camera.t[:, None], camera.K, camera.distortion
    table = np.zeros(
        len(instants),
        [("subject_idx", np.int8), ("action_idx", np.int8), ("frame_idx", np.int16),
         ("keypoints", np.float32, (17, 3)), ("bbox_by_camera_tlbr", np.int16, (4, 4))],
    )  # fmt: skip
    for row, instant in zip(table, instants, strict=True):
        subject, action, subaction, image = instant
        X = body(instant)
        boxes = np.stack([square(camera, X) for camera in rig(subject)])[:, [1, 0, 3, 2]]
        row["subject_idx"], row["action_idx"] = subjects.index(subject), 2 * (action - 2) + subaction - 1
        row["frame_idx"], row["keypoints"], row["bbox_by_camera_tlbr"] = image - 1, 1000 * X[TO_KARFLY], boxes
    return {
        "subject_names": [f"S{s}" for s in subjects],
        "camera_names": list(CAMERAS),
        "action_names": names,
        "cameras": cameras,
        "table": table,
    }


def write_karfly(path, content, name="extra/human36m-multiview-labels-GTbboxes.npy"):
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / "processed").mkdir(exist_ok=True)
    if isinstance(content, bytes):
        np.save(path / name, np.array({}))
        header = (path / name).read_bytes().partition(b"\n")[0] + b"\n"
        (path / name).write_bytes(header + content)
    else:
        np.save(path / name, content)
    return path


def write_jpeg(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 97])
