"""HRNet for pose (Sun et al., CVPR 2019): a 256×256 picture becomes a 64×64 heatmap for each joint.

`PoseHRNet` has the state-dict keys of the official code (HRNet/HRNet-Human-Pose-Estimation), so that its
published checkpoints load.  Arguments make it slimmer for CPUs; `SLIM` are those of the checkpoints that ship.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from epiutils.data.files import replacing

SLIM = {"width": 16, "modules": (1, 1, 1), "blocks": 2, "stem": (24, 32), "stem_blocks": 1}
_MOST_BLOCKS, _MOST_NUMBERS = 2_000, 250_000_000  # of a network; the published W48 has 108 and 64 million
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}


def normalise(images: Tensor | np.ndarray) -> Tensor:
    """Pictures as the network takes them: RGB in [0, 1], less ImageNet's mean, over its standard deviation.

    images: (..., H, W, 3) uint8.  Returns (N, 3, H, W) float32 in channels-last memory, leading dimensions merged.
    """
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.array(images))  # a copy: PyTorch takes no view such as bgr[..., ::-1]
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"images must be (..., H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
    mean, deviation = (255 * torch.tensor(_IMAGENET[k], device=images.device) for k in ("mean", "deviation"))
    images = images[None].flatten(0, -4).contiguous()  # (N, H, W, 3)
    return ((images - mean) / deviation).permute(0, 3, 1, 2)  # (N, 3, H, W); the numbers stay where they were


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, then batch normalisation."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., CVPR 2016, figure 5 left)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(inputs, outputs)
        self.conv2, self.bn2 = _conv_bn(outputs, outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if inputs == outputs else nn.Sequential(*_conv_bn(inputs, outputs, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions, a quarter as wide inside, and a shortcut (He et al., figure 5 right)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(inputs, outputs // 4, kernel=1)
        self.conv2, self.bn2 = _conv_bn(outputs // 4, outputs // 4)
        self.conv3, self.bn3 = _conv_bn(outputs // 4, outputs, kernel=1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if inputs == outputs else nn.Sequential(*_conv_bn(inputs, outputs, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class _HighResolutionModule(nn.Module):
    """Parallel branches of basic blocks at falling resolutions; then each output sums all branches, resampled.

    widths: channels of the branches, each at half the resolution of the one before.  outputs: how many of the
    resolutions are handed on (the network's last module needs only the highest).
    """

    def __init__(self, widths: list[int], blocks: int, outputs: int):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(_BasicBlock(w, w) for _ in range(blocks))) for w in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._resample(widths, j, i) for j in range(len(widths))) for i in range(outputs)
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _resample(widths: list[int], j: int, i: int) -> nn.Module:
        """From branch j to the resolution and width of branch i."""
        if j == i:
            return nn.Identity()
        if j > i:
            return nn.Sequential(*_conv_bn(widths[j], widths[i], kernel=1), nn.Upsample(scale_factor=2 ** (j - i)))
        halvings = [nn.Sequential(*_conv_bn(widths[j], widths[j], stride=2), nn.ReLU()) for _ in range(i - j - 1)]
        return nn.Sequential(*halvings, nn.Sequential(*_conv_bn(widths[j], widths[i], stride=2)))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(y) for branch, y in zip(self.branches, x, strict=True)]
        return [self.relu(sum(resample(y) for resample, y in zip(row, x, strict=True))) for row in self.fuse_layers]


class PoseHRNet(nn.Module):
    """HRNet-W`width`: a stem at a quarter of the resolution, then stages of 2, 3 and 4 parallel branches.

    width: channels of the highest resolution; each lower one has twice as many (32 and 48 are published).
    joints: heatmaps given.  modules: high-resolution modules of stages 2, 3, 4.  blocks: basic blocks a branch.
    stem: channels after its convolutions and after its residual blocks, `stem_blocks` of them: bottlenecks
    where the second is four times the first, as published, else basic blocks.
    width 32 with 17 joints: 28,536,113 parameters and 1,754 state-dict keys.

    forward: (N, 3, H, W) as `normalise` makes them, H and W multiples of 32 → (N, joints, H/4, W/4).
    """

    def __init__(
        self,
        width: int = 32,
        joints: int = 17,
        modules: tuple[int, int, int] = (1, 4, 3),
        blocks: int = 4,
        stem: tuple[int, int] = (64, 256),
        stem_blocks: int = 4,
    ):
        super().__init__()
        self.settings = {"width": width, "joints": joints, "modules": list(modules), "blocks": blocks,
                         "stem": list(stem), "stem_blocks": stem_blocks}  # fmt: skip
        numbers = [width, joints, *modules, blocks, *stem, stem_blocks]
        if (len(modules), len(stem)) != (3, 2) or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"settings must be positive integers, three modules, two of the stem: got {self.settings}")
        count = stem_blocks + blocks * sum(stage * m for stage, m in zip((2, 3, 4), modules, strict=True))
        if count > _MOST_BLOCKS:
            raise ValueError(f"settings ask for {count} residual blocks, over {_MOST_BLOCKS}: got {self.settings}")
        channels, out = stem
        self.conv1, self.bn1 = _conv_bn(3, channels, stride=2)
        self.conv2, self.bn2 = _conv_bn(channels, channels, stride=2)
        self.relu = nn.ReLU(inplace=True)
        block = _Bottleneck if out == 4 * channels else _BasicBlock
        self.layer1 = nn.Sequential(*(block(out if k else channels, out) for k in range(stem_blocks)))
        widths = [out]
        for stage in (2, 3, 4):
            wider = [width * 2**k for k in range(stage)]
            self.add_module(f"transition{stage - 1}", self._transition(widths, wider))
            outputs = [stage] * modules[stage - 2]
            if stage == 4:
                outputs[-1] = 1
            self.add_module(f"stage{stage}", nn.Sequential(*(_HighResolutionModule(wider, blocks, n) for n in outputs)))
            widths = wider
        self.final_layer = nn.Conv2d(width, joints, 1)
        nn.init.normal_(self.final_layer.weight, std=0.001)  # as in the official code: maps begin near zero
        nn.init.zeros_(self.final_layer.bias)

    @staticmethod
    def _transition(before: list[int], after: list[int]) -> nn.ModuleList:
        """From one stage's branches to the next one's: the new branch is the lowest one, halved."""
        same = [
            nn.Identity() if a == b else nn.Sequential(*_conv_bn(a, b), nn.ReLU(inplace=True))
            for a, b in zip(before, after, strict=False)
        ]
        halved = nn.Sequential(*_conv_bn(before[-1], after[-1], stride=2), nn.ReLU(inplace=True))
        return nn.ModuleList([*same, nn.Sequential(halved)])

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 32 or images.shape[3] % 32:
            raise ValueError(f"images must be (N, 3, H, W), H and W multiples of 32, got {tuple(images.shape)}")
        x = self.relu(self.bn1(self.conv1(images)))  # (N, C, H/2, W/2)
        x = self.layer1(self.relu(self.bn2(self.conv2(x))))  # (N, C', H/4, W/4)
        branches = [x]
        transitions = self.transition1, self.transition2, self.transition3
        for transition, stage in zip(transitions, (self.stage2, self.stage3, self.stage4), strict=True):
            branches = [*branches, branches[-1]]
            branches = stage([change(x) for change, x in zip(transition, branches, strict=True)])
        return self.final_layer(branches[0])


def save_checkpoint(path: str | os.PathLike, network: PoseHRNet, **provenance) -> None:
    """Write weights as safetensors, with the network's settings and where the weights come from in the metadata.

    The same weights and the same provenance give the same bytes.
    """
    metadata = {"settings": json.dumps(network.settings), "provenance": json.dumps(provenance)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    data = save(tensors, metadata)  # eight bytes of the header's length, the header, the numbers
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = metadata  # in this order: safetensors has them in a random one
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as part:
        part.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def provenance(path: str | os.PathLike) -> dict:
    """What `save_checkpoint` was told of the weights: command, commit, seed, data, device, accuracy.

    Of a file that is not safetensors, such as the official code's, its name and the SHA-256 of its bytes.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return _metadata(path, "provenance")
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def load_checkpoint(path: str | os.PathLike, joints: int | None = None, **settings) -> PoseHRNet:
    """A network with the weights of a file, in evaluation mode and channels-last memory.

    Our own files (.safetensors) know their settings.  The official code's (.pth: a state dict, or a dict with
    `state_dict` or `best_state_dict`, with or without a "module." prefix) are W32 or W48, told by their shapes;
    give other settings by name.  They are read with `weights_only=True`: nothing in them is run.
    joints: build the last layer for so many instead, and warn that it begins anew where the file has another number.
    Raises FileNotFoundError, or ValueError naming the file and what of it does not fit.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        settings = _metadata(path, "settings") | settings
        state = load_file(path)
    else:
        state = _official_state(path)
    last = state.get("final_layer.weight")
    if last is None or last.ndim != 4:
        raise ValueError(f"{path}: no final_layer.weight of four dimensions in it (it begins {list(state)[:3]})")
    settings = {"width": last.shape[1], **settings, "joints": last.shape[0]}
    _check(path, state, settings)
    network = PoseHRNet(**settings | {"joints": settings["joints"] if joints is None else joints})
    if joints not in (None, settings["joints"]):
        warnings.warn(
            f"{path} has {settings['joints']} joints, not {joints}: everything but final_layer is taken from it",
            stacklevel=2,
        )
        state |= {key: value for key, value in network.state_dict().items() if key.startswith("final_layer.")}
    network.load_state_dict(state)
    return network.eval().to(memory_format=torch.channels_last)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def _metadata(path: Path, key: str) -> dict:
    """What `save_checkpoint` wrote under a key; nothing where another program wrote the file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {}).get(key, "{}")))
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole safetensors file, or its {key} cannot be read: {error}") from error


def _official_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth file, unwrapped, without the prefix of DataParallel."""
    scalar = np.float64().__reduce__()[0]  # the official checkpoint.pth also holds its accuracy, a NumPy number
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers += [np.dtype, *(type(np.dtype(t)) for t in "fd"), (codecs.encode, "_codecs.encode")]
    try:
        with torch.serialization.safe_globals(numbers):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle may raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {refused[1]}, which is not run" if refused else "it is cut short, or no file of PyTorch's"
        raise ValueError(f"{path} cannot be read as weights: {why}") from error
    for key in ("best_state_dict", "state_dict"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        what = f"a dict of {list(state)[:3]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected tensors by name, alone or as state_dict or best_state_dict, got {what}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _check(path: Path, state: dict[str, Tensor], settings: dict) -> None:
    """Compare names and shapes with those of the network, without its memory: a strange file may ask for any size."""
    numbers = sum(value.numel() for value in state.values())
    if numbers > _MOST_NUMBERS:  # a small .pth may repeat one number along a whole tensor
        raise ValueError(f"{path} holds {numbers} numbers, over {_MOST_NUMBERS}")
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in PoseHRNet(**settings).state_dict().items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not tell of a PoseHRNet: {error}") from error
    found = {key: () for key in expected if key.endswith("num_batches_tracked")}  # PyTorch before 0.4.1 had none
    found |= {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'no such key')}"
             for key in expected | found if found.get(key) != expected.get(key)]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit PoseHRNet({settings}): {'; '.join(wrong[:5])}{more}")
