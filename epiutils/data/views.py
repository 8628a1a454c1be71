"""Views: a picture, its camera and the joints in it; what is seen in several; and the geometry between their heatmaps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from epiutils.cameras import Camera, crop_affine
from epiutils.epipolar import fundamental_from_cameras, transfer
from epiutils.heatmaps import HEATMAP_FROM_INPUT

# Human3.6M's joints in the toolbox's order, which the embedded people share
JOINTS = ("root", "rhip", "rkne", "rank", "lhip", "lkne", "lank", "belly", "neck",
          "nose", "head", "lsho", "lelb", "lwri", "rsho", "relb", "rwri")  # fmt: skip

BONES = ((0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8),
         (8, 9), (9, 10), (8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16))  # fmt: skip
_PAIRED = ("hip", "kne", "ank", "sho", "elb", "wri")
# The joint that each is in a mirror: left and right exchanged
MIRRORED = tuple(JOINTS.index({"l": "r", "r": "l"}[n[0]] + n[1:] if n[1:] in _PAIRED else n) for n in JOINTS)


@dataclass(frozen=True, eq=False)
class View:
    """One camera's picture of one instant, with the joints seen in it.

    image: (H, W, 3) uint8 RGB.  camera: the camera of this very picture.  joints: (J, 2) px, nan where
    unknown.  confidence: (J,) in [0, 1].  joints_3d: (J, 3) metres in the world, and visible: (J,) bool,
    where they are known.
    """

    image: np.ndarray
    camera: Camera
    joints: np.ndarray
    confidence: np.ndarray
    joints_3d: np.ndarray | None = None
    visible: np.ndarray | None = None

    def crop(self, A: np.ndarray, size: tuple[int, int]) -> View:
        """The view cropped, scaled or rotated by x_new = A x: picture, camera and joints together."""
        camera = self.camera.crop(A, size)
        shrinks = 1 / np.sqrt(abs(np.linalg.det(A[:2, :2])))
        image = cv2.GaussianBlur(self.image, (0, 0), 0.4 * shrinks) if shrinks > 1.2 else self.image  # no aliasing
        return replace(
            self,
            image=cv2.warpAffine(image, A[:2].astype(np.float64), camera.size, flags=cv2.INTER_LINEAR),
            camera=camera,
            joints=self.joints @ A[:2, :2].T + A[:2, 2],
        )

    def crop_to_person(self, size: tuple[int, int] = (256, 256), margin: float = 1.25) -> View:
        """The square crop around the known joints, `margin` times their larger extent, as HRNet's input is cut."""
        known = self.joints[np.isfinite(self.joints).all(-1)]
        if len(known) < 2:
            raise ValueError(f"{self.camera.name}: {len(known)} joints known, at least 2 are needed to place a crop")
        low, high = known.min(0), known.max(0)
        return self.crop(crop_affine((low + high) / 2, margin * (high - low).max(), size), size)

    def undistorted(self) -> View:
        """The view without lens distortion, in which epipolar lines are straight."""
        camera = self.camera.without_distortion()
        if not self.camera.bends:
            return self
        K, lens = self.camera.K, self.camera.distortion
        straight = cv2.fisheye.undistortImage if self.camera.fisheye else cv2.undistort
        return replace(
            self,
            image=straight(self.image, K, lens, None, K),
            camera=camera,
            joints=self.camera.undistort(self.joints),
        )


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a network, or a detector, sees in V views of each of N instants, and what is known to be true there.

    output: (N, V, J, H, W) heatmaps.  F: (N, V, V, 3, 3) in heatmap px, F[:, s, r] from view s to view r, zeros where
    s = r.  K, R: (N, V, 3, 3) and t: (N, V, 3), in metres, of the network's inputs.  joints: (N, V, J, 2) px of the
    inputs, the true ones of a dataset or the detections of a recording.  What only a dataset knows is else None:
    target: (N, V, J, H, W) and weight: (N, V, J), HRNet's; visible: (N, V, J) bool, in the picture and not hidden;
    joints_3d: (N, J, 3) metres in the world.

    `predicted[::4]` is of some instants, `predicted.of_views([0, 2])` of some views.
    """

    output: Tensor
    F: Tensor
    K: Tensor
    R: Tensor
    t: Tensor
    joints: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None
    visible: Tensor | None = None
    joints_3d: Tensor | None = None

    @classmethod
    def of_instants(cls, seen: Iterable[tuple[Sequence[View], Tensor]]) -> Predicted:
        """Of N instants of whom no truth is known: the V views of each and their maps (V, J, H, W); no picture is kept."""
        samples = []
        for views, maps in seen:
            arrays = {key: np.stack([getattr(view.camera, key) for view in views]) for key in "KRt"}
            arrays |= {"joints": np.stack([view.joints for view in views])}
            arrays |= {"F": heatmap_fundamentals([view.camera for view in views])}
            samples.append({"output": maps} | {key: torch.from_numpy(value) for key, value in arrays.items()})
        return cls(**{key: torch.stack([sample[key] for sample in samples]) for key in samples[0]})

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, instants: slice | Sequence[int] | np.ndarray) -> Predicted:
        return self._each(lambda name, values: values[instants])

    def of_views(self, views: Sequence[int]) -> Predicted:
        """Those views alone, in that order."""
        views = list(views)
        both = {"F": lambda F: F[:, views][:, :, views], "joints_3d": lambda X: X}
        return self._each(lambda name, values: both.get(name, lambda values: values[:, views])(values))

    @property
    def P(self) -> Tensor:
        """Projection matrices P = K [R | t] of the inputs (H&Z 6.8): (N, V, 3, 4)."""
        return self.K @ torch.cat([self.R, self.t[..., None]], -1)

    def _each(self, change) -> Predicted:
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return Predicted(**{name: None if values is None else change(name, values) for name, values in known.items()})


def exact_detections(cameras: Sequence[Camera], X: np.ndarray) -> np.ndarray:
    """Projections of known joints X (T, J, 3) and a confidence of 1, as a detector gives them: (V, T, J, 3)."""
    xy = np.stack([camera.project(X) for camera in cameras])  # (V, T, J, 2)
    return np.concatenate([xy, np.ones_like(xy[..., :1])], -1)


def heatmap_fundamentals(cameras: Sequence[Camera]) -> np.ndarray:
    """F between the heatmaps of all pairs of network inputs, from their cameras, in heatmap px.

    Returns (V, V, 3, 3), F[s, r] from the source s to the reference r, F[r, s] = F[s, r]ᵀ, zeros where s = r.
    """
    F = np.zeros((len(cameras), len(cameras), 3, 3))
    for s, r in itertools.combinations(range(len(cameras)), 2):
        of_inputs = fundamental_from_cameras(cameras[s], cameras[r])
        F[s, r] = transfer(of_inputs, HEATMAP_FROM_INPUT, HEATMAP_FROM_INPUT)
        F[r, s] = F[s, r].T
    return F
