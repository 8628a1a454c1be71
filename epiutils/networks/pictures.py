"""Any pose network before any cameras: pictures become heatmaps, and the grid of its maps goes into the camera.

Notebooks and fusion take maps of 64×64 whose pixel i lies at pixel 4 i of a 256×256 picture.  Networks have other
pictures, other maps, and half pixels: here is the one place that knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from epiutils.cameras import crop_affine
from epiutils.data.bodies import JOINTS
from epiutils.data.views import Predicted, View
from epiutils.heatmaps import STRIDE
from epiutils.networks.hrnet import load_checkpoint, normalise, provenance
from epiutils.networks.movenet import MoveNet
from epiutils.networks.onnx import OnnxPose

_MAP = 64  # px, the side of all maps


@dataclass(frozen=True, eq=False)
class PoseNetwork:
    """A network that takes square pictures (B, S, S, 3) uint8 RGB, S = `side`, and gives maps (B, J, 64, 64).

    run: what takes the middle of the pictures, of `size` (width, height), and gives its own maps (B, J, h, w), whose
    pixel i lies at pixel stride · i + offset there.  They are made square by zeros, and resampled where they are not 64.
    models: the orders that its joints may be in, of `bodies.JOINTS`.  files: those of its weights.
    """

    name: str
    run: Callable[[np.ndarray], Tensor]
    models: tuple[str, ...]
    size: tuple[int, int] = (256, 256)
    stride: tuple[float, float] = (STRIDE, STRIDE)
    offset: tuple[float, float] = (0.0, 0.0)
    files: tuple[Path, ...] = ()

    @property
    def side(self) -> int:
        return max(self.size)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> Tensor:
        (left, top), (width, height) = self._corner, self.size
        maps = self.run(np.ascontiguousarray(pictures[:, top : top + height, left : left + width])).float().cpu()
        h, w = maps.shape[-2:]
        side = max(h, w)
        x, y = (side - w) // 2, (side - h) // 2
        maps = torch.nn.functional.pad(maps, (x, side - w - x, y, side - h - y))
        if side != _MAP:
            maps = torch.nn.functional.interpolate(maps, (_MAP, _MAP), mode="bilinear", antialias=True)
        return maps

    @property
    def _corner(self) -> tuple[int, int]:
        return (self.side - self.size[0]) // 2, (self.side - self.size[1]) // 2

    def aligned(self, view: View) -> View:
        """The view of `side` px as 256×256, its camera and joints moved so that map pixel i lies at its pixel 4 i."""
        stride, own = np.array(self.stride), np.rint(np.array(self.size) / self.stride)
        scale = _MAP / own.max()
        move = -(np.array(self._corner) + self.offset) / stride + (own.max() - own) // 2  # px of the square map
        A = np.diag([*(STRIDE * scale / stride), 1.0])
        A[:2, 2] = STRIDE * (scale * (move + 0.5) - 0.5)
        image, shown = view.image, (STRIDE * _MAP,) * 2
        if view.camera.size != shown:
            image = cv2.resize(image, shown, interpolation=cv2.INTER_AREA)
        joints = view.joints @ A[:2, :2].T + A[:2, 2]
        return replace(view, image=image, camera=view.camera.crop(A, shown), joints=joints)


def open_network(name: str, model: str = "auto") -> PoseNetwork:
    """A network by its name: "movenet", or the path of HRNet's weights (.pth, .safetensors) or of an ONNX file.

    model: whose joints, of `bodies.JOINTS`; by default all orders of as many.  The size of pictures is what the file
    says, else its name (…_256x192.pth is 256 high), else 256×256.
    Raises FileNotFoundError, ImportError, or ValueError naming the file, and what is expected.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "movenet":
        return PoseNetwork("MoveNet", MoveNet().to(device), _models(name, 17, model, ("COCO_17",)), offset=(1.5, 1.5))
    path = Path(name).expanduser()
    if path.suffix not in (".pth", ".safetensors", ".onnx"):
        raise ValueError(f'a network is "movenet", or a file .pth, .safetensors or .onnx, got {name!r}')
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such network")
    told = re.findall(r"(?<!\d)(\d{2,4})x(\d{2,4})(?!\d)", path.stem)
    width, height = map(int, told[-1][::-1]) if told else (256, 256)
    if path.suffix == ".onnx":
        onnx = OnnxPose(path, (width, height), model=model)
        return PoseNetwork(path.stem, onnx, onnx.models, onnx.size, onnx.stride, onnx.offset, (path,))
    hrnet = load_checkpoint(path).to(device)
    own = ("HUMAN36M_17",) if path.suffix == ".safetensors" and provenance(path) else tuple(JOINTS)
    models = _models(path, hrnet.final_layer.out_channels, model, own)
    run = lambda pictures: hrnet(normalise(torch.from_numpy(pictures).to(device)))
    return PoseNetwork(path.stem, run, models, (width, height), files=(path,))


def _models(name: str | Path, count: int, model: str, own: Sequence[str]) -> tuple[str, ...]:
    """Those of its own orders, or the one that was asked for, that have as many joints."""
    fits = tuple(one for one in ([model] if model != "auto" else own) if len(JOINTS.get(one, ())) == count)
    if not fits:
        mpii = "; 16 are MPII's, whose order is not known here: take a COCO checkpoint" if count == 16 else ""
        known = ", ".join(f"{one} {len(joints)}" for one, joints in JOINTS.items())
        which = "no model has" if model == "auto" else f"{model} has not"
        raise ValueError(f"{name}: {count} joints, which {which}: {known}{mpii}")
    return fits


def predict_views(
    network: PoseNetwork, instants: Sequence[Sequence[View]], batch: int = 4, progress: bool = False
) -> Predicted:
    """What a network sees in the views of instants, with the crop, and the half pixels of its maps, in the cameras.

    instants: N of V views each, cut around the person, of any size (`Recording.views` gives them of `side` px).  The
    joints, K, R, t and F are those of the `aligned` views.
    """
    size = (network.side,) * 2

    def look(views: Sequence[View]) -> tuple[list[View], Tensor]:
        views = [v if v.camera.size == size else v.crop(_square(v, network.side), size) for v in views]
        parts = [views[i : i + batch] for i in range(0, len(views), batch)]
        maps = torch.cat([network(np.stack([view.image for view in part])) for part in parts])
        return [network.aligned(view) for view in views], maps

    bar = tqdm(instants, desc=f"{network.name} looks", unit="instant", disable=not progress)
    return Predicted.of_instants(map(look, bar))


def _square(view: View, side: int) -> np.ndarray:
    width, height = view.camera.size
    return crop_affine((width / 2, height / 2), max(width, height), (side, side))
