"""The prior of body parts: against a literal product of Gaussians, rigid motions, and modes that only a limb explains."""

import numpy as np
import pytest
import torch

from epiutils.data import people
from epiutils.data.views import BONES, JOINTS
from epiutils.space import Body, Modes, along_bones
from epiutils.studies import parts as parts_of
from epiutils.studies.parts import Parts

ACTIONS = people.ACTIONS[:4]


@pytest.fixture(scope="module")
def parts():
    poses = np.stack([people.pose(1, action, frame, 3) for action in ACTIONS for frame in range(0, 100, 4)])
    return Parts.of(poses, np.repeat(ACTIONS, 25), Body.of(poses, BONES), neighbours=20)


def certain(pose, decoys=()):
    """Modes of a pose (J, 3), one a joint, sharp; and (joint, place, mass) of second ones."""
    X, mass = torch.from_numpy(np.stack([pose, pose], 1)), torch.tensor([[0.0, -1e8]]).repeat(len(JOINTS), 1).double()
    for j, place, height in decoys:
        X[j, 1], mass[j, 1] = torch.from_numpy(place), height
    covariance = 1e-4 * torch.eye(3).double().expand(1, len(JOINTS), 2, 3, 3)
    return Modes(X[None], mass[None], covariance)


def refined(parts, found):
    share = along_bones(found, parts.body)
    return parts.refine(found, share, found.near_best(share))[0]


@pytest.mark.parametrize("seed", range(2))
def test_a_pose_that_is_sure_stays(parts, seed):
    pose = people.pose(1, ACTIONS[seed], 50, 3)
    assert np.linalg.norm(refined(parts, certain(pose)) - pose, axis=-1).max() < 0.02


@pytest.mark.parametrize("joint", ["lwri", "rank"])
def test_a_limb_that_others_hold_so_wins_over_a_likelier_mode(parts, joint):
    """The decoy keeps the bone's length: it lies on the other side of the elbow or knee, and only the pose tells."""
    pose, j = people.pose(1, ACTIONS[0], 48, 3), JOINTS.index(joint)
    parent = next(a for a, b in BONES if b == j)
    decoy = pose[parent] - (pose[j] - pose[parent]) + 1e-3
    found = certain(pose, [(j, decoy, 1.0)])
    assert np.linalg.norm(found.near_best(found.share)[0, j].numpy() - decoy) < 0.01
    assert np.linalg.norm(refined(parts, found)[j] - pose[j]) < 0.03


def test_moved_and_turned_about_the_vertical_all_follows(parts):
    pose = people.pose(1, ACTIONS[1], 30, 3)
    c, s, shift = np.cos(2.1), np.sin(2.1), np.array((0.7, -0.4, 0.1))
    R = np.array([(c, -s, 0), (s, c, 0), (0, 0, 1)])
    decoy = [(JOINTS.index("lwri"), pose[13] + (0.2, 0.1, 0.1), 0.5)]
    there = [(j, R @ place + shift, height) for j, place, height in decoy]
    moved = refined(parts, certain(pose @ R.T + shift, there))
    np.testing.assert_allclose(moved, refined(parts, certain(pose, decoy)) @ R.T + shift, atol=1e-6)


def test_the_tested_action_is_left_out(parts):
    left = parts.without(ACTIONS[2])
    assert set(left.actions) == set(ACTIONS) - {ACTIONS[2]} and len(left.poses) == len(left.actions) == 150
    assert len(parts.poses) == 200


def test_mirrored_poses_have_left_and_right_exchanged(parts):
    own, mirrored = np.split(parts.poses, 2)
    for name in ("hip", "kne", "ank", "sho", "elb", "wri"):
        left, right = JOINTS.index(f"l{name}"), JOINTS.index(f"r{name}")
        np.testing.assert_allclose(mirrored[:, left], own[:, right] * (-1, 1, 1))
    lateral = own[:, JOINTS.index("lhip")] - own[:, JOINTS.index("rhip")]
    assert (lateral[:, 0] > 0).mean() > 0.95  # left lies along x


def test_the_product_of_gaussians_is_that_of_their_stacked_equations():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(15, 15))
    told, says = root @ root.T, rng.normal(size=15)
    mean, half = rng.normal(size=(5, 3)), rng.normal(size=(5, 3, 3))
    seen = half @ half.swapaxes(1, 2) + np.eye(3)
    covariance, middle = parts_of._product(told, says, mean, seen)
    # the least of ½ xᵀ told x − says·x + ½ Σ (x_j − mean_j)ᵀ seen_j⁻¹ (x_j − mean_j), by whitened least squares
    rows, right = [np.linalg.cholesky(told).T], [np.linalg.solve(np.linalg.cholesky(told), says)]
    for j in range(5):
        white = np.linalg.inv(np.linalg.cholesky(seen[j]))
        block = np.zeros((3, 15))
        block[:, 3 * j : 3 * j + 3] = white
        rows.append(block)
        right.append(white @ mean[j])
    A, b = np.concatenate(rows), np.concatenate(right)
    np.testing.assert_allclose(middle.ravel(), np.linalg.lstsq(A, b, rcond=None)[0], rtol=1e-8)
    np.testing.assert_allclose(covariance, np.linalg.inv(A.T @ A), rtol=1e-7, atol=1e-12)
