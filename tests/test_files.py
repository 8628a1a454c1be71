"""Files of others are read within bounds, whatever they say; our own appear whole or not at all."""

import os
import resource
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import tomli_w
from files36m import SHOWN, labels, records, write_karfly, write_toolbox
from recorded import write_recording
from rigs import camera_pair

from epiutils.data.calibration import read_calib, write_calib
from epiutils.data.files import check_file, read_bytes, reading, replacing
from epiutils.data.human36m import Human36M, _archive, _read_picture
from epiutils.data.recordings import read_recording

# Our own


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with replacing(file) as part:
        part.write_text("first")
        assert not file.exists() and part.parent == file.parent
    with pytest.raises(ZeroDivisionError), replacing(file) as part:
        part.write_text("second")
        1 / 0
    assert file.read_text() == "first" and os.listdir(file.parent) == ["a.txt"]
    assert file.stat().st_mode & 0o777 == 0o644


KILLED = """
import os, signal, sys
from epiutils.data.files import replacing
with replacing(sys.argv[1]) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_what_others_write_is_kept(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a.txt"])
    (left,) = tmp_path.iterdir()
    host, pid, _ = left.name.removeprefix(".a.txt.").rsplit("-", 2)
    others = [left.name.replace(pid, str(os.getppid())), left.name.replace(host, "elsewhere"), f".a.txt.{host}-notes"]
    for name in others:
        (tmp_path / name).touch()
    with replacing(tmp_path / "b.txt") as part:
        part.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "b.txt"])


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync"))
    monkeypatch.setattr(os, "replace", lambda *_: done.append("replace"))
    with replacing(tmp_path / "a"):
        pass
    assert done == ["sync", "replace"]


# Those of others


def test_only_regular_files_inside_their_folder_are_read(tmp_path):
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    (folder / "below").mkdir(parents=True)
    secret.write_text("secret")
    (folder / "a").write_text("a")
    os.mkfifo(folder / "pipe")
    for name, target in (("inside", "a"), ("away", secret), ("loop", "loop"), ("dangling", "none"), ("dir", tmp_path)):
        (folder / name).symlink_to(target)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / "a", folder / "inside", tmp_path / "link" / "a", folder / "below" / ".." / "a"):
        assert read_bytes(path, within=folder) == read_bytes(path, within=tmp_path / "link") == b"a"
    for name in ("away", "../secret", "below/../../secret", "dir/secret"):
        with pytest.raises(ValueError, match=rf"folder/{name} leads out of .*folder"):
            read_bytes(folder / name, within=folder)
        assert read_bytes(folder / name) == b"secret"
    for path in (folder / "pipe", folder / "below", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            read_bytes(path)
    for name in ("loop", "a/b", "a" * 300, "nul\0"):
        with pytest.raises(ValueError, match=f"folder/{name} is not a file that can be read"):
            read_bytes(folder / name)
    for name in ("dangling", "none"):
        with pytest.raises(FileNotFoundError):
            check_file(folder / name)


def test_a_file_larger_than_the_limit_is_refused_and_the_limit_said(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345678")
    assert read_bytes(file, limit=8) == b"12345678"
    with pytest.raises(ValueError, match="a has 8 bytes; more than 7 are read only where limit= says so"):
        read_bytes(file, limit=7)


@pytest.mark.parametrize(
    "error", [RecursionError, MemoryError, OverflowError, OSError, cv2.error, ValueError, KeyError]
)
def test_whatever_a_parser_raises_becomes_a_value_error_that_names_the_file(error):
    with (
        pytest.raises(ValueError, match=rf"^a.xyz is not a picture: {error.__name__}\(.*why"),
        reading("a.xyz", "a picture"),
    ):
        raise error("why")
    with pytest.raises(ValueError, match="^a.xyz: .*why"), reading("a.xyz"):
        raise error("why")
    with pytest.raises(FileNotFoundError), reading("a.xyz", "a picture"):
        raise FileNotFoundError
    with pytest.raises(KeyboardInterrupt), reading("a.xyz", "a picture"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text",
    ["a = " + 100_000 * "[", "a = " + 100_000 * "{b=", ".".join(100_000 * "a") + " = 1", f"[{'.'.join(100 * 'a')}]",
     "a = " + 5000 * "1", "a = \xff", "\0", "a = 1\na = 2"],
)  # fmt: skip
def test_toml_that_is_nested_or_broken_is_refused_at_once(tmp_path, text):
    file, began = tmp_path / "a.toml", time.process_time()
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="a.toml is not a TOML file: "):
        read_calib(file)
    assert time.process_time() - began < 2


def test_toml_of_100_mb_is_refused_and_one_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "Calib.toml"
    with file.open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(ValueError, match="Calib.toml has 104857600 bytes; more than 1048576 are"):
        read_calib(file)
    write_calib(file, camera_pair(0))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [camera.name for camera in read_calib(file)] == ["src", "ref"]


@pytest.mark.parametrize("size", [(40_000, 40_000), (33_000, 10), (10_000, 10_000), (float("inf"), 10), (1e300, 1e300)])
def test_a_camera_too_large_for_its_picture_is_refused(tmp_path, size):
    write_calib(tmp_path / "Calib.toml", camera_pair(0))
    tables = tomllib.loads((tmp_path / "Calib.toml").read_text())
    tables["src"]["size"] = list(map(float, size))
    (tmp_path / "Calib.toml").write_text(tomli_w.dumps(tables))
    with pytest.raises(ValueError, match=r"Calib.toml, table \[src\]: .*(size|infinity)"):
        read_calib(tmp_path / "Calib.toml")


# Recordings and Human3.6M that are hostile


def small(path):
    """A recording of two cameras that see a person in one frame."""
    write_recording(path, frames=[0], folder="{}", name="{1}.json")
    return path


def keypoints(numbers):
    return '{"people": [{"pose_keypoints_2d": [' + numbers + "]}]}"


@pytest.mark.parametrize(
    "text",
    [100_000 * "[", 100_000 * '{"people":', keypoints(100_000 * "["), keypoints(5000 * "1"), keypoints(400 * "1" + ", 1, 1"),
     keypoints("1e400, 1, 1"), keypoints("1e300, 1, 1"), '{"people": [1]}', '{"people": 1}', "1", "\ud800"],
)  # fmt: skip
def test_hostile_json_is_refused_by_name(tmp_path, text):
    path, began = small(tmp_path), time.process_time()
    (path / "cam02" / "0.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"cam02/0\.json"):
        read_recording(path, "BODY_25B")
    assert time.process_time() - began < 2


def test_what_leads_out_of_a_recording_is_refused(tmp_path):
    path, other = small(tmp_path / "a"), small(tmp_path / "b")
    file = path / "cam02" / "0.json"
    file.unlink()
    for target in (other / "cam02" / "0.json", "/dev/zero"):
        file.symlink_to(target)
        with pytest.raises(ValueError, match=r"cam02/0\.json (leads out of|is not a regular)"):
            read_recording(path, "BODY_25B")
        file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"cam02/0\.json is not a regular file"):
        read_recording(path, "BODY_25B")
    file.unlink()
    file.write_text(keypoints(", ".join(75 * ["1"])) + " " * (17 << 20))
    with pytest.raises(ValueError, match=r"cam02/0\.json has \d+ bytes; more than 16777216"):
        read_recording(path, "BODY_25B")
    file.rename(file.with_name("1" * 200 + ".json"))
    with pytest.raises(ValueError, match="no frame has a number of 200 digits"):
        read_recording(path, "BODY_25B")


def test_a_video_that_is_no_file_or_never_ends_is_refused(tmp_path):
    path = small(tmp_path)
    for camera in ("cam01", "cam02"):
        os.mkfifo(path / f"{camera}.mp4")
    with pytest.raises(ValueError, match=r"cam01\.mp4 is not a regular file"):
        read_recording(path, "BODY_25B").views(0)
    for camera in ("cam01", "cam02"):
        (path / f"{camera}.mp4").unlink()
        shutil.copy(path / "calibration" / "Calib.toml", path / f"{camera}.mp4")
    with pytest.raises(ValueError, match=r"cam01\.mp4 is not a video that OpenCV can read"):
        read_recording(path, "BODY_25B")
    for camera in ("cam01", "cam02"):
        size = read_calib(path / "calibration" / "Calib.toml")[0].size
        film = cv2.VideoWriter(str(path / f"{camera}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 30, size)
        for _ in range(3):
            film.write(np.zeros((*size[::-1], 3), np.uint8))
        film.release()
        (path / camera / "0.json").rename(path / camera / "999999999999999.json")
    with pytest.warns(UserWarning, match="some have none"):
        recording = read_recording(path, "BODY_25B")
    with pytest.raises(ValueError, match=r"cam01\.mp4: no picture 999999999999999"):
        recording.views(999999999999999)


def jpeg(size=(1000, 1000), kind=".jpg"):
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8), (0, 0), 9)
    return cv2.imencode(kind, image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1] if kind == ".jpg" else [])[1].tobytes()


def test_pictures_are_inside_their_folder_and_of_the_size_that_they_have(tmp_path):
    (tmp_path / "images").mkdir()
    picture = tmp_path / "images" / "a.jpg"
    for name in ("images/../secret.jpg", "images/link.jpg"):
        (tmp_path / "secret.jpg").write_bytes(jpeg())
        (tmp_path / "images" / "link.jpg").unlink(missing_ok=True)
        (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        with pytest.raises(ValueError, match=f"{name} leads out of .*images"):
            _read_picture(tmp_path, name)
    scan = jpeg()[jpeg().rindex(b"\xff\xda") : -2]
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    for data in (jpeg((1000, 999)), header + bytes(4), jpeg()[:-2] + 100 * scan + b"\xff\xd9", b"GIF89a" + bytes(9)):
        picture.write_bytes(data)
        with pytest.raises(ValueError, match=r"images/a\.jpg: expected a picture of 1000×1000"):
            _read_picture(tmp_path, "images/a.jpg")
    for data in (jpeg(), jpeg(kind=".png")):
        picture.write_bytes(data)
        assert _read_picture(tmp_path, "images/a.jpg").shape == (1000, 1000, 3)


def zipped(path, content, method=zipfile.ZIP_STORED, size=None):
    """A zip with one picture; its content may be said to be packed in some way, and to be of some size."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/a.jpg", content)
    data = bytearray(path.read_bytes())
    for header in (0, data.index(b"PK\1\2") + 2):  # the second has one field more before these
        data[header + 8] = method
        data[header + 22 : header + 26] = (len(content) if size is None else size).to_bytes(4, "little")
    path.write_bytes(data)
    _archive.cache_clear()
    return path


def test_a_picture_in_a_zip_does_not_unpack_to_more_than_a_picture(tmp_path):
    deflate = zlib.compressobj(wbits=-15)
    bomb = 100 * (deflate.compress(bytes(30 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)) + b"\3\0"  # 3 GB in 3 MB
    assert len(bomb) < 4e6 and zlib.decompressobj(-15).decompress(bomb, 60 << 20) == bytes(60 << 20)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for method, size, why in (
        (8, 3000 << 20, "3145728000 bytes"),
        (8, 1000, "CRC"),
        (14, 1000, "compressed in way 14"),
    ):
        with pytest.raises(ValueError, match=rf"images\.zip, picture images/a\.jpg.*{why}"):
            _read_picture(zipped(tmp_path / "images.zip", bomb, method, size), "images/a.jpg")
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e5  # kB
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(ValueError, match=r"pipe\.zip is not a regular file"):
        _read_picture(tmp_path / "pipe.zip", "images/a.jpg")


# What chance makes of a file; of those of recordings, in test_layouts


def mutated(data, rng):
    """The file with one to four things done to it: bytes changed, lost, doubled, moved, or told to be huge."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        a, b = sorted(rng.integers(0, len(data) + 1, 2))
        b = min(b, a + int(rng.integers(1, 40)))
        match rng.integers(6):
            case 0:
                data[a:b] = rng.integers(0, 256, b - a, np.uint8).tobytes()
            case 1:
                del data[a : b if rng.random() < 0.8 else None]
            case 2:
                data[a:a] = data[a:b] * int(rng.integers(1, 50))
            case 3:
                data[a:b] = rng.choice(
                    [b"0", b"-1", b"1e999", b"nan", b"9" * 30, b'"', b"[", b"{}", b"null", b"\xff\xff\xff\x7f"]
                )
            case 4:
                c = int(rng.integers(0, len(data) + 1))
                data[c:c] = data[a:b]
            case 5 if len(data):
                data[min(a, len(data) - 1)] ^= 1 << int(rng.integers(8))
        data = data or bytearray(b"\0")
    return bytes(data)


def of_human36m(path):
    data = Human36M(path, every=1)
    assert data.joints_3d.shape == (len(data), 17, 3) and np.isfinite(data.joints_3d).all()


def toolbox(path):
    file = write_toolbox(path, records(SHOWN[:1])) / "annot" / "h36m_validation.pkl"
    return file, lambda: of_human36m(path)


def karfly(path):
    write_karfly(path, labels(SHOWN[:1]))
    return path / "extra" / "human36m-multiview-labels-GTbboxes.npy", lambda: of_human36m(path)


def archive(path):
    small = cv2.imencode(".png", np.zeros((1000, 1000, 3), np.uint8))[1].tobytes()
    file = zipped(path / "images.zip", small)

    def read():
        _archive.cache_clear()
        _read_picture(file, "images/a.jpg")

    return file, read


def picture(path):
    (path / "images").mkdir()
    file = path / "images" / "a.jpg"
    file.write_bytes(cv2.imencode(".jpg", np.full((1000, 1000, 3), 90, np.uint8))[1].tobytes())
    return file, lambda: _read_picture(path, "images/a.jpg")


@pytest.mark.parametrize("kind", [toolbox, karfly, archive, picture])
def test_300_broken_files_are_read_or_refused_by_name(tmp_path, kind):
    file, read = kind(tmp_path)
    read()
    whole, refused = file.read_bytes(), 0
    for seed in range(300):
        file.write_bytes(mutated(whole, np.random.default_rng(seed)))
        began = time.process_time()
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert file.name in str(error), (seed, error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        assert time.process_time() - began < 2, seed
    assert refused > 10
