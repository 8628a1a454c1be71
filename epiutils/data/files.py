"""Files: those of others are read within bounds; our own appear whole or not at all, and say which code made them."""

from __future__ import annotations

import ast
import os
import platform
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType


@contextmanager
def reading(path: str | os.PathLike, what: str = "") -> Iterator[None]:
    """All that a parser may raise becomes a ValueError, "{path} is not {what}: …"; a FileNotFoundError stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken file can raise anything: RecursionError, MemoryError, cv2.error …
        said = f" is not {what}: {error!r}" if what else f": {error if isinstance(error, ValueError) else repr(error)}"
        raise ValueError(f"{path}{said:.1000}") from error


def check_file(path: str | os.PathLike, limit: float = float("inf"), within: str | os.PathLike | None = None) -> Path:
    """The path, if it is that of a regular file of at most `limit` bytes, inside the folder `within`.

    Raises FileNotFoundError where there is none; ValueError naming it where it is a folder, a pipe or a device, is too
    large, or leads out of the folder by `..` or by a link.
    """
    path = Path(path)
    with reading(path, "a file that can be read"):
        status = os.stat(path)
        inside = within is None or path.resolve(strict=True).is_relative_to(Path(within).resolve())
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if not inside:
        raise ValueError(f"{path} leads out of {within}: only what is inside is read")
    if status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size} bytes; more than {limit} are read only where limit= says so")
    return path


def read_bytes(path: str | os.PathLike, limit: int = 16 << 20, within: str | os.PathLike | None = None) -> bytes:
    """The bytes of a file that `check_file` lets pass."""
    with reading(path, "a file that can be read"), check_file(path, limit, within).open("rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))  # room for `limit` bytes would be made each time


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an exception.

    A reader sees the old file or the new one, never a half, also after a power cut.  The folder is made where it is
    missing; temporary files that killed processes of this machine left in it are removed.
    """
    path, host = Path(path), platform.node()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*.{host}-*"):
        owner = re.fullmatch(rf"\..+\.{re.escape(host)}-(\d+)-\w+", left.name)
        if owner and not _alive(int(owner[1])):
            left.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{host}-{os.getpid()}-")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, to ask would be to kill
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def code(module: ModuleType) -> str:
    """A module's code without comments and docstrings."""
    return _bare(Path(module.__file__).read_bytes())


@lru_cache(maxsize=64)
def _bare(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)
