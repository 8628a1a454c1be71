"""The training loop: seeded batches, AdamW, a schedule, clipping, and files from which it goes on.

Everything that is random in step k follows from (seed, k): a run that was killed and taken up again ends with the
weights of an unbroken one, and several processes (`accelerate launch`) do what one does with the same batch.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from epiutils.data.files import replacing
from epiutils.networks.batchnorm import synchronised

Loss = Callable[[nn.Module, dict[str, Tensor], float], Tensor]


def train(
    model: nn.Module,
    loss: Loss,
    data: torch.utils.data.Dataset,
    out: str | os.PathLike | None = None,
    *,
    steps: int,
    batch: int = 4,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    warmup: int = 0,
    schedule: str = "cosine",
    clip: float = 0.0,
    every: int = 0,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    log: Callable[[nn.Module], dict[str, float]] | None = None,
    stop: int | None = None,
    seed: int = 0,
    workers: int = 0,
    precision: str = "no",
    progress: bool = True,
) -> tuple[list[dict], list[dict]]:
    """Train the parameters of `model` that require a gradient, in place, and return what was measured.

    loss(model, batch, done): a scalar, the mean over the batch; done is the share of the steps behind, 0 to 1.
    data: a Dataset of dicts of tensors; one with `sample(index, epoch)` is asked for that.  batch: samples a step,
    over all processes together.  schedule: "cosine" to 0, or "constant", after `warmup` steps from 0.  clip: the
    largest gradient norm, 0 for any.  every: steps between two rows of measurements and two checkpoints, by
    default one pass over the data.  validate(model) and log(model), after each backward pass, add columns.
    stop: end before that step, with the schedule of all `steps`.  workers: processes that load.
    precision: "no", "bf16" or "fp16".

    out: a folder for `checkpoint.pt`, `epochs.csv` and `steps.csv`; where it holds a checkpoint of the same
    settings, training goes on from it.  Ctrl-C and SIGTERM finish the step, save, and raise KeyboardInterrupt.
    Returns the rows of `epochs.csv` and of `steps.csv`: dicts with "step", "loss", "lr", "gradient_norm", …
    Raises ValueError where settings are wrong or differ from the checkpoint's, FloatingPointError at a loss that
    is not finite.
    """
    accelerator = _accelerator(precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    every = every or math.ceil(len(data) / max(1, batch))
    if schedule not in ("cosine", "constant") or batch % world or min(steps, batch, every, len(data)) < 1:
        raise ValueError(
            f'schedule must be "cosine" or "constant", got {schedule!r}; batch a multiple of the {world} processes, '
            f"got {batch}; steps, every and the {len(data)} samples at least 1, got {steps} and {every}"
        )
    if world > 1:
        model = synchronised(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    warm = lambda step: min(1.0, (step + 1) / max(1, warmup))
    fall = lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if schedule == "cosine" else 1.0
    settings = {"samples": len(data), "steps": steps, "batch": batch, "lr": lr, "weight_decay": weight_decay,
                "warmup": warmup, "schedule": schedule, "clip": clip, "every": every, "seed": seed}  # fmt: skip
    out = None if out is None else Path(out)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    done, epochs, rows = _take_up(out, settings, model, optimizer)
    last = min(steps, stop or steps)
    loader = torch.utils.data.DataLoader(
        _Asked(data),
        batch_sampler=[b[rank::world] for b in itertools.islice(batches(len(data), batch, seed), done, last)],
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=accelerator.device.type == "cuda",
    )

    def save() -> None:
        if out is not None and accelerator.is_main_process:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(out, state | {"settings": settings, "step": done, "epochs": epochs, "rows": rows})

    bar = tqdm(initial=done * batch, total=last * batch, desc="training", unit="sample", unit_scale=True,
               disable=not (progress and accelerator.is_main_process))  # fmt: skip
    started, here, pending = time.perf_counter(), 0, []
    with _interruptible() as interrupted, bar:
        for samples in loader:
            samples = {key: value.to(accelerator.device, non_blocking=True) for key, value in samples.items()}
            for group in optimizer.param_groups:
                group["lr"] = lr * warm(done) * fall(done)
            with accelerator.autocast():
                value = loss(wrapped, samples, done / steps)
            accelerator.backward(value)
            norm = accelerator.clip_grad_norm_(parameters, clip or math.inf)
            extra = log(model) if log else {}
            optimizer.step()
            optimizer.zero_grad()
            done, here = done + 1, here + 1
            pending.append((done, value.detach(), group["lr"], norm, extra))
            bar.update(batch)
            ends = done % every == 0 or done == last
            stopping = _anywhere(interrupted, accelerator)
            if ends or stopping:
                rows += _measured(pending, accelerator)
                pending.clear()
            if ends:
                seconds = time.perf_counter() - started
                since = epochs[-1]["step"] if epochs else 0
                recent = [row["loss"] for row in rows[since:]]
                row = {"step": done, "epoch": done * batch / len(data), "loss": sum(recent) / len(recent)}
                row |= {"lr": group["lr"], "seconds": seconds, "samples_per_second": here * batch / seconds}
                row |= validate(model) if validate and accelerator.is_main_process else {}
                epochs.append(row)
                bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", "accuracy") if k in row})
                started, here = time.perf_counter(), 0
            if ends or stopping:
                save()
                accelerator.wait_for_everyone()
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {done} of {steps}" + (f"; {out} goes on" if out else ""))
    return epochs, rows


def _accelerator(precision: str = "no") -> Accelerator:
    """accelerate's, of all processes that were launched: without a GPU they would each train alone unless it is told."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    return Accelerator(mixed_precision=precision, cpu=launched > 1 and not torch.accelerator.is_available())


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


def _measured(pending: list[tuple], accelerator: Accelerator) -> list[dict]:
    """Rows of `steps.csv`; the losses of all processes averaged.  The device is waited for here only."""
    if not pending:
        return []
    steps, losses, lrs, norms, extras = zip(*pending, strict=True)
    losses = accelerator.reduce(torch.stack(losses).float(), "mean").tolist()
    norms = torch.stack([torch.as_tensor(n) for n in norms]).float().tolist()
    rows = [
        {"step": step, "loss": value, "lr": lr, "gradient_norm": norm, **{k: float(v) for k, v in extra.items()}}
        for step, value, lr, norm, extra in zip(steps, losses, lrs, norms, extras, strict=True)
    ]
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} at step {row['step']}: a lower lr, or clip, may help")
    return rows


def _take_up(out: Path | None, settings: dict, model: nn.Module, optimizer) -> tuple[int, list, list]:
    """Load the checkpoint of `out` where there is one; steps done and the rows measured."""
    path = out and out / "checkpoint.pt"
    if path is None or not path.exists():
        return 0, [], []
    state = torch.load(path, map_location="cpu", weights_only=True)
    differs = [
        f"{k} was {state['settings'].get(k)}, is {v}" for k, v in settings.items() if state["settings"].get(k) != v
    ]
    if differs:
        raise ValueError(f"{path} is of another run ({'; '.join(differs)}): give another folder, or remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["epochs"], state["rows"]


def _save(out: Path, state: dict) -> None:
    with replacing(out / "checkpoint.pt") as part:
        torch.save(state, part)
    for name, rows in (("epochs", state["epochs"]), ("steps", state["rows"])):
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with replacing(out / f"{name}.csv") as part:
            part.write_text(text.getvalue(), "utf-8")


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
