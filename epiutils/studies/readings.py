"""The original's trainings as they may have been, each at its real length, and HRNet alone trained alike beside it.

    python -m epiutils.studies.readings                       # all that is not done yet: minutes on a GPU, days on a CPU
    python -m epiutils.studies.readings --only free alone --seeds 1 --until 1000

Subject 1 whole, ordered pairs of views, Adam at 1e-3 as HRNet has it, and no schedule, which would begin at epoch 170.
On the way the accuracy on subject 9 is measured, of the fused and of the unfused maps.  Where the backbone is frozen and
no sigmoid stands behind the sum, the loss is a parabola, and ten seeds are trained on its normal equations in a second.
Else a step is recorded once as a CUDA graph where there is a GPU, and runs go side by side.  A run can be stopped and is
taken up where it was saved; what is done lies in runs/readings and is packed into data/results/readings.npz.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.files import replacing
from epiutils.fusion import OriginalFusion
from epiutils.heatmaps import found, joints_mse
from epiutils.metrics import joint_mean
from epiutils.networks.hrnet import load_checkpoint, normalise
from epiutils.networks.loop import batches, loader
from epiutils.networks.predict import device_name
from epiutils.redirect import Pencil
from epiutils.studies.causes import NormalEquations, Pairs, initial_weights
from epiutils.studies.fitting import PAIRS
from epiutils.studies.predicted import CHECKPOINTS, heatmaps_once
from epiutils.studies.stored import load_arrays, save_arrays

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "data" / "results" / "readings.npz"
SEEDS, FROZEN_SEEDS = 3, 10
_ON_THE_WAY = ("fused", "unfused", "weights")  # measured at such iterations:
MEASURED = (0, 10, 20, 50, 60, 100, 190, 350, 600, 1000, 1500, 2200, 3000, 4400, 6600, 8800)  # iterations


@dataclass(frozen=True)
class _Reading:
    """One way to read what the original trained.

    start: the checkpoint that the backbone begins with.  free: it trains too.  fused: False is HRNet alone, on the same
    batches.  sigmoid: behind the sum.  batch: pairs of views.  steps: iterations.  What may heal it: begin, the nine
    weights at the beginning, zeros or those of PyTorch; warmup: iterations until the full learning rate; slow: the
    backbone's part of the learning rate; hold: iterations before the backbone begins to move.
    """

    start: str = "original"
    free: bool = True
    fused: bool = True
    sigmoid: bool = False
    batch: int = 8
    steps: int = 8800
    begin: str = "uniform"
    warmup: int = 0
    slow: float = 1.0
    hold: int = 0

    @property
    def parabola(self) -> bool:
        """The loss is a parabola in the nine weights."""
        return not self.free and not self.sigmoid

    @property
    def control(self) -> str:
        """The name of HRNet alone, trained alike."""
        if not self.free:
            return "hrnet"
        return "alone" + ("_pretrained" if self.start == "best" else "") + ("_16" if self.batch == 16 else "")


READINGS = {
    "frozen": _Reading(free=False),
    "frozen_16": _Reading(free=False, batch=16),
    "frozen_sigmoid": _Reading(free=False, sigmoid=True),
    "free": _Reading(),
    "alone": _Reading(fused=False),
    "free_sigmoid": _Reading(sigmoid=True),
    "zero": _Reading(begin="zero", steps=2200),
    "warmup": _Reading(warmup=500, steps=2200),
    "slow": _Reading(slow=0.1, steps=2200),
    "hold": _Reading(hold=500, steps=2200),
    "free_pretrained": _Reading("best"),
    "alone_pretrained": _Reading("best", fused=False),
    "free_16": _Reading(batch=16),
    "alone_16": _Reading(batch=16, fused=False),
}


class _Filmed:
    """Instants of a split on a device: normalised pictures, targets, and the `Pencil` of each pair that is wanted.

    images: (4 N, 3, 256, 256), target (4 N, J, h, w), weight (4 N, J): view v of instant n is 4 n + v.  source and
    reference: (P,) those numbers of each pair.
    """

    def __init__(self, split: str, scenes: Sequence[int], pairs: Sequence[tuple[int, int]], device: str):
        data = Benchmark(split).prepare(only=scenes)
        loaded = list(loader(MultiView(torch.utils.data.Subset(data, scenes)), 0, batch_size=8))
        put = lambda key: torch.cat([part[key].flatten(0, 1).to(device) for part in loaded])
        self.target, self.weight = put("target"), put("weight")
        pictures = [normalise(part["image"].to(device)) for part in loaded]
        self.images = torch.cat(pictures).contiguous(memory_format=torch.channels_last)
        instants = 4 * torch.arange(len(scenes), device=device)[:, None]
        s, r = torch.tensor(list(pairs), device=device).T
        self.source, self.reference = (instants + s).flatten(), (instants + r).flatten()
        F = torch.cat([part["F"] for part in loaded]).to(device)[:, s, r].flatten(0, 1)
        self.shape = tuple(self.target.shape[-2:])
        made = [Pencil.from_fundamental(part, self.shape, 1.0) for part in F.split(500)]
        self.order, self.lo, self.hi = (torch.cat([getattr(p, k).int() for p in made]) for k in ("order", "lo", "hi"))
        self.wraps = torch.cat([torch.zeros_like(p.lo, dtype=bool) if p.wraps is None else p.wraps for p in made])
        self.valid = torch.cat([torch.ones_like(p.order, dtype=bool) if p.valid is None else p.valid for p in made])

    def every(self, step: int) -> _Filmed:
        """Of every so many-th instant."""
        few, instants = copy.copy(self), len(self.images) // 4
        for key in ("images", "target", "weight", "order", "lo", "hi", "wraps", "valid"):
            setattr(few, key, getattr(self, key).unflatten(0, (instants, -1))[::step].flatten(0, 1))
        few.images = few.images.contiguous(memory_format=torch.channels_last)
        few.source, few.reference = self.source[: len(few.order)], self.reference[: len(few.order)]
        return few

    def pencil(self, pairs: Tensor) -> Pencil:
        """The set-up of some pairs, by their numbers (B,)."""
        order, lo, hi, wraps, valid = (
            getattr(self, key).index_select(0, pairs) for key in ("order", "lo", "hi", "wraps", "valid")
        )
        return Pencil(self.shape, self.shape, True, order.long(), lo.long(), hi.long(), wraps, valid)


@dataclass(eq=False)
class _Run:
    """One reading with one seed on its way: the backbone, the nine weights, and what was measured.

    The seed draws the nine weights and orders the pairs.  Everything of a step is on the device, the number of the step
    too, so that it can be recorded once and played again.
    """

    name: str
    seed: int
    lesson: _Filmed
    maps: Tensor | None = None  # of the frozen backbone, of all pictures of the lesson
    measured: dict[str, list] = field(default_factory=lambda: {key: [] for key in ("iterations", *_ON_THE_WAY)})

    def __post_init__(self):
        torch.manual_seed(self.seed)
        device, reading = self.lesson.images.device, READINGS[self.name]
        self.reading, self.on_gpu = reading, device.type == "cuda"
        begin = torch.zeros(3, 3) if reading.begin == "zero" else None
        self.fusion = OriginalFusion(sigmoid=reading.sigmoid, initial=begin).to(device)
        self.network = load_checkpoint(CHECKPOINTS[reading.start]).to(device, memory_format=torch.channels_last)
        self.network.train(reading.free).requires_grad_(reading.free)
        drawn = itertools.islice(batches(len(self.lesson.source), reading.batch, self.seed), reading.steps)
        self.order = torch.tensor([[index for _, index in batch] for batch in drawn], device=device)
        self.k = torch.zeros(1, dtype=torch.long, device=device)
        self.losses = torch.zeros(reading.steps, device=device)
        trained = [self.fusion] * reading.fused + [self.network] * reading.free
        self.rates = [torch.tensor(1e-3, device=device) for _ in trained]
        groups = [{"params": list(m.parameters()), "lr": r} for m, r in zip(trained, self.rates, strict=True)]
        fast = {"fused": True, "capturable": True} if self.on_gpu else {"foreach": False}
        self.optimizer = torch.optim.Adam(groups, **fast)
        self.parameters = [p for group in groups for p in group["params"]]
        self.play = self.step

    def step(self) -> None:
        """One iteration of Adam on one batch of pairs."""
        film, reading = self.lesson, self.reading
        pairs = self.order.index_select(0, self.k)[0]
        source, reference = film.source.index_select(0, pairs), film.reference.index_select(0, pairs)
        both = torch.cat([source, reference])
        maps = self.network(film.images.index_select(0, both)) if reading.free else self.maps.index_select(0, both)
        fused = maps[reading.batch :]
        if reading.fused:
            fused = self.fusion(maps[: reading.batch], fused, film.pencil(pairs))
        loss = joints_mse(fused, film.target.index_select(0, reference), film.weight.index_select(0, reference))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._set_rates()
        self.optimizer.step()
        self.losses.index_copy_(0, self.k, loss.detach()[None])
        self.k += 1

    def _set_rates(self) -> None:
        """1e-3, but for what is to heal: a slow rise, a slower backbone, one that waits."""
        reading, done = self.reading, self.k[0].float()
        if reading.warmup:
            for rate in self.rates:
                rate.copy_(1e-3 * ((done + 1) / reading.warmup).clamp_max(1.0))
        if reading.hold:
            self.rates[-1].copy_(1e-3 * (done >= reading.hold).float())
        if reading.slow != 1:
            self.rates[-1].fill_(1e-3 * reading.slow)

    def record(self) -> None:
        """Record the step as a CUDA graph on a stream of its own, after a few steps that are undone."""
        before, stream, graph = copy.deepcopy(self.state()), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        torch.cuda.synchronize()
        self.restore(before)

        def play() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        self.play = play

    def state(self) -> dict:
        """All that a step changes."""
        moments = [dict(self.optimizer.state.get(p, {})) for p in self.parameters]
        modules = {"network": self.network.state_dict(), "fusion": self.fusion.state_dict()}
        return modules | {"moments": moments, "k": self.k, "losses": self.losses, "measured": self.measured}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """The state as it was, written to where a recorded step reads it."""
        self.network.load_state_dict(state["network"])
        self.fusion.load_state_dict(state["fusion"])
        for p, moments in zip(self.parameters, state["moments"], strict=True):
            if moments and p not in self.optimizer.state:
                self.optimizer.state[p] = {key: value.clone() for key, value in moments.items()}
            for key, value in self.optimizer.state.get(p, {}).items():
                value.copy_(moments[key]) if moments else value.zero_()
        self.k.copy_(state["k"])
        self.losses.copy_(state["losses"])
        self.measured = copy.deepcopy(state["measured"])

    @torch.no_grad()
    def found(self, test: _Filmed, unfused: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Which joints are found in the test's references, (P, J), fused with the next camera's map and alone."""
        unfused = _seen(self.network, test.images) if unfused is None else unfused
        alone, fused = [], []
        for pairs in torch.arange(len(test.source), device=unfused.device).split(210):
            reference, truth = unfused[test.reference[pairs]], test.target[test.reference[pairs]]
            alone.append(_found(reference, truth))
            if self.reading.fused:
                fused.append(_found(self.fusion(unfused[test.source[pairs]], reference, test.pencil(pairs)), truth))
        alone = np.concatenate(alone)
        return np.concatenate(fused) if fused else alone, alone

    def measure(self, test: _Filmed, unfused: Tensor | None = None) -> None:
        """Add a row of what is measured on the way."""
        fused, alone = self.found(test, unfused)
        row = (int(self.k), joint_mean(fused), joint_mean(alone), self.fusion.weight.detach().flatten().tolist())
        for values, value in zip(self.measured.values(), row, strict=True):
            values.append(value)


@torch.no_grad()
def _seen(network: nn.Module, images: Tensor) -> Tensor:
    """The maps of all pictures by a network in evaluation mode."""
    training = network.training
    network.eval()
    maps = torch.cat([network(part) for part in images.split(240)])
    network.train(training)
    return maps


def _found(output: Tensor, target: Tensor) -> np.ndarray:
    """`heatmaps.found` of maps on a device, of which only the peaks leave it."""
    peaks = []
    for maps in (output, target):
        height, place = maps.flatten(-2).max(-1, keepdim=True)
        peak = torch.zeros_like(maps, dtype=torch.uint8).flatten(-2).scatter_(-1, place, (height > 0).byte())
        peaks.append(peak.view(maps.shape))
    return found(*peaks)


def _train(
    wanted: Sequence[tuple[str, int]], out: Path, until: int = 8800, side_by_side: int = 12, seconds: float = 1e9
) -> None:
    """Run what is missing of these readings and seeds, in order, and keep each run in the folder `out`.

    until: iterations at most.  side_by_side: runs at once on a GPU.  seconds: after these, what was measured counts as
    done.
    """
    began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = device == "cuda"
    for name in dict.fromkeys(name for name, _ in wanted if READINGS[name].parabola):
        if not (out / f"{name}-{FROZEN_SEEDS - 1}.npz").exists():
            _on_parabola(name, out, until)
    wanted = [(name, seed) for name, seed in wanted if not READINGS[name].parabola]
    missing = [(name, seed) for name, seed in wanted if not (out / f"{name}-{seed}.npz").exists()]
    if not missing:
        return
    lesson = _Filmed("train", range(840), PAIRS, device)
    following = [((v + 1) % 4, v) for v in range(4)]
    test = _Filmed("test", range(420), following, device)
    few = test.every(4)
    print(f"{device_name()}: pictures after {time.perf_counter() - began:.0f} s", flush=True)
    frozen = {}
    for start in {READINGS[name].start for name, _ in missing if not READINGS[name].free}:
        network = load_checkpoint(CHECKPOINTS[start]).to(device, memory_format=torch.channels_last)
        frozen[start] = [_seen(network, film.images) for film in (lesson, few, test)]
    group, steps = (side_by_side if device == "cuda" else 1), lambda name: min(until, READINGS[name].steps)
    with tqdm(total=sum(steps(name) for name, _ in missing), unit="iteration", unit_scale=True, miniters=1) as bar:
        while missing and time.perf_counter() < began + seconds:
            runs = []
            for name, seed in missing[:group]:
                maps = [None] * 3 if READINGS[name].free else frozen[READINGS[name].start]
                runs.append((_Run(name, seed, lesson, maps[0]), maps, out / f"{name}-{seed}"))
            missing = missing[group:]
            _side_by_side(runs, few, test, until, began + seconds, bar)


def _side_by_side(runs: list, few: _Filmed, test: _Filmed, until: int, ends: float, bar: tqdm) -> None:
    """Train runs to their ends, measured and saved on the way."""
    for run, _, path in runs:
        if path.with_suffix(".pt").exists():
            run.restore(torch.load(path.with_suffix(".pt"), map_location=run.k.device, weights_only=True))
            bar.update(int(run.k))
        if run.on_gpu:
            run.record()
    saved = time.perf_counter()
    for mark in [m for m in MEASURED if m < until] + [until]:
        left = [max(0, min(mark, run.reading.steps) - int(run.k)) for run, _, _ in runs]
        before = [int(run.k) for run, _, _ in runs]
        for k in range(max(left)):
            for (run, _, _), steps in zip(runs, left, strict=True):
                if k < steps:
                    run.play()
            if runs[0][0].on_gpu and k % 20 == 19:
                torch.cuda.synchronize()
            if time.perf_counter() > ends:
                break
        if runs[0][0].on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        late, due = now > ends, now > saved + 60
        for (run, maps, path), old in zip(runs, before, strict=True):
            done = int(run.k)
            bar.update(done - old)
            if run.measured["iterations"][-1:] != [done]:
                run.measure(few, maps[1])
            if late or done >= min(until, run.reading.steps):
                if not path.with_suffix(".npz").exists():
                    _keep(path, run, test, maps[2])
            elif done and due:
                with replacing(path.with_suffix(".pt")) as part:
                    torch.save(run.state(), part)
        saved = now if due else saved
        if late:
            return


def _on_parabola(name: str, out: Path, until: int) -> None:
    """`FROZEN_SEEDS` runs of a reading whose loss is a parabola: Adam on the normal equations of each batch."""
    reading, seeds = READINGS[name], range(FROZEN_SEEDS)
    lesson = heatmaps_once(reading.start, "train", progress=False)
    equations = NormalEquations.of(Pairs.all_of(lesson), 1.0)
    steps = min(until, reading.steps)
    path = equations.train(initial_weights(seeds), seeds, steps, reading.batch)
    seen = heatmaps_once(reading.start, "test", progress=False)
    few, test = (Pairs.with_next(seen, range(0, len(seen), every)) for every in (4, 1))
    marks = [mark for mark in MEASURED if mark < steps] + [steps]
    fused = np.stack([[joint_mean(f) for f in few.score(path[:, mark], 1.0)] for mark in marks], 1)
    for seed, found_fused in zip(seeds, test.score(path[:, -1], 1.0), strict=True):
        measured = {"iterations": marks, "fused": fused[seed], "unfused": [joint_mean(few.alone())] * len(marks)}
        _store(out / f"{name}-{seed}", measured | {"weights": path[seed, marks].numpy()}, found_fused, test.alone())


def _keep(path: Path, run: _Run, test: _Filmed, unfused: Tensor | None) -> None:
    """A run that is done."""
    _store(path, run.measured | {"losses": run.losses[: int(run.k)].half().cpu().numpy()}, *run.found(test, unfused))
    path.with_suffix(".pt").unlink(missing_ok=True)


def _store(path: Path, measured: dict, fused: np.ndarray, unfused: np.ndarray) -> None:
    """What was measured on the way, and which joints were found in the end in all test instants, (N, 4, J)."""
    right = {"found": fused, "found_unfused": unfused}
    right = {key: found.reshape(-1, 4, found.shape[-1]) for key, found in right.items()}
    meta = {"device": device_name(), "torch": torch.__version__}
    save_arrays(path.with_suffix(".npz"), measured | right | {"meta": meta})
    last, both = measured["iterations"][-1], (100 * measured[key][-1] for key in ("fused", "unfused"))
    print("{}: {:.1f} % fused, {:.1f} unfused after {}".format(path.name, *both, last), flush=True)


def _pack(folder: Path, stored: Path = STORED) -> None:
    """Put all runs of a folder into one file, beside what it has of others."""
    arrays = load_arrays(stored) if stored.exists() else {}
    for path in sorted(folder.glob("*.npz")):
        name, seed = path.stem.rsplit("-", 1)
        arrays |= {f"{name}/{seed}/{key}": values for key, values in load_arrays(path).items()}
    save_arrays(stored, arrays)


def load() -> dict[str, dict[str, np.ndarray]]:
    """The stored runs of each reading: iterations (M,), fused and unfused (S, M) accuracies, weights (S, M, 9) …

    … and of each seed's last iteration found and found_unfused (S, N, V, J), nan where HRNet leaves a joint out.  The
    iterations are all at which a seed was measured; a seed is nan where it was not.
    """
    runs: dict[str, dict[str, list]] = {}
    for full, values in sorted(load_arrays(STORED).items()):
        name, _, key = full.split("/")
        runs.setdefault(name, {}).setdefault(key, []).append(values)
    shown = {}
    for name, values in runs.items():
        marks = sorted(set().union(*values["iterations"]))
        rows = {key: np.full((len(values[key]), len(marks), *values[key][0].shape[1:]), np.nan) for key in _ON_THE_WAY}
        for key, of_seeds in rows.items():
            for row, iterations, measured in zip(of_seeds, values["iterations"], values[key], strict=True):
                row[np.searchsorted(marks, iterations)] = measured
        right = {key: np.stack(values[key]) for key in ("found", "found_unfused")}
        shown[name] = {"iterations": np.array(marks), "meta": values["meta"][0]} | rows | right
    return {name: shown[name] for name in READINGS if name in shown}


def at(runs: dict[str, dict[str, np.ndarray]], name: str, iterations: int) -> dict:
    """What stands after so many iterations of a reading, as accuracies from 0 to 1.

    fused, unfused, the mean over seeds of the fused and of the backbone's own maps; control, HRNet alone trained alike;
    and iterations, batch, seeds, fused_by_seed: of the seeds that were measured then.  runs: of `load`.  Raises
    ValueError where nothing was.
    """
    reading, run = READINGS[name], runs[name]
    control, untrained = runs.get(reading.control), runs["frozen"]["unfused"][:, :1]

    def moment(of: dict[str, np.ndarray], key: str) -> np.ndarray:
        values = of[key][:, list(of["iterations"]).index(iterations)]
        return values[np.isfinite(values)]

    return {
        "fused": float(moment(run, "fused").mean()),
        "unfused": float(moment(run, "unfused").mean()),
        "control": float((moment(control, "fused") if control else untrained).mean()),
        "iterations": int(iterations),
        "batch": reading.batch,
        "seeds": len(moment(run, "fused")),
        "fused_by_seed": moment(run, "fused").tolist(),
    }


def _main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and pack what there is."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.studies.readings", description=_main.__doc__)
    parser.add_argument("--only", nargs="+", choices=READINGS, default=list(READINGS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--until", type=int, default=8800, help="iterations at most")
    parser.add_argument("--side-by-side", type=int, default=12, help="runs at once on a GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="end with what is measured after these")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "readings", help="where single runs are kept")
    chosen = parser.parse_args(arguments)
    try:
        wanted = itertools.product(chosen.only, range(chosen.seeds))
        _train(list(wanted), chosen.out, chosen.until, chosen.side_by_side, chosen.seconds)
    finally:
        _pack(chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
