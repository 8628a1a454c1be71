"""Evidence in space on the benchmark: what it learns from training people, and how well it finds the test's joints.

    python -m epiutils.studies.evidence          # all operating points, with and without the flip test: 15 minutes
    python -m epiutils.studies.evidence --points --free best    # the backbone set free, and its control: 10 minutes
    python -m epiutils.studies.evidence --points runs/w32/w32.safetensors    # weights that do not ship

Three numbers say what a backbone's heatmaps are worth, bone lengths what a body is like, poses how limbs are held; all
come from people that the backbone was trained on.  What each method finds is stored in data/results/space.npz, see
`load`; the settings were chosen on subject 8.  On a GPU, backbones are trained on in minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data import people
from epiutils.data.dataset import Augmentation, Benchmark, MultiView
from epiutils.data.views import BONES, Predicted
from epiutils.metrics import mpjpe
from epiutils.networks.hrnet import load_checkpoint, normalise
from epiutils.networks.loop import train
from epiutils.networks.predict import device_name, predict
from epiutils.networks.training import maps_loss, pose_loss
from epiutils.space import Body, Calibration, along_bones, log_evidence, modes, poses
from epiutils.studies.parts import Parts
from epiutils.studies.predicted import CHECKPOINTS, choose, found_back, found_by, heatmaps_once, kept, triangulated
from epiutils.studies.runs import TRAINING, repaired
from epiutils.studies.stored import load_arrays, save_arrays
from epiutils.triangulate import triangulate

STORED = Path(__file__).resolve().parents[2] / "data" / "results" / "space.npz"
_TRAINED = (1, 5, 6, 7)  # subjects; 8 is to choose on


def calibrated(point: str, flip: bool = False) -> Calibration:
    """What the heatmaps of an operating point are worth, view by view, fitted on instants of subject 1."""
    seen = heatmaps_once(point, "train", TRAINING, progress=False, flip=flip)
    make = lambda: vars(Calibration.fit(seen.output, seen.joints))
    return Calibration(**kept("calibration", [Calibration, seen.output, seen.joints], make))


@lru_cache(1)
def training_parts() -> Parts:
    """How the embedded training people are built, `.body`, and hold their limbs."""
    some = [i for i in Benchmark("train-large").instants if i.subject in _TRAINED]
    shown = np.stack([people.pose(i.subject, i.action, i.frame, i.seed) for i in some])
    return Parts.of(shown, np.array([i.action for i in some]), Body.of(shown, BONES))


@torch.no_grad()
def in_space(
    predicted: Predicted, calibration: Calibration, parts: Parts, actions: Sequence[str], batch: int = 8
) -> dict[str, np.ndarray]:
    """Where the joints are, (N, J, 3) metres, by each kind of evidence.

    "space": the likeliest modes; "space_tree": those that the bones allow; "space_parts": those that agree with how
    training people hold their limbs in other actions than the instant's own.  actions: (N,) of the instants.
    """

    def make() -> dict:
        made: dict[str, list] = {"space": [], "space_tree": [], "space_parts": []}
        for first in range(0, len(predicted), batch):
            some = predicted[first : first + batch]
            found = modes(some.output, some.P.to(some.output), calibration)
            share = along_bones(found, parts.body)
            made["space"].append(found.near_best(found.share))
            made["space_tree"].append(found.near_best(share))
            for n, action in enumerate(actions[first : first + batch]):
                one = type(found)(*(v[n : n + 1] for v in vars(found).values()))
                X = parts.without(action).refine(one, share[n : n + 1], made["space_tree"][-1][n : n + 1])
                made["space_parts"].append(torch.from_numpy(X))
        return {name: torch.cat(each) for name, each in made.items()}

    known = [modes, triangulate, Parts, predicted.output, predicted.P, calibration, vars(parts), list(actions)]
    return {name: points.double().numpy() for name, points in kept("space", known, make).items()}


def _evaluated(point: str, flip: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Each method on all instants of the test: found (N, V, J), see `heatmaps.found`, and mm (N, J) from the truth.

    "hrnet" and "repaired": HRNet's peaks and the frozen module's, triangulated by plain DLT.  All others are points
    projected back into every view, hidden or not: "robust_reprojected", HRNet's peaks by robust triangulation, nothing
    learned; "space", "space_tree" and "space_parts", see `in_space`.
    """
    seen, module = heatmaps_once(point, progress=False, flip=flip), repaired(point)
    actions, calibration = [i.action for i in Benchmark("test").instants], calibrated(point, flip).together()
    alone, fused = (triangulated(fusion, seen)[1] for fusion in (None, module))
    X = {"hrnet": alone["DLT"], "robust_reprojected": alone["robust"], "repaired": fused["DLT"]}
    X |= in_space(seen, calibration, training_parts(), actions)
    right = {name: found_back(points, seen) for name, points in X.items()}
    right |= {"hrnet": found_by(None, seen), "repaired": found_by(module, seen)}
    true = seen.joints_3d.numpy()
    return {name: {"found": right[name], "mm": 1000 * mpjpe(X[name], true)} for name in X}


def _space_loss(network: nn.Module, batch: dict[str, Tensor], done: float, calibration: Calibration) -> Tensor:
    """How improbable the true place of a joint is among its modes, and HRNet's own losses beside it; for `train`.

    −log of p(X)^(1 / 1.5) at the true X over its sum with the modes' that lie more than 5 cm from it; of `MultiView`.
    """
    maps = network(normalise(batch["image"])).unflatten(0, batch["image"].shape[:2])
    P = (batch["K"] @ torch.cat([batch["R"], batch["t"][..., None]], -1)).to(maps)
    true = batch["joints_3d"].to(maps)[:, :, None]  # (B, J, 1, 3)
    with torch.no_grad():
        X = modes(maps, P, calibration, count=8, peaks=2).X
    evidence = log_evidence(torch.cat([true, X], 2), maps, P, calibration) / 1.5
    same = torch.nn.functional.pad((X - true).norm(dim=-1) < 0.05, (1, 0))
    lost = -torch.log_softmax(evidence.masked_fill(same, -1e4), -1)[..., 0].mean()
    return lost + maps_loss(maps, batch, 0.5)


def _trained_on(point: str, through_space: bool, steps: int, batch: int, workers: int) -> nn.Module:
    """The backbone of a point after some steps more, of so many instants each, with patches that hide; of seed 0."""
    weights, everybody = Path(CHECKPOINTS.get(point, point)), Benchmark("train-strong")
    network, calibration = load_checkpoint(weights), calibrated(point)
    chosen, augmentation = choose(everybody, batch * steps), Augmentation(hiding=1.0)
    instants = torch.utils.data.Subset(everybody.prepare(progress=False, only=chosen), chosen)
    alone = lambda network, batch, done: pose_loss(network, batch, 0.5)
    loss = partial(_space_loss, calibration=calibration) if through_space else alone
    settings = {"steps": steps, "batch": batch, "lr": 5e-4, "warmup": 10, "clip": 1.0, "seed": 0}

    def make() -> dict:
        torch.manual_seed(0)
        model = network.to(memory_format=torch.channels_last).train()
        train(model, loss, MultiView(instants, augmentation), workers=workers, progress=True, **settings)
        return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}

    known = [weights, _space_loss, train, modes, MultiView, [everybody.instants[i] for i in chosen]]
    network.load_state_dict(kept("set-free", [*known, through_space, settings, calibration], make))
    return network.eval()


def _set_free(point: str, **lesson) -> dict[str, dict[str, np.ndarray]]:
    """As `_evaluated`, of backbones that were trained on: "space_free", through space, its joints in space with bones;
    "space_longer", alone and as long, the same; "hrnet_free" and "hrnet_longer", the heatmaps of each alone.

    lesson: steps, batch and workers, of `_trained_on`.
    """
    made, body, shots = {}, training_parts().body, []
    for split, wanted in (("train", TRAINING), ("test", slice(None))):
        data = Benchmark(split)
        chosen = choose(data, wanted)
        shots.append(MultiView(torch.utils.data.Subset(data.prepare(progress=False, only=chosen), chosen)))
    for name, through_space in (("free", True), ("longer", False)):
        network = _trained_on(point, through_space, **lesson)
        known, seen = (predict(network, data) for data in shots)
        calibration, true = Calibration.fit(known.output, known.joints).together(), seen.joints_3d.numpy()
        with torch.no_grad():
            X = poses(seen.output, seen.P.float(), calibration, body).double().numpy()
        alone = triangulated(None, seen)[1]["DLT"]
        made[f"space_{name}"] = {"found": found_back(X, seen), "mm": 1000 * mpjpe(X, true)}
        made[f"hrnet_{name}"] = {"found": found_by(None, seen), "mm": 1000 * mpjpe(alone, true)}
    return made


def load() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """What is stored, by point and method, "hrnet_flip" with the flip test: found (N, V, J), and mm (N, J).

    "meta" says how each was made, with its command and device.
    """
    shown: dict[str, dict] = {}
    arrays = load_arrays(STORED)
    meta = arrays.pop("meta")
    for name, values in arrays.items():
        point, method, key = name.split("/")
        shown.setdefault(point, {}).setdefault(method, {})[key] = values
    return shown | {"meta": meta}


def _there(point: str) -> str:
    """A point that ships, or a file, as `argparse` asks for it."""
    if point not in CHECKPOINTS and not Path(point).is_file():
        raise argparse.ArgumentTypeError(f"expected {', '.join(CHECKPOINTS)}, or a file of weights, got {point!r}")
    return point


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _main(arguments: list[str] | None = None) -> int:
    """Evaluate what is asked for, and store it beside what is there."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.studies.evidence", description=_main.__doc__)
    points = {"nargs": "*", "metavar": "POINT", "type": _there}
    parser.add_argument("--points", **points, default=list(CHECKPOINTS), help="checkpoints that ship, or their files")
    parser.add_argument("--free", **points, default=[], help="also train these on, through space and alone")
    parser.add_argument("--steps", type=_positive, default=100, help="of --free (default: %(default)s)")
    parser.add_argument("--batch", type=_positive, default=4, help="instants a step (default: %(default)s)")
    parser.add_argument("--workers", type=_positive, default=1, help="processes that load (default: %(default)s)")
    chosen, arrays = parser.parse_args(arguments), load_arrays(STORED) if STORED.exists() else {}
    made, lesson = arrays.pop("meta", {}), {key: getattr(chosen, key) for key in ("steps", "batch", "workers")}
    asked = [(point, partial(_evaluated, flip=flip), "_flip" * flip) for point in chosen.points for flip in (0, 1)]
    for point, evaluate, ending in [*asked, *((point, partial(_set_free, **lesson), "_free") for point in chosen.free)]:
        of = Path(point).stem
        for method, values in evaluate(point).items():
            name = f"{of}/{method}{ending.removesuffix('_free')}"
            arrays |= {f"{name}/{key}": of_key for key, of_key in values.items()}
            mm = float(np.nanmean(values["mm"]))
            print(f"{name}: {100 * np.nanmean(values['found']):.1f} % found, {mm:.1f} mm", flush=True)
        command = " ".join(["python -m epiutils.studies.evidence", *(arguments or sys.argv[1:])])
        made[of + ending] = {"command": command, "device": device_name(), "torch": torch.__version__}
        save_arrays(STORED, arrays | {"meta": made})
    return 0


if __name__ == "__main__":
    sys.exit(_main())
