"""Files appear whole or not at all; and what a module's file says, for those that keep what it makes."""

from __future__ import annotations

import ast
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an exception.

    A reader sees the old file or the new one, never a half.  The folder is made where it is missing; temporary files
    that killed processes of this machine left in it are removed.
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
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _alive(process: int) -> bool:
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
