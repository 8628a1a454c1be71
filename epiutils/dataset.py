"""What the notebooks look at: the embedded people, or a recording of one's own, behind the same few names.

Both have `cameras`, `joints`, `bones`, `frames`, `views(frame)` and `detections` (V, T, J, 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epiutils import people
from epiutils.cameras import Camera, View
from epiutils.recordings import Recording, read_recording


@dataclass(frozen=True)
class Performance:
    """An embedded person who performs one action before four cameras."""

    subject: int = 9
    action: str = "walk"
    seed: int = 0
    length: int = 100

    @property
    def cameras(self) -> list[Camera]:
        return people.rig()

    @property
    def joints(self) -> tuple[str, ...]:
        return people.JOINTS

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        return people.BONES

    @property
    def frames(self) -> np.ndarray:
        return np.arange(self.length)

    @property
    def detections(self) -> np.ndarray:
        """Exact projections and a confidence of 1, in px of the uncropped pictures: (V, T, J, 3)."""
        poses = np.stack([people.pose(self.subject, self.action, int(f), self.seed) for f in self.frames])
        xy = np.stack([camera.project(poses) for camera in self.cameras])  # (V, T, J, 2)
        return np.concatenate([xy, np.ones_like(xy[..., :1])], -1)

    def views(self, frame: int) -> list[View]:
        """The cropped pictures of one instant, 256×256."""
        return people.scene(self.subject, self.action, frame, self.seed)


def open_dataset(recording: str = "", subject: int = 9, action: str = "walk", seed: int = 0) -> Performance | Recording:
    """The recording in that folder, or an embedded person where the name is empty."""
    return read_recording(recording) if recording else Performance(subject, action, seed)
