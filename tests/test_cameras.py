"""Cameras: OpenCV's model, A K for a crop, and views that move picture and joints together."""

from dataclasses import FrozenInstanceError, replace

import cv2
import numpy as np
import pytest
from rigs import LENS, camera_pair, look_at, world_points

from epiutils.cameras import Camera, crop_affine
from epiutils.data.views import View

SEEDS = range(4)
AFFINES = {
    "shift": np.array([[1, 0, -20.5], [0, 1, 13.0], [0, 0, 1]]),
    "anisotropic": np.diag([0.5, 1.7, 1.0]),
    "rotation": crop_affine((150, 110), 180, (64, 96), rotation=0.6),
    "shear": np.array([[1.1, 0.3, 5], [-0.2, 0.8, -7], [0, 0, 1]]),
}


def plain(**changes):
    """A camera with one field changed."""
    K = [[300, 0, 160], [0, 310, 120], [0, 0, 1]]
    return Camera(**{"K": K, "R": np.eye(3), "t": (0, 0, 3), "size": (320, 240), "name": "left", **changes})


def opencv_pixels(camera, X):
    project = cv2.fisheye.projectPoints if camera.fisheye else cv2.projectPoints
    pixels, _ = project(X[:, None], cv2.Rodrigues(camera.R)[0], camera.t, camera.K, camera.distortion)
    return pixels[:, 0]


LENSES = {  # coefficients, and whether of OpenCV's fisheye model
    "none": ((), False),
    "four": ((-0.1, 0.05, 1e-3, 2e-3), False),
    "five": (LENS, False),
    "eight": ((*LENS, 0.03, -0.02, 0.01), False),
    "fisheye": ((-0.05, 0.02, -4e-3, 1e-3), True),
    "fisheye without coefficients": ((), True),
}


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_projection_is_opencvs_and_P_and_C_are_those_of_the_pinhole(seed, lens):
    X, (distortion, fisheye) = world_points(seed), LENSES[lens]
    for pinhole in camera_pair(seed):
        camera = replace(pinhole, distortion=distortion, fisheye=fisheye)
        np.testing.assert_allclose(camera.project(X), opencv_pixels(camera, X), atol=1e-9)
        x = np.column_stack([X, np.ones(len(X))]) @ camera.P.T
        np.testing.assert_allclose(x[:, :2] / x[:, 2:], opencv_pixels(pinhole, X), atol=1e-9)
        np.testing.assert_allclose(camera.P @ np.append(camera.C, 1), 0, atol=1e-9)


@pytest.mark.parametrize("distortion", [(), LENS], ids=["straight", "lens"])
def test_points_in_or_behind_the_cameras_plane_have_no_image(distortion):
    X = np.array([[0, 0, 1.0], [0.1, 0, -3], [0.1, 0.2, -5], [0, 0, -3 + 1e-9]])
    seen = plain(distortion=distortion).project(X)
    assert np.isfinite(seen).all(-1).tolist() == [True, False, False, True]
    assert np.isnan(seen[1:3]).all()


def test_leading_dimensions_inputs_and_what_is_unknown_stay():
    X, camera = world_points(0, 24).reshape(2, 3, 4, 3), plain(t=(0, 0, 5), distortion=LENS)
    x = camera.project(X)
    before = X.copy(), x.copy()
    assert x.shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(x[1, 2, 3], camera.project(X[1, 2, 3]))
    np.testing.assert_array_equal(camera.undistort(x)[1, 2, 3], camera.undistort(x[1, 2, 3]))
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(x, before[1])
    assert np.isnan(camera.undistort([[np.nan, 3.0]])).all()


@pytest.mark.parametrize("lens", ["five", "eight", "fisheye", "fisheye without coefficients"])
@pytest.mark.parametrize("seed", SEEDS)
def test_undistort_takes_recorded_pixels_to_the_undistorted_cameras(seed, lens):
    X, (distortion, fisheye) = world_points(seed), LENSES[lens]
    for camera in camera_pair(seed):
        camera = replace(camera, distortion=distortion, fisheye=fisheye)
        recorded, straight = camera.project(X), camera.without_distortion().project(X)
        assert camera.bends and not camera.without_distortion().bends
        assert np.abs(recorded - straight).max() > 0.5, "a lens that does nothing tests nothing"
        np.testing.assert_allclose(camera.undistort(recorded), straight, atol=1e-6)
        criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 200, 1e-14)
        undistort = cv2.fisheye.undistortPoints if fisheye else cv2.undistortPoints
        options = (camera.K,) if fisheye else (camera.K, criteria)
        opencv = undistort(recorded[:, None], camera.K, camera.distortion, None, None, *options)[:, 0]
        np.testing.assert_allclose(camera.undistort(recorded), opencv, atol=1e-4 if fisheye else 1e-6)


def test_undistort_finds_the_inverse_as_far_out_as_the_lens_has_one_and_gives_nan_elsewhere():
    for angle in (1.2, 1.5, 1.56):
        X, fisheye = [[3 * np.tan(angle), 0, 0]], plain(distortion=LENSES["fisheye"][0], fisheye=True)
        found = fisheye.undistort(fisheye.project(X))
        np.testing.assert_allclose(found, fisheye.without_distortion().project(X), rtol=1e-6)
    barrel = plain(distortion=(-0.3, 0, 0, 0))  # r − 0.3 r³ grows up to r = 1.054, where it is 0.7027
    for r in (0.5, 0.8, 0.95, 1.02):
        found = barrel.undistort([[160 + 300 * (r - 0.3 * r**3), 120]])
        np.testing.assert_allclose(found, [[160 + 300 * r, 120]], atol=1e-5)
    for r in (0.7036, 0.705, 0.75, 3.0):
        found = barrel.undistort([[160, 120], [200, 150], [160 + 300 * r, 120]])
        np.testing.assert_array_equal(np.isfinite(found).all(1), (True, True, False))


@pytest.mark.parametrize("distortion", [(), LENS], ids=["straight", "lens"])
@pytest.mark.parametrize("A", AFFINES.values(), ids=AFFINES)
def test_a_crop_moves_every_pixel_by_its_affine(A, distortion):
    X, camera = world_points(3), camera_pair(3, distortion)[0]
    cropped, x = camera.crop(A, (64, 96)), camera.project(X)
    np.testing.assert_allclose(cropped.project(X), x @ A[:2, :2].T + A[:2, 2], atol=1e-9)
    straight = cropped.without_distortion().project(X)
    np.testing.assert_allclose(cropped.undistort(cropped.project(X)), straight, atol=1e-6)
    assert cropped.size == (64, 96) and camera.size == (320, 240)


def test_crop_affine_puts_the_square_where_it_should_and_turns_clockwise_on_the_screen():
    A = crop_affine((100, 60), side=50, size=(200, 120))
    for point, expected in {(100, 60): (100, 60), (75, 60): (0, 60), (100, 35): (100, -40)}.items():
        np.testing.assert_allclose(A @ (*point, 1), (*expected, 1))
    A = crop_affine((100, 60), side=50, size=(50, 50), rotation=np.pi / 2)
    np.testing.assert_allclose(A @ (110, 60, 1), (25, 35, 1), atol=1e-12)  # right of the centre → below it
    np.testing.assert_allclose(A @ (100, 50, 1), (35, 25, 1), atol=1e-12)  # above it → right of it


BAD_FIELDS = {
    "K needs positive focal": {"K": np.diag([-1, 1, 1])},
    "K needs positive focal lengths and the last row": {"K": np.diag([1, 1, 2])},
    "K must hold": {"K": np.eye(4)},
    "R is not a rotation": {"R": np.diag([1, 1, -1.0])},
    "R is not a rotation .*det": {"R": 2 * np.eye(3)},
    "R must hold": {"R": np.full((3, 3), np.nan)},
    "t must hold": {"t": (1, 2)},
    "t must hold .*inf": {"t": (1, 2, np.inf)},
    "distortion needs k1 k2 p1": {"distortion": np.zeros(12)},
    "distortion needs k1 k2 k3 k4 of a fisheye": {"distortion": np.ones(5), "fisheye": True},
    "distortion must hold": {"distortion": (np.nan, 0, 0, 0)},
    "size must be": {"size": (0, 240)},
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_what_is_no_camera_is_refused_by_camera_and_field(message):
    with pytest.raises(ValueError, match=f"(?s)left: {message}"):
        plain(**BAD_FIELDS[message])


def test_a_crop_needs_an_invertible_affine_and_a_side_that_is_positive():
    for A in (np.zeros((3, 3)), np.eye(2), np.diag([1, 1, 2.0]), np.diag([1, 0, 1.0])):
        with pytest.raises(ValueError, match="left: A must be an invertible"):
            plain().crop(A, (10, 20))
    for side in (0, -1, np.nan):
        with pytest.raises(ValueError, match="side must be positive"):
            crop_affine((0, 0), side)


def test_a_camera_is_frozen_and_keeps_copies_of_its_arrays():
    K = np.diag([300.0, 310, 1])
    camera = plain(K=K)
    K[0, 0] = 1
    assert camera.K[0, 0] == 300 and camera.K.dtype == np.float64
    for field in ("K", "R", "t", "distortion"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(camera, field)[...] = 0
    with pytest.raises(FrozenInstanceError):
        camera.size = (1, 1)
    assert plain(distortion=(1, 2, 3, 4)).distortion.tolist() == [1, 2, 3, 4, 0]


def dotted_view(camera, X):
    """A dark picture with a bright, soft dot at each point."""
    x = camera.project(X)
    yy, xx = np.mgrid[: camera.size[1], : camera.size[0]]
    glow = sum(np.exp(-((xx - px) ** 2 + (yy - py) ** 2) / (2 * 3.0**2)) for px, py in x)
    image = np.repeat((200 * glow.clip(0, 1))[..., None], 3, -1).round().astype(np.uint8)
    return View(image, camera, x, np.ones(len(x)), X)


def centroid(image, point, radius=14):
    """Centre of the brightness around a point."""
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
    weight = image[..., 0] * ((xx - point[0]) ** 2 + (yy - point[1]) ** 2 < radius**2).astype(float)
    return np.array([(xx * weight).sum(), (yy * weight).sum()]) / weight.sum()


DOTS = np.array([[0, 0.6, 1.5], [0.2, -0.5, 0.8], [-0.2, 0.3, 0.6], [0, 0, 1.1]])
CAMERA = look_at((3, 0.3, 1.2), (0, 0, 1), 320, (320, 240), 0.1, (-0.5, 0.2, 2e-3, 3e-3, 0))


def assert_moved_together(view, inside):
    """The joints are where the camera sees them, and the picture has its dots there."""
    np.testing.assert_allclose(view.joints, view.camera.project(DOTS), atol=1e-5)
    assert inside.sum() >= 3 and view.image.shape == (*view.camera.size[::-1], 3)
    for joint in view.joints[inside]:
        np.testing.assert_allclose(centroid(view.image, joint), joint, atol=0.35)


@pytest.mark.parametrize("A", [AFFINES["shift"], np.diag([0.8, 1.3, 1]), crop_affine((160, 120), 250, (260, 200), 0.4)])
def test_a_crop_of_a_view_moves_picture_joints_and_camera_together(A):
    view = dotted_view(CAMERA, DOTS).crop(A, (260, 310))
    assert view.camera.size == (260, 310)
    assert_moved_together(view, ((view.joints > 15) & (view.joints < np.array([260, 310]) - 15)).all(-1))


@pytest.mark.parametrize("lens", ["five", "eight", "fisheye", "fisheye without coefficients"])
def test_undistorting_a_view_moves_picture_joints_and_camera_together(lens):
    distortion, fisheye = LENSES[lens] if "fisheye" in lens else (CAMERA.distortion, False)
    distortion = (*distortion, 0.2, -0.1, 0.05) if lens == "eight" else distortion
    bent = dotted_view(replace(CAMERA, distortion=distortion, fisheye=fisheye), DOTS)
    view = bent.undistorted()
    assert not view.camera.bends and not view.camera.fisheye and view.undistorted() is view
    assert np.abs(view.joints - bent.joints).max() > 1.5
    assert_moved_together(view, np.ones(len(DOTS), bool))


def test_the_crop_to_a_person_has_every_joint_inside_and_keeps_unknown_ones_unknown_and_needs_two():
    view = dotted_view(CAMERA, DOTS)
    view = replace(view, joints=np.vstack([view.joints, [np.nan, np.nan]]))
    crop = view.crop_to_person((96, 96), margin=1.25)
    known = crop.joints[:-1]
    assert np.isnan(crop.joints[-1]).all() and crop.image.shape == (96, 96, 3)
    extent = known.max(0) - known.min(0)
    np.testing.assert_allclose(extent.max(), 96 / 1.25)
    np.testing.assert_allclose((known.max(0) + known.min(0)) / 2, 48)

    for known in (0, 1):
        joints = view.joints.copy()
        joints[known:, 0] = np.nan
        with pytest.raises(ValueError, match=f"{known} joints known, at least 2"):
            replace(view, joints=joints).crop_to_person()
