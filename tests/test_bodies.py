"""A grown person's bones for every body model: a tree, plausible, and enough to choose among modes."""

import numpy as np
import pytest
import torch

from epiutils.data import people
from epiutils.data.bodies import DETECTED, JOINTS, grown, guess_model
from epiutils.space import Modes, along_bones

STANDING = {  # metres, of a person of 1.75 m, measured by nobody who wrote the shares
    "sho": (0.18, 0.0, 1.43), "elb": (0.22, 0.02, 1.13), "wri": (0.24, 0.1, 0.88),
    "hip": (0.11, 0.0, 0.92), "kne": (0.12, 0.02, 0.5), "ank": (0.12, -0.02, 0.08),
}  # fmt: skip


def standing(model):
    """A pose (J, 3): limbs as above, all else at the nose."""
    X = np.tile((0.0, 0.1, 1.6), (len(JOINTS[model]), 1))
    for name, (x, y, z) in STANDING.items():
        X[JOINTS[model].index(f"l{name}")], X[JOINTS[model].index(f"r{name}")] = (x, y, z), (-x, y, z)
    return X


@pytest.mark.parametrize("model", JOINTS)
def test_the_bones_are_a_tree_in_order_and_join_neighbours(model):
    body, names = grown(model), JOINTS[model]
    reached = {body.bones[0][0]}
    for parent, child in body.bones:
        assert parent in reached and child not in reached
        reached.add(child)
    assert {names[k] for k in reached} == {side + name for side in "lr" for name in STANDING}
    assert body.mean.sum() == pytest.approx(1) and (body.deviation > 0).all()
    size = body.measure(torch.from_numpy(standing(model))[None], torch.ones(1, len(names)))
    assert abs(float(size) / body.size[0] - 1.75 / 1.70) < 0.08


@pytest.mark.parametrize("model", ["COCO_17", "BODY_25B", "HALPE_26"])
@pytest.mark.parametrize("joint", ["lwri", "rank", "relb"])
def test_bones_choose_the_mode_that_fits_and_leave_other_joints_alone(model, joint):
    pose, j, nose = standing(model), JOINTS[model].index(joint), JOINTS[model].index("nose")
    X = torch.from_numpy(np.stack([pose, pose], 1))[None]
    mass = torch.tensor([0.0, -1e8]).double().repeat(1, len(pose), 1)
    X[0, j, 1] += torch.tensor([0.5, -0.3, 0.2])
    X[0, nose, 1] += 1.0
    mass[0, [j, nose], 1] = 0.7  # the heatmaps like the second better
    found = Modes(X, mass, 1e-4 * torch.eye(3).double().expand(1, len(pose), 2, 3, 3))
    share = along_bones(found, grown(model))
    placed = found.near_best(share)[0].numpy()
    assert np.linalg.norm(placed[j] - pose[j]) < 1e-6
    assert np.linalg.norm(placed[nose] - pose[nose]) > 1
    torch.testing.assert_close(share[0, nose], torch.softmax(mass[0, nose], -1))


def test_seventeen_joints_of_a_network_are_cocos_or_human36ms_as_the_pictures_say():
    """Files of detections have COCO's, networks may have either: all actions, four cameras, one instant each."""
    place = JOINTS["HUMAN36M_17"].index
    face = {"leye": "nose", "reye": "nose", "lear": "head", "rear": "head"}
    as_coco = [place(face.get(name, name)) for name in JOINTS["COCO_17"]]
    for seed, action in enumerate(people.ACTIONS):
        X = people.pose((1, 5, 9)[seed % 3], action, 20, seed)
        xy = np.stack([camera.project(X) for camera in people.rig()])
        xy = np.dstack([xy, np.ones(xy.shape[:2])])
        assert guess_model(xy) == "HUMAN36M_17" and guess_model(xy[:, as_coco]) == "COCO_17"
    between = np.random.default_rng(0).uniform(0, 100, (4, 17, 3))
    between[:, :5] *= 0.25
    for people_, said in ((between, r"span 0\.\d\d of the person"), (np.full((4, 17, 3), np.nan), "span nan")):
        with pytest.raises(ValueError, match=f"cannot tell COCO_17 from HUMAN36M_17 .*{said}"):
            guess_model(people_)
    assert [model for model in DETECTED if len(JOINTS[model]) == 17] == ["COCO_17"]
