"""The embedded benchmark's people: kinematics, geometry, what is visible against brute force."""

from dataclasses import replace

import numpy as np
import pytest

from epiutils.cameras import Camera
from epiutils.data import people, raycast
from epiutils.data.people import ACTIONS, SUBJECTS
from epiutils.data.views import BONES, JOINTS, View

J = {name: number for number, name in enumerate(JOINTS)}
SCENES = [(1, "walk", 40, 0), (9, "sit", 12, 1), (8, "crouch", 55, 2), (11, "carry", 3, 3), (5, "phone", 81, 4)]


@pytest.fixture(scope="module")
def scenes() -> list[list[View]]:
    return [people.scene(*which) for which in SCENES]


def bones(X: np.ndarray) -> np.ndarray:
    """Lengths of the bones, (..., 17, 3) → (..., 16)."""
    return np.stack([np.linalg.norm(X[..., a, :] - X[..., b, :], axis=-1) for a, b in BONES], axis=-1)


# kinematics


def test_the_skeleton_is_human36ms():
    assert len(JOINTS) == 17 and SUBJECTS == (1, 5, 6, 7, 8, 9, 11) and len(ACTIONS) >= 10
    assert len(BONES) == 16 and {b for _, b in BONES} == set(range(1, 17))  # a tree from the root
    assert all(a < b for a, b in BONES)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_bone_lengths_belong_to_the_subject(subject):
    lengths = np.stack([bones(people.pose(subject, a, f, s)) for s, a in enumerate(ACTIONS) for f in (0, 33, 1234)])
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], lengths.shape), atol=1e-7)
    assert 0.2 < lengths[0, BONES.index((J["lhip"], J["lkne"]))] < 0.6


def test_subjects_differ_in_proportions():
    lengths = np.stack([bones(people.pose(s, "walk", 0)) for s in SUBJECTS])
    apart = np.abs(lengths[:, None] - lengths[None]).max(-1) + np.eye(len(SUBJECTS))
    assert apart.min() > 0.01  # metres
    tall = [people.pose(s, "wave", 0)[J["head"], 2] for s in SUBJECTS]
    assert min(tall) > 1.35 and max(tall) < 1.98 and max(tall) - min(tall) > 0.2


@pytest.mark.parametrize("action", ACTIONS)
def test_motion_is_continuous_and_stays_in_the_room(action):
    X = np.stack([people.pose(6, action, f, 7) for f in range(60)])
    assert np.abs(np.diff(X, axis=0)).max() < 0.16  # a hand at 8 m/s
    assert np.abs(np.diff(X, n=2, axis=0)).max() < 0.08
    assert (np.abs(X[..., :2]) < people.ROOM[:2]).all() and X[..., 2].min() > 0.0 and X[..., 2].max() < 2.6


@pytest.mark.parametrize("action", ACTIONS)
def test_feet_are_on_the_floor(action):
    for subject, frame, seed in ((1, 0, 0), (7, 77, 1), (8, 500, 2), (11, 31, 3)):
        feet = [s for s in people._solids(subject, action, frame, seed, occluders=False) if s.part.endswith("foot")]
        lowest = min((s.ends[:, 2] - s.radii).min() for s in feet)
        assert abs(lowest) < 1e-6
        if action not in people._TABLES.lifts and action != "sit":  # both soles
            sides = [min((s.ends[:, 2] - s.radii).min() for s in feet if s.part == side) for side in ("lfoot", "rfoot")]
            assert max(sides) < 0.04


def test_left_is_up_cross_forward():
    for subject in SUBJECTS:
        for seed in range(4):
            X = np.stack([people.pose(subject, "walk", f, seed) for f in (20, 22)])
            forward = X[1, 0] - X[0, 0]  # a walker goes forwards
            left = np.cross((0, 0, 1), forward)
            for side in ("hip", "sho"):
                assert (X[0, J["l" + side]] - X[0, J["r" + side]]) @ left > 0
            assert (X[0, J["nose"]] - X[0, J["neck"]]) @ forward > 0


def test_a_facing_person_has_its_left_hand_on_the_right_and_a_face():
    facing = turned = 0
    for seed in range(12):
        subject = (1, 6, 9, 11)[seed % 4]
        X = np.stack([people.pose(subject, "walk", f, seed) for f in (20, 22)])
        forward = (X[1, 0] - X[0, 0]) / np.linalg.norm(X[1, 0] - X[0, 0])
        for view in people.scene(subject, "walk", 20, seed, size=128, occluders=False):
            away = view.camera.C - X[0, 0]
            towards = forward @ away / np.linalg.norm(away)
            l_r = view.joints[J["lsho"], 0] - view.joints[J["rsho"], 0]
            if towards > 0.75:
                facing += 1
                assert l_r > 0 and view.visible[J["nose"]]
            if towards < -0.75:
                turned += 1
                assert l_r < 0 and not view.visible[J["nose"]]
    assert facing > 3 and turned > 3


def test_face_and_hair_have_different_colours():
    K = ((400.0, 0, 31.5), (0, 400.0, 39.5), (0, 0, 1))
    camera = Camera(K=K, R=((1, 0, 0), (0, 0, -1), (0, 1, 0)), t=(0, 0, 0), size=(64, 80))
    colours = []
    for yaw in (-90, 90):  # towards the camera, and away
        neck, skin, hair = np.array((0, 2, -0.2)), np.full(3, 0.8), np.zeros(3)
        solids = people._head(1.75, neck, people._turned(z=yaw), "short", skin, hair)
        colours.append(raycast.render(solids, camera)[0][35:45, 27:37].mean())
    assert colours[0] > colours[1] + 60


# geometry


def test_rig():
    cameras = people.rig()
    assert [camera.name for camera in cameras] == ["cam1", "cam2", "cam3", "cam4"]
    for camera in cameras:
        assert camera.size == (1000, 1000) and abs(camera.K[0, 0] - 1145) < 10
        assert np.allclose(np.abs(camera.C), (2, 4.5, 1.5), atol=0.12)
        assert np.abs(camera.project(np.array((0, 0, 0.95))) - 500).max() < 60
        for action in ACTIONS:  # the uncropped picture would show the whole person
            x = camera.project(people.pose(8, action, 50, 5))
            assert (x > 0).all() and (x < 999).all()
    centres = np.stack([camera.C for camera in cameras])
    assert np.abs(centres * (-1, 1, 1) - centres[[3, 2, 1, 0]]).max(-1).min() > 0.02  # not mirror images


def test_views_hold_what_their_cameras_see(scenes):
    for views in scenes:
        assert [view.camera.name for view in views] == ["cam1", "cam2", "cam3", "cam4"]
        for view in views:
            assert view.image.shape == (256, 256, 3) and view.image.dtype == np.uint8
            assert view.image.std() > 20 and 50 < view.image.mean() < 220
            assert view.camera.size == (256, 256) and view.visible.dtype == bool
            np.testing.assert_allclose(view.camera.project(view.joints_3d), view.joints, atol=1e-6)
            assert (view.joints > 8).all() and (view.joints < 247).all()
            assert np.ptp(view.joints, axis=0).max() > 150
            np.testing.assert_array_equal(view.confidence, 1)


def test_another_rig_may_be_given():
    moved = [replace(camera, t=camera.t + (0, 0.1, 0.8), name="moved") for camera in people.rig()[:2]]
    views = people.scene(6, "reach", 9, 2, size=64, rig=moved)
    assert len(views) == 2 and views[0].camera.name == "moved"
    np.testing.assert_array_equal(views[0].camera.R, moved[0].R)
    np.testing.assert_allclose(views[0].camera.C, moved[0].C)


# visibility


def brute_force(solid: raycast.Solid, C: np.ndarray, ray: np.ndarray) -> float:
    """Where a ray enters a solid: a round cone as 1,500 balls along its axis, a box face by face."""
    o, d = solid.axes @ (C - solid.centre), solid.axes @ ray
    if solid.kind == "box":
        faces = [(k, (side * solid.size[k] - o[k]) / d[k]) for k in range(3) for side in (-1, 1)]
        on = lambda k, t: all(abs(o[m] + t * d[m]) <= solid.size[m] for m in range(3) if m != k)
        return min((t for k, t in faces if t > 0 and on(k, t)), default=np.inf)
    s = np.linspace(0, 1, 1500) if solid.kind == "cone" else np.zeros(1)
    ra, rb, length = solid.size if solid.kind == "cone" else (1, 1, 0)
    radius, o = ra + s * (rb - ra), o - s[:, None] * (0, 0, length)
    a, b, c = d @ d, o @ d, (o * o).sum(-1) - radius**2
    square = b * b - a * c
    t = (-b[square > 0] - np.sqrt(square[square > 0])) / a
    return t[t > 0].min(initial=np.inf)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_visibility_is_what_brute_force_sees(scenes, which):
    solids, compared = people._solids(*SCENES[which]), 0
    for view in scenes[which]:
        camera = view.camera
        for j, name in enumerate(JOINTS):
            u, v = np.rint(view.joints[j])
            ray = camera.R.T @ np.linalg.inv(camera.K) @ (u, v, 1)
            t = np.array([brute_force(solid, camera.C, ray) for solid in solids])
            first, second = np.argsort(t)[:2]
            parts, reach = people._CARRIERS[name]
            z = camera.R[2] @ view.joints_3d[j] + camera.t[2]
            tie = t[second] - t[first] < 1e-3 and (solids[first].part in parts) != (solids[second].part in parts)
            if tie or abs(z - t[first] - reach) < 1e-3:
                continue
            compared += 1
            assert view.visible[j] == (solids[first].part in parts and z - t[first] <= reach), (camera.name, name)
    assert compared > 60


def test_furniture_only_hides(scenes):
    hidden = 0
    for which, views in zip(SCENES, scenes, strict=True):
        for view, bare in zip(views, people.scene(*which, occluders=False), strict=True):
            np.testing.assert_array_equal(view.joints, bare.joints)
            assert not (view.visible & ~bare.visible).any()
            hidden += (bare.visible & ~view.visible).sum()
    assert hidden > 10


def test_about_a_quarter_of_the_joints_is_hidden():
    seen = [
        [view.visible for view in people.scene(SUBJECTS[k % 7], action, 61 * k, k, size=64)]
        for k, action in enumerate(ACTIONS)
    ]
    assert 0.64 < np.mean(seen) < 0.82


def test_the_body_keeps_clear_of_furniture():
    for k, action in enumerate(ACTIONS):
        boxes = [s for s in people._furniture(SUBJECTS[k % 7], action, k) if s.kind == "box"]
        for frame in (0, 40, 313, 700):
            X = people.pose(SUBJECTS[k % 7], action, frame, k)
            for box in boxes:
                q = (X - box.centre) @ box.axes.T
                assert not (np.abs(q) < box.size).all(-1).any()


# reproducibility and bad input


def test_the_same_seed_gives_the_same_bytes(scenes):
    again = people.scene(*SCENES[0])
    for a, b in zip(scenes[0], again, strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert a.joints.tobytes() == b.joints.tobytes() and (a.visible == b.visible).all()
    np.testing.assert_array_equal(again[0].joints_3d, people.pose(*SCENES[0]))
    other = people.scene(1, "walk", 40, 1)
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(scenes[0], other, strict=True))
    assert not np.allclose(other[0].joints_3d, scenes[0][0].joints_3d)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, "walk", 0), r"subject 2.*1, 5, 6, 7, 8, 9, 11"),
        ((1, "fly", 0), r"'fly'.*walk, sit"),
        ((1, "walk", -1), "frame.*-1"),
        ((1, "walk", 0.5), "frame.*0.5"),
        ((1, "walk", 0, -3), "seed.*-3"),
        ((1.0, "walk", 0), "subject 1.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    for function in (people.pose, people.scene, people._solids):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_bad_sizes_and_cameras_are_named():
    with pytest.raises(ValueError, match="size.*2"):
        people.scene(1, "walk", 0, size=2)
    camera = people.rig()[0]
    with pytest.raises(ValueError, match="cam1.*distortion"):
        people.scene(1, "walk", 0, size=32, rig=[replace(camera, distortion=(-0.2, 0.1, 0, 0, 0))])
    away = replace(camera, R=np.diag((-1.0, 1, -1)) @ camera.R, t=np.diag((-1.0, 1, -1)) @ camera.t)
    with pytest.raises(ValueError, match="cam1.*in front"):
        people.scene(1, "walk", 0, rig=[away])
