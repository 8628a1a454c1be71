"""What of a recording does not fit together is an error or a warning; and several people are told apart."""

import warnings
from dataclasses import replace
from itertools import combinations, product

import cv2
import numpy as np
import pytest
from recorded import HEIGHT, WIDTH, body, calib, camera, keypoints, write_json, write_recording, write_video

from epiutils.data.calibration import read_calib, write_calib
from epiutils.data.recordings import read_recording
from epiutils.data.tracks import associate
from epiutils.epipolar import fundamental_from_cameras
from epiutils.triangulate import triangulate


def film(file, size, n=4, bars=0, paint=90):
    """A video of grey pictures, with black bars of so many px above and below."""
    image = np.full((size[1], size[0], 3), paint, np.uint8)
    image[:bars] = image[size[1] - bars :] = 0
    write_video(file, n * [image])


def read(path, **options):
    """The recording, and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recording = read_recording(path, **options)
    return recording, [str(one.message) for one in said]


def in_space(recording):
    """The person's joints (T, J, 3)."""
    xy = [c.undistort(d[..., :2]) for c, d in zip(recording.cameras, recording.detections, strict=True)]
    return triangulate(np.stack(xy).transpose(1, 2, 0, 3), np.stack([c.P for c in recording.cameras]))


@pytest.mark.parametrize(
    ("size", "bars", "message"),
    [
        ((WIDTH, HEIGHT), 0, None),
        ((WIDTH // 2, HEIGHT // 2), 0, None),
        ((WIDTH, HEIGHT + 40), 20, None),
        (
            (HEIGHT, WIDTH),
            0,
            "cam01.mp4: pictures of 240×160 px, but the calibration of cam01 is for 160×240: turned by",
        ),
        ((240, 240), 0, "cam01.mp4: pictures of 240×240 px, .* for 160×240: another shape, and no black bars"),
        ((WIDTH, HEIGHT + 40), 0, "160×280 px.*another shape"),
    ],
)
def test_pictures_have_the_shape_of_their_cameras(tmp_path, size, bars, message):
    write_recording(tmp_path, frames=range(4))
    for name in ("cam01", "cam02"):
        film(tmp_path / "videos" / f"{name}.mp4", size, bars=bars)
    if message is None:
        assert read_recording(tmp_path).video_start == 0
    else:
        with pytest.raises(ValueError, match=message):
            read_recording(tmp_path)


@pytest.mark.parametrize(
    ("first", "pictures", "told", "start", "warned"),
    [
        (0, 5, None, 0, None),
        (0, 9, None, 0, None),
        (2, 9, None, 0, None),
        (1, 5, None, 1, "frames 1 to 5 and 5 pictures: the first picture is taken for frame 1"),
        (1000, 5, None, 1000, "the first picture is taken for frame 1000"),
        (1, 5, 1, 1, None),
        (1, 5, 0, 0, "frames 1 to 5, but cam01.mp4 has 5 pictures, frames 0 to 4 with video_start=0: some have none"),
        (4, 6, None, 0, "some have none"),
    ],
)
def test_frames_and_pictures_are_counted_alike(tmp_path, first, pictures, told, start, warned):
    write_recording(tmp_path, frames=range(first, first + 5))
    for name in ("cam01", "cam02"):
        film(tmp_path / f"{name}.mp4", (WIDTH, HEIGHT), pictures)
    recording, said = read(tmp_path, video_start=told)
    assert recording.video_start == start and len(said) == (warned is not None)
    assert warned is None or warned in said[0]


def test_cameras_that_are_exchanged_are_told_by_pair(tmp_path):
    write_recording(tmp_path, frames=range(10), n=4)
    exact = read_recording(tmp_path)
    assert "cam01–cam02 0.0, cam01–cam03 0.0" in exact.notes[-1]
    cameras = read_calib(calib(tmp_path))
    turned = cv2.Rodrigues(np.array([0.2, 0, 0]))[0]
    write_calib(
        calib(tmp_path), [replace(c, R=turned @ c.R, t=turned @ c.t) if c.name == "cam03" else c for c in cameras]
    )
    with pytest.warns(
        UserWarning, match=r"(?s)off each other's epipolar lines in 3 of 6 pairs.*cam03 is in all of them"
    ):
        assert "cam01–cam03" in read_recording(tmp_path).notes[-1]


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("lag", [0, 3, -5])
def test_a_camera_out_of_step_is_told_by_how_much(tmp_path, lag, noise):
    rng, cameras = np.random.default_rng(0), [camera(i) for i in range(4)]
    write_calib(calib(tmp_path), cameras)
    for v, c in enumerate(cameras):
        for t in range(30):
            late = lag * (v == 2)
            x = c.project(body("BODY_25B", (0, 0, 0.1 * np.sin(t - late))) + (0, 0.03 * (t - late), 0))
            write_json(
                tmp_path / "pose" / f"{c.name}_json" / f"{t:04}.json",
                [keypoints(x + noise * rng.normal(size=x.shape), np.ones(25))],
            )
    told = [text for text in read(tmp_path)[1] if "fits frame t of the others" in text]
    assert len(told) == (lag != 0) and all(f"frame t{lag:+d} of cam03 fits" in text for text in told)


def test_keypoints_beyond_the_picture_are_told(tmp_path):
    write_recording(tmp_path, frames=range(4))
    small = [replace(c, size=(120, 150)) for c in read_calib(calib(tmp_path))]
    write_calib(calib(tmp_path), small)
    for name, text in zip(("cam01", "cam02"), read(tmp_path)[1], strict=True):
        assert f"% of the keypoints of {name} lie outside its picture" in text and "calibration says 120×150" in text


# Several people


def crowd(path, places, views=4, frames=12, seed=0, hidden=()):
    """People who stand and turn at places, in files in another order each time.  Returns X (people, T, J, 3)."""
    rng, cameras = np.random.default_rng(seed), [camera(i) for i in range(views)]
    write_calib(calib(path), cameras)
    X = np.stack([[body("BODY_25B", (x + 0.02 * t, y, 0)) for t in range(frames)] for x, y in places])
    order = np.empty((views, frames, len(places)), int)
    for v, c in enumerate(cameras):
        for t in range(frames):
            order[v, t] = rng.permutation(len(places))
            seen = [k for k in order[v, t] if (k, v, t) not in hidden]
            people = [keypoints(c.project(X[k, t]) + rng.normal(0, 0.5, (25, 2)), np.full(25, 0.8)) for k in seen]
            write_json(path / "pose" / f"{c.name}_json" / f"{c.name}_{t:04}.json", people)
    return X


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("places", [[(0, 0), (0.6, 0.3)], [(0, 0), (0.7, 0.1), (-0.6, 0.4)]])
def test_people_are_matched_between_views_and_followed(tmp_path, places, seed):
    hidden = {(0, 1, t) for t in range(5, 8)} | {(0, 2, 6)}  # the first is not seen by all cameras all the time
    X = crowd(tmp_path, places, seed=seed, hidden=hidden)
    found = []
    for k in range(len(places)):
        with pytest.warns(UserWarning, match=f"several people, kept {k}"):
            recording = read_recording(tmp_path, person=k)
        off = np.linalg.norm(in_space(recording) - X, axis=-1).max((1, 2))
        found.append(int(off.argmin()))
        assert off.min() < 0.1
        seen = (recording.person >= 0).sum()
        assert seen == 4 * 12 - 4 * (found[-1] == 0)
    assert sorted(found) == list(range(len(places))) and found[-1] == 0  # who is seen most comes first
    with pytest.raises(ValueError, match=rf"no person {len(places)}: 0 in 12 frames; 1 in 12 frames"):
        read_recording(tmp_path, person=len(places))


def test_the_person_of_one_combination_is_not_mixed_with_the_larger_one(tmp_path):
    """In one view another person is larger: by size alone the views would be mixed."""
    X = crowd(tmp_path, [(0, 0), (0.3, 0.9)], views=4)
    kept = {}
    for person in ("largest", 0):
        recording, said = read(tmp_path, person=person)
        assert any("off each other's epipolar lines" in text for text in said) == (person == "largest")
        kept[person] = np.linalg.norm(in_space(recording) - X, axis=-1).max(-1).min(0).max()
    assert kept[0] < 0.1 < 0.3 < kept["largest"]


def test_association_takes_any_number_of_people_and_views():
    cameras = [camera(i) for i in range(6)]
    X = np.stack([body("BODY_25B", (0.45 * k - 1, 0.3 * (k % 2), 0)) for k in range(5)])
    people = [[[np.column_stack([c.project(x), np.ones(25)]) for x in X[:: (-1) ** v]]] for v, c in enumerate(cameras)]
    places = associate(cameras, people)
    assert places.shape == (5, 6, 1)
    right = {tuple(k if v % 2 == 0 else 4 - k for v in range(6)) for k in range(5)}
    assert set(map(tuple, places[:, :, 0].tolist())) == right
    assert associate(cameras[:1], people[:1]).shape == (5, 1, 1)
    nobody = [[[], *view] for view in people]
    assert (associate(cameras, nobody)[:, :, 0] == -1).all()


def best_groups(cameras, at, near=0.05):
    """The groups of one instant, as sets of (view, place), by trying every combination, one after another."""

    straight = {(v, i): cameras[v].undistort(x[:, :2]) for v, view in enumerate(at) for i, x in enumerate(view)}

    F_of = {(s, r): fundamental_from_cameras(cameras[s], cameras[r]) for s, r in combinations(range(len(at)), 2)}

    def extent(x):
        return np.ptp(x[np.isfinite(x[:, 0])], 0).max()

    def score(s, i, r, j):
        x, y, c, e = straight[s, i], straight[r, j], at[s][i][:, 2], at[r][j][:, 2]
        both = np.isfinite(x[:, 0] + y[:, 0])
        F, w = F_of[s, r], np.minimum(c, e)[both]
        if not both.any():
            return 0.0
        d = []
        for F, p, q, size in ((F, x[both], y[both], extent(y)), (F.T, y[both], x[both], extent(x))):
            lines = np.column_stack([p, np.ones(len(p))]) @ F.T
            off = np.abs((lines * np.column_stack([q, np.ones(len(q))])).sum(1)) / np.hypot(*lines[:, :2].T)
            d.append((w * np.minimum(off / size, 1)).sum() / w.sum())
        return w.sum() * (1 - np.mean(d) / near)

    left, groups = [[None, *range(len(view))] for view in at], []
    pairs = {(s, i, r, j): score(s, i, r, j) for s, r in combinations(range(len(at)), 2)
             for i in range(len(at[s])) for j in range(len(at[r]))}  # fmt: skip
    while True:
        totals = {}
        for chosen in product(*left):
            some = [(v, i) for v, i in enumerate(chosen) if i is not None]
            totals[frozenset(some)] = sum(pairs[*a, *b] for a, b in combinations(some, 2))
        best = max(totals, key=totals.get)
        if totals[best] <= 0:
            return {*groups, *(frozenset([(v, i)]) for v, view in enumerate(left) for i in view if i is not None)}
        groups.append(best)
        for v, i in best:
            left[v].remove(i)


@pytest.mark.parametrize("seed", range(4))
def test_every_instant_is_matched_as_by_trying_all_combinations(seed):
    """Instants of different numbers of people at once, some of them seen by few, some joints unseen, one no person."""
    rng, cameras = np.random.default_rng(seed), [camera(i) for i in range(4)]
    people = [[] for _ in cameras]
    for _ in range(6):
        X = [body("BODY_25B", (0.5 * k - 0.5, rng.uniform(-0.4, 0.4), 0)) for k in range(3)]
        for c, view in zip(cameras, people, strict=True):
            at = [np.column_stack([c.project(x) + rng.normal(0, 1, (25, 2)), rng.uniform(0.2, 1, 25)]) for x in X]
            at.append(np.column_stack([rng.uniform(0, 200, (25, 2)), np.full(25, 0.5)]))
            for one in at:
                one[rng.random(25) < 0.2] = np.nan, np.nan, 0
            view.append([at[k] for k in rng.permutation(4)[: rng.integers(2, 5)]])
    places = associate(cameras, people)
    for t, at in enumerate(zip(*people, strict=True)):
        found = {frozenset((v, i) for v, i in enumerate(row) if i >= 0) for row in places[:, :, t].tolist()}
        assert found - {frozenset()} == best_groups(cameras, at)
    one = [[view[5]] for view in people]
    assert {tuple(row) for row in places[:, :, 5].tolist()} - {(-1,) * 4} == {
        *map(tuple, associate(cameras, one)[..., 0])
    }
