"""Evidence in space on the benchmark: what it learns from training people, and the joints that it finds.

Three numbers say what a backbone's heatmaps are worth, bone lengths what a body is like; both come from people that the
backbone was trained on.  `in_space` is then where the joints of every test instant are.
"""

from __future__ import annotations

import numpy as np
import torch

from epiutils.data import people
from epiutils.data.dataset import Benchmark
from epiutils.data.views import BONES, Predicted
from epiutils.space import Body, Calibration, along_bones, modes, near_best
from epiutils.studies.predicted import heatmaps_once, kept
from epiutils.studies.runs import TRAINING
from epiutils.triangulate import triangulate


def calibrated(point: str) -> Calibration:
    """What the heatmaps of an operating point are worth, fitted on instants of subject 1."""
    seen = heatmaps_once(point, "train", TRAINING, progress=False)
    make = lambda: vars(Calibration.fit(seen.output, seen.joints))
    return Calibration(**kept("calibration", [Calibration, seen.output, seen.joints], make))


def training_body() -> Body:
    """The proportions of the embedded training people, subjects 1, 5, 6, 7 and 8."""
    some = Benchmark("train-large").instants[::5]
    return Body.of(np.stack([people.pose(i.subject, i.action, i.frame, i.seed) for i in some]), BONES)


def in_space(predicted: Predicted, calibration: Calibration, body: Body, batch: int = 8) -> dict[str, np.ndarray]:
    """Where the joints are, (N, J, 3) metres: "space" by the likeliest modes, "space_tree" by those the bones allow."""

    def make() -> dict:
        found: dict[str, list] = {"space": [], "space_tree": []}
        for first in range(0, len(predicted), batch):
            some = predicted[first : first + batch]
            of_some = modes(some.output, some.P.to(some.output), calibration)
            found["space"].append(near_best(of_some, of_some.share))
            found["space_tree"].append(near_best(of_some, along_bones(of_some, body)))
        return {name: torch.cat(each) for name, each in found.items()}

    with torch.no_grad():
        X = kept("space", [modes, triangulate, predicted.output, predicted.P, calibration, body], make)
    return {name: points.double().numpy() for name, points in X.items()}
