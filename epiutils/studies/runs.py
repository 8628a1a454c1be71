"""The long experiments: every method trained by five seeds at both operating points, scored, and stored.

    python -m epiutils.studies.runs                     # everything that is not done yet: hours on two cores
    python -m epiutils.studies.runs --points original --methods repaired_frozen original_frozen

Each run is kept in runs/studies as soon as it is done, so the command can be stopped and taken up again; at the end they
are packed into data/results/<point>.npz, which the notebooks read with `load`.  A method takes the place of what is
stored of it once it has at least as many seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from epiutils.data.dataset import Augmentation, Benchmark, MultiView
from epiutils.data.views import Predicted
from epiutils.fusion import OriginalFusion, RepairedFusion, SimpleFusion
from epiutils.heatmaps import hit_loss
from epiutils.metrics import joint_mean, mpjpe
from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint
from epiutils.networks.loop import train
from epiutils.networks.predict import device_name, predict
from epiutils.networks.training import maps_loss, pose_loss, train_pose
from epiutils.studies.fitting import FusedNetwork, ViewPairs, train_pairs, train_together
from epiutils.studies.predicted import (
    CHECKPOINTS,
    choose,
    found_back,
    found_by,
    freed,
    heatmaps_once,
    kept,
    training_pictures,
    triangulated,
)
from epiutils.studies.rivals import RIVALS
from epiutils.studies.stored import load_arrays, save_arrays

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "data" / "results"
SEEDS = 5
TRAINING = slice(0, 840, 8)  # of subject 1, for modules on frozen heatmaps


class WithNext(nn.Module):
    """A module of one source, such as `OriginalFusion`, for all views: each is fused with the next camera's."""

    def __init__(self, fusion: nn.Module):
        super().__init__()
        self.fusion = fusion

    @property
    def sharpness(self) -> Tensor:
        """That of a repaired module."""
        return self.fusion.sharpness

    def all_views(self, heatmaps: Tensor, F: Tensor) -> Tensor:
        pairs = [((r + 1) % heatmaps.shape[1], r) for r in range(heatmaps.shape[1])]
        return torch.stack([self.fusion(heatmaps[:, s], heatmaps[:, r], F[:, s, r]) for s, r in pairs], 1)


# Methods on frozen heatmaps that train by pairs of views as the original did: the module, iterations and batch
PAIRED = {
    "original_frozen": (OriginalFusion, 50, 8),
    "original_frozen_sigmoid": (partial(OriginalFusion, sigmoid=True), 50, 8),
    "original_frozen_2200": (OriginalFusion, 2200, 8),  # the last iteration that the original showed
    "second_attempt": (SimpleFusion, 50, 16),
}
# Methods that train on all views of an instant together: the module
TOGETHER: dict[str, Callable[[], nn.Module]] = {
    **RIVALS,
    "repaired_frozen": RepairedFusion,
    "repaired_one": lambda: WithNext(RepairedFusion()),  # of one source
    # the repairs, one after the other …
    "repair_start": partial(RepairedFusion, normalise=False, multiply=False, confidence=False),
    "repair_loss": partial(RepairedFusion, normalise=False, multiply=False, confidence=False),
    "repair_normalise": partial(RepairedFusion, multiply=False, confidence=False),
    "repair_multiply": partial(RepairedFusion, confidence=False),
    # … and all but one of them
    "without_loss": RepairedFusion,
    "without_normalise": partial(RepairedFusion, normalise=False),
    "without_multiply": partial(RepairedFusion, multiply=False),
}
_ON_SQUARES = ("repair_start", "without_loss")  # on HRNet's loss
# AdamW's highest rate and the steps, where they are not 5e-2 and 100: the best that `studies.search` found
SETTINGS = {"dense": (1e-4, 100), "attention": (1e-2, 100), "line_sum": (5e-2, 400), "line_mean": (2e-1, 400)}
# Methods that train the backbone too, on pictures
FREE = ("original_free", "repaired_free", "repaired_free_frozen_statistics", "hrnet_longer")
_FREE_SPLIT = {"original": "train", "best": "train-large"}  # what the point's backbone was trained on


def _train_frozen(method: str, heatmaps: Predicted, seed: int, steps: int = 100) -> tuple[nn.Module, dict]:
    """The module of a method, trained on the heatmaps of a frozen backbone, and how: see `train_pairs`."""
    if method in PAIRED:
        torch.manual_seed(seed)
        make, steps, batch = PAIRED[method]
        module = make()
        followed = train_pairs(module, ViewPairs(heatmaps), steps, batch, seed=seed)
        return WithNext(module.cpu()), followed
    lr, steps = SETTINGS.get(method, (5e-2, steps))
    return train_together(TOGETHER[method], heatmaps, seed, steps, lr, method in _ON_SQUARES)


def _free_loss(model: FusedNetwork, batch: dict[str, Tensor], done: float) -> Tensor:
    """The loss of `train_together` through the backbone, and HRNet's own losses on its unfused heatmaps beside it."""
    maps, fused = model.all_views(batch["image"], batch["F"])
    return hit_loss(model.fusion.sharpness * fused, batch["target"], batch["weight"]) + maps_loss(maps, batch, 0.5)


def _train_free(method: str, point: str, seed: int, fusion: nn.Module) -> tuple[FusedNetwork, dict]:
    """Backbone and module trained together, from the backbone of the point (and the fusion as given)."""
    torch.manual_seed(seed)
    network = load_checkpoint(CHECKPOINTS[point]).to(memory_format=torch.channels_last)
    settings = {"seed": seed, "workers": 1, "progress": True}
    model = FusedNetwork(network, fusion, method.endswith("frozen_statistics")).train()
    if method == "original_free":
        return model, train_pairs(model, training_pictures(TRAINING), 60, **settings)
    data = MultiView(Benchmark(_FREE_SPLIT[point]).prepare(), Augmentation(), seed=seed)
    alone = lambda model, batch, done: pose_loss(model.network, batch, 0.5)
    settings |= {"steps": 200, "batch": 4, "lr": 1e-3 if point == "original" else 5e-4, "warmup": 10, "clip": 1.0}
    _, rows = train(model, alone if method == "hrnet_longer" else _free_loss, data, **settings)
    return model, {"losses": np.array([row["loss"] for row in rows]), "path": np.empty((0, 2, 9), np.float32)}


def _evaluate(module: nn.Module | None, predicted: Predicted) -> dict[str, np.ndarray]:
    """Which joints are found in each view, and how far off they are in space, all views fused with each other.

    Returns found (N, V, J) of 1, 0 and nan, and the distances in mm (N, J) from the true joints to what plain
    triangulation gives, dlt_mm, and the robust one weighed by the heights of the peaks, robust_mm.
    """
    _, points = triangulated(module, predicted)
    true = predicted.joints_3d.numpy()
    off = {f"{way.lower()}_mm": 1000 * mpjpe(points[way], true) for way in ("DLT", "robust")}
    return {"found": found_by(module, predicted)} | off


def _quality(steps: int = 600, every: int = 50) -> dict:
    """How much fusion gives at each quality of the backbone: HRNet trained from nothing on subject 1, fused on its way.

    Returns after every so many steps `step`, the accuracy `alone` and, behind a repaired module trained for 60 steps on
    the heatmaps of that moment, `fused`: (Q,) each, on every fourth test instant.
    """
    train_set, test = Benchmark("train").prepare(), Benchmark("test").prepare()
    learn, judge = (MultiView([data[i] for i in range(0, len(data), n)]) for data, n in ((train_set, 16), (test, 4)))

    def validate(network: nn.Module) -> dict[str, float]:
        seen = predict(network, judge)
        module, _ = _train_frozen("repaired_frozen", predict(network, learn), 0, steps=60)
        return {"alone": joint_mean(found_by(None, seen)), "fused": joint_mean(found_by(module, seen))}

    torch.manual_seed(0)
    network = PoseHRNet(**SLIM).train().to(memory_format=torch.channels_last)
    rows, _ = train_pose(network, train_set, steps=steps, every=every, validate=validate)
    return {key: [row[key] for row in rows] for key in ("step", "alone", "fused")}


def _run(point: str, method: str, seed: int) -> dict:
    """One method at one operating point with one seed, trained and scored on the whole test set.

    Returns what `_evaluate` gives, and for a backbone that was trained found_unfused, of its own maps; the trained
    `weights` of the fusion module, the `seconds` and `losses` of the training, and for the original's modules the
    `path` (steps, 2, 9) of the nine weights and their gradients.
    """
    if method == "quality":
        return _quality()
    test = heatmaps_once(point, progress=False)
    if method == "hrnet":
        return _evaluate(None, test) | {"seconds": 0.0}
    if method in FREE:
        torch.manual_seed(seed)
        fusion = OriginalFusion()
        if method != "original_free":
            fusion = _train_frozen("repaired_frozen", heatmaps_once(point, "train", TRAINING, progress=False), seed)[0]
        start = time.perf_counter()
        model, followed = _train_free(method, point, seed, fusion)
        seconds = time.perf_counter() - start
        test = predict(model.network, MultiView(Benchmark("test")), workers=1)
        module = model.fusion.cpu()
        fused = {"original_free": WithNext(module), "hrnet_longer": None}.get(method, module)
        scored = _evaluate(fused, test)
        if fused:
            scored |= {"found_unfused": _evaluate(None, test)["found"]}
    else:
        heatmaps = heatmaps_once(point, "train", TRAINING, progress=False)
        start = time.perf_counter()
        module, followed = _train_frozen(method, heatmaps, seed)
        seconds, scored = time.perf_counter() - start, _evaluate(module, test)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    scored |= {"weights": weights.numpy() if len(weights) < 1000 else [], "seconds": seconds}
    return scored | followed


def load(point: str, subject: int = 9) -> dict[str, dict[str, np.ndarray]]:
    """The stored runs of a point by method: found (S, N, V, J), dlt_mm and robust_mm (S, N, J), … of S seeds.

    subject: 9; or 11, on whom nothing was chosen: what the stored modules find in one instant of each performance.
    "meta" says how they were made.  Raises FileNotFoundError where nothing is stored.
    """
    methods: dict[str, dict] = {}
    arrays = load_arrays(RESULTS / f"{point if subject == 9 else 'eleven'}.npz")
    meta = arrays.pop("meta")
    for name, values in arrays.items():
        *of, method, key = name.split("/")
        if of in ([], [point]):
            methods.setdefault(method, {})[key] = values.astype(np.float64) if key.endswith("_mm") else values
    return methods | {"meta": meta}


def originals(
    point: str,
    dataset: str = "",
    train_scenes: int = 105,
    test_scenes: int = 420,
    threshold: float = 1.0,
    steps: int = 50,
    free_steps: int = 60,
    batch: int = 8,
    seeds: int = SEEDS,
) -> dict[str, dict[str, np.ndarray]]:
    """The original's experiments, as `load` gives them: stored where they are these, or else made now.

    found (S, N, V, J) of S seeds, in the chosen test instants; losses, path and weights of the trainings.  What is made
    now has one seed where the backbone is free.
    """
    settings = (dataset, train_scenes, threshold, steps, free_steps, batch)
    if settings == ("", 105, 1.0, 50, 60, 8) and (RESULTS / f"{point}.npz").exists():
        stored, chosen = load(point), choose(Benchmark("test"), test_scenes)
        cut = lambda key, values: values[:seeds, chosen] if key.startswith("found") else values[:seeds]
        names = [name for name in ("hrnet", *PAIRED, "original_free") if name in stored]
        return {name: {key: cut(key, values) for key, values in stored[name].items()} for name in names}
    lesson = heatmaps_once(point, "train", train_scenes, False, dataset)
    test = heatmaps_once(point, "test", test_scenes, False, dataset)
    made = {"hrnet": [{"found": found_by(None, test)}]}
    for method in ("original_frozen", "original_frozen_sigmoid", "second_attempt"):
        make, _, usual = PAIRED[method]
        made[method] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            module = make(threshold)
            followed = train_pairs(module, ViewPairs(lesson), steps, usual * batch // 8, seed=seed)
            weights = next(module.parameters()).detach().flatten().numpy()
            made[method].append({"found": found_by(WithNext(module), test), "weights": weights} | followed)
    seen, training = freed(point, test_scenes, free_steps, 1e-3, threshold, batch, train_scenes, dataset)
    module = OriginalFusion(threshold, initial=torch.from_numpy(training["weights"]))
    training |= {"found": found_by(WithNext(module), seen), "found_unfused": found_by(None, seen)}
    made["original_free"] = [training | {"weights": training["weights"].flatten()}]
    return {name: {key: np.stack([run[key] for run in each]) for key in each[0]} for name, each in made.items()}


_ON_ELEVEN = ("original_frozen", "line_max", "weighted_max", "repaired_one", "repaired_frozen")


def _score_eleven() -> None:
    """Subject 11 seen by both backbones, fused by the modules whose weights are stored."""
    arrays = {"meta": {"command": "python -m epiutils.studies.runs --eleven", "device": device_name()}}
    for point in _FREE_SPLIT:
        some, stored = slice(420, 840, 3), load(point)
        seen, flipped = (heatmaps_once(point, "test-large", some, flip=flip) for flip in (False, True))
        arrays[f"{point}/hrnet/found"] = found_by(None, seen)[None]
        arrays[f"{point}/hrnet_flip/found"] = found_by(None, flipped)[None]
        arrays[f"{point}/robust_reprojected/found"] = found_back(triangulated(None, seen)[1]["robust"], seen)[None]
        for method in _ON_ELEVEN:
            right = [found_by(_rebuilt(method, weights), seen) for weights in stored[method]["weights"]]
            arrays[f"{point}/{method}/found"] = np.stack(right)
    save_arrays(RESULTS / "eleven.npz", arrays)


def measured(name: str) -> dict:
    """What was measured and stored, with its command and device: "fusion" or "throughput" of benchmarks/, or "search".

    Raises FileNotFoundError where it has not.
    """
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def repaired(
    point: str, lesson: Predicted | None = None, threshold: float = 1.0, seed: int = 0, steps: int = 100
) -> RepairedFusion:
    """The repaired module of an operating point, frozen backbone, first seed: stored, or else trained now.

    lesson: heatmaps to train it on instead, once, with these settings; what comes of it is kept in the cache.
    """
    if lesson is None:
        with suppress(FileNotFoundError):
            return _rebuilt("repaired_frozen", load(point)["repaired_frozen"]["weights"][0])
        lesson = heatmaps_once(point, "train", TRAINING, progress=False)
    module = RepairedFusion(threshold)
    make = lambda: train_together(partial(RepairedFusion, threshold), lesson, seed, steps)[0].state_dict()
    known = [train_together, RepairedFusion, lesson.output, threshold, seed, steps]
    module.load_state_dict(kept("repaired", known, make))
    return module.requires_grad_(False)


def _rebuilt(method: str, weights: np.ndarray) -> nn.Module:
    """The module of a method on frozen heatmaps, for all views, with the `weights` of a run."""
    module = WithNext(PAIRED[method][0]()) if method in PAIRED else TOGETHER[method]()
    nn.utils.vector_to_parameters(torch.from_numpy(weights), module.parameters())
    return module.requires_grad_(False)


def _pack(point: str, folder: Path, seeds: int) -> None:
    """Put the methods of which all these seeds are there into the file of their point, beside what it has of others."""
    path = RESULTS / f"{point}.npz"
    arrays = load_arrays(path) if path.exists() else {}
    for method in METHODS:
        paths = [folder / f"{point}-{method}-{seed}.npz" for seed in _seeds(point, method, seeds)]
        before = {name for name in arrays if name.split("/")[0] == method}
        if not paths or not all(map(Path.exists, paths)) or any(len(arrays[name]) > len(paths) for name in before):
            continue
        each = [load_arrays(path) for path in paths]
        arrays = {name: values for name, values in arrays.items() if name not in before}
        arrays |= {f"{method}/{key}": np.stack([one[key] for one in each]) for key in each[0]}
    meta = {"command": "python -m epiutils.studies.runs", "device": device_name(), "torch": torch.__version__}
    save_arrays(path, arrays | {"meta": meta | {"seeds": seeds}})


METHODS = ("hrnet", *PAIRED, *TOGETHER, *FREE, "quality")


def _seeds(point: str, method: str, seeds: int) -> range:
    """All seeds; one of what has no chance in it, one or three of what takes long, some of it at one point only."""
    few = {"hrnet": 1, "weighted_max": 3, "attention": 3, "dense": 3}
    if point == "original":
        few |= {"quality": 1, "repaired_free_frozen_statistics": 1}
    else:
        few |= {"quality": 0, "repaired_free_frozen_statistics": 0, "hrnet_longer": 3}
    return range(min(seeds, few.get(method, seeds)))


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and pack what there is."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.studies.runs", description=main.__doc__)
    parser.add_argument("--points", nargs="+", choices=_FREE_SPLIT, default=list(_FREE_SPLIT))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--eleven", action="store_true", help="score what is stored on subject 11, and nothing else")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "studies", help="where single runs are kept")
    chosen = parser.parse_args(arguments)
    if chosen.eleven:
        _score_eleven()
        return 0
    for point in chosen.points:
        for method in chosen.methods:
            for seed in _seeds(point, method, chosen.seeds):
                path = chosen.out / f"{point}-{method}-{seed}.npz"
                if path.exists():
                    continue
                result = _run(point, method, seed)
                save_arrays(path, result)
                said = f", accuracy {100 * joint_mean(result['found']):5.1f} %" if "found" in result else ""
                print(f"{point:9s} {method:31s} seed {seed}{said}", flush=True)
        _pack(point, chosen.out, chosen.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
