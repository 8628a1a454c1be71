"""A prior of body parts over the modes of all joints: how training people hold their torso, legs and arms.

Each part of a body has neighbours of its own among training poses, so that a pose nobody showed as a whole can be put
together.  The poses of the tested action are left out: what is learned is how limbs move, not what the action is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from epiutils.data.views import JOINTS, MIRRORED
from epiutils.space import Body, Modes

_NAMES = ("root rhip lhip belly neck nose head lsho rsho", "root rhip lhip lkne lank", "root lhip rhip rkne rank",
          "neck lsho rsho lelb lwri", "neck lsho rsho relb rwri", "rhip lhip rkne lkne rank lank")  # fmt: skip
_PARTS = [[JOINTS.index(name) for name in names.split()] for names in _NAMES]
_TORSO = [JOINTS.index(name) for name in ("root", "belly", "neck", "rhip", "lhip", "lsho", "rsho")]


@dataclass(frozen=True, eq=False)
class Parts:
    """Poses of training people in the body's own frame, and how far they are trusted.

    poses: (N, J, 3) metres, of a body of mean size: the torso's mean is the origin, left lies along x, z points up.
    actions: (N,) their names.  neighbours: poses that speak for a part.  spread: metres, of what no neighbour showed.
    blur: metres, added to every mode.  slack: metres within which a mode agrees with the rest of the body; floor: for
    what it cannot explain.
    """

    poses: np.ndarray
    actions: np.ndarray
    body: Body
    neighbours: int = 80
    spread: float = 0.08
    blur: float = 0.008
    slack: float = 0.03
    floor: float = 1e-3

    @classmethod
    def of(cls, poses: np.ndarray, actions: np.ndarray, body: Body, **settings) -> Parts:
        """From poses (N, J, 3) in metres, and their mirror images."""
        a, b = np.array(body.bones).T
        size = np.linalg.norm(poses[:, a] - poses[:, b], axis=-1).sum(1)
        own = np.stack([_own_frame(X, _frame(X), body.size[0] / s) for X, s in zip(poses, size, strict=True)])
        mirrored = own[:, list(MIRRORED)] * (-1, 1, 1)
        return cls(np.concatenate([own, mirrored]), np.concatenate([actions, actions]), body, **settings)

    def without(self, action: str) -> Parts:
        """Those of all other actions."""
        others = self.actions != action
        return replace(self, poses=self.poses[others], actions=self.actions[others])

    def refine(self, found: Modes, share: torch.Tensor, X: torch.Tensor, rounds: int = 3) -> np.ndarray:
        """Poses (B, J, 3) in metres: the modes and the parts, in turn, as Gaussians of the whole body.

        found, share: of `modes` and `along_bones`.  X: (B, J, 3) of `Modes.near_best`, to begin with.  The modes of a joint
        are one Gaussian, the neighbours of each part another; their product says where the joint is, and without the
        joint's own (its cavity; Minka 2001) which of its modes agrees with the rest of the body.
        """
        size = self.body.measure(X, share.amax(-1)).double().numpy()
        modes = (v.double().numpy() for v in (found.X, found.mass, found.covariance, share, X))
        return np.stack(
            [self._refine(*one, self.body.size[0] / s, rounds) for *one, s in zip(*modes, size, strict=True)]
        )

    def _refine(self, X, mass, covariance, share, pose, scale: float, rounds: int) -> np.ndarray:
        """One instant: modes X (J, M, 3), mass (J, M), covariance (J, M, 3, 3), share (J, M) and a pose (J, 3)."""
        own = np.exp(mass - mass.max(1, keepdims=True))
        for _ in range(rounds):
            frame = origin, turn = _frame(pose)
            places = _own_frame(X, frame, scale)  # (J, M, 3)
            spreads = scale**2 * turn @ covariance @ turn.T
            mean, seen = self._gaussians(places, spreads, share)
            told, says = self._neighbours(mean, seen)
            whole, middle = _product(told, says, mean, seen)
            within = np.linalg.inv(whole.reshape(len(X), 3, len(X), 3)[range(len(X)), :, range(len(X))])  # all told …
            cavity = np.linalg.inv(within - np.linalg.inv(seen) + 1e-3 * np.eye(3))  # … and without the joint's modes
            rest = np.einsum("jab,jb->ja", within, middle) - np.einsum("jab,jb->ja", np.linalg.inv(seen), mean)
            away = places - np.einsum("jab,jb->ja", cavity, rest)[:, None]
            off = np.einsum("jma,jab,jmb->jm", away, np.linalg.inv(cavity + self.slack**2 * np.eye(3)), away)
            share = own * (self.floor + np.exp(-0.5 * off))
            share /= share.sum(1, keepdims=True)
            mean, seen = self._gaussians(places, spreads, share)
            pose = _product(told, says, mean, seen)[1] @ turn / scale + origin
        return pose

    def _gaussians(self, X, spreads, share) -> tuple[np.ndarray, np.ndarray]:
        """The modes of each joint as one Gaussian: mean (J, 3) and covariance (J, 3, 3)."""
        mean = (share[..., None] * X).sum(1)
        away = X - mean[:, None]
        of_modes = spreads + away[..., :, None] * away[..., None, :]
        return mean, np.einsum("jm,jmab->jab", share, of_modes) + self.blur**2 * np.eye(3)

    def _neighbours(self, mean, seen) -> tuple[np.ndarray, np.ndarray]:
        """The product of the parts' Gaussians, as information (3 J, 3 J) and its vector (3 J,)."""
        size = mean.size
        told, says = np.zeros((size, size)), np.zeros(size)
        weight = 1 / (np.trace(seen, axis1=1, axis2=2) / 3 + 0.02**2)
        far = np.minimum(((self.poses - mean) ** 2).sum(-1), 0.25**2) * weight  # (N, J)
        for part in _PARTS:
            near = np.argpartition(far[:, part].sum(1), self.neighbours)[: self.neighbours]
            some = self.poses[near][:, part].reshape(self.neighbours, -1)
            information = np.linalg.inv(np.cov(some.T) + self.spread**2 * np.eye(some.shape[1]))
            at = (3 * np.array(part)[:, None] + np.arange(3)).ravel()
            told[np.ix_(at, at)] += information
            says[at] += information @ some.mean(0)
        return told, says


def _frame(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and rotation (3, 3) about z of a body's own frame."""
    at = {name: pose[k] for k, name in enumerate(JOINTS)}
    left = at["lhip"] - at["rhip"] + at["lsho"] - at["rsho"]
    c, s = left[:2] / np.hypot(*left[:2])
    return pose[_TORSO].mean(0), np.array([(c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)])


def _own_frame(X: np.ndarray, frame: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    origin, turn = frame
    return scale * (X - origin) @ turn.T


def _product(told, says, mean, seen) -> tuple[np.ndarray, np.ndarray]:
    """Covariance (3 J, 3 J) and mean (J, 3) of the product of a Gaussian of the whole body and those of its joints."""
    own = np.linalg.inv(seen)
    total = told.copy()
    joints = 3 * np.arange(len(mean))[:, None] + np.arange(3)
    total[joints[:, :, None], joints[:, None, :]] += own
    covariance = np.linalg.inv(total)
    return covariance, (covariance @ (says + np.einsum("jab,jb->ja", own, mean).ravel())).reshape(-1, 3)
