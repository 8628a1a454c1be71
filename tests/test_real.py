"""Real pictures: cameras and their F, questions that hide what they say, and answers that follow from the stored maps."""

import numpy as np
import pytest
import torch

from epiutils.data.bodies import grown
from epiutils.space import Calibration
from epiutils.studies import real, runs


@pytest.fixture(scope="module")
def data():
    return real.load()[0]


@pytest.fixture(scope="module")
def cases(data):
    return real.cases(data)


def test_the_stored_cameras_see_the_pseudo_truth_where_openpose_saw_it(data):
    assert np.nanmedian(data["residual"]) / 4 < 0.6 and data["X"].shape == (33, 17, 3)
    assert data["clean"].dtype == np.uint8 and data["clean"].shape == (33, 4, 17, 64, 64)
    bones = np.linalg.norm(data["X"][:, 11] - data["X"][:, 13], axis=-1)  # a thigh keeps its length
    assert bones.std() / bones.mean() < 0.05 and 0.3 < bones.mean() < 0.55


def test_what_is_asked_lies_under_the_patch_or_differs(data, cases):
    assert set(cases) == {"unhidden", "second_person", "every_view", "one_view", "two_sources", "as_calibrated"}
    one = cases["one_view"]
    assert not one["asked"][:, 1:].any() and one["asked"][:, 0].sum() > 200
    seen = one["seen"]
    for n in range(0, len(seen), 7):
        r, frame = n // 33, int(one["frame"][n])
        for v in range(1, 4):  # the sources are clean, in the order of the cameras
            np.testing.assert_array_equal(seen.output[n, v], data["clean"][frame, (r + v) % 4])
        boxes = data["boxes"][frame, r] / 4
        for j in np.flatnonzero(one["asked"][n, 0]):
            x, y = seen.joints[n, 0, j] / 4
            assert any(l <= x <= right and t <= y <= b for l, t, right, b in boxes)
    assert cases["two_sources"]["seen"].output.shape[1] == 3
    assert (data["differs"][cases["second_person"]["asked"]] > 20).all()


@pytest.mark.parametrize("name", ["unhidden", "second_person", "two_sources"])
def test_answers_follow_from_the_stored_maps(data, cases, name):
    """A few instants asked anew: by all methods as stored, and alone by a literal arg-max."""
    few = {key: values[4:7] for key, values in cases[name].items()}
    calibration = Calibration(*map(float, data["calibration"]))
    given = real._answers(few, runs.repaired("best"), calibration, grown("COCO_17"))
    stored = real.load()[1][name]
    for method, answer in given.items():
        np.testing.assert_array_equal(answer["found"], stored[method]["found"][4:7], err_msg=method)
    for n, v, j in np.argwhere(few["asked"]):
        y, x = np.unravel_index(int(few["seen"].output[n, v, j].argmax()), (64, 64))
        near = np.hypot(*(np.array((x, y)) - few["seen"].joints[n, v, j].numpy() / 4)) < 3.2
        assert given["alone"]["found"][n, v, j] == near


def test_patches_cover_what_their_boxes_say():
    image = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    made, boxes = real._patched(image, np.full((12, 2), 250.0), np.random.default_rng(1))
    for picture, (left, top, right, bottom) in zip(made, boxes, strict=True):
        changed = (picture != image).any(-1)
        assert 0 <= left < right <= 255 and changed[top:bottom, left:right].mean() > 0.9
        changed[top:bottom, left:right] = False
        assert not changed.any()
    assert torch.from_numpy(made).unique().numel() > 2
