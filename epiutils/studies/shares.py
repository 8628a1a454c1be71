"""What each cause has of the failure: nine causes removed in every combination, and the fair share of each.

    python -m epiutils.studies.shares                   # about an hour on two cores; can be stopped and taken up

What a removal adds depends on what was removed before it.  Shapley's value is its mean over all n! orders,

    φᵢ = Σ_{S ∌ i} |S|! (n − |S| − 1)! / n! · (v(S ∪ {i}) − v(S)),

and these shares add up to the whole, v(all) − v(none) (Shapley, "A value for n-person games", 1953).  The accuracy v of
all 512 sets is affordable because training is, on the `causes.NormalEquations`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from epiutils.cameras import Camera
from epiutils.data.dataset import open_dataset
from epiutils.data.files import replacing
from epiutils.data.views import HEATMAP_FROM_INPUT, Predicted
from epiutils.epipolar import epipoles, find_fundamental, fundamental_from_cameras, transfer
from epiutils.fusion import SimpleFusion
from epiutils.heatmaps import found, hit_loss
from epiutils.networks.loop import Settings
from epiutils.networks.predict import device_name
from epiutils.redirect import Pencil
from epiutils.studies.causes import NormalEquations, Pairs, initial_weights
from epiutils.studies.fitting import ViewPairs, train_pairs
from epiutils.studies.predicted import heatmaps_once, kept

STORED = Path(__file__).resolve().parents[2] / "data" / "results" / "shares.npz"
SEEDS = 5

# What is removed, in the order of the bits of a set
CAUSES = {
    "height": "the ridge is higher than the peak",
    "bands": "the bands are uneven",
    "start": "initial weights in ±1/3, not zero",
    "steps": "50 iterations, not 2,200",
    "rate": "a learning rate of 0.001, not 0.01",
    "points": "F from points, not from calibration",
    "crop": "the crop left out of F",
    "data": "one subject, 105 instants, not the tested ones",
    "shared": "nine weights for all joints, not for each",
}
# The fourteen suspects of the failure, by what is changed alone: of `CAUSES`, of `causes_removed`, or of `readings.READINGS`
SUSPECTS = {
    "height": "1 ridge higher than the peak",
    "bands": "2 uneven bands",
    "epipole": "3 epipole in the crop",
    "loss": "4 squared error, not the place",
    "sigmoid": "5 sigmoid",
    "steps": "6 too few iterations",
    "rate": "6 learning rate too small",
    "start": "6 initial weights far from zero",
    "points": "7 F from points",
    "crop": "7 crop left out of F",
    "threshold": "8 threshold 1, not 3",
    "slow": "9 the backbone's rate too high (free)",
    "sources": "10 errors of the source",
    "data": "11 one subject, few images",
    "shared": "12 weights shared by all joints",
    "zero": "13 a start above all-zero maps (free)",
}
# From the original, frozen, to the first repair: what its training changes at once
FIRST_STEP = {
    "sources": "three sources, not one",
    "instants": "instants, not pairs, as samples",
    "rate": "a learning rate of 0.05, not 0.001",
    "schedule": "100 iterations that cool down, not 50",
    "start": "from zero, not from ±1/3",
}


def shapley(values: np.ndarray) -> np.ndarray:
    """The Shapley value of each of n causes, from the values of all their sets: (2ⁿ, …) → (n, …).

    Set s holds cause i where bit i of s is 1.  Raises ValueError where the number of sets is no power of two.
    """
    n = len(values).bit_length() - 1
    if len(values) != 2**n:
        raise ValueError(f"n causes have 2ⁿ sets, got {len(values)}")
    shares = []
    for i in range(n):
        without = [s for s in range(2**n) if not s >> i & 1]
        weights = [1 / (n * math.comb(n - 1, s.bit_count())) for s in without]
        shares.append(sum(w * (values[s | 1 << i] - values[s]) for w, s in zip(weights, without, strict=True)))
    return np.stack(shares)


def _fundamentals(predicted: Predicted, cameras: Sequence[Camera], points: bool, crop: bool) -> Tensor:
    """F between all heatmaps, right or wrong as the original may have had them: (N, V, V, 3, 3).

    cameras: of the whole pictures, whose distortion is taken away.  points: from the whole pixels of the first instant's
    joints, by OpenCV's least median of squares as its tutorial does it; else from calibration.  crop: left out, as if
    heatmaps showed the whole pictures.
    """
    if not points and not crop:
        return predicted.F
    cameras, X = [camera.without_distortion() for camera in cameras], predicted.joints_3d[0].numpy()
    height, width = predicted.output.shape[-2:]
    if crop:
        A = np.stack([np.diag([width / c.size[0], height / c.size[1], 1.0]) for c in cameras])[None]  # (1, V, 3, 3)
    else:  # (N, V, 3, 3), heatmap from picture
        A = HEATMAP_FROM_INPUT @ predicted.K.double().numpy() @ np.linalg.inv(np.stack([c.K for c in cameras]))
    F = np.zeros((len(cameras), len(cameras), 3, 3))  # between the pictures
    for s, r in itertools.permutations(range(len(cameras)), 2):
        if points:
            F[s, r], _ = find_fundamental(*(np.rint(cameras[v].project(X)) for v in (s, r)), "lmeds")
        else:
            F[s, r] = fundamental_from_cameras(cameras[s], cameras[r])
    return torch.from_numpy(transfer(F, A[:, :, None], A[:, None])).expand_as(predicted.F)


def causes_removed(
    lesson: Predicted,
    test: Predicted,
    cameras: tuple[Sequence[Camera], Sequence[Camera]],
    seeds: int = SEEDS,
    iterations: tuple[int, int] = (50, 2200),
    causes: Sequence[str] = tuple(CAUSES),
) -> dict[str, np.ndarray]:
    """Which joints the module finds, trained with causes of its failure removed, see `heatmaps.found`.

    "sets", (2ⁿ, S, N, 4, J), with each set of n causes removed: set s has removed cause k where bit k is 1.  And causes
    beside those nine, each changed alone in the module that failed, (S, N, 4, J) each: "sigmoid" has one more; the
    others have one less: "epipole", no training pair with an epipole in the crop; "loss", a loss that asks for the
    joint's place; "threshold", of 3 px; "sources", the sources' maps without error.
    lesson, test: heatmaps that it trains on, and is tested on, each view with the next one's.  cameras: of the whole
    pictures of either.  iterations: few, and many.  causes: of `CAUSES`.
    """
    given = lesson, test, cameras, seeds, iterations
    return {"sets": _every_set(*given, causes)} | _alone(*given)


def _every_set(lesson, test, cameras, seeds, iterations, causes) -> np.ndarray:
    """The "sets" of `causes_removed`."""
    starts = {False: initial_weights(range(seeds)), True: torch.zeros(seeds, 9)}
    joints, results = lesson.output.shape[2], {}
    either = lambda *names: itertools.product(*((False, True) if name in causes else (False,) for name in names))
    bar = tqdm(total=2 ** len(causes), desc="sets of causes", unit="set")
    for right_F, right_crop in either("points", "crop"):
        seen = [
            replace(maps, F=_fundamentals(maps, rig, not right_F, not right_crop))
            for maps, rig in zip((lesson, test), cameras, strict=True)
        ]
        taught, tested = Pairs.all_of(seen[0]), Pairs.with_next(seen[1])
        usual = float(np.mean([pencil.count.double().mean() for pencil in tested.pencils(1.0)]))
        for even, tests in either("bands", "data"):
            per_band = usual if even else None
            equations = NormalEquations.of(tested if tests else taught, 1.0, per_band)
            sets, kernels = [], []
            for low, zero, fast, own in either("height", "start", "rate", "shared"):
                scale, start = 1 / usual if low else 1.0, starts[zero]
                start = start[:, None].expand(-1, joints, -1) if own else start
                path = _trained(equations.scaled(scale), start, range(seeds), iterations, 1e-2 if fast else 1e-3)
                for (many,) in either("steps"):
                    weights = path[int(many)] if own else path[int(many)][:, None].expand(-1, joints, -1)
                    kernels.append(scale * weights.unflatten(-1, (3, 3)))  # (S, J, 3, 3)
                    removed = dict(height=low, bands=even, start=zero, steps=many, rate=fast, points=right_F,
                                   crop=right_crop, data=tests, shared=own)  # fmt: skip
                    sets.append(sum(removed[name] << k for k, name in enumerate(causes)))
            for first in range(0, len(sets), 8):
                right = tested.score(torch.cat(kernels[first : first + 8]), 1.0, per_band)  # (8 · S, N, 4, J)
                results |= dict(zip(sets[first : first + 8], np.split(right, len(right) // seeds), strict=True))
                bar.update(len(right) // seeds)
    bar.close()
    return np.stack([results[s] for s in range(2 ** len(causes))])


def _trained(equations: NormalEquations, start: Tensor, seeds: Sequence[int], iterations, lr: float) -> Tensor:
    """The weights after few and after many iterations, `kept` in the cache: (2, S, …)."""
    make = lambda: {"weights": equations.train(start, seeds, max(iterations), lr=lr)[:, list(iterations)]}
    depends = [NormalEquations, vars(equations), start, list(seeds), list(iterations), lr]
    return kept("trained", depends, make)["weights"].transpose(0, 1)


def _alone(lesson, test, cameras, seeds, iterations) -> dict[str, np.ndarray]:
    """What `causes_removed` gives beside its sets, after the fewer iterations."""
    lesson, test = (
        replace(maps, F=_fundamentals(maps, rig, True, True)) for maps, rig in zip((lesson, test), cameras, strict=True)
    )
    steps, start = iterations[0], initial_weights(range(seeds))
    given, tested = Pairs.all_of(lesson), Pairs.with_next(test)
    fit = lambda pairs, threshold=1.0: NormalEquations.of(pairs, threshold).train(start, range(seeds), steps)[:, -1]
    outside = given.chosen.reshape(-1, 1, 3)[~_epipole_inside(given.F, given.shape)]
    learn, judge = (Pairs(_perfect_sources(p.predicted), p.chosen + (0, 4, 0)) for p in (given, tested))
    return {
        "sigmoid": tested.score(_on_heatmaps("sigmoid", lesson, start, steps), 1.0, sigmoid=True),
        "epipole": tested.score(fit(Pairs(lesson, outside)), 1.0),
        "loss": tested.score(_on_heatmaps("place", lesson, start, steps), 1.0),
        "threshold": tested.score(fit(given, 3.0), 3.0),
        "sources": judge.score(fit(learn), 1.0),
    }


def _epipole_inside(F: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Whether the epipole lies in the reference heatmap (H, W): F (..., 3, 3) → (...) bool."""
    e = epipoles(F)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.asarray(e[..., 0] / e[..., 2]), np.asarray(e[..., 1] / e[..., 2])
    return (x > -0.5) & (x < shape[1] - 0.5) & (y > -0.5) & (y < shape[0] - 0.5)


def _perfect_sources(predicted: Predicted) -> Predicted:
    """Eight views: the four, and the same again with perfect heatmaps."""
    twice = predicted.of_views([*range(4), *range(4)])
    return replace(twice, output=torch.cat([predicted.output, predicted.target], 1))


def _on_heatmaps(what: str, lesson: Predicted, start: Tensor, steps: int) -> Tensor:
    """The nine weights after training that no parabola gives, on heatmaps: (S, 9), `kept` in the cache.

    what: "sigmoid", behind one; "place", on the loss that asks for the place, with the repaired module's first β.
    start: (S, 9), what seed 0, 1, … begins with; it orders the pairs.
    """

    def place(module: nn.Module, batch: dict[str, Tensor], done: float) -> Tensor:
        fused = module(batch["source"], batch["reference"], batch["F"])
        return hit_loss(10 * fused, batch["target"], batch["weight"])

    def make() -> dict[str, Tensor]:
        modules = [SimpleFusion(1.0, sigmoid=what == "sigmoid", initial=w.reshape(3, 3)) for w in start]
        for seed, module in enumerate(modules):
            train_pairs(module, ViewPairs(lesson), steps, seed=seed, loss=place if what == "place" else None)
        return {"weights": torch.stack([module.conv.weight.detach().flatten() for module in modules])}

    seen = [lesson.output, lesson.target, lesson.weight, lesson.F]
    return kept(what, [SimpleFusion, Pencil, train_pairs, hit_loss, seen, start, steps], make)["weights"]


# The first step of the ladder


def _first_step(
    lesson: Predicted, test: Predicted, seeds: int = SEEDS, iterations: tuple[int, int] = (50, 100)
) -> np.ndarray:
    """Which joints a sum finds, trained with each set of the changes of `FIRST_STEP`: (32, S, N, 4, J)."""
    three = _of_all_sources(lesson)
    samples = {
        (0, 0): NormalEquations.of(Pairs.all_of(lesson)),
        (0, 1): _by_instant(NormalEquations.of(Pairs.with_next(lesson))),
        (1, 0): three,
        (1, 1): _by_instant(three),
    }
    weights = []
    for change in range(32):
        sources, instants, fast, cooled, zero = (change >> k & 1 for k in range(5))
        start = torch.zeros(seeds, 9) if zero else initial_weights(range(seeds))
        steps, highest = iterations[cooled], 5e-2 if fast else 1e-3
        settings = Settings(steps=steps, lr=highest, schedule="cosine" if cooled else "constant")
        rates = [settings.rate(step) for step in range(steps)]
        batch = 4 if instants else 8
        weights.append(samples[sources, instants].train(start, range(seeds), steps, batch, rates)[:, -1])
    one = Pairs.with_next(test).score(torch.cat(weights[::2]))
    right = np.stack([one, _with_all_sources(test, torch.cat(weights[1::2]))], 1)  # (16 · S, 2, N, 4, J)
    return np.moveaxis(right.reshape(16, seeds, 2, *right.shape[2:]), 2, 1).reshape(32, seeds, *right.shape[2:])


def _all_ridges(predicted: Predicted) -> Iterator[Tensor]:
    """A = Σ_s A_s of every view with all others as its sources, (J, 9, H·W) of each view of each instant in turn."""
    views = range(predicted.output.shape[1])
    chosen = [[(n, s, r) for r in views for s in views if s != r] for n in range(len(predicted))]
    columns = [Pairs(predicted, chosen).columns()] * (len(views) - 1)  # one iterator: as many a view
    return map(sum, zip(*columns, strict=True))


def _with_all_sources(predicted: Predicted, weights: Tensor) -> np.ndarray:
    """Which joints the sum of all sources' ridges finds with each of K kernels (K, 9): (K, N, V, J)."""
    outputs, targets, right = predicted.output.flatten(0, 1), predicted.target.flatten(0, 1), []
    for A, output, target in zip(_all_ridges(predicted), outputs, targets, strict=True):
        fused = output[:, None] + (weights.to(A.dtype) @ A).unflatten(-1, output.shape[-2:])  # (J, K, H, W)
        right.append(found(fused, target[:, None].expand_as(fused)).T)
    return np.stack(right, 1).reshape(len(weights), *predicted.output.shape[:3])


def _of_all_sources(predicted: Predicted) -> NormalEquations:
    """Of each view (N · V) with all three others as its sources, one kernel for all: A = Σ_s A_s."""
    wanted = (predicted.target - predicted.output).flatten(0, 1)
    seen = ((e.double(), v) for e, v in zip(wanted, predicted.weight.flatten(0, 1), strict=True))
    return NormalEquations.of_columns((A.double() for A in _all_ridges(predicted)), seen)


def _by_instant(equations: NormalEquations) -> NormalEquations:
    """Four views a sample."""
    return NormalEquations(*(v.unflatten(0, (-1, 4)).mean(1) for v in vars(equations).values()))


# What is stored


def load() -> dict[str, np.ndarray]:
    """What `python -m epiutils.studies.shares` stored, every fourth instant of subject 9 at the 46 % point.

    What `causes_removed` gives, of all nine causes, and "first_step" (32, S, N, 4, J): the changes of `FIRST_STEP` in
    each set.  Raises FileNotFoundError where nothing is stored.
    """
    with np.load(STORED, allow_pickle=False) as stored:
        left_out, shapes = stored["left_out"], json.loads(str(stored["meta"]))["shapes"]
        right = {name: np.unpackbits(stored[name], count=math.prod(shape)) for name, shape in shapes.items()}
        return {name: np.where(left_out, np.float32("nan"), right[name].reshape(shapes[name])) for name in shapes}


def _store(results: dict[str, np.ndarray]) -> None:
    left_out = np.isnan(results["sets"][0, 0])  # by the target alone: the same joints everywhere
    assert all((np.isnan(found) == left_out).all() for found in results.values())
    meta = {
        "command": "python -m epiutils.studies.shares",
        "device": device_name(),
        "torch": torch.__version__,
        "shapes": {name: found.shape for name, found in results.items()},
    }
    arrays = {name: np.packbits(found == 1) for name, found in results.items()}
    with replacing(STORED) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays, left_out=left_out, meta=json.dumps(meta))


def _main(arguments: list[str] | None = None) -> int:
    """Measure every set of causes, and store it."""
    argparse.ArgumentParser(prog="python -m epiutils.studies.shares", description=_main.__doc__).parse_args(arguments)
    lesson = heatmaps_once("original", "train", slice(0, 840, 8))
    test = heatmaps_once("original", "test")[::4]
    cameras = tuple(open_dataset("", subject).cameras for subject in (1, 9))
    _store(causes_removed(lesson, test, cameras) | {"first_step": _first_step(lesson, test)})
    return 0


if __name__ == "__main__":
    sys.exit(_main())
