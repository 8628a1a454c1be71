"""Pickles of arrays and plain containers, read without running anything that they name."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import pickletools
import re

import numpy as np

from epiutils.data.files import check_file, reading


# A pickle calls what it names, and numpy's dtype believes the offsets and flags that a pickle states, with which any
# memory can be read.  So these stand in for all that an array needs; dtypes are rebuilt with numpy's own checks.
class _Dtype:
    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[<>=|]?[a-zA-Z]\d{0,9}", str(code)):
            raise ValueError(f"no dtype is written as {code!r}")
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
        if math.prod(shape) > len(data):  # of objects, numpy would make room for what the shape says
            raise ValueError(f"an array of shape {shape} from {len(data)} bytes or objects")
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


# The opcodes that arrays and plain containers need.  What they take from the stack to make one object of it, or to put
# it into the object below; "mark" is all above the last mark.
_MAKE = {"EMPTY_LIST": 0, "EMPTY_DICT": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": "mark", "LIST": "mark",
         "DICT": "mark", "STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "OBJ": "mark", "INST": "mark"}  # fmt: skip
_FILL = {"APPEND": 1, "SETITEM": 2, "APPENDS": "mark", "SETITEMS": "mark", "BUILD": 1}
_PUSH = """GLOBAL NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING
SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8
EMPTY_TUPLE""".split()
_MEMO = ("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_COPY = ("REDUCE", "NEWOBJ", "OBJ", "INST", "BUILD")  # may copy what they take
_KINDS = dict.fromkeys(_PUSH, "push") | dict.fromkeys(_MAKE, "make") | dict.fromkeys(_FILL, "fill")
_KINDS |= {name: "get" if name.endswith("GET") else "put" for name in _MEMO}
_KINDS |= {"MARK": "mark", "STOP": "stop", "PROTO": "skip", "FRAME": "skip"}
_OPCODES = {  # for each its kind, its name, and pickletools' number of bytes that follow
    ord(op.code): (_KINDS.get(op.name), op.name, op.arg.n if op.arg else 0) for op in pickletools.opcodes
}
_PREFIX = {-2: 1, -3: 4, -4: 4, -5: 8}  # negative ones: the bytes that tell how many follow
_DEPTH = 50


def _number(argument: bytes, size: int) -> int:
    return int.from_bytes(argument, "little") if size > 0 else int(argument)


def _check(data: mmap.mmap, i: int) -> None:
    """Raise ValueError where a pickle is nested deeply, or would build far more than its size warrants.

    It builds nothing but, for each object, the bytes of it and of all in it, each time that it is in it, since what is
    shared a few times on each of many levels is huge to whoever reads it; containers are [bytes, depth, whether used].
    data: the file, whose pickle begins at i.
    """
    most, built, copied = 32 * len(data) + (4 << 20), 0, 0
    stack, marks, memo = [], [], {}
    while True:
        kind, name, size = _OPCODES[data[i]]
        start = end = i + 1
        if size > 0:
            end += size
        elif size < -1:
            start += _PREFIX[size]
            end = start + int.from_bytes(data[i + 1 : start], "little")
        elif size:
            for _ in range(2 if name in ("GLOBAL", "INST") else 1):
                end = data.find(b"\n", end) + 1 or len(data) + 1
        if kind == "push":
            stack.append(32 + end - start)  # with the others of its kind at most 32 times what they take here
        elif kind == "get":
            one = memo[data[start] if size == 1 else _number(data[start:end], size)]
            stack.append(one)
            if one.__class__ is list:
                one[2] = True
        elif kind == "put":
            number = _number(data[start:end], size) if size else len(memo)
            if number > len(data):  # room is made for as many
                raise ValueError(f"it remembers an object as number {number}")
            memo[number] = stack[-1]
            built += 96
        elif kind == "mark":
            marks.append(len(stack))
        elif kind == "make" or kind == "fill":
            count = _MAKE[name] if kind == "make" else _FILL[name]
            at = marks.pop() if count == "mark" else len(stack) - count
            parts, weight, depth = stack[at:], 0, 0
            del stack[at:]
            for one in parts:
                if one.__class__ is list:
                    one[2] = True
                    weight += one[0]
                    if one[1] > depth:
                        depth = one[1]
                else:
                    weight += one
            if kind == "make":
                stack.append([0, 0, False])
            into = stack[-1]
            if into[2]:
                raise ValueError("it changes an object that it has used")
            into[0] += 32 + weight
            if depth >= into[1]:
                into[1] = depth + 1
            built += 96 if count else 160
            copied += weight if name in _COPY else 0
            if max(into[0], copied) > most or into[1] > _DEPTH:
                raise ValueError(f"it is nested more than {_DEPTH} deep, or more than {most} bytes")
        elif kind == "stop":
            return
        elif kind != "skip":
            raise ValueError(f"arrays and plain containers need no {name}")
        if end > len(data) or built > most:
            raise ValueError(f"its end is missing, or it is more than {most} bytes")
        i = end


def unpickle(path: str | os.PathLike, limit: int = 4 << 30):
    """What a pickle or a .npy file of one object holds: numpy arrays, numbers, text, lists, tuples and dicts.

    limit: most bytes of the file.  It is refused before anything is built where that would be nested more than 50 deep,
    or take more than 4 MB and 32 times its bytes; to look takes about 6 times as long as to read, for Human3.6M's
    annotations some two minutes a GB.
    Raises ValueError, naming the file, for all else than the above; FileNotFoundError where it is missing.
    """
    path = check_file(path, limit)
    with reading(path, "a pickle of arrays and plain containers"), path.open("rb") as stream:
        if path.suffix == ".npy":  # a header with its length, then a pickle
            version = np.lib.format.read_magic(stream)
            stream.seek(int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little"), os.SEEK_CUR)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(data, stream.tell())
        return _Unpickler(stream, encoding="latin1").load()  # as Python 2 wrote arrays
