"""The embedded benchmark's pictures: articulated people, ray-cast as shaded solids into four Human3.6M-like views.

The world is in metres, z up, with the floor at z = 0; the body's axes are x forward, y left, z up.  A pixel depends
on integers only (subject, action, frame, seed, view): what the ray caster is given is rounded to 1e-9.
The tables of looks, motions and furniture are in `people.toml`.
About 29 % of the joints are hidden, 19 % without furniture.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from epiutils.cameras import Camera, crop_affine
from epiutils.data.raycast import ROOM, Room, Solid, plain, render
from epiutils.data.views import JOINTS, View

_FPS = 50

_TABLES = SimpleNamespace(**tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")))
_PEOPLE = {who["subject"]: who for who in _TABLES.people}
SUBJECTS, ACTIONS = tuple(_PEOPLE), tuple(_TABLES.motions)


def rig() -> list[Camera]:
    """The four cameras "cam1" … "cam4", 1000×1000 px, at the corners of a 4×9 m room; no two are mirror images."""
    cameras = []
    for name, centre, aim, f, principal, roll in (
        ("cam1", (1.97, 4.46, 1.52), (0.06, 0.10, 0.93), 1145.1, (512.5, 515.4), 0.4),
        ("cam2", (2.03, -4.52, 1.44), (-0.05, -0.07, 0.90), 1149.7, (508.8, 508.1), -0.6),
        ("cam3", (-1.94, -4.41, 1.56), (0.03, 0.04, 0.96), 1147.6, (519.8, 501.4), 0.2),
        ("cam4", (-2.05, 4.55, 1.49), (-0.09, 0.02, 0.91), 1143.2, (514.9, 506.3), -0.3),
    ):
        forward = np.subtract(aim, centre) / np.linalg.norm(np.subtract(aim, centre))
        right = np.cross(forward, (0, 0, 1)) / np.linalg.norm(np.cross(forward, (0, 0, 1)))
        R = _turned(z=roll) @ np.stack([right, np.cross(forward, right), forward])
        K = ((f, 0, principal[0]), (0, f - 0.8, principal[1]), (0, 0, 1))
        cameras.append(Camera(K=K, R=R, t=-R @ np.array(centre), size=(1000, 1000), name=name))
    return cameras


_default_rig = rig  # `scene` has an argument of the same name


def _rng(subject: int, action: str, seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, subject, ACTIONS.index(action), *purpose))


def _turned(frame: np.ndarray | None = None, **degrees: np.ndarray) -> np.ndarray:
    """Frames (..., 3, 3) turned about their own axes x, y, z by angles (...), one after the other."""
    for axis, angle in degrees.items():
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        R = np.zeros((*np.shape(c), 3, 3)) + np.eye(3)
        R[..., i, i], R[..., i, j], R[..., j, i], R[..., j, j] = c, -s, s, c
        frame = R if frame is None else frame @ R
    return frame


def _check(subject: int, action: str, frame: int, seed: int, size: int = 8) -> None:
    if not isinstance(subject, Integral) or subject not in SUBJECTS:
        raise ValueError(f"unknown subject {subject!r}: the subjects are {SUBJECTS}")
    if action not in ACTIONS:
        raise ValueError(f"unknown action {action!r}: the actions are {', '.join(ACTIONS)}")
    for name, value, least in (("frame", frame, 0), ("seed", seed, 0), ("size", size, 8)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _lengths(subject: int) -> dict[str, float]:
    """Distances along the body in metres, from the average figure's fractions of its height."""
    person = _PEOPLE[subject]
    h, legs = person["height"], person["legs"]
    trunk = h * (1 - 0.535 * legs) / 0.465
    return {
        "hip": 0.060 * h * person["girth"] ** 0.5, "thigh": 0.247 * h * legs, "shin": 0.243 * h * legs,
        "ankle": 0.045 * h, "heel": 0.032 * h, "sole": 0.022 * h, "toe": 0.088 * h, "belly": 0.133 * trunk,
        "chest": 0.147 * trunk, "head": 0.16 * h, "nose": 0.105 * h, "face": 0.052 * h,
        "shoulder": 0.1 * h * person["shoulders"], "upper": 0.166 * h, "lower": 0.148 * h,
    }  # fmt: skip


def _angles(subject: int, action: str, frames: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Joint angles in degrees, (F,) each: the action's table, with the seed's side, tempo, amplitudes and sway."""
    rng, motion, still = _rng(subject, action, seed, 0), _TABLES.motions[action], action == "sit"
    rest, stances = _TABLES.rest_arms, _TABLES.stances
    side = "lr" if rng.random() < 0.5 else "rl"  # which side acts
    tempo, gain, start = rng.uniform(0.85, 1.2), rng.uniform(0.75, 1.15), rng.uniform(0, 360)
    arms, legs, idle = rng.integers(len(rest), size=2), stances[rng.integers(len(stances))], {}
    for s, arm, leg in zip("ab", arms, (legs[:3], legs[3:]), strict=True):
        for names, values in ((("arm", "raise", "rot", "elbow"), rest[arm]), (("hip", "knee", "spread"), leg)):
            if f"{names[0]}_{s}" not in motion:
                idle |= {f"{name}_{s}": (value, 0) for name, value in zip(names, values, strict=True)}
    time, angles = frames / _FPS, {}
    cycle = 360 * tempo * time / motion["period"] + start
    for name in _TABLES.order:
        base, _, suffix = name.partition("_")
        spread, lowest, highest = _TABLES.limits[base]
        offset, scale, phases = rng.normal(0, spread), rng.uniform(0.85, 1.15), rng.uniform(0, 360, 2)
        mean, amplitude, phase, harmonic = (*motion.get(name, idle.get(name, (0, 0))), 0, 1)[:4]
        sway = np.sin(np.radians(360 * time / 3.7 + phases[0])) + np.sin(np.radians(360 * time / 6.1 + phases[1]))
        value = mean + offset + 0.35 * spread * sway * (not still or base not in ("hip", "spread", "knee", "toe"))
        value = value + gain * scale * amplitude * np.sin(np.radians(harmonic * cycle + phase))
        value = -value if base in _TABLES.mirrored and side == "rl" else value
        angles[f"{base}_{side['ab'.index(suffix)]}" if suffix else base] = np.clip(value, lowest, highest)
    if action not in _TABLES.lifts and not still:
        angles |= _level_knees(angles, _lengths(subject))
    if action in ("walk", "carry"):
        stride = 4 * 0.5 * _PEOPLE[subject]["height"] * np.sin(np.radians(gain * motion["hip_a"][1]))
        angles["path"] = stride * tempo * time / motion["period"]  # metres walked
    return angles


def _level_knees(a: dict[str, np.ndarray], n: dict[str, float]) -> dict[str, np.ndarray]:
    """Knee angles that bend the leg that reaches lower until both feet stand on one floor; from angles and lengths."""
    hip, knee, toe, spread = (np.radians([a[k + "_l"], a[k + "_r"]]) for k in ("hip", "knee", "toe", "spread"))
    foot = n["ankle"] * np.cos(toe) + n["toe"] * np.sin(np.maximum(toe, 0))  # (2, F), left and right
    thigh, shin = (n[name] * np.cos(spread) for name in ("thigh", "shin"))
    reach = (thigh * np.cos(hip) + shin * np.cos(knee - hip) + foot).min(0)
    bent = hip + np.arccos(np.clip((reach - foot - thigh * np.cos(hip)) / shin, -1, 1))
    return dict(zip(("knee_l", "knee_r"), np.degrees(np.maximum(knee, bent)), strict=True))


def _skeleton(subject: int, action: str, frames: np.ndarray, seed: int) -> tuple[dict, dict]:
    """Forward kinematics: points (F, 3) in metres by name, and the frames (F, 3, 3) of the limbs, columns x, y, z."""
    a, n = _angles(subject, action, frames, seed), _lengths(subject)
    rng = _rng(subject, action, seed, 1)
    place, heading = rng.uniform((-0.45, -0.9), (0.45, 0.9)), rng.uniform(-180, 180)
    if "path" in a:  # around a circle, one way or the other
        radius, way = rng.uniform(0.65, 0.95), rng.choice((-1, 1))
        around = np.radians(heading) + way * a["path"] / radius
        place = place * 0.6 + radius * np.stack([np.cos(around), np.sin(around)], axis=-1)
        heading = np.degrees(around) + 90 * way
    f, p = {"ground": _turned(z=heading + a["yaw"])}, {"root": np.zeros((len(frames), 3))}
    half = _turned(y=a["bend"] / 2, x=-a["lean"] / 2, z=a["twist"] / 2)
    f["pelvis"] = _turned(f["ground"], y=a["pitch"], x=a["roll"])
    f["waist"] = f["pelvis"] @ half
    f["chest"] = f["waist"] @ half
    f["head"] = _turned(f["chest"], z=a["turn"], y=a["nod"], x=-a["tilt"])
    p["belly"] = p["root"] + f["waist"] @ (0, 0, n["belly"])
    p["neck"] = p["belly"] + f["chest"] @ (0, 0, n["chest"])
    p["nose"] = p["neck"] + f["head"] @ (n["face"], 0, n["nose"])
    p["head"] = p["neck"] + f["head"] @ (0.004, 0, n["head"])
    for s, left in (("l", 1), ("r", -1)):
        f[s + "thigh"] = _turned(f["ground"], y=-a["hip_" + s], x=left * a["spread_" + s], z=left * 8.0)
        f[s + "shin"] = _turned(f[s + "thigh"], y=a["knee_" + s])
        f[s + "foot"] = _turned(f[s + "shin"], y=np.clip(a["hip_" + s] - a["knee_" + s] + a["toe_" + s], -45, 45))
        f[s + "upper"] = _turned(f["chest"], y=-a["arm_" + s], x=left * a["raise_" + s], z=-left * a["rot_" + s])
        f[s + "lower"] = _turned(f[s + "upper"], y=-a["elbow_" + s])
        p[s + "hip"] = p["root"] + f["pelvis"] @ (0, left * n["hip"], 0)
        p[s + "kne"] = p[s + "hip"] + f[s + "thigh"] @ (0, 0, -n["thigh"])
        p[s + "ank"] = p[s + "kne"] + f[s + "shin"] @ (0, 0, -n["shin"])
        p[s + "heel"] = p[s + "ank"] + f[s + "foot"] @ (-n["heel"], 0, n["sole"] * 1.15 - n["ankle"])
        p[s + "toe"] = p[s + "ank"] + f[s + "foot"] @ (n["toe"], 0, n["sole"] - n["ankle"])
        p[s + "sho"] = p["neck"] + f["chest"] @ (0, left * n["shoulder"], -0.012)
        p[s + "elb"] = p[s + "sho"] + f[s + "upper"] @ (0, 0, -n["upper"])
        p[s + "wri"] = p[s + "elb"] + f[s + "lower"] @ (0, 0, -n["lower"])
    lowest = [p[s + end][:, 2] - n["sole"] * r for s in "lr" for end, r in (("heel", 1.15), ("toe", 1.0))]
    anchor = p["root"] if "path" in a or action == "sit" else (p["lank"] + p["rank"]) / 2
    move = np.column_stack([np.broadcast_to(place, (len(frames), 2)) - anchor[:, :2], -np.min(lowest, axis=0)])
    return {k: np.round(v + move, 9) for k, v in p.items()}, {k: np.round(v, 9) for k, v in f.items()}


@lru_cache(maxsize=1)
def _instant(subject: int, action: str, frame: int, seed: int) -> tuple[dict, dict]:
    """The skeleton at one frame: points (3,) and frames (3, 3) by name."""
    return tuple({k: v[0] for k, v in d.items()} for d in _skeleton(subject, action, np.array([frame]), seed))


def pose(subject: int, action: str, frame: int, seed: int = 0) -> np.ndarray:
    """The joints (17, 3) of a person at one instant, metres in the world, 50 frames a second.

    Joint angles of a periodic motion, plus the seed's own tempo, amplitude, side, sway, place and heading, through
    the skeleton of the subject; the lowest point of the feet is on the floor, z = 0.  Continuous in `frame`.
    Raises ValueError for an unknown subject or action, and where frame or seed is not an integer of at least 0.
    """
    _check(subject, action, frame, seed)
    points, _ = _instant(subject, action, frame, seed)
    return np.stack([points[name] for name in JOINTS])


# Paints, as `raycast.Solid` has them
def _limb(q, size, colours, setting):
    """Cloth (first colour) up to `setting` of the limb's length, then skin (second), with a hem between them."""
    along, cover = q[2] / size[2], setting[0]
    rgb = np.where(along < cover, colours[0], colours[1])
    return np.where(np.abs(along - cover + 0.04) < 0.035, colours[0] * 0.78, rgb)


def _shirt(q, size, colours, setting):
    """The torso's cloth (colour, accent, skin): neckline and pattern in front, yoke and print at the back."""
    y, z = q[1], q[2] - setting[1]  # z: from the top of the chest, metres
    front, side, dark, style = q[0] > 0, np.abs(y), colours[0] * 0.72, setting[0].astype(int)
    pocket, rgb = (y > 0.045) & (y < 0.115) & (np.abs(z + 0.10) < 0.032), colours[0]
    for where, colour in (
        ((style == 0) & front & ((y - 0.01) ** 2 + (z + 0.13) ** 2 < 0.0042), colours[1]),
        ((style == 1) & front & ((side < 0.017) | pocket), dark),
        ((style == 1) & front & (side < 0.009) & (np.abs((z * 14) % 1 - 0.5) < 0.16), colours[1]),  # buttons
        ((style == 2) & ((z * 9) % 1 < 0.45) & (front | (z < -0.12)), colours[1]),
        ((style == 3) & front & (side < 0.05), colours[1]),
        ((style == 3) & front & (np.abs(side - 0.055) < 0.012), dark),
        ((style == 4) & front & (z > -0.16), colours[1]),
        ((style != 2) & ~front & (side < 0.075) & (np.abs(z + 0.13) < 0.04), colours[1]),
        (~front & (np.abs(z + 0.045) < 0.006), dark),
        (front & (side < 0.62 * (z - 0.005)), colours[2]),
    ):
        rgb = np.where(where, colour, rgb)
    return rgb


def _trousers(q, size, colours, setting):
    """The hips' cloth, on a unit ball: a belt with a buckle in front, pockets at the back."""
    dark, height, side = colours[0] * 0.6, np.abs(q[2] - 0.56), np.abs(q[1])
    rgb = np.where(height < 0.14, dark, colours[0])
    rgb = np.where((q[0] > 0) & (height < 0.12) & (side < 0.13), colours[1], rgb)
    return np.where((q[0] < 0) & (np.abs(side - 0.45) < 0.2) & (np.abs(q[2] + 0.05) < 0.25), dark, rgb)


def _face(q, size, colours, setting):
    """Skin with eyes, brows, cheeks and mouth on a unit ball that looks along x; setting 1 adds a beard."""
    (skin, hair), y, side, z = colours[:2], q[1] ** 2, np.abs(q[1]), q[2]
    rgb = skin
    for where, colour in (
        ((side - 0.5) ** 2 + (z + 0.3) ** 2 < 0.035, skin * np.float32([[1.0], [0.86], [0.84]])),  # cheeks
        ((setting[0] > 0) & (z < -0.32 - 0.3 * (side - 0.55)), hair),
        ((np.abs(z - 0.43 + 1.6 * (side - 0.36) ** 2) < 0.04) & (np.abs(side - 0.37) < 0.19), hair * 0.8),  # brows
        ((side - 0.36) ** 2 / 0.033 + (z - 0.13) ** 2 / 0.026 < 1, np.float32([[0.97], [0.97], [0.95]])),  # eyes
        ((side - 0.35) ** 2 + (z - 0.12) ** 2 < 0.0125, np.float32([[0.10], [0.08], [0.09]])),
        (y / 0.09 + (z + 0.53 - y * 0.9) ** 2 / 0.004 < 1, np.float32([[0.68], [0.25], [0.25]])),  # mouth
    ):
        rgb = np.where((q[0] > 0) & where, colour, rgb)
    return rgb


def _shoe(q, size, colours, setting):
    """A shoe from heel to toe, local x up: a pale sole, a toe cap, laces."""
    along = q[2] / size[2]
    laces = (along > 0.3) & (along < 0.8) & (np.abs((along * 7) % 1 - 0.5) < 0.2) & (q[0] > 0.3 * size[0])
    rgb = np.where(along > 0.86, colours[0] * 0.65, colours[0])
    return np.where(laces | (q[0] < -0.45 * size[0]), colours[1], rgb)


def _strands(q, size, colours, setting):
    """Soft stripes along z, as of hair."""
    return colours[0] * (1 + 0.16 * (np.abs((q[1] * 5) % 2 - 1) - 0.5))


def _wood(q, size, colours, setting):
    """Boards: a faint grain along the longest side, and edges that are a little darker."""
    grain = np.abs((q[0] * 23 + q[2] * 9 + np.abs((q[1] * 6) % 2 - 1)) % 2 - 1)
    edge = (size - np.abs(q) < 0.012).sum(0) > 1
    return colours[0] * np.where(edge, 0.8, 1 - 0.12 * grain)


def _doors(q, size, colours, setting):
    """A cabinet: two doors with gaps and knobs on the sides that look along ±x."""
    gap = (np.abs(np.abs(q[1]) - size[1] / 2) > size[1] / 2 - 0.02) | (np.abs(q[2]) > size[2] - 0.03)
    knob = (np.abs(np.abs(q[1]) - 0.06) < 0.014) & (np.abs(q[2] - 0.1) < 0.03)
    flat = size[0] - np.abs(q[0]) < 0.004
    return np.where(flat & knob, colours[1], np.where(flat & gap, colours[0] * 0.75, colours[0]))


def _body(subject: int, action: str, seed: int, p: dict, f: dict) -> list[Solid]:
    """The person's solids around the points and frames of one instant."""
    who, n, rng = _PEOPLE[subject], _lengths(subject), _rng(subject, action, seed, 2)
    h, w = who["height"], who["height"] * who["girth"] ** 0.5
    tint = lambda colour: np.clip(np.array(colour) * rng.uniform(0.88, 1.1) + rng.uniform(-0.05, 0.05, 3), 0.03, 1)
    style, *colours = who["shirts"][rng.integers(len(who["shirts"]))]
    base, _ = shirt = [tint(colour) for colour in colours]
    trousers, shoe = (tint(who[k][rng.integers(len(who[k]))]) for k in ("trousers", "shoes"))
    sole = np.array((0.95, 0.94, 0.9)) if shoe.max() < 0.7 else np.array((0.3, 0.3, 0.33))
    skin, hair, (arm, leg) = np.array(who["skin"]), np.array(who["hair_colour"]), who["cover"]
    pelvis, waist, chest, root, belly, neck = f["pelvis"], f["waist"], f["chest"], p["root"], p["belly"], p["neck"]
    at = lambda point, frame, *v: point + frame @ (h * np.array(v))
    limb = lambda part, a, b, ra, rb, x, *paint, **more: Solid.cone(a, b, ra * w, rb * w, x, *paint, part=part, **more)
    solids = [
        Solid.ball(at(root, pelvis, 0, 0, 0.012), pelvis, (0.066 * w, 0.094 * w, 0.072 * h), _trousers, trousers,
             (0.85, 0.78, 0.5), part="torso"),
        limb("torso", at(root, waist, 0, 0, 0.04), belly, 0.082, 0.081, waist[:, 0], _shirt, *shirt, skin,
             setting=(style, n["belly"] - 0.04 * h + n["chest"] - 0.055 * h), flat=0.74),
        Solid.cone(at(belly, chest, 0, 0, -0.02), at(neck, chest, 0, 0, -0.055), 0.081 * w, 0.093 * w * who["shoulders"],
             chest[:, 0], _shirt, *shirt, skin, part="torso", setting=(style, n["chest"] - 0.035 * h), flat=0.68),
        limb("neck", at(neck, chest, -0.01, 0, -0.01), at(neck, f["head"], 0, 0, 0.09), 0.036, 0.03, chest[:, 0], plain,
             skin),
    ]  # fmt: skip
    for s in "lr":
        shoulder, elbow, wrist, hip, knee = (p[s + name] for name in ("sho", "elb", "wri", "hip", "kne"))
        ankle, heel, toe = (p[s + name] for name in ("ank", "heel", "toe"))
        upper, lower, thigh, shin, foot = (f[s + name] for name in ("upper", "lower", "thigh", "shin", "foot"))
        thumb = at(wrist, lower, 0, 0, -0.02), at(wrist, lower, 0.024, 0, -0.05)
        instep = at(heel, foot, 0, 0, 0.014), at(ankle, foot, 0.014, 0, 0)
        solids += [
            limb("torso", at(neck, chest, 0, 0, -0.032), shoulder, 0.036, 0.036, chest[:, 0], plain, base),
            limb(s + "upper", shoulder, elbow, 0.036, 0.027, upper[:, 0], _limb, base, skin, setting=(arm, 0)),
            limb(s + "lower", elbow, wrist, 0.0265, 0.019, lower[:, 0], _limb, base, skin, setting=(arm - 1.05, 0)),
            Solid.ball(
                at(wrist, lower, 0, 0, -0.045), lower, (0.023 * w, 0.014 * w, 0.05 * h), plain, skin, part=s + "hand"
            ),
            limb(s + "hand", *thumb, 0.011, 0.008, chest[:, 0], plain, skin),
            limb(s + "thigh", hip, knee, 0.051, 0.036, thigh[:, 0], _limb, trousers, skin, setting=(leg, 0)),
            limb(s + "shin", knee, ankle, 0.0365, 0.024, shin[:, 0], _limb, trousers, skin, setting=(leg - 1.05, 0)),
            Solid.cone(heel, toe, n["sole"] * 1.15, n["sole"], foot[:, 2], _shoe, shoe, sole, part=s + "foot"),
            Solid.cone(*instep, 0.025 * h, 0.024 * h, foot[:, 0], plain, shoe, part=s + "foot"),
        ]
    return solids + _head(h, neck, f["head"], who["hair"], skin, hair)


def _head(h: float, neck: np.ndarray, F: np.ndarray, style: str, skin: np.ndarray, hair: np.ndarray) -> list[Solid]:
    """The head's solids, larger than life by a fifth so that a face is a face at 25 pixels."""
    at = lambda v: neck + F @ (h * np.array(v))
    blob = lambda v, r, *paint, beard=0: Solid.ball(at(v), F, h * np.array(r), *paint, part="head", setting=(beard, 0))
    lock = lambda a, b, ra, rb, **more: Solid.cone(
        at(a), at(b), ra * h, rb * h, F[:, 0], _strands, hair, part="head", **more
    )
    brows, warm = np.array((0.1, 0.08, 0.07)) if style == "cap" else hair, skin * (0.95, 0.84, 0.8)
    top = blob((-0.015, 0, 0.133), (0.058, 0.057, 0.066), _strands, hair)
    back = blob((-0.02, 0, 0.108), (0.05, 0.056, 0.07), _strands, hair)
    return [
        blob((0.004, 0, 0.118), (0.058, 0.051, 0.072), _face, skin, brows, beard=style == "bald"),
        blob((0.062, 0, 0.112), (0.013, 0.0095, 0.013), plain, warm),  # nose and ears
        *(blob((-0.002, y, 0.116), (0.011, 0.009, 0.017), plain, warm) for y in (0.051, -0.051)),
        *{
            "bald": [],
            "short": [top],
            "long": [top, back, lock((-0.034, 0, 0.1), (-0.05, 0, 0.005), 0.046, 0.034, flat=0.7)],
            "tail": [top, back, lock((-0.075, 0, 0.145), (-0.098, 0, 0.04), 0.021, 0.012)],
            "bun": [top, back, blob((-0.07, 0, 0.165), (0.03, 0.03, 0.03), _strands, hair)],
            "cap": [top, blob((0.05, 0, 0.155), (0.05, 0.044, 0.009), plain, hair * 0.8)],
        }[style],
    ]


def _piece(name: str, at: np.ndarray, yaw: float, size: Sequence[float], rng: np.random.Generator) -> list[Solid]:
    """A piece of furniture of (half depth, half width, height) on the floor at (x, y), turned by `yaw` degrees."""
    (a, b, h), F = size, np.round(_turned(z=yaw), 9)
    colours, accents = _TABLES.furniture["colours"], _TABLES.furniture["accents"]
    colour = np.array(colours[rng.integers(len(colours))]) * rng.uniform(0.85, 1.1)
    accent = np.array(accents[rng.integers(len(accents))])
    place = lambda x, y, z: np.round(np.array([*at, 0.0]) + F @ (x, y, z), 9)
    block = lambda x, y, z, half, paint=_wood, c=(colour, accent): Solid.box(place(x, y, z), F, half, paint, *c)
    if name == "cabinet":
        return [block(0, 0, h / 2, (a, b, h / 2), _doors), block(0, 0, h, (a + 0.015, b + 0.015, 0.014))]
    if name == "crate":
        return [block(0, 0, h / 2, (a, b, h / 2)), block(0, 0, h / 2, (a + 0.004, b + 0.004, 0.05), plain, (accent,))]
    if name == "plant":
        green, up = np.array((0.24, 0.46, 0.25)) * rng.uniform(0.8, 1.25), place(0, 0, 0.3)
        solids = [Solid.cone(place(0, 0, 0.06), up, 0.13, 0.17, F[:, 0], plain, accent)]
        for k in range(7):
            tip = place(0.24 * np.cos(k * 2.4), 0.24 * np.sin(k * 2.4), h * (0.5 + 0.075 * k))
            side, leaf = F[:, 2] + 0.1 * F[:, k % 2], green * (0.85 + 0.04 * k)
            solids.append(Solid.cone(up, tip, 0.02, 0.06, side, plain, leaf, flat=0.45))
        return solids
    legs = [block(sx * (a - 0.03), sy * (b - 0.03), h / 2, (0.022, 0.022, h / 2)) for sx in (-1, 1) for sy in (-1, 1)]
    solids = [*legs, block(0, 0, h - 0.02, (a, b, 0.02))]
    if name == "chair":
        solids += [block(-a + 0.02, 0, h + 0.36, (0.018, b - 0.02, 0.1), _wood, (accent,))]
        solids += [block(-a + 0.02, s * (b - 0.03), h + 0.22, (0.018, 0.018, 0.24)) for s in (-1, 1)]
    elif rng.random() < 0.6:  # a table with things on it
        x, y = rng.uniform((-0.5 * a, -0.6 * b), (0.5 * a, 0.6 * b))
        solids += [block(x, y, h + 0.09, (0.09, 0.12, 0.09), plain, (accent,))]
    return solids


@lru_cache(maxsize=16)
def _furniture(subject: int, action: str, seed: int) -> list[Solid]:
    """What stands around the person, clear of all that the motion sweeps, often on the way to a camera."""
    rng = _rng(subject, action, seed, 3)
    p, f = _skeleton(subject, action, np.arange(0, 640, 20), seed)
    swept = np.stack(list(p.values()), axis=1).reshape(-1, 3)  # (F·P, 3)
    middle = (swept[:, :2].min(0) + swept[:, :2].max(0)) / 2
    solids, taken = [], []
    if action == "sit":
        height, ahead = p["root"][0, 2] - 0.078 * _PEOPLE[subject]["height"], f["ground"][0, :2, 0]
        seat, yaw = p["root"][0, :2] + ahead * 0.06, np.degrees(np.arctan2(ahead[1], ahead[0]))
        solids += _piece("chair", seat, yaw, (0.23, 0.22, height), rng)
        taken.append((seat, 0.3))
    wanted, kinds = rng.integers(2, 5), _TABLES.furniture["kinds"]
    for _ in range(24):
        name, low, high = kinds[rng.integers(len(kinds))]
        size, yaw = rng.uniform(low, high), rng.uniform(-180, 180)
        way = ((2, 4.5), (2, -4.5), (-2, -4.5), (-2, 4.5))[rng.integers(4)] - middle
        at = middle + way / np.linalg.norm(way) * rng.uniform(0.45, 1.7) + rng.normal(0, 0.16, 2)
        q = (swept[:, :2] - at) @ _turned(z=yaw)[:2, :2]
        reach, top = max(size[:2]), size[2] + (0.55 if name == "chair" else 0.2)
        near = (np.abs(q) < size[:2] + 0.2).all(-1) & (swept[:, 2] < top)
        outside = (np.abs(at) + reach >= ROOM[:2]).any()
        if not (near.any() or outside or any(np.linalg.norm(at - c) < reach + r for c, r in taken)):
            solids += _piece(name, at, yaw, size, rng)
            taken.append((at, reach))
            if len(taken) == wanted:
                break
    return solids


def _held(p: dict, f: dict) -> list[Solid]:
    """The box between the hands of who carries one."""
    F, ends = f["chest"], np.stack([p[s + "wri"] - f[s + "lower"][:, 2] * 0.05 for s in "lr"])
    middle, width = ends.mean(0) + F[:, 0] * 0.03, max(np.linalg.norm(ends[0] - ends[1]) / 2 - 0.035, 0.08)
    tape = Solid.box(middle, F, (0.112, 0.03, 0.122), plain, (0.9, 0.86, 0.72))
    return [Solid.box(middle, F, (0.11, width, 0.12), _wood, (0.80, 0.64, 0.44)), tape]


def _solids(subject: int, action: str, frame: int, seed: int = 0, occluders: bool = True) -> list[Solid]:
    """The person at one instant, and with `occluders` the furniture and what the hands hold."""
    _check(subject, action, frame, seed)
    p, f = _instant(subject, action, frame, seed)
    person, held = _body(subject, action, seed, p, f), _held(p, f) if action == "carry" else []
    return person + held + _furniture(subject, action, seed) if occluders else person


_CARRIERS = {  # the parts that meet at a joint, and how far inside them it may lie, in metres
    "root": (("torso", "lthigh", "rthigh"), 0.2), "belly": (("torso",), 0.2), "neck": (("torso", "neck", "head"), 0.17),
    "nose": (("head",), 0.08), "head": (("head",), 0.15),
    **{s + "hip": (("torso", s + "thigh"), 0.18) for s in "lr"},
    **{s + "kne": ((s + "thigh", s + "shin"), 0.14) for s in "lr"},
    **{s + "ank": ((s + "shin", s + "foot"), 0.14) for s in "lr"},
    **{s + "sho": (("torso", s + "upper"), 0.14) for s in "lr"},
    **{s + "elb": ((s + "upper", s + "lower"), 0.12) for s in "lr"},
    **{s + "wri": ((s + "lower", s + "hand"), 0.12) for s in "lr"},
}  # fmt: skip


def _visible_joints(
    joints: np.ndarray, z: np.ndarray, depth: np.ndarray, index: np.ndarray, parts: Sequence[str]
) -> np.ndarray:
    """Which joints are seen, from the depth buffer: (17,) bool.

    Joint j is visible when the pixel nearest to it is inside the picture, the first surface on that pixel's ray
    belongs to a part of the person that meets at the joint (`_CARRIERS`: an elbow is carried by its own upper and
    lower arm), and lies at most the part's reach (8 to 20 cm) before the joint.  So furniture, another limb, or the
    back of the head before the nose hide it.

    joints: (17, 2) px.  z: (17,) metres along the optical axis.  parts: of the solids that `index` counts.
    """
    height, width = depth.shape
    seen = np.zeros(len(JOINTS), dtype=bool)
    for j, (name, (u, v)) in enumerate(zip(JOINTS, np.rint(joints).astype(int), strict=True)):
        if 0 <= u < width and 0 <= v < height and index[v, u] >= 0:
            carriers, reach = _CARRIERS[name]
            seen[j] = parts[index[v, u]] in carriers and z[j] - depth[v, u] <= reach
    return seen


def scene(
    subject: int, action: str, frame: int, seed: int = 0, size: int = 256, occluders: bool = True,
    rig: Sequence[Camera] | None = None,
) -> list[View]:  # fmt: skip
    """The views of one instant, cropped around the person to size × size px.

    The crop is a square of 1.2 times the larger extent of the joints and the 8 cm of flesh around them.
    Each is rendered at the crop's resolution by the cropped camera.  The room, its light, the clothes and the
    furniture follow the seed; exposure and sensor noise follow the seed, the frame and the camera's place in the rig.
    rig: cameras without lens distortion, `people.rig()` by default.  Returns a View a camera, with `joints_3d`, and
    `visible`: where the first surface on the joint's pixel belongs to a part of the body that meets at the joint.
    Raises ValueError for bad arguments, a lens with distortion, or a camera that does not have the person before it.
    """
    _check(subject, action, frame, seed, size)
    X, look = pose(subject, action, frame, seed), Room.drawn(seed)
    things = _solids(subject, action, frame, seed, occluders)
    shadow = look.shadow_map(things, X[0])
    things += look.pictures
    views = []
    for number, camera in enumerate(_default_rig() if rig is None else rig):
        x, z = camera.project(X), X @ camera.R[2] + camera.t[2]
        if not np.isfinite(x).all():
            raise ValueError(f"{camera.name}: the person is not in front of the camera")
        low, high = x.min(0), x.max(0)
        side = 1.2 * ((high - low).max() + 2 * 0.08 * camera.K[0, 0] / z[0])  # the body is wider than its joints
        camera = camera.crop(crop_affine((low + high) / 2, side, (size, size)), (size, size))
        image, depth, index = render(things, camera, look, shadow)
        image, joints = _sensor(image, _rng(subject, action, seed, 5, frame, number)), camera.project(X)
        visible = _visible_joints(joints, z, depth, index, [solid.part for solid in things])
        views.append(View(image, camera, joints, np.ones(len(JOINTS)), X, visible))
    return views


def _sensor(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, white balance and triangular noise of 1.5 to 5 grey levels, in integers."""
    gain = rng.uniform(0.88, 1.14) * rng.uniform(0.96, 1.04, 3)
    table = np.rint(np.clip(np.arange(256)[:, None] * gain, 0, 255)).astype(np.uint8)
    strength = int(rng.integers(4, 13))
    grain = np.frombuffer(rng.bytes(2 * image.size), np.uint8).reshape(2, *image.shape).astype(np.int16)
    noise = ((grain[0] + grain[1] - 255) * np.int16(strength)) >> 8
    return np.clip(cv2.LUT(image, table[None]) + noise, 0, 255).astype(np.uint8)
