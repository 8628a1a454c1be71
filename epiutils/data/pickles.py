"""Pickles of arrays and plain containers, read without running anything that they name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np


# A pickle calls what it names, and numpy's dtype believes the offsets and flags that a pickle states, with which any
# memory can be read.  So these stand in for all that an array needs; dtypes are rebuilt with numpy's own checks.
class _Dtype:
    def __init__(self, code: str, *_):
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple):
        _, order, subarray, names, fields, *_ = state
        if subarray:
            self.dtype = np.dtype((subarray[0].dtype, subarray[1]))
        elif names:
            formats, offsets = zip(*((fields[name][0].dtype, fields[name][1]) for name in names), strict=True)
            layout = {"names": list(names), "formats": list(formats), "offsets": list(offsets)}
            self.dtype = np.dtype(layout | {"itemsize": self.dtype.itemsize})
        else:
            self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    def __setstate__(self, state: tuple):
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran, data))


def _reconstruct(*_) -> _Array:
    return _Array(0)


def _frombuffer(data, dtype: _Dtype, shape: tuple[int, ...], order: str, *axes) -> np.ndarray:
    array = np.frombuffer(_encode(data), dtype.dtype)
    return array.reshape(shape).transpose(*axes) if order == "K" else array.reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
    return np.frombuffer(_encode(data), dtype.dtype, 1)[0]


def _encode(data: bytes | bytearray | str, *_) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)  # a copy: no array shares another's memory


_ALLOWED = {"numpy.dtype": _Dtype, "numpy.ndarray": "ndarray", "_codecs.encode": _encode}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED |= {f"{_core}.multiarray._reconstruct": _reconstruct, f"{_core}.multiarray.scalar": _scalar}
    _ALLOWED[f"{_core}.numeric._frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is forbidden")
        return _ALLOWED[f"{module}.{name}"]


def unpickle(path: Path):
    """What a pickle or a .npy file of one object holds: numpy arrays, numbers, text, lists, tuples and dicts.

    Raises ValueError, naming the file, for all else.
    """
    with path.open("rb") as stream:
        try:
            if path.suffix == ".npy":  # a header with its length, then a pickle
                version = np.lib.format.read_magic(stream)
                stream.read(int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little"))
            return _Unpickler(stream, encoding="latin1").load()  # as Python 2 wrote arrays
        except Exception as error:  # a broken pickle can raise anything
            raise ValueError(f"{path} is not a pickle of arrays and plain containers: {error!r}") from error
