"""Files of others are read within bounds, whatever they say; our own appear whole or not at all."""

import os
import re
import resource
import subprocess
import sys
import time
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from files36m import SHOWN, labels, records, write_karfly, write_toolbox
from recorded import calib, write_alphapose, write_qualisys, write_recording

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


# Human3.6M that is hostile


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


# What chance makes of a file


def mutated(data, rng):
    """The file with one or two things done to it: bytes changed, lost, doubled, moved; values of other types, nested."""
    values = (b"null", b"[]", b"{}", b"1e999", b"-1", b'"x"', b'"', b"true", b"0", b"9" * 400, b"nan", b"1e5", b"[[1]]",
              b"<a/>", b"\xff\xff\xff\x7f")  # fmt: skip
    for _ in range(rng.integers(1, 3)):
        a, far = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        b, c = min(far, a + int(rng.integers(1, 40))), int(rng.integers(0, len(data) + 1))
        junk, value = rng.integers(0, 256, b - a, np.uint8).tobytes(), values[rng.integers(len(values))]
        numbers = [m.span() for m in re.finditer(rb"\d[\w.]*", data)] or [(a, b)]
        start, end = numbers[rng.integers(len(numbers))]
        data = (
            lambda: data[:a],
            lambda: data[:a] + data[far:],
            lambda: data[:a] + data[b:],
            lambda: data[:a] + junk + data[a:],
            lambda: data[:a] + junk + data[b:],
            lambda: data[far:] + data[a:far] + data[:a],
            lambda: data[:c] + data[a:b] + data[c:],
            lambda: data[:a] + data[a:b] * int(rng.integers(1, 50)) + data[a:],
            lambda: data[:a] + 20_000 * data[a : a + 1] + data[a:],
            lambda: data[:a] + value + data[far:],
            lambda: data[:start] + value + data[end:],
            lambda: data[:start] + 3000 * b"[" + data[start:end] + 3000 * b"]" + data[end:],
            lambda: data[:a] + bytes(x ^ 1 << int(rng.integers(8)) for x in data[a : a + 1]) + data[a + 1 :],
        )[rng.integers(13)]() or b"\0"  # fmt: skip
    return data


def of_recording(path, change=lambda path: None):
    write_recording(path, frames=range(2))
    change(path)
    return lambda: read_recording(path)


def openpose(path):
    return path / "pose" / "cam01_json" / "cam01_000000000000_keypoints.json", of_recording(path)


def alphapose(path):
    return path / "pose" / "cam01.json", of_recording(path, write_alphapose)


def toml(path):
    return calib(path), of_recording(path)


def qualisys(path):
    return path / "calibration" / "Calib.qca.txt", of_recording(path, write_qualisys)


def of_human36m(path):
    def read():
        data = Human36M(path, every=1)
        assert data.joints_3d.shape == (len(data), 17, 3) and np.isfinite(data.joints_3d).all()

    return read


def toolbox(path):
    return write_toolbox(path, records(SHOWN[:1])) / "annot" / "h36m_validation.pkl", of_human36m(path)


def karfly(path):
    write_karfly(path, labels(SHOWN[:1]))
    return path / "extra" / "human36m-multiview-labels-GTbboxes.npy", of_human36m(path)


def archive(path):
    file = zipped(path / "images.zip", cv2.imencode(".png", np.zeros((1000, 1000, 3), np.uint8))[1].tobytes())

    def read():
        _archive.cache_clear()
        _read_picture(file, "images/a.jpg")

    return file, read


def picture(path):
    (path / "images").mkdir()
    file = path / "images" / "a.jpg"
    file.write_bytes(cv2.imencode(".jpg", np.full((1000, 1000, 3), 90, np.uint8))[1].tobytes())
    return file, lambda: _read_picture(path, "images/a.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [openpose, alphapose, toml, qualisys, toolbox, karfly, archive, picture])
def test_500_broken_files_are_read_or_refused_by_name(tmp_path, kind):
    file, read = kind(tmp_path)
    read()
    whole, refused = file.read_bytes(), 0
    named = str(tmp_path) if kind in (openpose, alphapose, toml, qualisys) else file.name
    for seed in range(500):
        file.write_bytes(mutated(whole, np.random.default_rng(seed)))
        began = time.process_time()
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert named in str(error), (seed, error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        assert time.process_time() - began < 2, seed
    assert 10 < refused and (refused < 500 or kind is archive)  # a zip has checksums
