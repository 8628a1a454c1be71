"""What programs write: program × variant × (read exactly, perhaps with a warning | refused with what)."""

import json
import os
import re
import shutil
import time
import tomllib
import warnings
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tomli_w
from recorded import HEIGHT, WIDTH, body, calib, keypoints, write_alphapose, write_json, write_qualisys, write_recording

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import read_calib, write_calib
from epiutils.data.recordings import Status, read_recording
from epiutils.triangulate import triangulate

FRAMES, CAMERAS = 4, 3
DETECTIONS, FIRST, SECOND = "pose/*/*", "pose/cam01_json/*000_*", "pose/cam02_json/*001_*"


# Changes of a recording that was written as Pose2Sim has it


def many(*changes):
    return lambda path: [change(path) for change in changes] and None


def tables(change):
    """Change the tables of the rig file, in place or to others."""

    def changed(path):
        known = tomllib.loads(calib(path).read_text("utf-8"))
        calib(path).write_text(tomli_w.dumps(change(known) or known), "utf-8")

    return changed


def each(change):
    """Change each camera's table."""
    return tables(lambda known: [change(table) for key, table in known.items() if key != "metadata"] and None)


def scale_unit(factor):
    return each(lambda table: table.update(translation=[factor * v for v in table["translation"]]))


def renamed(names):
    """Cameras that are called otherwise; the last digit of the old name chooses."""
    return each(lambda table: table.update(name=names(table["name"][-1])))


def rename(**names):
    """Folders of detections that are called otherwise."""
    return lambda path: [(path / "pose" / f"{k}_json").rename(path / "pose" / v) for k, v in names.items()] and None


def edit(what, change):
    """Change the bytes of files."""
    return lambda path: [file.write_bytes(change(file.read_bytes())) for file in sorted(path.glob(what))] and None


def text(content):
    """One file of detections that holds this."""
    return edit(FIRST, lambda _: content.encode("utf-8", "surrogatepass"))


def person(numbers):
    return text('{"people": [{"pose_keypoints_2d": [' + numbers + "]}]}")


def points(change):
    """Change all detections (J, 3) of all cameras, told the number of the camera."""

    def changed(path):
        for v, folder in enumerate(sorted((path / "pose").iterdir())):
            for file in folder.iterdir():
                (one,) = json.loads(file.read_text())["people"]
                write_json(file, [np.ravel(change(np.reshape(one["pose_keypoints_2d"], (-1, 3)), v)).tolist()])

    return changed


def unseen(value):
    """One joint of a camera undetected, as a program writes it."""
    return points(lambda x, v: [*x[:5], [value, value, 0], *x[6:]] if v == 1 else x)


def shares(x, v=0):
    return x / (WIDTH, HEIGHT, 1)


def one_over_one(x, v):
    x = shares(x)
    x[3, 0] = 1.2
    return x


def crowded(number):
    return edit(SECOND, lambda data: json.dumps({"people": number * json.loads(data)["people"]}).encode())


def crlf(data):
    return b"\r\n".join(line + b" \t" for line in data.replace(b", ", b",\n").split(b"\n"))


def utf16(data):
    return data.decode().encode("utf-16")


def with_mark(data):
    return b"\xef\xbb\xbf" + data


def caliscope(path):
    def change(known):
        cameras = {}
        for i, table in enumerate((table for key, table in known.items() if key != "metadata"), 1):
            R = cv2.Rodrigues(np.array(table["rotation"]))[0].tolist()
            cameras[str(i)] = table | {"cam_id": i, "rotation": R, "rotation_count": 0, "ignore": False}
            del cameras[str(i)]["name"]
        return {"cameras": cameras | {"9": {"ignore": True}}, "fps": 30}

    tables(change)(path)


def beside(name, lag=0, keep=True):
    """A folder of poses beside `pose`, and `pose` with one camera late."""

    def change(path):
        shutil.copytree(path / "pose", path / name)
        files = sorted((path / "pose" / "cam02_json").iterdir())
        texts = [file.read_text() for file in files]
        for file, late in zip(files, texts[lag:] + texts[:lag], strict=True):
            file.write_text(late)
        if not keep:
            shutil.rmtree(path / "pose")

    return change


def litter(path):
    """What systems and editors leave."""
    for folder in (path, path / "pose", path / "pose" / "cam01_json", path / "calibration"):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".DS_Store").write_bytes(b"\0\1")
        for name in ("._cam01_000000000000_keypoints.json", "._Calib.toml", "._cam01.mp4"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    shutil.copy(calib(path), path / "calibration" / ".ipynb_checkpoints" / "Calib-checkpoint.toml")


def links(path):
    """A file and a folder that are links to what lies elsewhere in the recording."""
    second(path).rename(path / "kept.txt")
    second(path).symlink_to(path / "kept.txt")
    (path / "pose" / "cam03_json").rename(path / "kept")
    (path / "pose" / "cam03_json").symlink_to("../kept")


def second(path):
    """The second file of the second camera."""
    return path / "pose" / "cam02_json" / "cam02_000000000001_keypoints.json"


def away(make):
    """The second file of the second camera made anew, told where it was and where it lies now."""
    return lambda path: make(second(path), second(path).rename(path.parent / "outside.json"))


def videos(make):
    return lambda path: [make(path / f"cam0{i}.mp4") for i in (1, 2, 3)] and None


def qualisys_with_blanks(path):
    """Blanks around Qualisys' numbers, and a name with blanks for the file."""
    file = write_qualisys(path)
    file.with_name("My lab 2.qca.txt").write_text(re.sub(r'"(-?[\d.e-]+)"', r'"  \1 "', file.read_text()))
    file.unlink()


def more_cameras(path):
    write_calib(calib(path), [*read_calib(calib(path)), replace(read_calib(calib(path))[0], name="cam09")])


def nothing(path):
    pass


LENSES = {"five": (-0.1, 0.05, 1e-3, -2e-3, 0.02), "eight": (-0.1, 0.05, 1e-3, -2e-3, 0.02, 0.03, -0.01, 5e-3)}
READ = {  # program and variant: how the files are changed, what the writer and the reader are told, what it warns of
    "OpenPose, model told": (nothing, {"model": "BODY_25B"}, None),
    "OpenPose, folders without ending": (nothing, {"folder": "pose/{}", "name": "{1}.json"}, None),
    "OpenPose, dots in names": (nothing, {"folder": "pose/{}_pose", "name": "{0}.{1:04}.json"}, None),
    "OpenPose, no folder pose": (nothing, {"folder": "{}_json", "name": "{0}_{1}_keypoints.json"}, None),
    "OpenPose, UTF-8 with a mark": (edit(DETECTIONS, with_mark), {}, None),
    "OpenPose, UTF-16": (edit(DETECTIONS, utf16), {}, None),
    "OpenPose, NaN where nothing is seen": (unseen(np.nan), {}, None),
    "OpenPose, null where nothing is seen": (unseen(None), {}, None),
    "OpenPose, names in capitals": (
        lambda p: [f.rename(f.with_suffix(".JSON")) for f in p.glob(DETECTIONS)] and None, {}, None),
    "OpenPose, CRLF and blanks": (many(edit(DETECTIONS, crlf), edit("calibration/*", crlf)), {}, None),
    "OpenPose, a camera lacks frames": (
        lambda p: [f.unlink() for f in sorted(p.glob("pose/cam02_json/*"))[1:3]] and None, {}, None),
    "AlphaPose, a file a camera": (write_alphapose, {"body": "HALPE_26"}, None),
    "AlphaPose, a folder a camera": (
        lambda p: write_alphapose(p, "{}/alphapose-results.json"), {"body": "COCO_17"}, None),
    "AlphaPose, names of pictures": (
        lambda p: write_alphapose(p, "{}_alphapose-results.json", ".png"), {"body": "HALPE_26"}, None),
    "Pose2Sim, links inside": (links, {}, None),
    "Pose2Sim, names with blanks and dashes": (
        many(renamed({"1": "Cam 10", "2": "cam-2", "3": "CAM_3 "}.get),
             rename(cam01="cam10", cam02="Cam 2_json", cam03="cam_3_JSON")), {}, None),
    "Pose2Sim, pose-sync": (beside("pose-sync", 2), {}, None),
    "Pose2Sim, pose-associated": (many(beside("pose-associated", 1), beside("pose-sync", 2)), {}, None),
    "Pose2Sim, pose-sync alone": (beside("pose-sync", 1, keep=False), {}, None),
    "Pose2Sim, calibration one level up": (
        lambda p: shutil.move(p / "calibration", p.parent / "calibration"), {}, None),
    "Pose2Sim, calibration beside the folders": (lambda p: shutil.move(calib(p), p / "Calib_qualisys.toml"), {}, None),
    "Pose2Sim, cameras int_cam01_img": (renamed("int_cam0{}_img".format), {}, None),
    "Pose2Sim, folders cam_1": (rename(cam01="cam_1_json", cam02="cam_2_json", cam03="cam_3_json"), {}, None),
    "Pose2Sim, folders by order": (
        rename(cam01="left_json", cam02="middle_json", cam03="right_json"), {},
        "matched by order.*cam01 = left_json, cam02 = middle_json, cam03 = right_json"),
    "Pose2Sim, folders from 0": (rename(cam01="a0_json", cam02="a1_json", cam03="a2_json"), {}, "matched by order"),
    "Pose2Sim, more calibrated cameras": (more_cameras, {}, "left out: cam09"),
    "Pose2Sim, a camera that sees nobody": (
        edit("pose/cam02_json/*", lambda _: b'{"people": []}'), {},
        "nobody is detected in any frame of cam02: left out"),
    "Pose2Sim, what systems leave": (litter, {}, None),
    "Pose2Sim, two of the cameras": (nothing, {"cameras": "cam03,cam01"}, None),
    "Pose2Sim, Calib.toml with a mark": (edit("calibration/*", with_mark), {}, None),
    "anipose, millimetres, told": (scale_unit(1000), {"unit": "mm"}, None),
    "anipose, millimetres, found": (scale_unit(1000), {}, r"a person of 1\.\d+e\+03 m: its unit is taken for mm"),
    "anipose, centimetres, found": (scale_unit(100), {}, "its unit is taken for cm"),
    "anipose, calibration.toml and its board": (
        tables(lambda known: known | {"charuco": {"square": 3}, "fps": 30}), {}, None),
    "anipose, five coefficients": (nothing, {"distortion": LENSES["five"]}, None),
    "anipose, eight coefficients": (nothing, {"distortion": LENSES["eight"]}, None),
    "anipose, fisheye": (nothing, {"distortion": (-0.05, 0.02, -4e-3, 1e-3), "fisheye": True}, None),
    "FreeMoCap": (lambda p: calib(p).rename(p / "2024-01-01_camera_calibration.toml"), {}, None),
    "caliscope, [cameras.0], 3×3": (caliscope, {}, None),
    "caliscope, camera_array.toml": (many(caliscope, lambda p: calib(p).rename(p / "camera_array.toml")), {}, None),
    "Qualisys": (write_qualisys, {}, None),
    "Qualisys, blanks around numbers": (qualisys_with_blanks, {}, None),
    "Qualisys, serial numbers": (
        many(renamed("270{}5".format), write_qualisys), {}, "matched by order.*27015 = cam01_json"),
}  # fmt: skip
NAME = r"cam01_0+_keypoints\.json"
REFUSED = {
    "keypoints from 0 to 1": (points(shares), {}, "cam01 within .*pixels are needed"),
    "0 to 1, one point over 1": (points(one_over_one), {}, "cam01 within .*pixels are needed"),
    "one camera from 0 to 1": (
        points(lambda x, v: shares(x) if v == 1 else x), {}, "cam02 within .*pixels are needed"),
    "0 to 1 in one frame": (
        edit("pose/cam03_json/*002_*", lambda _: json.dumps(
            {"people": [{"pose_keypoints_2d": keypoints(np.full((25, 2), 0.4), np.ones(25))}]}).encode()), {},
        r"cam03 within \[−2, 2\] in 1 of 4 frames: pixels are needed"),
    "pictures twice as large": (
        points(lambda x, v: x * (2, 2, 1)), {}, r"outside its picture: they span .*the calibration says 160×240"),
    "nobody in any file": (edit(DETECTIONS, lambda _: b'{"people": []}'), {}, "pose: no person in any file"),
    "{} in every file": (edit(DETECTIONS, lambda _: b'{"people": [{}]}'), {}, "pose: no person in any file"),
    "27 keypoints": (
        points(lambda x, v: np.vstack([x, x[:2]])), {}, "27 keypoints a person, which no model has: BODY_25B 25"),
    "another model told": (nothing, {"model": "HALPE_26"}, "25 keypoints a person, but HALPE_26 has 26"),
    "one person of another model": (person("1, 2, 1"), {}, "1 keypoints a person in cam01_json, frame 0; 25 keypoints"),
    "a second person wanted": (nothing, {"person": 1}, "no person 1: 0 in 4 frames"),
    "51 people": (crowded(51), {}, "51 people in a file of cam02"),
    "1001 people": (crowded(1001), {}, "cam02_0+1_keypoints.json.*1001 people; more than 1000"),
    "JSON cut": (text('{"people": ['), {}, f"{NAME}.*JSONDecodeError"),
    "JSON is no text": (edit(FIRST, lambda _: b"\xff\xfe\x00\x80"), {}, f"{NAME}.*Decode"),
    "JSON half a character": (text("\ud800"), {}, f"{NAME}.*Decode"),
    "JSON a list": (text("[]"), {}, f"{NAME}.*TypeError"),
    "JSON a number": (text("1"), {}, f"{NAME}.*TypeError"),
    "JSON nested": (text(100_000 * "["), {}, NAME),
    "JSON nested people": (text(100_000 * '{"people":'), {}, NAME),
    "no people": (text("{}"), {}, rf"{NAME}.*KeyError\('people'\)"),
    "people null": (text('{"people": null}'), {}, f"{NAME}.*TypeError"),
    "people a number": (text('{"people": 1}'), {}, f"{NAME}.*TypeError"),
    "people numbers": (text('{"people": [1]}'), {}, f"{NAME}.*TypeError"),
    "a person without keypoints": (text('{"people": [{"pose": []}]}'), {}, f"{NAME}.*pose_keypoints_2d"),
    "two numbers": (person("1, 2"), {}, f"{NAME}: person 0: expected 3 numbers"),
    "keypoints nested": (person(100_000 * "["), {}, NAME),
    "keypoints a text": (person('1, "a", 1'), {}, f"{NAME}.*could not convert"),
    "keypoints NaN": (person("1, NaN, 1"), {}, f"{NAME}: person 0: .*not finite"),
    "keypoints null": (person("1, null, 1"), {}, f"{NAME}: person 0: .*not finite"),
    "keypoints infinite": (person("Infinity, 1, 1"), {}, f"{NAME}: person 0: .*not finite"),
    "keypoints beyond all numbers": (person("1e400, 1, 1"), {}, f"{NAME}: person 0: .*not finite"),
    "keypoints huge": (person("1e300, 1, 1"), {}, f"{NAME}: person 0: .*a million or more"),
    "keypoints of 400 digits": (person(400 * "1" + ", 1, 1"), {}, NAME),
    "keypoints of 5000 digits": (person(5000 * "1"), {}, NAME),
    "confidence negative": (person("1, 2, -1"), {}, f"{NAME}: person 0: .*negative confidence"),
    "AlphaPose, not its JSON": (
        many(write_alphapose, lambda p: (p / "pose/cam02.json").write_text('{"people": 1}')), {},
        "cam02.json is not AlphaPose's"),
    "a link that leads away": (away(lambda file, outside: file.symlink_to(outside)), {}, "cam02_0+1.* leads out of"),
    "a link to a device": (
        away(lambda file, _: file.symlink_to("/dev/zero")), {}, "cam02_0+1.* (leads out of|is not a regular)"),
    "a pipe": (away(lambda file, _: os.mkfifo(file)), {}, "cam02_0+1.*json is not a regular file"),
    "a large file": (
        edit(SECOND, lambda data: data + b" " * (17 << 20)), {}, r"cam02_0+1.* has \d+ bytes; more than 16777216"),
    "a number of 200 digits": (
        away(lambda file, outside: outside.rename(file.with_name("1" * 200 + ".json"))), {},
        "no frame has a number of 200 digits"),
    "a frame twice": (
        lambda p: shutil.copy(second(p), second(p).with_name("cam02_1.json")), {},
        "(cam02_1.json and cam02_0+1_.*|cam02_0+1_.* and cam02_1.json) are both frame 1"),
    "no number": (
        away(lambda file, outside: outside.rename(file.with_name("keypoints.json"))), {},
        "keypoints.json: no frame number"),
    "half of the folders named": (rename(cam01="left_json"), {}, r"\['cam01'\].*\['left_json'\]"),
    "another number": (
        rename(cam02="cam07_json"), {}, r"without a folder of JSON files: \['cam02'\].*without a calibration: \['cam07_"),
    "a camera twice": (
        lambda p: shutil.copytree(p / "pose/cam02_json", p / "pose/cam_02"), {},
        "cam02_json and .*cam_02 both belong to camera cam02"),
    "no such camera": (nothing, {"cameras": "cam01, cam07"}, "no camera cam07, there are cam01, cam02"),
    "no detections of a camera": (more_cameras, {"cameras": "cam01,cam09"}, "no detections of cam09, there are those of"),
    "two cameras of one name": (each(lambda t: t.update(name="cam01")), {}, "Calib.toml: two cameras share"),
    "a table twice": (
        edit("calibration/*", lambda data: data.replace(b"[cam02]", b"[cam01]")), {}, "Calib.toml is not a TOML"),
    "two calibrations": (
        lambda p: shutil.copy(calib(p), p / "Calib_2.toml"), {}, "expected one Calib.*Calib_2.toml.*calibration.Calib"),
    "no calibration": (lambda p: calib(p).rename(p / "other.txt"), {}, r"expected one Calib.*found \[\]"),
    "UTF-16 Calib.toml": (edit("calibration/*", utf16), {}, "Calib.toml is not a TOML file"),
    "millimetres told for metres": (nothing, {"unit": "mm"}, "Calib.toml and .*a person of 0.00.*unit='mm'"),
    "sides of a board": (scale_unit(1 / 0.003e-3), {}, "people have 0.2 to 3.*sides of the board"),
    "twelve coefficients": (
        each(lambda t: t.update(distortions=12 * [0.1])), {}, r"Calib.toml, table \[cam01\].*distortion needs"),
    "caliscope, no rotation yet": (
        many(caliscope, tables(lambda known: known["cameras"]["2"].pop("rotation") and None)), {},
        r"Calib.toml, table \[cameras.2\]: missing rotation"),
    "Qualisys, broken": (
        many(write_qualisys, edit("calibration/*", lambda _: b"<calibration>")), {}, "Calib.qca.txt is not"),
    "a video that is a pipe": (videos(os.mkfifo), {}, r"cam01\.mp4 is not a regular file"),
    "a video that is none": (
        videos(lambda file: file.write_bytes(b"no video")), {}, r"cam01\.mp4 is not a video that OpenCV can read"),
}  # fmt: skip


def prepared(path, change, told):
    """What the reader is told; a recording is written to the path as the rest says, and changed."""
    options = {key: told[key] for key in ("folder", "name", "distortion", "fisheye") if key in told}
    write_recording(path, told.get("body", "BODY_25B"), range(FRAMES), CAMERAS, **options)
    change(path)
    return {key: told[key] for key in told if key not in options and key != "body"}


@pytest.mark.parametrize("row", READ)
def test_what_a_program_writes_is_read_exactly(tmp_path, row):
    change, told, warned = READ[row]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recording = read_recording(tmp_path / "trial", **prepared(tmp_path / "trial", change, told))
    said = [str(one.message) for one in said]
    assert bool(said) == bool(warned) and re.search(f"(?s){warned or ''}", "\n".join(said))
    assert set(said) <= set(recording.notes)
    model = told.get("body", "BODY_25B")
    xy = np.stack([c.undistort(d[..., :2]) for c, d in zip(recording.cameras, recording.detections, strict=True)])
    X = triangulate(xy.transpose(1, 2, 0, 3), np.stack([camera.P for camera in recording.cameras]))
    true = np.stack([body(model, (0.02 * t, 0, 0)) for t in range(FRAMES)])
    assert recording.model == model and recording.joints == JOINTS[model]
    assert np.linalg.norm(X - true, axis=-1).max() < 1e-4  # 0.1 mm


@pytest.mark.filterwarnings("ignore:.*left out. cam09")
@pytest.mark.parametrize("row", REFUSED)
def test_what_is_certainly_wrong_is_refused_at_once_by_both_sides(tmp_path, row):
    change, told, message = REFUSED[row]
    told = prepared(tmp_path / "trial", change, told)
    began = time.process_time()
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{message}"):
        read_recording(tmp_path / "trial", **told)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"model": "MPI"}, 'model must be "auto" or one of BODY_25B'),
        ({"person": "tall"}, 'person must be a number from 0, "largest" or "confident", got'),
        ({"person": -1}, "person must be"),
        ({"unit": "feet"}, 'unit must be "auto" or one of m, cm, mm'),
        ({"video_start": "1"}, "video_start must be the number"),
    ],
)
def test_what_the_reader_cannot_be_told_is_refused(tmp_path, told, message):
    with pytest.raises(ValueError, match=message):
        read_recording(tmp_path, **told)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        read_recording(tmp_path / "none", **told)


def test_which_folder_was_read_is_said(tmp_path):
    prepared(tmp_path, beside("pose-sync", 1), {})
    said = "detections of pose-sync, not those of pose; calibration Calib.toml"
    assert any(said in note for note in read_recording(tmp_path).notes)


def test_a_person_of_a_place_that_is_not_seen_is_nobody(tmp_path):
    """Pose2Sim keeps the place of each person in pose-associated, and writes {} where a camera does not see it."""
    write_recording(tmp_path, frames=range(FRAMES), n=CAMERAS, folder="pose-associated/{}_json")
    for folder in (tmp_path / "pose-associated").iterdir():
        for t, file in enumerate(sorted(folder.iterdir())):
            (one,) = json.loads(file.read_text())["people"]
            other = one | {"pose_keypoints_2d": (np.array(one["pose_keypoints_2d"]) * 0.9).tolist()}
            unseen = (folder.name, t) == ("cam02_json", 1)
            file.write_text(json.dumps({"people": [{} if unseen else other, one]}))
    with pytest.warns(UserWarning, match="several people, kept 1"):
        second = read_recording(tmp_path, person=1)
    assert (second.person == 1).all() and second.status[1, 1] == Status.OK
    with pytest.warns(UserWarning):
        first = read_recording(tmp_path, person=0)
    assert first.person[1, 1] == -1 and first.status[1, 1] == Status.NO_PERSON and (first.person >= 0).sum() == 11
    np.testing.assert_allclose(first.detections[0, ..., :2], 0.9 * second.detections[0, ..., :2])
