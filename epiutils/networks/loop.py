"""The training loop: seeded batches, AdamW, a schedule, clipping, and files from which it goes on.

Everything that is random in step k follows from (seed, k): a run that was killed and taken up again ends with the
weights of an unbroken one, and several processes (`accelerate launch`) do what one does with the same batch.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from epiutils.data.files import reading, replacing


@dataclass(frozen=True)
class Settings:
    """What decides the steps of a training, beside its model, its loss and its data.

    steps: of the whole training.  batch: samples a step, over all processes together.  lr: AdamW's highest, reached
    after `warmup` steps, from where it falls to 0 by half a cosine, or stays (schedule "constant").  clip: the largest
    norm of the gradient, 0 for any.  every: steps between two rows of measurements and two checkpoints, 0 for one pass
    over the data.  precision: "no", "bf16" or, on a GPU, "fp16".  Raises ValueError.
    """

    steps: int
    batch: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 0
    schedule: str = "cosine"
    clip: float = 0.0
    every: int = 0
    seed: int = 0
    precision: str = "no"

    def __post_init__(self):
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f'schedule must be "cosine" or "constant", got {self.schedule!r}')
        for name, value in asdict(self).items():
            least = 1 if name in ("steps", "batch") else 0
            if name not in ("schedule", "precision") and not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least}, and finite, got {value}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))) if self.schedule == "cosine" else 1.0
        return self.lr * warm * fall

    def accelerator(self) -> Accelerator:
        """Accelerate's handle of all processes that were launched, and of their devices.

        Raises ValueError where the device cannot compute in that precision.
        """
        if AcceleratorState._shared_state.get("_mixed_precision", self.precision) != self.precision:
            AcceleratorState._shared_state = {}  # one for each precision: Accelerate has one a process, and refuses
        launched = int(os.environ.get("WORLD_SIZE", "1"))  # without a GPU they would each train alone unless it is told
        cpu = launched > 1 and not torch.accelerator.is_available()
        accelerator = Accelerator(mixed_precision=self.precision, cpu=cpu)
        if self.precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would leave it at float32
            raise ValueError("precision fp16 needs a GPU: choose bf16 or no")
        return accelerator

    def check(self, model: nn.Module, out: Path | None, processes: int = 1, stop: int | None = None) -> None:
        """Raise ValueError or OSError unless a training can begin, and save what it learns to the folder `out`."""
        if self.batch % processes:
            raise ValueError(f"batch must be a multiple of the {processes} processes, got {self.batch}")
        if stop is not None and not 1 <= stop <= self.steps:
            raise ValueError(f"stop must be 1 to steps, {self.steps}, got {stop}")
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        copies = 1 if (out / "checkpoint.pt").exists() else 2  # the old one stays until the new one is whole
        needed, free = weights + copies * (weights + moments) + 2**20, shutil.disk_usage(out).free
        if free < needed:
            what = f"{free / 1e6:.0f} MB are free, checkpoints and weights need {needed / 1e6:.0f}"
            raise OSError(errno.ENOSPC, what, str(out))


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, dict[str, Tensor], float], Tensor],
    data: torch.utils.data.Dataset,
    out: str | os.PathLike | None = None,
    *,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    log: Callable[[nn.Module], dict[str, float]] | None = None,
    stop: int | None = None,
    workers: int = 0,
    facts: dict | None = None,
    progress: bool = True,
    **settings,
) -> tuple[list[dict], list[dict]]:
    """Train the parameters of `model` that require a gradient, in place, and return what was measured.

    loss(model, batch, done): a scalar, the mean over the batch; done is the share of the steps behind, 0 to 1.
    data: a Dataset of dicts of tensors; one with `sample(index, epoch)` is asked for that.  validate(model), at each
    row of measurements, and log(model), after each backward pass, add columns.  stop: end after so many steps, with
    the schedule of all.  workers: processes that load.  settings: those of `Settings`.

    out: a folder for `checkpoint.pt`, `epochs.csv` and `steps.csv`; where it holds a checkpoint of the same settings
    and facts, training goes on from it.  facts: what else decides the result, such as the data's name; numbers, texts,
    lists and dicts.  Ctrl-C and SIGTERM finish the step, save, and raise KeyboardInterrupt.
    Returns the rows of `epochs.csv` and of `steps.csv`: dicts with "step", "loss", "lr", "gradient_norm", …
    Raises, before the first step, TypeError or ValueError where settings are wrong or differ from the checkpoint's and
    OSError where the folder cannot be written to; later OSError where a checkpoint cannot be written, the one before
    it is kept, and FloatingPointError at a loss that is not finite.
    """
    settings, samples = Settings(**settings), len(data)
    if not samples:
        raise ValueError("there are no samples to train on")
    settings = replace(settings, every=settings.every or math.ceil(samples / settings.batch))
    accelerator = settings.accelerator()
    world, rank = accelerator.num_processes, accelerator.process_index
    out = None if out is None else Path(out)
    settings.check(model, out if accelerator.is_main_process else None, world, stop)
    last = stop or settings.steps
    facts = {**asdict(settings), "samples": samples, **(facts or {})}
    run = _Run(model, settings, accelerator, out, facts)
    order = itertools.islice(batches(samples, settings.batch, settings.seed), run.done, last)
    load = loader(_Asked(data), workers, batch_sampler=[batch[rank::world] for batch in order],
                  pin_memory=accelerator.device.type == "cuda")  # fmt: skip
    bar = tqdm(initial=run.done * settings.batch, total=last * settings.batch, desc="training", unit="sample",
               unit_scale=True, disable=not (progress and accelerator.is_main_process))  # fmt: skip
    try:
        with _interruptible() as interrupted, bar:
            for batch in load:
                run.step(loss, batch, log)
                bar.update(settings.batch)
                stopping = _anywhere(interrupted, accelerator)
                if run.done % settings.every == 0 or run.done == last:
                    row = run.close(validate)
                    bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "accuracy") if k in row})
                    run.save()
                elif stopping:
                    run.save()
                if stopping:
                    goes_on = f"; {out} goes on" if out else ""
                    raise KeyboardInterrupt(f"stopped after step {run.done} of {settings.steps}{goes_on}")
    finally:
        accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False)  # it has its own forward again
    return run.epochs, run.rows


class _Run:
    """A training on its way: the model, its optimizer, the steps done and what was measured in them."""

    def __init__(self, model: nn.Module, settings: Settings, accelerator: Accelerator, out: Path | None, facts: dict):
        self.model = _synchronised(model) if accelerator.num_processes > 1 else model
        self.settings, self.accelerator, self.out = settings, accelerator, out
        self.facts = json.loads(json.dumps(facts))  # as a checkpoint gives them back
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.done, self.epochs, self.rows = 0, [], []
        self.pending = []  # of steps since the last measurement: their losses may still be on their way
        if out is not None and (out / "checkpoint.pt").exists():
            self._take_up(out / "checkpoint.pt")
        self.started, self.before = time.perf_counter(), self.done

    def _take_up(self, path: Path) -> None:
        state = _read(path)
        old = state["settings"]
        told = [(k, old.get(k, "not told"), self.facts.get(k, "not told")) for k in old | self.facts]
        differs = [f"{k} was {was}, is {now}" for k, was, now in told if was != now]
        if differs:
            raise ValueError(f"{path} is of another run ({'; '.join(differs)}): give another folder, or remove it")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is of another network: give another folder, or remove it ({error})") from error
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.done, self.epochs, self.rows = state["step"], state["epochs"], state["rows"]
        if self.accelerator.is_main_process:
            _write_tables(path.parent, self.epochs, self.rows)  # they may be older

    def step(self, loss: Callable, batch: dict[str, Tensor], log: Callable | None) -> None:
        """One step of AdamW."""
        batch = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        lr = self.settings.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.accelerator.autocast():
            value = loss(self.wrapped, batch, self.done / self.settings.steps)
        self.accelerator.backward(value)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        extra = log(self.model) if log else {}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.pending.append((self.done, value.detach(), lr, norm, extra))

    def _measure(self) -> None:
        """Rows of `steps.csv`; the losses of all processes averaged.  The device is waited for here only."""
        if not self.pending:
            return
        steps, losses, lrs, norms, extras = zip(*self.pending, strict=True)
        losses = self.accelerator.reduce(torch.stack(losses).float(), "mean").tolist()
        norms = torch.stack([torch.as_tensor(n) for n in norms]).float().tolist()
        for step, value, lr, norm, extra in zip(steps, losses, lrs, norms, extras, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}: a lower lr, or clip, may help")
            row = {"step": step, "loss": value, "lr": lr, "gradient_norm": norm}
            self.rows.append(row | {k: float(v) for k, v in extra.items()})
        self.pending.clear()

    def close(self, validate: Callable | None) -> dict:
        """A row of `epochs.csv`, of the steps since the last one."""
        self._measure()
        seconds, batch = time.perf_counter() - self.started, self.settings.batch
        recent = [row["loss"] for row in self.rows[self.epochs[-1]["step"] if self.epochs else 0 :]]
        row = {"step": self.done, "epoch": self.done * batch / self.facts["samples"]}
        row |= {"loss": sum(recent) / len(recent), "lr": self.rows[-1]["lr"], "seconds": seconds}
        row |= {"samples_per_second": (self.done - self.before) * batch / seconds}
        if validate and self.accelerator.is_main_process:
            row |= {k: float(v) for k, v in validate(self.model).items()}
        self.epochs.append(row)
        self.started, self.before = time.perf_counter(), self.done
        return row

    def save(self) -> None:
        """The checkpoint and the tables; other processes wait."""
        self._measure()
        if self.out is not None and self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler and scaler.state_dict(),
                "settings": self.facts,
                "step": self.done,
                "epochs": self.epochs,
                "rows": self.rows,
            }
            try:
                _write(self.out, state)
            except OSError as error:
                kept = f"step {self.done} could not be saved, checkpoint.pt is the last one written whole"
                raise OSError(error.errno, f"{error.strerror}: {kept}", str(self.out)) from error
        self.accelerator.wait_for_everyone()


def loader(data: torch.utils.data.Dataset, workers: int, **options) -> torch.utils.data.DataLoader:
    """PyTorch's DataLoader with so many processes that load, which are spawned: no thread or lock is inherited.

    They begin by running the calling script up to `if __name__ == "__main__":`.  A script without that line would
    begin anew in each: it gets none, and a warning.
    """
    main = sys.modules["__main__"]
    script = None if getattr(main, "__spec__", None) else getattr(main, "__file__", None)  # no module, no notebook
    if workers and script and "__main__" not in Path(script).read_text("utf-8", "replace"):
        reason = f'{script} has no `if __name__ == "__main__":`, which processes that load need'
        warnings.warn(f"loading in one process: {reason}", stacklevel=3)
        workers = 0
    options |= {"multiprocessing_context": "spawn", "worker_init_fn": _begin_worker} if workers else {}
    return torch.utils.data.DataLoader(data, num_workers=workers, generator=torch.Generator(), **options)


class _Asked(torch.utils.data.Dataset):
    """A dataset that is asked for (epoch, index)."""

    def __init__(self, data: torch.utils.data.Dataset):
        self.data = data

    def __getitem__(self, at: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = at
        return self.data.sample(index, epoch) if hasattr(self.data, "sample") else self.data[index]


def _begin_worker(_: int) -> None:
    """Ctrl-C is for the process that trains; and one thread each, as there are several."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


def batches(samples: int, batch: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, index) for ever: one permutation of all samples after the other, cut into pieces."""
    order = (
        (epoch, int(index))
        for epoch in itertools.count()
        for index in np.random.default_rng((seed, epoch)).permutation(samples)
    )
    while True:
        yield list(itertools.islice(order, batch))


def _read(path: Path) -> dict:
    """A checkpoint, its checksums compared."""
    with reading(path, "a whole checkpoint (remove it, and the training begins anew)"):
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)


def _write(out: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)  # not to the file: PyTorch's writer hides why a disk refuses
    with replacing(out / "checkpoint.pt") as part:
        part.write_bytes(buffer.getbuffer())
    _write_tables(out, state["epochs"], state["rows"])


def _write_tables(out: Path, epochs: list[dict], steps: list[dict]) -> None:
    for name, rows in (("epochs", epochs), ("steps", steps)):
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with replacing(out / f"{name}.csv") as part:
            part.write_text(text.getvalue(), "utf-8")


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor; so is its gradient (the losses add up too)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the batch of all processes, on any device.

    `torch.nn.SyncBatchNorm` does the same on GPUs only.  Variance as E[(x − E x)²] in two sums, for accuracy.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() / x.shape[1] * torch.distributed.get_world_size()
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / n  # (C,)
        centred = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def _synchronised(model: nn.Module) -> nn.Module:
    """The model with each BatchNorm2d, in place, given the statistics of all processes: the same parameters and keys."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _GlobalBatchNorm2d
    return model


@contextmanager
def _interruptible() -> Iterator[list]:
    """A list that is no longer empty once Ctrl-C or SIGTERM came; a second one acts at once."""
    seen = []

    def handle(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = [(s, signal.signal(s, handle)) for s in (signal.SIGINT, signal.SIGTERM)]
    except ValueError:  # only the main thread may
        before = []
    try:
        yield seen
    finally:
        for s, handler in before:
            signal.signal(s, handler)


def _anywhere(interrupted: list, accelerator: Accelerator) -> bool:
    """Whether any of the processes is to stop: all must after the same step."""
    if accelerator.num_processes == 1:
        return bool(interrupted)
    flag = torch.tensor(float(bool(interrupted)), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)
