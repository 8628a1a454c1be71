"""The ray caster against closed forms: depths, order, crops, paints and shadows."""

import numpy as np
import pytest

from epiutils.cameras import Camera
from epiutils.data import people, raycast
from epiutils.data.raycast import Room, Solid, plain, render


def solo_camera(size=(70, 40), f=90.0) -> Camera:
    """A camera at the origin that looks along the world's y axis, image y down the world's −z."""
    K = ((f, 0, (size[0] - 1) / 2), (0, f, (size[1] - 1) / 2), (0, 0, 1))
    return Camera(K=K, R=((1, 0, 0), (0, 0, -1), (0, 1, 0)), t=(0, 0, 0), size=size)


def ball(centre, radius) -> Solid:
    return Solid.ball(np.array(centre, float), np.eye(3), (radius,) * 3, plain, (1, 1, 1))


def test_depth_of_a_ball_is_the_closed_form():
    camera, centre, radius = solo_camera(), np.array((0.1, 3.0, -0.05)), 0.4
    depth, index = raycast._cast([ball(centre, radius)], camera)
    assert depth.shape == index.shape == (40, 70)
    for v in range(40):
        for u in range(70):
            ray = camera.R.T @ np.linalg.inv(camera.K) @ (u, v, 1)
            a, b, c = ray @ ray, -ray @ centre, centre @ centre - radius**2
            if b * b - a * c > 1e-3:
                assert depth[v, u] == pytest.approx((-b - np.sqrt(b * b - a * c)) / a, abs=2e-5) and index[v, u] == 0
            elif b * b - a * c < -1e-3:
                assert np.isinf(depth[v, u]) and index[v, u] == -1


def test_depth_of_a_capsule_and_a_box_head_on():
    camera = solo_camera((71, 41))
    ends = np.array(((-0.4, 2, 0), (0.4, 2, 0)))
    capsule = Solid.cone(*ends, 0.1, 0.1, np.array((0, 0, 1.0)), plain, (1, 1, 1))
    depth, _ = raycast._cast([capsule], camera)
    middle = np.abs((np.arange(71) - 35) / 90 * 1.9) < 0.4  # pixels that see its side
    np.testing.assert_allclose(depth[20, middle], 1.9, atol=1e-5)
    assert np.isinf(depth[20, np.abs((np.arange(71) - 35) / 90 * 2) > 0.52]).all()
    depth, _ = raycast._cast([Solid.box((0, 3, 0), np.eye(3), (0.5, 0.25, 0.3), plain, (1, 1, 1))], camera)
    inside = np.ix_(np.abs(np.arange(41) - 20) / 90 * 2.75 < 0.3, np.abs(np.arange(71) - 35) / 90 * 2.75 < 0.5)
    np.testing.assert_allclose(depth[inside], 2.75, atol=1e-5)


def test_the_nearer_solid_wins_in_any_order():
    near, far = ball((0, 2, 0), 0.2), ball((0.05, 3, 0), 0.5)
    depth, index = raycast._cast([near, far], solo_camera())
    again, swapped = raycast._cast([far, near], solo_camera())
    np.testing.assert_array_equal(depth, again)
    np.testing.assert_array_equal(np.where(index >= 0, 1 - index, -1), swapped)
    assert index[20, 35] == 0 and (index == 1).any()


def test_solids_at_and_behind_the_camera():
    camera = solo_camera()
    depth, index = raycast._cast([ball((0, -2, 0), 0.5), ball((0, 0.02, 0), 0.5), ball((0.3, 0.4, 0), 0.2)], camera)
    assert not (index == 0).any() and not (index == 1).any()  # behind, and around the camera
    assert (index == 2).any() and np.isfinite(depth[index == 2]).all()
    depth, index = raycast._cast([], camera)
    assert np.isinf(depth).all() and (index == -1).all()
    assert render([], camera)[0].shape == (40, 70, 3)


def test_a_crop_is_part_of_the_whole_picture():
    camera = people.rig()[1]
    solids = people._solids(9, "point", 17, 3)
    window = camera.crop(np.array([[1, 0, -330], [0, 1, -250], [0, 0, 1.0]]), (310, 420))
    image, depth, index = render(solids, camera)
    cut_image, cut_depth, cut_index = render(solids, window)
    assert cut_image.shape == (420, 310, 3)
    rows, columns = slice(250, 670), slice(330, 640)
    assert (cut_index == index[rows, columns]).mean() > 0.9995
    both = (cut_index == index[rows, columns]) & (cut_index >= 0)
    assert np.abs(cut_depth[both] - depth[rows, columns][both]).max() < 1e-3
    assert np.abs(cut_image.astype(int) - image[rows, columns]).mean() < 0.2


def test_one_to_three_colours():
    camera, red, blue = solo_camera(), (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)
    second = lambda q, size, colours, setting: colours[1]
    for colours, channel in (((red,), 0), ((red, blue), 2), ((red, blue, red), 2)):
        image = render([Solid.ball(np.array((0, 2, 0)), np.eye(3), (0.4,) * 3, second, *colours)], camera)[0]
        assert image[20, 35].argmax() == channel


@pytest.mark.parametrize("seed", range(4))
def test_the_shadow_lies_where_the_light_goes(seed):
    look = Room.drawn(seed)
    lid = Solid.box((0.2, -0.3, 0.9), np.eye(3), (0.3, 0.3, 0.02), plain, (1, 1, 1))
    shadow = look.shadow_map([lid], np.zeros(3))
    middle = np.array((0.2, -0.3, 0.9)) - look.light * 0.9 / look.light[2]  # of the shadow on the floor
    around = np.array([(0, 0, 0), (0.2, 0.2, 0), (-0.2, 0.2, 0), (0.4, 0, 0), (0, -0.4, 0), (0, 0, 1.2)])
    dark = raycast._dark(*shadow, (middle + around).T.astype(np.float32))
    np.testing.assert_array_equal(dark, (255, 255, 255, 0, 0, 0))
