"""Any pose network in an ONNX file, such as RTMPose or an exported HRNet, run by onnxruntime (`pip install epiutils[onnx]`).

Two kinds of output are known: maps (B, J, h, w), and SimCC's vectors (B, J, W r), (B, J, H r), r bins a pixel, as
RTMPose writes them (Li et al., ECCV 2022; Jiang et al., 2023).
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from epiutils.data.bodies import JOINTS
from epiutils.data.files import check_file, reading
from epiutils.heatmaps import STRIDE

# Mean and deviation of a picture's channels, 0 to 255; RTMPose's are ImageNet's
NORMALISATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "rtmpose": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "0 to 1": ((0.0,) * 3, (255.0,) * 3),
    "0 to 255": ((0.0,) * 3, (1.0,) * 3),
}


class OnnxPose:
    """Pictures (B, H, W, 3) uint8 RGB to heatmaps (B, J, h, w), float32, from 0 to 1 where the network's are.

    Pixel i of a map lies at pixel stride · i + offset of the picture, for x and y.  SimCC's vectors become what HRNet's
    targets would be on average, p = softmax(sharpness · vector) saying where the joint is, bin b being pixel b / r:
    h[y, x] = score Σ_ab p_x[a] p_y[b] exp(−((4 x − a / r)² + (4 y − b / r)²) / 2 · 8²), so stride 4 and offset 0, and
    score is RTMPose's, the lower of both vectors' maxima.

    path: the file.  size: (width, height) px of the pictures, where the file leaves it open.  normalisation: a name of
    `NORMALISATIONS`, or (mean, deviation), three numbers each, for values of 0 to 255.  model: whose joints, one of
    `bodies.JOINTS`; by default `models` are all that have as many.  offset: of maps, px of the picture, HRNet's being 0;
    networks trained on half-resolved pixels have (stride − 1) / 2.  sharpness: RTMPose's is 10.
    Raises ImportError without onnxruntime, FileNotFoundError, and ValueError that names the file and what of it is wrong.
    """

    def __init__(
        self, path: str | os.PathLike, size: tuple[int, int] | None = None,
        normalisation: str | tuple = "imagenet", model: str = "auto", offset: float = 0.0, sharpness: float = 10.0,
    ):  # fmt: skip
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"{path} needs onnxruntime: pip install onnxruntime") from error
        if isinstance(normalisation, str) and normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}")
        mean, deviation = NORMALISATIONS[normalisation] if isinstance(normalisation, str) else normalisation
        self.mean, self.deviation = (np.asarray(v, np.float32).reshape(3, 1, 1) for v in (mean, deviation))
        self.path, self.sharpness = check_file(path), sharpness
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        with reading(path, "an ONNX network"):
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = self.session.get_inputs()
        shape = given[0].shape if given else ()
        if len(given) != 1 or len(shape) != 4 or shape[1] not in (3, "3"):
            said = ", ".join(f"{i.name} {i.shape}" for i in given)
            raise ValueError(f"{path}: expected one input (B, 3, H, W), got {said or 'none'}")
        own = tuple(n if isinstance(n, int) and n > 0 else None for n in (shape[3], shape[2]))
        if size is None and None in own:
            raise ValueError(
                f"{path}: takes pictures of any size: pass size=(width, height), those that it learned from"
            )
        self.size = own if size is None else tuple(n or s for n, s in zip(own, size, strict=True))
        self.at_once = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self._maps, self._vectors = None, None
        self._understand(self._run(np.zeros((1, *self.size[::-1], 3), np.uint8)), offset)
        count = self(np.zeros((1, *self.size[::-1], 3), np.uint8)).shape[1]
        self.models = tuple(name for name, joints in JOINTS.items() if len(joints) == count and model in ("auto", name))
        if not self.models:
            known = ", ".join(f"{name} {len(joints)}" for name, joints in JOINTS.items())
            which = "which no model has" if model == "auto" else f"not those of {model}"
            raise ValueError(f"{path}: {count} joints, {which}: {known}")

    def _run(self, pictures: np.ndarray) -> list[np.ndarray]:
        """All outputs for pictures (B, H, W, 3), as many at once as the file takes."""
        x = (pictures.transpose(0, 3, 1, 2).astype(np.float32) - self.mean) / self.deviation
        name, step = self.session.get_inputs()[0].name, self.at_once or len(x)
        parts = []
        for first in range(0, len(x), step):
            part = x[first : first + step]
            missing = step - len(part)
            whole = np.concatenate([part, np.repeat(part[-1:], missing, 0)]) if missing else part
            with reading(self.path, "a network of such pictures"):
                parts.append([np.asarray(out)[: len(part)] for out in self.session.run(None, {name: whole})])
        return [np.concatenate(out) for out in zip(*parts, strict=True)]

    def _understand(self, outputs: list[np.ndarray], offset: float) -> None:
        """Which of the outputs are maps, or vectors for x and y, and where their pixels lie."""
        width, height = self.size
        maps = [k for k, out in enumerate(outputs) if out.ndim == 4]
        vectors = [k for k, out in enumerate(outputs) if out.ndim == 3]
        if len(maps) == 1:
            self._maps = maps[0]
            h, w = outputs[maps[0]].shape[2:]
            self.stride, self.offset = (width / w, height / h), (float(offset),) * 2
            if w <= width and h <= height and abs(self.stride[0] / self.stride[1] - 1) < 0.05:
                return
        elif len(vectors) == 2 and outputs[vectors[0]].shape[:2] == outputs[vectors[1]].shape[:2]:
            names = [self.session.get_outputs()[k].name.lower()[-1] for k in vectors]
            x, y = vectors[::-1] if names == ["y", "x"] else vectors
            bins = outputs[x].shape[2] / width
            if bins > 0 and bins == outputs[y].shape[2] / height:
                self._vectors, self.stride, self.offset = (x, y), (float(STRIDE),) * 2, (0.0, 0.0)
                return
        said = ", ".join(f"{o.name} {out.shape}" for o, out in zip(self.session.get_outputs(), outputs, strict=True))
        raise ValueError(
            f"{self.path}: expected maps (B, J, h, w), or vectors (B, J, {width} r) and (B, J, {height} r) as SimCC has "
            f"them, got {said} for pictures of {width}×{height} px"
        )

    def __call__(self, pictures: Tensor | np.ndarray) -> Tensor:
        pictures = np.asarray(pictures)
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (*self.size[::-1], 3):
            expected = f"(B, {self.size[1]}, {self.size[0]}, 3) uint8"
            raise ValueError(f"pictures must be {expected}, got {pictures.shape} {pictures.dtype}")
        outputs = self._run(pictures)
        if self._maps is not None:
            return torch.from_numpy(outputs[self._maps].astype(np.float32))
        x, y = (torch.from_numpy(outputs[k].astype(np.float32)) for k in self._vectors)  # (B, J, W r), (B, J, H r)
        score = torch.minimum(x.amax(-1), y.amax(-1)).clamp(0, 1)  # (B, J)
        across, down = (
            torch.softmax(self.sharpness * v, -1) @ _bumps(n, v.shape[-1])
            for v, n in zip((x, y), self.size, strict=True)
        )  # (B, J, w), (B, J, h)
        return score[..., None, None] * down[..., :, None] * across[..., None, :]


def _bumps(length: int, bins: int, sigma: float = 2.0) -> Tensor:
    """HRNet's Gaussians, σ in px of the map, around each bin of `length` px, at the map's pixels: (bins, ⌈length / 4⌉)."""
    at = torch.arange(bins) * (length / bins / STRIDE)
    return torch.exp(-((torch.arange(-(-length // STRIDE)) - at[:, None]) ** 2) / (2 * sigma**2))
