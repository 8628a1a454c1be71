"""Stored results: arrays in .npz files, in which what was found takes a byte and what is in millimetres two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from epiutils.data.files import replacing

_FARTHEST = 65504.0  # mm, where half precision ends: as wrong as a joint can be stored


def save_arrays(path: Path, arrays: dict) -> None:
    """Store arrays, numbers and dicts by their names, of which the part behind the last / says of what kind they are.

    found…: 1, 0 and nan, in eight bits, 2 for nan.  …mm: in half precision, at most 65504.  Dicts are JSON.
    """
    packed = {}
    for name, values in arrays.items():
        key = name.split("/")[-1]
        if isinstance(values, dict):
            values = json.dumps(values)
        elif key.startswith("found"):
            values = np.where(np.isnan(values), 2, values).astype(np.uint8)
        elif key.endswith("mm"):
            values = np.minimum(values, _FARTHEST).astype(np.float16)
        packed[name] = values
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **packed)


def load_arrays(path: Path) -> dict:
    """What `save_arrays` stored, by name; what was found, and millimetres, in single precision.

    Raises FileNotFoundError where nothing is stored.
    """
    arrays: dict = {}
    with np.load(path, allow_pickle=False) as stored:
        for name in stored.files:
            key, values = name.split("/")[-1], stored[name]
            if values.dtype.kind == "U":
                values = json.loads(str(values))
            elif key.startswith("found"):
                values = np.where(values > 1, np.nan, values.astype(np.float32))
            elif key.endswith("mm"):
                values = np.minimum(values.astype(np.float32), np.float32(_FARTHEST))
            arrays[name] = values
    return arrays
