"""What programs write: program × variant × (read exactly, perhaps with a warning | refused with what), and fuzz."""

import json
import re
import shutil
import time
import tomllib
import warnings
from dataclasses import replace

import cv2
import numpy as np
import pytest
import recorded
import tomli_w
from recorded import HEIGHT, WIDTH, body, calib, keypoints, write_json, write_recording

from epiutils.data.bodies import JOINTS
from epiutils.data.calibration import read_calib, write_calib
from epiutils.data.recordings import Status, read_recording
from epiutils.triangulate import triangulate

FRAMES, CAMERAS = 4, 3


def tables(path, change):
    """Change the tables of the rig file."""
    known = tomllib.loads(calib(path).read_text("utf-8"))
    known = change(known) or known
    calib(path).write_text(tomli_w.dumps(known), "utf-8")


def each(change):
    """Change each camera's table by a function."""
    return lambda path: tables(path, lambda known: [change(t) for k, t in known.items() if k != "metadata"] and None)


def scale_unit(factor):
    return each(lambda table: table.update(translation=[factor * v for v in table["translation"]]))


def relens(distortion, fisheye=False):
    """Other lenses, with detections as they see the person."""

    def change(path):
        cameras = [replace(c, distortion=distortion, fisheye=fisheye) for c in read_calib(calib(path))]
        write_calib(calib(path), cameras)
        for c in cameras:
            for t, file in enumerate(sorted((path / "pose" / f"{c.name}_json").iterdir())):
                write_json(file, [keypoints(c.project(body("BODY_25B", (0.02 * t, 0, 0))), np.full(25, 0.9))])

    return change


def rename(**names):
    def change(path):
        for old, new in names.items():
            (path / "pose" / f"{old}_json").rename(path / "pose" / new)

    return change


def caliscope(path):
    def change(known):
        cameras = {}
        for i, (name, table) in enumerate((k, t) for k, t in known.items() if k != "metadata"):
            R = cv2.Rodrigues(np.array(table["rotation"]))[0].tolist()
            cameras[str(i + 1)] = table | {"cam_id": i + 1, "rotation": R, "rotation_count": 0, "ignore": False}
            del cameras[str(i + 1)]["name"]
        return {"cameras": cameras | {"9": {"ignore": True}}, "fps": 30}

    tables(path, change)


def qualisys(path):
    text = recorded.qualisys(read_calib(calib(path)))
    calib(path).unlink()
    (path / "calibration" / "Calib.qca.txt").write_text(text)


def alphapose(name="{}.json", ending=".jpg", folder=False):
    """One JSON file a camera for all frames."""

    def change(path):
        for old in sorted((path / "pose").iterdir()):
            found = []
            for t, file in enumerate(sorted(old.iterdir())):
                (person,) = json.loads(file.read_text())["people"]
                found.append({"image_id": f"{t}{ending}", "category_id": 1, "keypoints": person["pose_keypoints_2d"]})
            shutil.rmtree(old)
            file = path / "pose" / name.format(old.name.removesuffix("_json"))
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(found))

    return change


def beside(name, lag=0, keep=True):
    """A folder of poses beside `pose`, and `pose` with one camera late."""

    def change(path):
        shutil.copytree(path / "pose", path / name)
        files = sorted((path / "pose" / "cam02_json").iterdir())
        texts = [file.read_text() for file in files]
        for file, text in zip(files, texts[lag:] + texts[:lag], strict=True):
            file.write_text(text)
        if not keep:
            shutil.rmtree(path / "pose")

    return change


def points(change):
    """Change all detections (J, 3) of all cameras, told the number of the camera."""

    def changed(path):
        for v, folder in enumerate(sorted((path / "pose").iterdir())):
            for file in folder.iterdir():
                (person,) = json.loads(file.read_text())["people"]
                found = np.reshape(person["pose_keypoints_2d"], (-1, 3))
                write_json(file, [np.ravel(change(found, v)).tolist()])

    return changed


def one_over_one(found, v):
    found = found / (WIDTH, HEIGHT, 1)
    found[3, 0] = 1.2
    return found


def encoded(encoding, what):
    def change(path):
        for file in path.glob(what):
            file.write_bytes(file.read_text("utf-8").encode(encoding))

    return change


def litter(path):
    """What systems and editors leave."""
    for folder in (path, path / "pose", path / "pose" / "cam01_json", path / "calibration"):
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".DS_Store").write_bytes(b"\0\1")
        for name in ("._cam01_000000000000_keypoints.json", "._Calib.toml", "._cam01.mp4"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    shutil.copy(calib(path), path / "calibration" / ".ipynb_checkpoints" / "Calib-checkpoint.toml")


def up(path):
    shutil.move(path / "calibration", path.parent / "calibration")


def empty_second(path):
    for file in (path / "pose" / "cam02_json").iterdir():
        write_json(file, [])


def in_text(camera, old, new, frame=1):
    """Change the text of one file of detections."""

    def change(path):
        file = path / "pose" / f"{camera}_json" / f"{camera}_{frame:012}_keypoints.json"
        file.write_text(file.read_text().replace(old, new, 1))

    return change


def unseen(value):
    """One joint of a camera undetected, as a program writes it."""
    return points(lambda x, v: [*x[:5], [value, value, 0], *x[6:]] if v == 1 else x)


def everybody(people):
    return lambda path: (
        [file.write_text(json.dumps({"people": people})) for file in path.glob("pose/*/*.json")] and None
    )


def blanks(path):
    for file in (*path.glob("pose/*/*.json"), calib(path)):
        file.write_bytes(b"\r\n".join(line + b" \t" for line in file.read_bytes().replace(b", ", b",\n").split(b"\n")))


def links(path):
    """A file and a folder that are links to what lies elsewhere in the recording."""
    files = sorted((path / "pose" / "cam02_json").iterdir())
    files[1].rename(path / "kept.txt")
    files[1].symlink_to(path / "kept.txt")
    (path / "pose" / "cam03_json").rename(path / "kept")
    (path / "pose" / "cam03_json").symlink_to("../kept")


def link_out(path):
    file = sorted((path / "pose" / "cam02_json").iterdir())[1]
    file.rename(path.parent / "outside.json")
    file.symlink_to(path.parent / "outside.json")


def in_numbers(path):
    """Blanks around Qualisys' numbers, and a name with blanks for the file."""
    file = path / "calibration" / "Calib.qca.txt"
    text = re.sub(r'"(-?[\d.e-]+)"', r'"  \1 "', file.read_text())
    file.unlink()
    (path / "calibration" / "My lab 2.qca.txt").write_text(text)


def more_cameras(path):
    write_calib(calib(path), [*read_calib(calib(path)), replace(read_calib(calib(path))[0], name="cam09")])


def write(path, text="{}"):
    return lambda folder: (folder / path).write_text(text)


def many(*changes):
    return lambda path: [change(path) for change in changes] and None


def nothing(path):
    pass


FILE = "cam01_000000000000_keypoints.json"
READ = {  # program, variant: how the files are changed, what else the reader is told, and what it warns of
    ("OpenPose", "BODY_25B"): (nothing, {}, None),
    ("OpenPose", "BODY_25"): (nothing, {"body": "BODY_25"}, None),
    ("OpenPose", "COCO"): (nothing, {"body": "COCO"}, None),
    ("OpenPose", "BODY_135"): (nothing, {"body": "BODY_135"}, None),
    ("RTMPose", "HALPE_26"): (nothing, {"body": "HALPE_26"}, None),
    ("RTMPose", "COCO_17"): (nothing, {"body": "COCO_17"}, None),
    ("RTMPose", "COCO_133"): (nothing, {"body": "COCO_133"}, None),
    ("OpenPose", "model told"): (nothing, {"model": "BODY_25B"}, None),
    ("OpenPose", "UTF-8 with a mark"): (encoded("utf-8-sig", "pose/*/*.json"), {}, None),
    ("OpenPose", "UTF-16"): (encoded("utf-16", "pose/*/*.json"), {}, None),
    ("OpenPose", "NaN where nothing is seen"): (unseen(np.nan), {}, None),
    ("OpenPose", "null where nothing is seen"): (unseen(None), {}, None),
    ("OpenPose", "names in capitals"): (
        lambda p: [f.rename(f.with_suffix(".JSON")) for f in p.glob("pose/*/*")] and None, {}, None),
    ("OpenPose", "CRLF and blanks"): (blanks, {}, None),
    ("OpenPose", "a camera lacks frames"): (
        lambda p: [f.unlink() for f in sorted(p.glob("pose/cam02_json/*"))[1:3]] and None, {}, None),
    ("Pose2Sim", "links inside"): (links, {}, None),
    ("Pose2Sim", "names with blanks and dashes"): (
        many(each(lambda t: t.update(name={"1": "Cam 10", "2": "cam-2", "3": "CAM_3 "}[t["name"][-1]])),
             rename(cam01="cam10", cam02="Cam 2_json", cam03="cam_3_JSON")), {}, None),
    ("AlphaPose", "a file a camera"): (alphapose(), {"body": "HALPE_26"}, None),
    ("AlphaPose", "a folder a camera"): (alphapose("{}/alphapose-results.json"), {"body": "COCO_17"}, None),
    ("AlphaPose", "names of pictures"): (alphapose("{}_alphapose-results.json", ".png"), {"body": "HALPE_26"}, None),
    ("Pose2Sim", "pose-sync"): (beside("pose-sync", 2), {}, None),
    ("Pose2Sim", "pose-associated"): (many(beside("pose-associated", 1), beside("pose-sync", 2)), {}, None),
    ("Pose2Sim", "pose-sync alone"): (beside("pose-sync", 1, keep=False), {}, None),
    ("Pose2Sim", "calibration one level up"): (up, {}, None),
    ("Pose2Sim", "cameras int_cam01_img"): (each(lambda t: t.update(name=f"int_{t['name']}_img")), {}, None),
    ("Pose2Sim", "folders cam_1"): (rename(cam01="cam_1_json", cam02="cam_2_json", cam03="cam_3_json"), {}, None),
    ("Pose2Sim", "folders by order"): (
        rename(cam01="left_json", cam02="middle_json", cam03="right_json"), {},
        "matched by order.*cam01 = left_json, cam02 = middle_json, cam03 = right_json"),
    ("Pose2Sim", "folders from 0"): (
        many(rename(cam01="a0_json", cam02="a1_json", cam03="a2_json")), {}, "matched by order"),
    ("Pose2Sim", "more calibrated cameras"): (more_cameras, {}, "left out: cam09"),
    ("Pose2Sim", "a camera that sees nobody"): (empty_second, {}, "nobody is detected in any frame of cam02: left out"),
    ("Pose2Sim", "what systems leave"): (litter, {}, None),
    ("Pose2Sim", "two of the cameras"): (nothing, {"cameras": "cam03,cam01"}, None),
    ("Pose2Sim", "Calib.toml with a mark"): (encoded("utf-8-sig", "calibration/*.toml"), {}, None),
    ("anipose", "millimetres, told"): (scale_unit(1000), {"unit": "mm"}, None),
    ("anipose", "millimetres, found"): (scale_unit(1000), {}, r"a person of 1\.\d+e\+03 m: its unit is taken for mm"),
    ("anipose", "centimetres, found"): (scale_unit(100), {}, "its unit is taken for cm"),
    ("anipose", "calibration.toml and its board"): (
        lambda p: tables(p, lambda known: known | {"charuco": {"square": 3}, "fps": 30}), {}, None),
    ("anipose", "five coefficients"): (relens((-0.1, 0.05, 1e-3, 2e-3, 0.02)), {}, None),
    ("anipose", "eight coefficients"): (relens((-0.1, 0.05, 1e-3, 2e-3, 0.02, 0.03, -0.01, 5e-3)), {}, None),
    ("anipose", "fisheye"): (relens((-0.05, 0.02, -4e-3, 1e-3), True), {}, None),
    ("FreeMoCap", "camera_calibration.toml"): (
        lambda p: calib(p).rename(p / "2024-01-01_camera_calibration.toml"), {}, None),
    ("caliscope", "[cameras.0], 3×3"): (caliscope, {}, None),
    ("caliscope", "camera_array.toml"): (
        many(caliscope, lambda p: calib(p).rename(p / "camera_array.toml")), {}, None),
    ("Qualisys", "Calib.qca.txt"): (qualisys, {}, None),
    ("Qualisys", "blanks around numbers"): (many(qualisys, in_numbers), {}, None),
    ("Qualisys", "serial numbers"): (
        many(each(lambda t: t.update(name=f"270{t['name'][-1]}5")), qualisys), {}, "matched by order.*27015 = cam01_json"),
}  # fmt: skip
REFUSED = {
    ("OpenPose", "keypoints from 0 to 1"): (points(lambda x, v: x / (WIDTH, HEIGHT, 1)), {}, "cam01 within .*pixels are needed"),
    ("OpenPose", "0 to 1, one point over 1"): (points(one_over_one), {}, "cam01 within .*pixels are needed"),
    ("OpenPose", "one camera from 0 to 1"): (
        points(lambda x, v: x / (WIDTH, HEIGHT, 1) if v == 1 else x), {}, "cam02 within .*pixels are needed"),
    ("OpenPose", "0 to 1 in one frame"): (
        lambda p: write_json(sorted(p.glob("pose/cam03_json/*"))[2], [keypoints(np.full((25, 2), 0.4), np.ones(25))]), {},
        r"cam03 within \[−2, 2\] in 1 of 4 frames: pixels are needed"),
    ("OpenPose", "NaN where something is seen"): (in_text("cam02", "[", "[NaN, 1, 0.5, "), {}, "cam02_000000000001"),
    ("OpenPose", "infinity"): (points(lambda x, v: [[np.inf, 1, 1], *x[1:]]), {}, "cam01_0.*not finite"),
    ("OpenPose", "negative confidence"): (points(lambda x, v: x * (1, 1, -1)), {}, "cam01_0.*negative confidence"),
    ("OpenPose", "nobody in any file"): (everybody([]), {}, "pose: no person in any file"),
    ("Pose2Sim", "{} in every file"): (everybody([{}]), {}, "pose: no person in any file"),
    ("Pose2Sim", "a link that leads away"): (link_out, {}, "cam02_000000000001_keypoints.json leads out of"),
    ("Pose2Sim", "two cameras of one name"): (each(lambda t: t.update(name="cam01")), {}, "Calib.toml: two cameras share"),
    ("Pose2Sim", "a table twice"): (
        lambda p: calib(p).write_text(calib(p).read_text().replace("[cam02]", "[cam01]")), {}, "Calib.toml is not a TOML"),
    ("OpenPose", "pictures twice as large"): (
        points(lambda x, v: x * (2, 2, 1)), {}, r"outside its picture: they span .*the calibration says 160×240"),
    ("OpenPose", "27 keypoints"): (
        points(lambda x, v: np.vstack([x, x[:2]])), {}, "27 keypoints a person, which no model has: BODY_25B 25"),
    ("OpenPose", "another model told"): (nothing, {"model": "HALPE_26"}, "25 keypoints a person, but HALPE_26 has 26"),
    ("AlphaPose", "not its JSON"): (
        many(alphapose(), write("pose/cam02.json", '{"people": 1}')), {}, "cam02.json is not AlphaPose's"),
    ("Pose2Sim", "half of the folders named"): (rename(cam01="left_json"), {}, r"\['cam01'\].*\['left_json'\]"),
    ("Pose2Sim", "two calibrations"): (lambda p: shutil.copy(calib(p), p / "Calib_2.toml"), {}, "expected one Calib"),
    ("Pose2Sim", "no calibration"): (lambda p: calib(p).unlink(), {}, r"expected one Calib.*found \[\]"),
    ("Pose2Sim", "UTF-16 Calib.toml"): (encoded("utf-16", "calibration/*.toml"), {}, "Calib.toml is not a TOML file"),
    ("anipose", "millimetres told for metres"): (nothing, {"unit": "mm"}, "Calib.toml and .*a person of 0.00.*unit='mm'"),
    ("anipose", "sides of a board"): (scale_unit(1 / 0.003e-3), {}, "people have 0.2 to 3.*sides of the board"),
    ("anipose", "twelve coefficients"): (
        each(lambda t: t.update(distortions=12 * [0.1])), {}, r"Calib.toml, table \[cam01\].*distortion needs"),
    ("caliscope", "no rotation yet"): (
        many(caliscope, lambda p: tables(p, lambda known: known["cameras"]["2"].pop("rotation") and None)), {},
        r"Calib.toml, table \[cameras.2\]: missing rotation"),
    ("Qualisys", "broken"): (
        many(qualisys, lambda p: (p / "calibration" / "Calib.qca.txt").write_text("<calibration>")), {}, "Calib.qca.txt is not"),
}  # fmt: skip


def prepared(path, change, told):
    told = dict(told)
    model = told.pop("body", "BODY_25B")
    write_recording(path, model, range(FRAMES), CAMERAS)
    change(path)
    return model, told


@pytest.mark.parametrize("row", READ, ids=" ".join)
def test_what_a_program_writes_is_read_exactly(tmp_path, row):
    change, told, warned = READ[row]
    model, told = prepared(tmp_path / "trial", change, told)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recording = read_recording(tmp_path / "trial", **told)
    if warned:
        with pytest.warns(UserWarning, match=f"(?s){warned}"):
            [warnings.warn_explicit(w.message, w.category, w.filename, w.lineno) for w in said]
        assert all(str(w.message) in recording.notes for w in said)
    else:
        assert not said
    xy = np.stack([c.undistort(d[..., :2]) for c, d in zip(recording.cameras, recording.detections, strict=True)])
    X = triangulate(xy.transpose(1, 2, 0, 3), np.stack([camera.P for camera in recording.cameras]))
    true = np.stack([body(model, (0.02 * t, 0, 0)) for t in range(FRAMES)])
    assert recording.model == model and recording.joints == JOINTS[model]
    assert np.linalg.norm(X - true, axis=-1).max() < 1e-4  # 0.1 mm


@pytest.mark.parametrize("row", REFUSED, ids=" ".join)
def test_what_is_certainly_wrong_is_refused_by_both_sides(tmp_path, row):
    change, told, message = REFUSED[row]
    _, told = prepared(tmp_path / "trial", change, told)
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{message}"):
        read_recording(tmp_path / "trial", **told)


def test_the_table_is_long():
    assert len(READ) + len(REFUSED) >= 50


def test_which_folder_was_read_is_said(tmp_path):
    prepared(tmp_path, beside("pose-sync", 1), {})
    assert any(
        "detections of pose-sync, not those of pose; calibration Calib.toml" in n
        for n in read_recording(tmp_path).notes
    )


def test_a_person_of_a_place_that_is_not_seen_is_nobody(tmp_path):
    """Pose2Sim keeps the place of each person in pose-associated, and writes {} where a camera does not see it."""
    write_recording(tmp_path, frames=range(FRAMES), n=CAMERAS)
    (tmp_path / "pose").rename(tmp_path / "pose-associated")
    for folder in (tmp_path / "pose-associated").iterdir():
        for t, file in enumerate(sorted(folder.iterdir())):
            (person,) = json.loads(file.read_text())["people"]
            other = person | {"pose_keypoints_2d": (np.array(person["pose_keypoints_2d"]) * 0.9).tolist()}
            unseen = (folder.name, t) == ("cam02_json", 1)
            file.write_text(json.dumps({"people": [{} if unseen else other, person]}))
    with pytest.warns(UserWarning, match="several people, kept 1"):
        second = read_recording(tmp_path, person=1)
    assert (second.person == 1).all() and second.status[1, 1] == Status.OK
    with pytest.warns(UserWarning):
        first = read_recording(tmp_path, person=0)
    assert first.person[1, 1] == -1 and first.status[1, 1] == Status.NO_PERSON and (first.person >= 0).sum() == 11
    np.testing.assert_allclose(first.detections[0, ..., :2], 0.9 * second.detections[0, ..., :2])


# Fuzz


def mutated(data, rng):
    """A file cut, swapped, grown, nested, or with values of other types."""
    kind, at, to = rng.integers(8), *sorted(rng.integers(0, len(data) + 1, 2).tolist())
    junk = bytes(rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8))
    values = (b"null", b"[]", b"{}", b"1e999", b"-1", b'"x"', b"true", b"9" * 400, b"nan", b"1e5", b"[[1]]", b"<a/>")
    value = values[rng.integers(len(values))]
    numbers = [i for i in range(len(data)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
    place = numbers[rng.integers(len(numbers))]
    end = next((i for i in range(place, len(data)) if not data[i : i + 1].isalnum() and data[i] != 46), len(data))
    return (
        lambda: data[:at],
        lambda: data[:at] + data[to:],
        lambda: data[:at] + junk + data[at:],
        lambda: data[to:] + data[at:to] + data[:at],
        lambda: data[:place] + value + data[end:],
        lambda: data[:at] + 20_000 * data[at : at + 1] + data[at:],
        lambda: data[:at] + value + data[to:],
        lambda: data[:place] + 3000 * b"[" + data[place:end] + 3000 * b"]" + data[end:],
    )[kind]()


@pytest.mark.parametrize("kind", ["openpose", "alphapose", "toml", "qualisys"])
def test_mutated_files_are_read_or_refused_by_name(tmp_path, kind):
    rng = np.random.default_rng(7)
    write_recording(tmp_path, frames=range(2), n=2)
    {"alphapose": alphapose(), "qualisys": qualisys}.get(kind, nothing)(tmp_path)
    file = {"openpose": tmp_path / "pose" / "cam01_json" / FILE, "alphapose": tmp_path / "pose" / "cam01.json",
            "toml": calib(tmp_path), "qualisys": tmp_path / "calibration" / "Calib.qca.txt"}[kind]  # fmt: skip
    whole, refused = file.read_bytes(), 0
    for _ in range(500):
        file.write_bytes(mutated(whole, rng))
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_recording(tmp_path)
            except ValueError as error:
                refused += 1
                assert str(tmp_path) in str(error)
        assert time.process_time() - began < 2
    assert 100 < refused < 500
