"""Pickles of arrays are read whatever their age; hostile ones run nothing, and none takes more than its size warrants."""

import io
import os
import pickle
import resource
import time

import numpy as np
import pytest
from files36m import SHOWN, body, labels, records, write_karfly, write_toolbox

from epiutils.data.human36m import Human36M
from epiutils.data.pickles import unpickle


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Pickles that would make a file, or more, and the name by which each is refused."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    for protocol in range(6):
        yield pickle.dumps([Call(os.system, command)], protocol), r"(posix|nt)\.system"
    yield pickle.dumps(Call(eval, code)), r"(builtins|__builtin__)\.eval"
    yield pickle.dumps({"a": Call(exec, code)}, 2), r"__builtin__\.exec"
    yield pickle.dumps(Call(getattr, {}, "keys")), r"(builtins|__builtin__)\.getattr"
    yield pickle.dumps(Call(np.save, str(marker), 1)), r"numpy\.save"
    yield pickle.dumps(Call(np.ndarray.tofile, np.zeros(3), str(marker))), r"getattr|ndarray\.tofile"
    yield pickle.dumps(Call(np._core.multiarray._reconstruct, np.memmap, (0,), b"b")), r"numpy\.memmap"
    yield pickle.dumps(Call(np.memmap, str(marker), "u1", "w+", 0, (3,))), r"numpy\.memmap"
    yield b"cnumpy\ndtype.__class__\n.", r"numpy\.dtype\.__class__"
    yield b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", r"numpy\.ndarray\.dump"
    yield f"(S'{command}'\nios\nsystem\n.".encode(), r"os\.system"  # INST
    yield f"(cos\nsystem\nS'{command}'\no.".encode(), r"os\.system"  # OBJ
    yield f"cnumpy._core.multiarray\nos.system\n(S'{command}'\ntR.".encode(), r"multiarray\.os\.system"
    yield f"cnumpy\nndarray\n(S'{command}'\ntR.".encode(), "not callable"
    yield f"c_codecs\nencode\n(NN(dS'__code__'\nS'{command}'\nstb.".encode(), ""


def test_hostile_pickles_are_refused_by_name_and_run_nothing(tmp_path):
    marker = tmp_path / "marker"
    for number, (data, name) in enumerate(hostile(marker)):
        for write, file in ((write_toolbox, r"h36m_validation\.pkl"), (write_karfly, r"GTbboxes\.npy")):
            path = write(tmp_path / f"{number}" / write.__name__, data)
            with pytest.raises(ValueError, match=f"(?s){file}.*{name}"):
                Human36M(path)
            assert not marker.exists(), data
    pickle.loads(next(hostile(marker))[0])  # they would have
    assert marker.exists()


class Forged:
    """A dtype that lies about its objects or their place; numpy believes it."""

    def __init__(self, dtype, offset):
        self.state = 3, "|", None, ("a",), {"a": (np.dtype(dtype), offset)}, 8, 1, 0

    def __reduce__(self):
        return np.dtype, ("V8", False, True), self.state


def stated(shape, dtype, data):
    """An array with the state that is given."""
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


def test_dtypes_cannot_lie(tmp_path):
    trusting = pickle.loads(pickle.dumps(Forged("O", 0)))
    assert trusting["a"] == object and not trusting.hasobject  # bytes would be taken for the address of an object
    for dtype in (Forged("O", 0), Forged("f8", 1 << 30)):
        for content in (
            Call(np._core.multiarray.scalar, dtype, b"12345678"),
            Call(np._core.numeric._frombuffer, b"12345678", dtype, (1,), "C"),
            stated((1,), dtype, b"12345678"),
        ):
            with pytest.raises(ValueError, match="not a pickle of arrays"):
                Human36M(write_toolbox(tmp_path, pickle.dumps([content])))
    with pytest.raises(ValueError, match="record 0: expected"):  # an honest one is read
        Human36M(write_toolbox(tmp_path, pickle.dumps([stated((1,), Forged("f8", 0), b"12345678")])))


class Python2(pickle._Pickler):
    """Writes bytes and text as Python 2 wrote its strings."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, bytes | str) or self.memo.get(id(obj)):
            return super().save(obj, save_persistent_id)
        data = obj if isinstance(obj, bytes) else obj.encode("latin1")
        self.write(b"T" + len(data).to_bytes(4, "little") + data)
        return self.memoize(obj)


def python2(content):
    stream = io.BytesIO()
    Python2(stream, 2).dump(content)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")


ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.arange(24, dtype=">i4").reshape(2, 3, 4).transpose(1, 0, 2),
    np.asfortranarray(np.eye(3, 2, dtype=np.float32)),
    np.array(["ab", "c"]),
    np.array([1, "x", None], object),
    np.zeros(2, np.dtype([("a", "<i2", (2, 2)), ("b", "f4")], align=True)),
    np.float64(0.5),
    np.int8(-3),
    np.bool_(True),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5, "Python 2", "old numpy"])
def test_pickles_of_all_ages_are_read(tmp_path, protocol):
    old = {"Python 2": python2, "old numpy": lambda c: pickle.dumps(c, 3).replace(b"numpy._core.", b"numpy.core.")}
    write = old.get(protocol) or (lambda content: pickle.dumps(content, protocol))
    file = tmp_path / "arrays.pkl"
    file.write_bytes(write([ARRAYS, {"a": (1, 2.5, None, True, "é"), "b": b"\xff\0"}]))
    arrays, rest = unpickle(file)
    for one, other in zip(arrays, ARRAYS, strict=True):
        assert one.dtype == other.dtype.newbyteorder("=") or protocol == 5  # as numpy itself reads them
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)
    assert rest == {"a": (1, 2.5, None, True, "é"), "b": "\xff\0" if protocol == "Python 2" else b"\xff\0"}
    write_toolbox(tmp_path / "a", write(records(SHOWN)))
    write_karfly(tmp_path / "b", write(np.array(labels(SHOWN))))
    for path in (tmp_path / "a", tmp_path / "b"):
        data = Human36M(path, every=1)
        assert np.abs(data.joints_3d - np.stack([body(instant) for instant in SHOWN])).max() < 1e-6


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -1000])
def test_truncated_annotations_are_named(tmp_path, cut):
    data = pickle.dumps(records(SHOWN))
    with pytest.raises(ValueError, match=r"h36m_validation\.pkl is not a pickle of arrays and plain containers"):
        Human36M(write_toolbox(tmp_path, data[:cut]))
    data = pickle.dumps(np.array(labels(SHOWN)))
    with pytest.raises(ValueError, match=r"GTbboxes\.npy is not a pickle of arrays and plain containers"):
        Human36M(write_karfly(tmp_path / "b", data[:cut]))


# Pickles that ask for more than they are


def shared(levels):
    """A list that holds the one below twice, and so on: 2^levels of the lowest."""
    return b"(Nl\x94" + b"".join(b"(h%ch%cl\x94" % (n, n) for n in range(levels)) + b"."


def from_outside(levels):
    """The same, put together from outside: each is filled when it is in the one above already."""
    return levels * b"]\x94" + b"".join(b"h%c(h%ch%ce" % (n, n + 1, n + 1) for n in range(levels - 1)) + b"."


DEEP = 1_000_000
GREEDY = {
    "a key nested a million deep": b"}N" + DEEP * b"\x85" + b"Ns.",
    "lists nested a million deep": DEEP * b"]" + (DEEP - 1) * b"a" + b".",
    "2 GB in 11 bytes": b"\x80\x05\x96" + (2 << 30).to_bytes(8, "little") + b".",
    "4 GB to remember": b"Nr\xff\xff\xff\x0f.",
    "a number without end": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "2^50 in 424 bytes": shared(50),
    "2^20 of a list that is filled later": from_outside(20),
    "8 TiB of objects": pickle.dumps(stated((1 << 40,), np.dtype(object), [1, 2])),
    "2^60 of nothing": pickle.dumps(stated((1 << 60,), np.dtype("V0"), b"")),
    "10 GB of copies": b"c_codecs\nencode\n\x94B\x00\x00\x10\x00"
    + bytes(1 << 20)
    + b"\x94("
    + 10_000 * b"h\x00h\x01N\x86R"
    + b"t.",
    "4 million lists": b"(" + 4_000_000 * b"]" + b"t.",
    "4 million names": b"N" + 4_000_000 * b"\x94" + b".",
    "a set": pickle.dumps([{1, 2}], 4),
    "no end": b"N" * 1000,
    "a number of 5,000 digits": b"I" + b"1" * 5000 + b"\n.",
}


@pytest.mark.parametrize("attack", GREEDY)
def test_pickles_that_ask_for_too_much_are_refused_at_once(tmp_path, attack):
    file = tmp_path / "greedy.pkl"
    file.write_bytes(GREEDY[attack])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"greedy\.pkl is not a pickle of arrays and plain containers: "):
        unpickle(file)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB


def test_a_pickle_larger_than_the_limit_is_refused_and_the_limit_said(tmp_path):
    file = tmp_path / "large.pkl"
    file.write_bytes(pickle.dumps(np.zeros(1000)))
    assert unpickle(file, limit=20_000).shape == (1000,)
    with pytest.raises(ValueError, match=r"large\.pkl has 8\d\d\d bytes; more than 8000 are read only where limit="):
        unpickle(file, limit=8000)


def test_a_large_pickle_is_looked_at_before_it_is_read(tmp_path):
    file = tmp_path / "hole.pkl"
    with file.open("wb") as stream:  # a tuple of 100 MB of zeros, of which the file holds none, and of something deep
        stream.write(b"\x80\x05(\x8e" + (100 << 20).to_bytes(8, "little"))
        stream.seek(100 << 20, os.SEEK_CUR)
        stream.write(b"N" + 100 * b"\x85" + b"t.")
    with pytest.raises(ValueError, match=r"hole\.pkl is not .*nested more than 50 deep"):
        unpickle(file)
