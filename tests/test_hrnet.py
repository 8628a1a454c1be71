"""HRNet: the official code's keys and outputs, checkpoints that come back as they were, and files that are no such."""

import copy
import hashlib
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint, normalise, provenance, save_checkpoint

TINY = {"width": 4, "modules": (1, 1, 1), "blocks": 1, "stem": (4, 8), "stem_blocks": 1}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def official_shapes(width, joints=17):
    """Key → shape in the order of the official state dict, from its structure: no network is built."""
    shapes = {}

    def pair(conv, bn, inputs, outputs, kernel):
        shapes[f"{conv}.weight"] = (outputs, inputs, kernel, kernel)
        shapes.update({f"{bn}.{name}": (outputs,) for name in BATCH_NORM[:-1]})
        shapes[f"{bn}.num_batches_tracked"] = ()

    pair("conv1", "bn1", 3, 64, 3)
    pair("conv2", "bn2", 64, 64, 3)
    for k in range(4):
        first = 256 if k else 64
        for n, (inputs, outputs, kernel) in enumerate([(first, 64, 1), (64, 64, 3), (64, 256, 1)], 1):
            pair(f"layer1.{k}.conv{n}", f"layer1.{k}.bn{n}", inputs, outputs, kernel)
        if k == 0:
            pair("layer1.0.downsample.0", "layer1.0.downsample.1", 64, 256, 1)
    C = [width, 2 * width, 4 * width, 8 * width]
    for branches, modules in ((2, 1), (3, 4), (4, 3)):
        change = f"transition{branches - 1}"
        if branches == 2:
            pair(f"{change}.0.0", f"{change}.0.1", 256, C[0], 3)
        last = 256 if branches == 2 else C[branches - 2]
        pair(f"{change}.{branches - 1}.0.0", f"{change}.{branches - 1}.0.1", last, C[branches - 1], 3)
        for m in range(modules):
            module = f"stage{branches}.{m}"
            for b, block, n in np.ndindex(branches, 4, 2):
                name = f"{module}.branches.{b}.{block}"
                pair(f"{name}.conv{n + 1}", f"{name}.bn{n + 1}", C[b], C[b], 3)
            for i, j in np.ndindex(1 if (branches, m) == (4, 2) else branches, branches):
                name = f"{module}.fuse_layers.{i}.{j}"
                if j > i:
                    pair(f"{name}.0", f"{name}.1", C[j], C[i], 1)
                for k in range(i - j):
                    pair(f"{name}.{k}.0", f"{name}.{k}.1", C[j], C[i] if k == i - j - 1 else C[j], 3)
    return shapes | {"final_layer.weight": (joints, width, 1, 1), "final_layer.bias": (joints,)}


def official_forward(state, x, training=False):
    """The official network as a function of its state dict alone; training updates the running statistics in it."""

    def conv_bn(conv, bn, x, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=state[f"{conv}.weight"].shape[-1] // 2)
        weight, bias, mean, variance = (state[f"{bn}.{name}"] for name in BATCH_NORM[:-1])
        return F.batch_norm(x, mean, variance, weight, bias, training, momentum=0.1, eps=1e-5)

    def numbers(prefix):
        return sorted({int(k.removeprefix(prefix).split(".")[1]) for k in state if k.startswith(f"{prefix}.")})

    def block(name, x):
        y, last = x, 3 if f"{name}.conv3.weight" in state else 2
        for n in range(1, last + 1):
            y = conv_bn(f"{name}.conv{n}", f"{name}.bn{n}", y)
            y = F.relu(y) if n < last else y
        if f"{name}.downsample.0.weight" in state:
            x = conv_bn(f"{name}.downsample.0", f"{name}.downsample.1", x)
        return F.relu(y + x)

    def resample(name, i, j, x):
        if j > i:
            x = conv_bn(f"{name}.0", f"{name}.1", x)
            return F.interpolate(x, scale_factor=2 ** (j - i), mode="nearest")
        for k in range(i - j):
            x = conv_bn(f"{name}.{k}.0", f"{name}.{k}.1", x, stride=2)
            x = F.relu(x) if k < i - j - 1 else x
        return x

    x = F.relu(conv_bn("conv2", "bn2", F.relu(conv_bn("conv1", "bn1", x, 2)), 2))
    for k in numbers("layer1"):
        x = block(f"layer1.{k}", x)
    maps = [x]
    for branches in (2, 3, 4):
        name = f"transition{branches - 1}"
        new = F.relu(conv_bn(f"{name}.{branches - 1}.0.0", f"{name}.{branches - 1}.0.1", maps[-1], 2))
        if f"{name}.0.0.weight" in state:
            maps = [F.relu(conv_bn(f"{name}.0.0", f"{name}.0.1", maps[0]))]
        maps = [*maps, new]
        for m in numbers(f"stage{branches}"):
            module = f"stage{branches}.{m}"
            for b in range(branches):
                for k in numbers(f"{module}.branches.{b}"):
                    maps[b] = block(f"{module}.branches.{b}.{k}", maps[b])
            fuse = f"{module}.fuse_layers"
            maps = [
                F.relu(sum(resample(f"{fuse}.{i}.{j}", i, j, maps[j]) for j in range(branches))) for i in numbers(fuse)
            ]
    return F.conv2d(maps[0], state["final_layer.weight"], state["final_layer.bias"])


def random_state(shapes, seed=0):
    """Weights and statistics that are nobody's defaults, and keep the size of what goes through."""
    rng, state = np.random.default_rng(seed), {}
    for key, shape in shapes.items():
        if len(shape) == 4:
            value = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        elif key.endswith("num_batches_tracked"):
            value = rng.integers(1, 99)
        elif key.endswith(("running_var", "weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.3, shape)
        state[key] = torch.tensor(value)
    return state


def shapes_of(network):
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def on_meta(**settings):
    """A network without memory, for its shapes."""
    with torch.device("meta"):
        return PoseHRNet(**settings)


def tiny(seed=0, joints=3):
    """A small network whose every number is random."""
    network = PoseHRNet(joints=joints, **TINY)
    network.load_state_dict(random_state(shapes_of(network), seed))
    return network.eval()


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def inputs(n, h, w, seed=0):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


@pytest.fixture(scope="module")
def w32():
    """HRNet-W32 in float64, its weights and statistics random."""
    network = PoseHRNet().double()
    network.load_state_dict(random_state(official_shapes(32)), strict=True)
    return network.eval()


# The network is the official one


@pytest.mark.parametrize(("width", "joints", "parameters"), [(32, 17, 28_536_113), (48, 17, 63_595_745)])
def test_keys_shapes_and_order_are_the_official_ones(width, joints, parameters):
    network, expected = on_meta(width=width, joints=joints), official_shapes(width, joints)
    assert list(shapes_of(network).items()) == list(expected.items())
    assert len(expected) == 1754
    count = sum(p.numel() for p in network.parameters())
    stored = sum(int(np.prod(s)) for k, s in expected.items() if not k.endswith(BATCH_NORM[2:]))
    assert count == stored == parameters
    assert {(m.eps, m.momentum) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-5, 0.1)}


def test_w32_is_the_official_forward(w32):
    images = inputs(2, 64, 96)
    with torch.no_grad():
        expected = official_forward(w32.state_dict(), images.double())
        assert expected.shape == (2, 17, 16, 24) and expected.std() > 0.1
        torch.testing.assert_close(w32(images.double()), expected, rtol=1e-9, atol=1e-9)
        found = copy.deepcopy(w32).float().to(memory_format=torch.channels_last)(images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "settings",
    [SLIM, TINY, {"width": 4, "modules": (2, 1, 3), "blocks": 2, "stem": (3, 12), "stem_blocks": 2},
     {"width": 8, "modules": (1, 1, 1), "blocks": 1, "stem": (8, 8), "stem_blocks": 1}],
    ids=["slim", "tiny", "bottlenecks", "equal widths"],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_any_variant_is_the_official_forward_and_updates_its_statistics_likewise(settings, training):
    network = PoseHRNet(joints=5, **settings).double()
    network.load_state_dict(random_state(shapes_of(network), 1))
    state, images = {k: v.clone() for k, v in network.state_dict().items()}, inputs(3, 96, 64).double()
    before = images.clone()
    with torch.no_grad():
        found = network.train(training)(images)
        torch.testing.assert_close(found, official_forward(state, images, training), rtol=1e-9, atol=1e-9)
    assert torch.equal(images, before)
    for key, value in network.state_dict().items():
        counted = training and key.endswith("num_batches_tracked")
        torch.testing.assert_close(value, state[key] + counted, rtol=1e-9, atol=1e-9)


def test_the_slim_variant_has_a_twentieth_of_the_parameters_and_its_settings_survive_json():
    network = on_meta(joints=17, **SLIM)
    assert sum(p.numel() for p in network.parameters()) == 1_203_465
    assert len(network.state_dict()) == 344 and network.state_dict().keys() <= official_shapes(32).keys()
    assert shapes_of(on_meta(**json.loads(json.dumps(network.settings)))) == shapes_of(network)


@pytest.mark.parametrize("shape", [(1, 3, 64, 80), (1, 3, 48, 64), (3, 64, 96), (1, 4, 64, 96), (2, 64, 96, 3)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"H and W multiples of 32, got \({', '.join(map(str, shape))}\)"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [{"width": 0}, {"width": 32.0}, {"joints": 0}, {"joints": -1}, {"modules": (1, 4)}, {"modules": (1, 0, 1)},
     {"blocks": 0}, {"stem": (64,)}, {"stem": (0, 8)}, {"stem_blocks": 0}],
    ids=str,
)  # fmt: skip
def test_settings_of_no_network_are_refused(wrong):
    with pytest.raises(ValueError, match=f"positive integers.* got .*'{next(iter(wrong))}'"):
        PoseHRNet(**wrong)


def test_a_gradient_reaches_every_parameter(w32):
    network = copy.deepcopy(w32).float().train()
    network(inputs(2, 64, 96)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_seed_determines_the_initial_weights():
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(PoseHRNet(**SLIM).state_dict())
    assert_same_state(states[0], states[1])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
    assert 8e-4 < states[0]["final_layer.weight"].std() < 1.2e-3 and not states[0]["final_layer.bias"].any()


# Pictures


@pytest.mark.parametrize("leading", [(), (1,), (2,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_pictures_are_normalised_as_torchvision_does(leading):
    images = pictures(*leading, 7, 10)
    found = normalise(torch.from_numpy(images))
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.dtype == torch.float32 and found.shape == (int(np.prod(leading)), 3, 7, 10)
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected.reshape(-1, 7, 10, 3), rtol=1e-5, atol=1e-6)


def test_arrays_are_taken_as_tensors_are_read_only_turned_and_strided_ones_too():
    images = pictures(2, 7, 10)
    expected, kept = normalise(torch.from_numpy(images)), images.copy()
    locked = images.copy()
    locked.flags.writeable = False
    for same in (images, locked, images[..., ::-1].copy()[..., ::-1], np.asfortranarray(images)):
        assert torch.equal(normalise(same), expected)
    strided = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(normalise(strided), expected)
    assert normalise(strided).is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(images, kept)


@pytest.mark.parametrize(
    ("images", "got"),
    [(np.zeros((7, 10, 3)), r"\(7, 10, 3\) torch.float64"), (np.zeros((3, 7, 10), np.uint8), r"\(3, 7, 10\)"),
     (np.zeros((10, 3), np.uint8), r"\(10, 3\)"), (np.zeros((), np.uint8), r"\(\)"),
     (np.zeros((7, 10, 3), np.uint16), "torch.uint16"), (np.zeros((7, 10, 4), np.uint8), r"\(7, 10, 4\)"),
     (torch.zeros(7, 10, 3), "torch.float32")],
    ids=["float64", "channels first", "two dimensions", "none", "uint16", "four channels", "float32"],
)  # fmt: skip
def test_what_is_no_picture_is_refused(images, got):
    with pytest.raises(ValueError, match=rf"images must be \(..., H, W, 3\) uint8, got .*{got}"):
        normalise(images)


# Our own checkpoints


def test_a_checkpoint_comes_back_bit_for_bit_with_its_provenance(tmp_path):
    network = tiny().to(memory_format=torch.channels_last)
    told = {"seed": 3, "accuracy": {"pck": 0.1 + 0.2}, "data": ["ü", None]}
    path = tmp_path / "new" / "tiny.safetensors"
    written = set()
    for _ in range(6):  # safetensors itself writes metadata in a random order
        save_checkpoint(path, network.train(), **told)
        written.add(path.read_bytes())
    assert len(written) == 1
    loaded = load_checkpoint(str(path))
    assert provenance(path) == told
    assert loaded.settings == network.settings and not loaded.training
    assert loaded.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(loaded.state_dict(), network.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(inputs(2, 64, 96)), network.eval()(inputs(2, 64, 96)))
    assert os.listdir(path.parent) == ["tiny.safetensors"]
    assert_same_state(load_file(path), dict(network.state_dict()))  # any reader of safetensors
    with safetensors.safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    assert metadata == {"settings": network.settings, "provenance": told}


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path, write = tmp_path / "a.safetensors", Path.write_bytes
    save_checkpoint(path, tiny(1), seed=1)
    whole = path.read_bytes()

    def full(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, tiny(2), seed=2)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(path, tiny(2), device=torch.device("cpu"))
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["a.safetensors"]


# The official code's files


@pytest.mark.parametrize(("width", "zipped"), [(32, False), (48, True)])
def test_a_published_file_loads_by_itself(tmp_path, width, zipped):
    values = {key: torch.tensor(float(n)) for n, key in enumerate(official_shapes(width))}
    state = {key: values[key].expand(shape) for key, shape in official_shapes(width).items()}  # a small file
    torch.save(state, tmp_path / "pose_hrnet.pth", _use_new_zipfile_serialization=zipped)
    network = load_checkpoint(tmp_path / "pose_hrnet.pth")
    assert network.settings == on_meta(width=width).settings and not network.training
    digest = hashlib.sha256((tmp_path / "pose_hrnet.pth").read_bytes()).hexdigest()
    assert provenance(tmp_path / "pose_hrnet.pth") == {"file": "pose_hrnet.pth", "sha256": digest}
    for key, value in network.state_dict().items():
        assert (value == values[key]).all(), key


def prefixed(state):
    return {f"module.{key}": value for key, value in state.items()}


def training_checkpoint(state):
    """What the official train.py writes: its accuracy is a NumPy number."""
    return {"epoch": 210, "model": "pose_hrnet", "state_dict": prefixed(state), "best_state_dict": state,
            "perf": np.float64(0.77), "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-5}]}}  # fmt: skip


@FORMATS
@pytest.mark.parametrize(
    "wrap",
    [dict, prefixed, lambda s: {"state_dict": s}, lambda s: {"epoch": 3, "state_dict": prefixed(s)},
     lambda s: {"best_state_dict": s}, training_checkpoint,
     lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}],
    ids=["plain", "prefixed", "state_dict", "prefixed state_dict", "best_state_dict", "train.py's", "PyTorch 0.4.0"],
)  # fmt: skip
def test_a_state_dict_is_found_however_it_is_wrapped(tmp_path, wrap, zipped):
    network = tiny()
    torch.save(wrap(network.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    if wrap is training_checkpoint and not zipped:  # as NumPy 1 wrote it
        old = (tmp_path / "a.pth").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (tmp_path / "a.pth").write_bytes(old)
        assert b"numpy.core.multiarray" in old
    loaded, state = load_checkpoint(tmp_path / "a.pth", **TINY).state_dict(), network.state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value) or key.endswith("num_batches_tracked"), key


@pytest.mark.parametrize("joints", [2, 17])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_another_number_of_joints_takes_all_but_the_last_layer_and_says_so(tmp_path, suffix, joints):
    network, path = tiny(joints=3), tmp_path / f"a.{suffix}"
    if suffix == "pth":
        torch.save(network.state_dict(), path)
    else:
        save_checkpoint(path, network)
    settings = TINY if suffix == "pth" else {}
    with pytest.warns(UserWarning, match=rf"{path} has 3 joints, not {joints}: everything but final_layer"):
        loaded = load_checkpoint(path, joints, **settings)
    state = loaded.state_dict()
    assert loaded.settings["joints"] == joints
    assert state.pop("final_layer.weight").shape == (joints, 4, 1, 1) and state.pop("final_layer.bias").shape == (
        joints,
    )
    assert_same_state(state, {k: v for k, v in network.state_dict().items() if not k.startswith("final_layer")})
    assert_same_state(load_checkpoint(path, 3, **settings).state_dict(), network.state_dict())  # no warning: as many


# Files that are no checkpoint


@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda s: s.pop("layer1.0.bn1.weight"), "layer1.0.bn1.weight is missing"),
     (lambda s: s.pop("final_layer.bias"), "final_layer.bias is missing"),
     (lambda s: s.update(extra=torch.zeros(2, 5)), r"extra is \(2, 5\), expected no such key"),
     (lambda s: s.update({"conv2.weight": torch.zeros(4, 4, 5, 5)}), r"conv2.weight is \(4, 4, 5, 5\), expected \(4, 4, 3"),
     (lambda s: s.update({"final_layer.weight": torch.zeros(3, 4, 3, 3)}), r"final_layer.weight is \(3, 4, 3, 3\)"),
     (lambda s: s.pop("final_layer.weight"), "no final_layer.weight"),
     (lambda s: s.update({"final_layer.weight": torch.zeros(3, 4)}), "no final_layer.weight of four dimensions"),
     (lambda s: s.update({"final_layer.weight": torch.zeros(0, 4, 1, 1)}), "positive integers")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_does_not_fit_is_named(tmp_path, suffix, change, named):
    state, path = dict(tiny().state_dict()), tmp_path / f"a.{suffix}"
    change(state)
    (torch.save if suffix == "pth" else save_file)(state, path)
    with pytest.raises(ValueError, match=rf"{path}.*{named}"):
        load_checkpoint(path, None if suffix == "pth" else 5, **TINY)


def test_of_many_differences_five_are_named_before_a_network_is_built(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "a.pth")
    save_file({"final_layer.weight": torch.zeros(17, 64, 1, 1)}, tmp_path / "resnet.safetensors")
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"conv1.weight is \(4, 3, 3, 3\), expected \(64, 3, 3, 3\);.* and \d+ more$"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"resnet.safetensors does not fit PoseHRNet\({'width': 64, 'joints': 17}\)"):
        load_checkpoint(tmp_path / "resnet.safetensors")
    assert torch.equal(torch.get_rng_state(), generator), "weights were drawn"


def test_safetensors_of_others_have_no_settings_and_no_provenance(tmp_path):
    network, path = tiny(), tmp_path / "a.safetensors"
    save_file(dict(network.state_dict()), path)
    assert provenance(path) == {}
    assert_same_state(load_checkpoint(path, **TINY).state_dict(), network.state_dict())
    with pytest.raises(ValueError, match="a.safetensors does not fit"):
        load_checkpoint(path)
    save_file({"embedding": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"a.safetensors: no final_layer.weight.*\['embedding'\]"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "3", "null", '"width"', '{"depth": 3}', '{"modules": [1]}', '{"modules": 3}', '{"stem": 8}', "[" * 10**5,
     '{"blocks": 0}', '{"width": 1000000000000}', '{"modules": [1000000, 1, 1]}', '{"blocks": 1000000}',
     '{"stem_blocks": 1000000}', '{"blocks": ' + "9" * 400 + "}", '{"blocks": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_settings_of_no_network_name_the_file_before_anything_is_built(tmp_path, text):
    """Of a file that says them, or as asked for."""
    save_file(dict(tiny().state_dict()), tmp_path / "a.safetensors", {"settings": text})
    torch.save(tiny().state_dict(), tmp_path / "a.pth")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")
    if text.startswith("{") and len(text) < 100 and text.endswith("}"):
        with pytest.raises(ValueError, match=r"a\.pth"):
            load_checkpoint(tmp_path / "a.pth", **(TINY | json.loads(text)))
    assert time.perf_counter() - start < 5


def test_a_small_file_of_a_huge_network_is_refused(tmp_path):
    """A .pth may repeat one number along a whole tensor."""
    state = {key: torch.zeros(()).expand(shape) for key, shape in official_shapes(256).items()}
    torch.save(state, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 1e6
    with pytest.raises(ValueError, match=r"a\.pth holds \d+ numbers, over 250000000"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="'joints': 0"):
        torch.save(tiny().state_dict(), tmp_path / "a.pth")
        load_checkpoint(tmp_path / "a.pth", 0, **TINY)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0, 1e-9, 1e-3, 0.01, 0.5, 1])
def test_a_file_cut_short_is_named(tmp_path, share, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_checkpoint(path, tiny(), seed=3)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(np.ceil(share * len(whole))), len(whole) - 1)])
    cut = r"a\.pth cannot be read as weights: it (is cut short|asks for torch)"
    for read in (load_checkpoint, provenance)[: 1 + (kind == "safetensors")]:
        with pytest.raises(ValueError, match=r"is no whole safetensors file" if kind == "safetensors" else cut):
            read(path)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\x80", b"\x00" * 64, b"PK\x03\x04"], ids=repr)
def test_a_page_or_noise_instead_of_weights_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got"),
    [([1, 2], "list"), (torch.zeros(3), "Tensor"), ({"a": 1}, r"a dict of \['a'\]"), ({1: torch.zeros(2)}, "a dict of"),
     ({"model": {"conv1.weight": torch.zeros(2)}}, r"a dict of \['model'\]"), ({"state_dict": [1]}, "a dict of")],
    ids=["list", "tensor", "number", "numbered", "another wrapping", "state_dict of no dict"],
)  # fmt: skip
def test_a_pth_of_something_else_is_named(tmp_path, content, got):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: expected tensors by name, .* got {got}"):
        load_checkpoint(tmp_path / "a.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "among weights", "network"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, kind):
    path, ran = tmp_path / "a.pth", tmp_path / "ran"
    hostile = tiny() if kind == "network" else Hostile(ran)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(hostile, protocol=2))
    elif kind == "among weights":
        torch.save({"state_dict": dict(tiny().state_dict()), "perf": hostile}, path)
    else:
        torch.save({"state_dict": hostile}, path, _use_new_zipfile_serialization=kind != "legacy")
    named = "epiutils.networks.hrnet.PoseHRNet" if kind == "network" else r"\w+\.system"
    with pytest.raises(ValueError, match=rf"a\.pth cannot be read as weights: it asks for {named}, which is not run"):
        load_checkpoint(path, **TINY)
    assert not ran.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
        assert ran.exists(), "a test of something harmless"


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "folder.pth", "folder.safetensors"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    for read in (load_checkpoint, provenance):
        with pytest.raises(FileNotFoundError, match=rf"{name}: no such checkpoint"):
            read(tmp_path / name)
