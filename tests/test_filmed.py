"""Videos, a calibration and a network are enough: the person is found, and what is seen lies where the cameras say."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from recorded import HEIGHT, WIDTH, body, camera, keypoints, write_json, write_video

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import write_calib
from epiutils.data.recordings import Status
from epiutils.data.views import View
from epiutils.heatmaps import decode, render
from epiutils.networks.hrnet import SLIM, PoseHRNet, save_checkpoint
from epiutils.networks.pictures import PoseNetwork, open_network, predict_views
from epiutils.report import run as report
from epiutils.studies import filmed
from epiutils.studies.filmed import look_again, open_instant, read_film, seen
from epiutils.triangulate import project

NAMES = JOINTS["COCO_17"]
DRAWN = [j for j, name in enumerate(NAMES) if name[1:] not in ("eye", "ear")]  # those lie too close together
BACKGROUND = (30, 60, 30)
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "best.safetensors"


def colour(j):
    """Of a joint, RGB; no mixture of two joints', or of one and the background, is another's."""
    return 40 + 12 * j, 255 - 40 - 12 * j, 37 * j % 200 + 50


def draw(image, points, radius=3):
    for j in DRAWN:
        if np.isfinite(points[j]).all():
            at = tuple(int(v) for v in np.rint(16 * points[j]))
            cv2.circle(image, at, 16 * radius, colour(j)[::-1], -1, shift=4)
    return image


class Blobs:
    """A network that knows the colours: of each joint the spot nearest to the middle of the picture, if it is whole."""

    def __init__(self, stride=4):
        self.stride, self.looks = stride, 0

    def __call__(self, pictures):
        self.looks += len(pictures)
        points = np.full((len(pictures), len(NAMES), 2), np.nan)
        for b, picture in enumerate(pictures):
            spots = {}
            for j in DRAWN:
                mask = cv2.inRange(picture, *(tuple(c + d for c in colour(j)) for d in (-4, 4)))
                _, _, stats, centres = cv2.connectedComponentsWithStats(mask)
                middle = np.array(mask.shape[::-1]) / 2
                areas, away = stats[1:, cv2.CC_STAT_AREA], np.linalg.norm(centres[1:] - middle, axis=1)
                big = areas > 0.3 * max(areas, default=0)
                if big.any():
                    k = np.where(big, away, np.inf).argmin()
                    spots[j] = areas[k], centres[1 + k]
            whole = 0.85 * np.median([area for area, _ in spots.values()] or [0])
            for j, (area, centre) in spots.items():
                points[b, j] = centre if area >= whole else np.nan  # covered by another
        cells = (torch.from_numpy(points) - (self.stride - 1) / 2) / self.stride
        shape = tuple(n // self.stride for n in pictures.shape[1:3])
        return render(cells, shape, sigma=8 / self.stride, peak=0.9).float()


def blobs(size=(256, 256), stride=4):
    return PoseNetwork("Blobs", Blobs(stride), ("COCO_17",), size, (stride,) * 2, ((stride - 1) / 2,) * 2)


ASIDE = (0.8, 0, 0)  # metres; from every camera somebody else, and not in the middle


def place(t, start=(0, 0, 0)):
    return np.array(start) + (0.05 * t, -0.03 * t, 0)


def write_videos(path, length=4, n=4, others=(), blank=(), start=(0, 0, 0)):
    """Videos of the standing person, who walks; others: the cameras before which somebody else stands, and where;
    blank: (camera, frame) of pictures without anybody."""
    cameras, others = [camera(i) for i in range(n)], dict(others)
    for v, c in enumerate(cameras):
        pictures = [np.full((HEIGHT, WIDTH, 3), BACKGROUND, np.uint8) for _ in range(length)]
        for t, image in enumerate(pictures):
            for at in (place(t, start), *([others[v]] if v in others else [])) if (v, t) not in blank else ():
                draw(image, c.project(body("COCO_17", at)))
        write_video(path / "videos" / f"{c.name}.avi", pictures)
    write_calib(path / "Calib.toml", cameras)
    return cameras


@pytest.fixture
def film(tmp_path, monkeypatch):
    """The folder of a film, what a network sees in it being kept in a new cache, and the coloured spots' the network."""
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(filmed, "open_network", lambda name, model="auto": blobs())
    return tmp_path / "film"


def look(path, **options):
    return read_film(path, "blobs", progress=False, **options)


def off(data, start=(0, 0, 0)):
    """How far the detections (V, T, J) of a recording are from where the person walks, px; nan where undetected."""
    true = [[c.project(body("COCO_17", place(t, start))) for t in range(len(data))] for c in data.cameras]
    return np.linalg.norm(data.detections[..., :2] - np.array(true), axis=-1)


@pytest.mark.parametrize("size", [(256, 256), (192, 256)])
def test_the_person_is_found_from_whole_pictures_and_lies_where_the_bent_lenses_say(film, monkeypatch, size):
    write_videos(film)
    network = blobs(size)
    monkeypatch.setattr(filmed, "open_network", lambda *_: network)
    data = look(film)
    found, away = data.detections, off(data)
    assert found.shape == (4, 4, 17, 3) and np.isfinite(away[:, :, DRAWN]).mean() > 0.7
    assert np.nanmax(away) < 1.0 and np.nanmedian(away) < 0.35
    assert (found[..., 2] <= 1).all() and np.nanmax(found[..., 2]) > 0.8
    nobody = np.setdiff1d(np.arange(17), DRAWN)
    assert np.isnan(found[:, :, nobody, :2]).all() and (found[:, :, nobody, 2] == 0).all()
    assert network.run.looks == 4 * (4 + 1)  # twice at first


def test_a_view_that_saw_nobody_finds_the_person_again(film):
    blank = {(1, 0), (2, 1), (2, 2), (0, 3), (1, 3), (2, 3), (3, 3)}
    write_videos(film, blank=blank)
    data = look(film)
    known = np.isfinite(data.detections[:, :, DRAWN, 0]).mean(-1)
    for v, t in np.ndindex(4, 4):
        assert (known[v, t] == 0) == (data.status[v, t] == Status.NO_PERSON) == ((v, t) in blank)
    assert np.nanmax(off(data)) < 1.0


def test_a_view_that_saw_somebody_else_looks_where_the_others_see_the_person(film):
    """In one view somebody stands in the middle of the whole picture, and the person does not."""
    write_videos(film, others=[(1, (0, 0, 0))], start=ASIDE)
    data = look(film)
    away = off(data, ASIDE)[:, :, DRAWN]
    assert np.nanmax(away[[0, 2, 3]]) < 1.0
    known = away[1][np.isfinite(away[1])]  # where a joint is covered, the other's may be taken
    assert np.median(known) < 0.5 and (known < 1.0).mean() > 0.6 and len(known) > 0.5 * away[1].size
    corners = np.array([[0.0, 0], [WIDTH, HEIGHT]])
    whole = View(data.picture(1, 0), data.cameras[1], corners, np.ones(2)).crop_to_person((256, 256), 1.0)
    points, heights = decode(blobs()(whole.image[None])[0], "dark")
    other = np.linalg.norm(4 * points.numpy() + 1.5 - whole.camera.project(body("COCO_17")), axis=-1)
    assert np.median(other[heights.numpy() > 0.2]) < 2.0  # or nothing was shown


@pytest.mark.parametrize("ending", ["json", "JSON"])
def test_boxes_come_from_detections_where_there_are_some(film, ending):
    """Two people stand in every view; the recording's detections are of the second, and so are the network's."""
    cameras = write_videos(film, others=[(v, ASIDE) for v in range(4)])
    for v, t in np.ndindex(4, 4):
        x = cameras[v].project(body("BODY_25B", ASIDE))
        write_json(film / "pose" / f"{cameras[v].name}_json" / f"{t:03}.{ending}", [keypoints(x, np.ones(len(x)))])
    data = look(film)
    aside = np.stack([[c.project(body("COCO_17", ASIDE))] for c in cameras])
    away = np.linalg.norm(data.detections[..., :2] - aside, axis=-1)[:, :, DRAWN]
    assert np.nanmedian(away) < 0.5 and data.model == "COCO_17" and np.isfinite(away).mean() > 0.6


def test_a_film_is_seen_once_and_told_and_takes_its_place_as_a_recording(film, monkeypatch):
    cameras = write_videos(film)
    data = look(film)
    assert (data.status == Status.OK).all() and data.joints == NAMES
    assert any("COCO_17 detected by Blobs, in cam01 100 %" in note for note in data.notes)
    monkeypatch.setattr(PoseNetwork, "__call__", lambda *_: pytest.fail("it was seen before"))
    again = look(film)
    np.testing.assert_array_equal(again.detections, data.detections)
    np.testing.assert_allclose(again.cameras[1].P, cameras[1].P, atol=1e-9)
    shutil.copy(film / "videos" / "cam01.avi", film / "videos" / "cam02.avi")
    with pytest.raises(pytest.fail.Exception, match="seen before"):
        look(film)


def test_cameras_and_frames_are_those_asked_for_and_pictures_those_of_each_instant(film):
    write_videos(film)
    data = look(film, cameras="cam03,cam01", video_start=7)
    assert [c.name for c in data.cameras] == ["cam03", "cam01"] and data.frames.tolist() == [7, 8, 9, 10]
    later = replace(data, frames=data.frames[::2], lags=(1, 0))
    for shown in (data, later):
        pictures = list(shown.pictures())
        assert len(pictures) == len(shown.frames)
        for frame, of_all in zip(shown.frames, pictures, strict=True):
            for v, picture in enumerate(of_all):
                np.testing.assert_array_equal(picture, shown.picture(v, int(frame)))


def test_the_shortest_video_says_how_many_frames_there_are(film):
    write_videos(film)
    write_videos(film.parent / "short", length=2, n=1)
    shutil.copy(film.parent / "short" / "videos" / "cam01.avi", film / "videos")
    with pytest.warns(UserWarning, match="cam01.avi 2, cam02.avi 4.* pictures: the first 2 are taken"):
        assert look(film).frames.tolist() == [0, 1]


def test_notebooks_get_an_instant_and_maps_that_lie_at_its_joints(film):
    write_videos(film)
    data, frame = open_instant(3, str(film), "blobs")
    views, maps = seen(data, frame, "blobs")
    assert frame == 3 and len(views) == len(maps) == 4 and maps[0].shape == (17, 64, 64)
    for view, one in zip(views, maps, strict=True):
        points, heights = (a.numpy() for a in decode(one, "dark"))
        exact, known = view.camera.project(body("COCO_17", place(3))), (heights > 0.2) & np.isfinite(view.joints[:, 0])
        for joints in (exact, view.joints):
            np.testing.assert_allclose(4 * points[known], joints[known], atol=2.0)
        assert known.sum() > 6
    pictures, before, again = look_again(3, str(film), "blobs")
    assert pictures.shape == (4, 256, 256, 3) and before.output.shape == (1, 4, 17, 64, 64)
    torch.testing.assert_close(again(pictures), before.output[0])
    torch.testing.assert_close(before.output[0].double(), torch.stack(maps))
    data, frame = open_instant(20)
    views, maps = seen(data, frame)
    assert maps[0].shape == (17, 64, 64) and len(views) == 4
    with pytest.raises(ValueError, match="name its folder too"):
        open_instant(20, network="movenet")


@pytest.mark.parametrize(
    ("size", "stride"), [((256, 256), 4), ((192, 256), 4), ((288, 384), 4), ((256, 256), 8), ((160, 96), 2)]
)
def test_whatever_a_networks_grid_map_pixel_i_lies_at_pixel_4i(size, stride):
    """Blobs are drawn where joints are; their maps, and P, agree on where that is, at the middle of half pixels too."""
    network, X, instants = blobs(size, stride), body("COCO_17"), []
    for t in range(2):
        instants.append([])
        for v in range(3):
            c = camera(v).without_distortion().crop(np.diag([4.0, 4, 1]), (4 * WIDTH, 4 * HEIGHT))
            x = c.project(X + (0.1 * t, 0, 0))
            image = draw(np.full((4 * HEIGHT, 4 * WIDTH, 3), BACKGROUND, np.uint8), x, 22)[..., ::-1]
            view = View(np.ascontiguousarray(image), c, x, np.ones(17))
            instants[-1].append(view.crop_to_person((network.side,) * 2, 2.0))
    predicted = predict_views(network, instants)
    assert predicted.output.shape == (2, 3, 17, 64, 64) and predicted.F.shape == (2, 3, 3, 3, 3)
    points, heights = decode(predicted.output[:, :, DRAWN].double(), "dark")
    exact = np.stack([project(X[DRAWN] + (0.1 * t, 0, 0), predicted.P[t].numpy()).swapaxes(0, 1) for t in range(2)])
    off = (4 * points.numpy() - exact)[heights.numpy() > 0.2]
    far = np.linalg.norm(off, axis=-1)
    assert len(off) > 60 and np.median(far) < 0.5 * max(stride / 4, 1) and np.percentile(far, 90) < 2.0
    assert np.abs(off.mean(0)).max() < 0.35
    np.testing.assert_allclose(predicted.joints[:, :, DRAWN], exact, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_shipped_network_looks_at_videos_too(tmp_path, monkeypatch):
    """It knows embedded people alone, and says what it finds in Human3.6M's order, or that it finds nobody."""
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "cache"))
    network = open_network(str(CHECKPOINT))
    assert network.models == ("HUMAN36M_17",) and network.size == (256, 256)
    write_videos(tmp_path / "film", length=1, n=2)
    try:
        assert read_film(tmp_path / "film", str(CHECKPOINT), progress=False).model == "HUMAN36M_17"
    except ValueError as error:
        assert "finds nobody in any of 1 frames" in str(error)


def test_a_network_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    mpii, coco = (str(tmp_path / f"pose_hrnet_256x{width}.safetensors") for width in (256, 192))
    save_checkpoint(mpii, PoseHRNet(**SLIM, joints=16))
    save_checkpoint(coco, PoseHRNet(**SLIM, joints=17))
    for name, model, error, message in (
        (
            "openpose",
            "auto",
            ValueError,
            'a network is "movenet", or a file .pth, .safetensors or .onnx, got .openpose',
        ),
        (str(tmp_path / "none.pth"), "auto", FileNotFoundError, r"none\.pth: no such network"),
        ("movenet", "auto", FileNotFoundError, "`make real` brings MoveNet's weights"),
        (mpii, "auto", ValueError, r"256x256\.safetensors: 16 joints, which no model has: .*COCO_17 17.*MPII"),
        (coco, "HALPE_26", ValueError, "17 joints, which HALPE_26 has not"),
    ):
        with pytest.raises(error, match=message):
            open_network(name, model)
    network = open_network(coco)
    assert network.models == ("COCO_17", "HUMAN36M_17") and network.size == (192, 256)
    assert network(np.zeros((1, 256, 256, 3), np.uint8)).shape == (1, 17, 64, 64)


def test_a_folder_that_cannot_be_seen_is_refused_before_the_work(film):
    write_videos(film, length=1)
    for options, message in (
        ({"person": 1}, "person is for detections, of which there are none"),
        ({"cameras": "cam09"}, "no camera cam09, there are cam01, cam02"),
        ({"cameras": "cam01,cam01"}, "cameras to read are named twice: cam01, cam01"),
    ):
        with pytest.raises(ValueError, match=message):
            look(film, **options)
    for v in range(4):
        person = keypoints(camera(v).project(body("COCO_17")), np.ones(17))
        write_json(film / "pose" / f"cam0{v + 1}_json" / "0.json", [person])
    (film / "videos" / "cam02.avi").unlink()
    with (
        pytest.warns(UserWarning, match="without a video"),
        pytest.raises(ValueError, match="a network needs videos, and there is none of cam02"),
    ):
        look(film)
    shutil.rmtree(film / "pose")
    shutil.rmtree(film / "videos")
    with pytest.raises(ValueError, match="no video of cam01, cam02, cam03, cam04, here or in videos/"):
        look(film)
    (film / "cam01.mp4").write_bytes(b"no video")
    with (
        pytest.warns(UserWarning, match="cameras without a video"),
        pytest.raises(ValueError, match="no pictures in it"),
    ):
        look(film)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        look(film / "none")


def test_pictures_without_anybody_say_so(film):
    write_videos(film, length=2, n=2, blank={(v, t) for v in range(2) for t in range(2)})
    with pytest.raises(ValueError, match="Blobs finds nobody in any of 2 frames"):
        look(film)


def test_whose_joints_a_network_gives_is_told_by_how_they_lie_or_asked_for(film, monkeypatch):
    write_videos(film, length=1, n=1)
    x = camera(0).project(body("COCO_17"))
    cells = torch.from_numpy(32 + 30 * (x - x.mean(0)) / np.ptp(x, 0).max())
    for model, order in (("COCO_17", range(17)), ("HUMAN36M_17", np.roll(range(17), 8)), ("neither", [0] * 17)):
        maps = render(cells[list(order)], (64, 64), 2.0, peak=0.9).float()
        same = PoseNetwork(model, lambda _, maps=maps: maps[None], ("COCO_17", "HUMAN36M_17"))
        monkeypatch.setattr(filmed, "open_network", lambda *_, same=same: same)
        if model != "neither":
            assert look(film).model == model
    with pytest.raises(
        ValueError, match="neither: cannot tell COCO_17 from .*: say it by -p model, one of COCO_17, HUM"
    ):
        look(film)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "movenet"], "--network looks at a recording's videos: say --recording"),
        (["--recording", "FILM", "--network", "movenet"], "`make real` brings MoveNet's weights"),
        (["--recording", "FILM", "--network", "none.onnx"], "no such network"),
    ],
)
def test_the_report_checks_the_network_before_the_first_notebook(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path / "cache"))
    write_videos(tmp_path / "film", length=1, n=2)
    given = [str(tmp_path / "film") if text == "FILM" else text for text in arguments]
    with pytest.raises(SystemExit) as stop:
        report.main([*given, "--only", "02", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in capsys.readouterr().err
