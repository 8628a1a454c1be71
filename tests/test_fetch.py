"""What is real comes from archives, checked, once, whole or not at all."""

import hashlib
import io
import sys
import tarfile
import zipfile

import pytest

from epiutils.networks import fetch

CONTENT = {"in/a.bin": b"weights", "in/b/c.txt": b"a calibration"}
WANTED = {name: (f"kept/{name[3:]}", hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}


def archive(kind, content=CONTENT):
    """A function that brings an archive of that content."""

    def download(place):
        path = place / f"package.{kind}"
        if kind == "whl":
            with zipfile.ZipFile(path, "w") as opened:
                for name, data in content.items():
                    opened.writestr(name, data)
            return path
        with tarfile.open(path, "w:gz") as opened:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
        return path

    return download


@pytest.mark.parametrize("kind", ["whl", "tgz"])
def test_what_is_wanted_is_kept_and_not_brought_again(tmp_path, capsys, kind):
    fetch._bring(tmp_path, WANTED, "things", archive(kind, CONTENT | {"in/large": b"0" * 9999}))
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "kept/a.bin",
        "kept/b/c.txt",
    }
    assert (tmp_path / "kept/b/c.txt").read_bytes() == b"a calibration"
    fetch._bring(tmp_path, WANTED, "things", lambda place: pytest.fail("it is there"))
    assert "there already" in capsys.readouterr().out
    (tmp_path / "kept/a.bin").write_bytes(b"damaged")
    fetch._bring(tmp_path, WANTED, "things", archive(kind))
    assert (tmp_path / "kept/a.bin").read_bytes() == b"weights" and "1 files" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["whl", "tgz"])
def test_another_file_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"package\.{kind}: in/a\.bin is another file"):
        fetch._bring(tmp_path, WANTED, "things", archive(kind, CONTENT | {"in/a.bin": b"others"}))
    with pytest.raises(ValueError, match=rf"package\.{kind}: no in/b/c\.txt in it"):
        fetch._bring(tmp_path, WANTED, "things", archive(kind, {"in/a.bin": b"weights"}))
    assert not (tmp_path / "kept/b").exists()


def test_without_a_network_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_npm", lambda place: fetch._run([sys.executable, "-c", "exit('no route')"], place))
    monkeypatch.setattr(fetch, "_pip", archive("whl"))
    assert fetch._main() == 1
    said = capsys.readouterr()
    assert "could not be brought, is there a network? no route. Everything else works without it." in said.err
    assert "package.whl: no Pose2Sim/Demo_SinglePerson/calibration/Calib.qca.txt" in said.err and "Now:" not in said.out


def test_two_recordings_of_four_cameras_and_their_calibrations_are_wanted():
    kept = {name for name, _ in fetch._RECORDINGS.values()}
    assert len(kept) == 10 and "recordings/second_person/videos/cam04.mp4" in kept
    assert all(len(sha) == 64 for _, sha in (*fetch._RECORDINGS.values(), *fetch._NETWORK.values()))
