"""ONNX pose networks with known answers: maps, SimCC's vectors, and what is refused."""

import numpy as np
import pytest
import torch

from epiutils.data.bodies import JOINTS
from epiutils.heatmaps import decode
from epiutils.networks.onnx import OnnxPose

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WIDTH, HEIGHT = 48, 64


def write(path, outputs, nodes, constants, batch="B", size=(HEIGHT, WIDTH)):
    """An ONNX file of these nodes; outputs are names and their shapes."""
    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = h.make_graph(
        [h.make_node(op, inputs, [out], **more) for op, inputs, out, more in nodes],
        "pose",
        [h.make_tensor_value_info("input", kind, [batch, 3, *size])],
        [h.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(np.float32(values), name) for name, values in constants.items()],
    )
    model = h.make_model(graph, ir_version=9, opset_imports=[h.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    return path


def of_maps(path, joints=17, **more):
    """Means of 4×4 px, mixed from the colours to the joints' maps; and the weights."""
    weights = np.random.default_rng(joints).normal(size=(joints, 3, 1, 1))
    nodes = [("AveragePool", ["input"], "mean", {"kernel_shape": [4, 4], "strides": [4, 4]})]
    nodes += [("Conv", ["mean", "weights"], "maps", {})]
    shape = [None, joints, None, None]
    return write(path, {"maps": shape}, nodes, {"weights": weights}, **more), weights[..., 0, 0]


def of_vectors(path, x, y, names=("simcc_x", "simcc_y"), **more):
    """The vectors (J, W r) and (J, H r), whatever the picture; the second picture of a batch has the same."""
    nodes = [("ReduceMean", ["input"], "one", {"axes": [1, 2, 3], "keepdims": 1}), ("Mul", ["one", "no"], "none", {})]
    nodes += [("Squeeze", ["none", "axis"], "zero", {}), ("Add", ["zero", "x"], names[0], {})]
    nodes += [("Add", ["zero", "y"], names[1], {})]
    path = write(path, {names[0]: None, names[1]: None}, nodes, {"no": 0.0, "x": x, "y": y}, **more)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3]), "axis"))
    path.write_bytes(model.SerializeToString())
    return path


def bumps(at, count, sigma=5.0):
    """SimCC's training targets: Gaussians of peak 1 at these bins."""
    return np.exp(-((np.arange(count) - np.asarray(at)[:, None]) ** 2) / (2 * sigma**2))


def pictures(count=2, seed=0, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch", ["B", 1, 2])
@pytest.mark.parametrize("normalisation", ["imagenet", "0 to 1", ((10, 20, 30), (2, 4, 8))])
def test_maps_are_those_that_numpy_computes(tmp_path, batch, normalisation):
    path, weights = of_maps(tmp_path / "maps.onnx", batch=batch)
    network, given = OnnxPose(path, normalisation=normalisation), pictures(3)
    mean, deviation = {
        "imagenet": (255 * np.array((0.485, 0.456, 0.406)), 255 * np.array((0.229, 0.224, 0.225))),
        "0 to 1": (np.zeros(3), np.full(3, 255)),
    }.get(normalisation if isinstance(normalisation, str) else "", normalisation)
    cells = ((given - np.array(mean)) / deviation).reshape(3, HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean((2, 4))
    np.testing.assert_allclose(network(given), np.einsum("bhwc,jc->bjhw", cells, weights), rtol=1e-4, atol=1e-4)
    assert (network.stride, network.offset, network.size) == ((4, 4), (0, 0), (WIDTH, HEIGHT))
    assert network.models == ("COCO_17", "HUMAN36M_17")


def test_a_file_of_any_size_is_told_one(tmp_path):
    path, _ = of_maps(tmp_path / "maps.onnx", 26, size=("h", "w"))
    with pytest.raises(ValueError, match=r"maps\.onnx: takes pictures of any size: pass size="):
        OnnxPose(path)
    network = OnnxPose(path, size=(32, 40), offset=1.5)
    assert network(pictures(1, size=(40, 32))).shape == (1, 26, 10, 8)
    assert (network.models, network.offset) == (("HALPE_26",), (1.5, 1.5))


@pytest.mark.parametrize("names", [("simcc_x", "simcc_y"), ("simcc_y", "simcc_x"), ("a", "b")])
def test_vectors_become_maps_in_which_the_joints_lie_where_they_should(tmp_path, names):
    """A bump around bin b is a joint at pixel b / 2, which the map has at b / 8; its height is the score."""
    rng = np.random.default_rng(1)
    at = rng.uniform(20, (2 * WIDTH - 20, 2 * HEIGHT - 20), (17, 2))
    x, y = 0.8 * bumps(at[:, 0], 2 * WIDTH), 0.6 * bumps(at[:, 1], 2 * HEIGHT)
    vectors = (y, x) if names[0] == "simcc_y" else (x, y)
    network = OnnxPose(of_vectors(tmp_path / "simcc.onnx", *vectors, names))
    maps = network(pictures())
    assert maps.shape == (2, 17, HEIGHT // 4, WIDTH // 4) and network.offset == (0, 0)
    torch.testing.assert_close(maps[0], maps[1])
    points, heights = decode(maps[0], "dark")
    np.testing.assert_allclose(4 * points, at / 2, atol=0.1)
    assert ((heights.numpy() > 0.85 * y.max(1)) & (heights.numpy() <= y.max(1))).all()


def test_a_map_is_the_mean_of_hrnets_gaussians_over_all_bins(tmp_path):
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 0.5, (17, 2 * WIDTH)), rng.uniform(0, 0.5, (17, 2 * HEIGHT))
    made = OnnxPose(of_vectors(tmp_path / "simcc.onnx", x, y), sharpness=3.0)(pictures(1))[0, 4]
    px, py = (np.exp(3 * v[4]) / np.exp(3 * v[4]).sum() for v in (x, y))
    p, (rows, columns) = np.outer(py, px), np.indices((2 * HEIGHT, 2 * WIDTH)) / 8  # px of the map
    for i, j in ((3, 2), (9, 11), (15, 0)):
        gauss = np.exp(-((rows - i) ** 2 + (columns - j) ** 2) / (2 * 2**2))
        np.testing.assert_allclose(made[i, j], min(x[4].max(), y[4].max()) * (p * gauss).sum(), rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the exporter's own, about its successor, which needs one package more
def test_an_exported_torch_network_gives_what_it_gave(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 17, 3, 2, 1))
    torch.onnx.export(network.eval(), torch.zeros(1, 3, HEIGHT, WIDTH), tmp_path / "net.onnx", dynamo=False)
    given = pictures(2)
    expected = network((torch.from_numpy(given).permute(0, 3, 1, 2) / 255).float()).detach()
    made = OnnxPose(tmp_path / "net.onnx", normalisation="0 to 1")(given)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_what_is_no_pose_network_is_refused_by_name(tmp_path):
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX network"):
        OnnxPose(tmp_path / "text.onnx")
    with pytest.raises(FileNotFoundError):
        OnnxPose(tmp_path / "none.onnx")
    flat = [("ReduceMean", ["input"], "classes", {"axes": [2, 3], "keepdims": 0})]
    path = write(tmp_path / "classes.onnx", {"classes": None}, flat, {})
    with pytest.raises(ValueError, match=r"expected maps .* or vectors .* got classes \(1, 3\) for pictures of 48×64"):
        OnnxPose(path)
    with pytest.raises(
        ValueError, match=r"simcc\.onnx: expected maps .* got simcc_x \(1, 17, 96\), simcc_y \(1, 17, 100\)"
    ):
        OnnxPose(of_vectors(tmp_path / "simcc.onnx", np.zeros((17, 2 * WIDTH)), np.zeros((17, 100))))
    grey = [("Identity", ["input"], "maps", {})]
    path = write(tmp_path / "grey.onnx", {"maps": None}, grey, {}, size=(HEIGHT,))
    with pytest.raises(ValueError, match=r"grey\.onnx: expected one input \(B, 3, H, W\), got input"):
        OnnxPose(path)


def test_joints_of_no_model_and_pictures_of_another_size_are_refused(tmp_path):
    path, _ = of_maps(tmp_path / "mpii.onnx", 16)
    with pytest.raises(ValueError, match=r"mpii\.onnx: 16 joints, which no model has: .*COCO_17 17"):
        OnnxPose(path)
    path, _ = of_maps(tmp_path / "coco.onnx")
    with pytest.raises(ValueError, match=r"17 joints, not those of HALPE_26"):
        OnnxPose(path, model="HALPE_26")
    assert OnnxPose(path, size=(64, 64)).size == (WIDTH, HEIGHT)  # the file's own
    with pytest.raises(ValueError, match=r"normalisation must be one of imagenet"):
        OnnxPose(path, normalisation="caffe")
    network = OnnxPose(path, model="COCO_17")
    assert network.models == ("COCO_17",) and len(JOINTS["COCO_17"]) == 17
    with pytest.raises(ValueError, match=r"pictures must be \(B, 64, 48, 3\) uint8, got \(1, 48, 64, 3\)"):
        network(pictures(1, size=(WIDTH, HEIGHT)))
