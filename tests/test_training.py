"""Training: against a plain loop, stopped, killed and taken up again, shared by two processes; and its command."""

import csv
import math
import os
import re
import resource
import signal
import subprocess
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from tiny_training import TINY, command, scenes
from torch import nn

from epiutils.data.dataset import MultiView
from epiutils.networks import loop, training
from epiutils.networks.hrnet import PoseHRNet, load_checkpoint, provenance
from epiutils.networks.loop import Settings, batches, loader, train
from epiutils.networks.predict import device_name, predict

SCRIPT = Path(tiny_training.__file__)


class Points(torch.utils.data.Dataset):
    """y = A x + noise."""

    def __init__(self, n: int = 23, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 3, generator=generator)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(n, 1, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


POINTS = Points()


def squares(model, batch, done):
    return (model(batch["x"]) - batch["y"]).square().mean()


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def train_points(model=None, loss=squares, out=None, data=POINTS, **settings):
    return train(model or linear(), loss, data, out, **{"steps": 6, "batch": 4, "progress": False} | settings)


def state_of(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(
            value, b[key], **({"rtol": 0, "atol": 0} | tolerance), msg=lambda m, k=key: f"{k}: {m}"
        )


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


# The loop


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("seed", [0, 1])
def test_train_is_a_plain_adamw_loop(schedule, seed):
    data, model = Points(), linear()
    settings = {"steps": 17, "lr": 0.05, "weight_decay": 0.02, "warmup": 5, "clip": 0.7, "seed": seed}
    drawn = torch.get_rng_state()
    epochs, rows = train_points(model, data=data, schedule=schedule, every=6, **settings)
    assert torch.equal(torch.get_rng_state(), drawn), "the caller's random numbers"
    plain = linear()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.02)
    order = [i for e in range(4) for i in np.random.default_rng((seed, e)).permutation(23)]
    for step in range(17):
        optimizer.param_groups[0]["lr"] = rate = (
            0.05 * min(1, (step + 1) / 5) * ((1 + math.cos(math.pi * step / 17)) / 2 if schedule == "cosine" else 1)
        )
        chosen = order[4 * step : 4 * step + 4]
        loss = ((plain(data.x[chosen]) - data.y[chosen]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
        optimizer.step()
        assert rows[step] == pytest.approx(
            {"step": step + 1, "loss": loss.item(), "lr": rate, "gradient_norm": norm.item()}, rel=1e-5
        )
    assert_same(model.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    assert [row["step"] for row in epochs] == [6, 12, 17]
    means = [np.mean([r["loss"] for r in rows[a:b]]) for a, b in ((0, 6), (6, 12), (12, 17))]
    assert [row["loss"] for row in epochs] == pytest.approx(means)
    assert epochs[0]["epoch"] == pytest.approx(24 / 23) and epochs[0]["samples_per_second"] > 0


def test_every_sample_once_an_epoch():
    endless = batches(10, 4, seed=3)
    seen = [next(endless) for _ in range(5)]
    flat = [at for batch in seen for at in batch]
    assert [epoch for epoch, _ in flat] == [0] * 10 + [1] * 10
    first, second = ([i for e, i in flat if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_what_needs_no_gradient_stays_and_columns_are_added():
    model = nn.Sequential(linear(), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    epochs, rows = train_points(model, steps=5, batch=8, every=2, log=lambda m: {"slope": m[1].weight.grad.item()},
                                validate=lambda m: {"bias": m[1].bias.item()})  # fmt: skip
    assert torch.equal(model[0].weight, before)
    assert all(row["slope"] != 0 for row in rows) and epochs[-1]["bias"] == model[1].bias.item()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"schedule": "linear"}, "schedule must be"), ({"batch": 0}, "batch must be at least 1"),
     ({"steps": 0}, "steps must be at least 1"), ({"lr": math.nan}, "lr must be at least 0, and finite, got nan"),
     ({"stop": 7}, "stop must be 1 to steps, 6, got 7"), ({"data": Points(0)}, "no samples")],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        train_points(**wrong)


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        train_points(loss=lambda m, b, done: squares(m, b, done) * (math.nan if done > 0 else 1))


def test_each_training_has_its_own_precision():
    """Also one inside another, as when a validation trains; and the model's own forward is its own again."""
    inner, kinds, x = [], [], Points().x

    def loss(model, batch, done):
        kinds.append(model[0](batch["x"]).dtype)
        return squares(model, batch, done)

    def validate(model):
        inner.append(train_points(loss=loss, model=nn.Sequential(linear()))[1])
        return {}

    model = nn.Sequential(linear())
    train_points(model, loss, precision="bf16", every=3, validate=validate)
    low, no = [torch.bfloat16] * 3, [torch.float32] * 6
    assert kinds == low + no + low + no
    assert inner[0] == inner[1] == train_points(nn.Sequential(linear()))[1]
    assert torch.equal(model(x), nn.functional.linear(x, *model.state_dict().values()))


@pytest.mark.parametrize(("text", "workers"), [("print()", 0), ('if __name__ == "__main__": print()', 2)])
def test_a_script_that_its_workers_would_run_again_gets_none(tmp_path, monkeypatch, text, workers):
    (tmp_path / "script.py").write_text(text)
    main = types.ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert loader(Points(), 2).num_workers == workers
    assert [str(w.message).partition(":")[0] for w in said] == ([] if workers else ["loading in one process"])


# Stopping and going on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    tiny_training.run(out, 9)
    return out


def assert_goes_on(out: Path, unbroken: Path) -> list[dict]:
    """The run of a folder goes on to the end of the unbroken one, and leaves nothing else behind."""
    network, epochs, rows = tiny_training.run(out, 9)
    whole = state_of(unbroken)
    assert_same(network.state_dict(), whole["model"])
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole["rows"]] and len(rows) == 9
    written = list(csv.DictReader((out / "steps.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in written] == [row["loss"] for row in rows]
    assert files(out).keys() == files(unbroken).keys()
    return epochs


def test_a_stopped_run_goes_on_as_if_unbroken_and_workers_change_nothing(unbroken, tmp_path):
    for stop, workers in ((4, 0), (7, 2)):
        tiny_training.run(tmp_path, 9, stop=stop, workers=workers)
    assert [row["step"] for row in assert_goes_on(tmp_path, unbroken)] == [4, 7, 8, 9]
    (tmp_path / "steps.csv").unlink()
    assert_goes_on(tmp_path, unbroken)  # a finished run has nothing left to do but its tables


def test_a_run_that_was_killed_while_it_saved_goes_on_as_if_unbroken(unbroken, tmp_path):
    process = subprocess.run([sys.executable, SCRIPT, "die", tmp_path], capture_output=True, timeout=90, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert state_of(tmp_path)["step"] == 4 and any(name.startswith(".checkpoint.pt.") for name in files(tmp_path))
    assert_goes_on(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_is_at(unbroken, commanded, tmp_path, number, monkeypatch, capsys):
    own, out, other = training.pose_loss, tmp_path / "run", tmp_path / "command"

    def loss(network, batch, done):
        if done >= 0.5:
            os.kill(os.getpid(), number)
        return own(network, batch, done)

    with monkeypatch.context() as patch:
        patch.setattr(training, "pose_loss", loss)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step 6 of 9; {out} goes on"):
            tiny_training.run(out, 9)
        assert command(other) == 130 and capsys.readouterr().out == f"stopped after step 3 of 4; {other} goes on\n"
    assert state_of(out)["step"] == 6
    assert_goes_on(out, unbroken)
    assert command(other) == 0
    assert (other / "weights.safetensors").read_bytes() == (commanded / "weights.safetensors").read_bytes()


def test_a_full_disk_is_named_and_the_old_checkpoint_is_kept(unbroken, tmp_path):
    tiny_training.run(tmp_path, 9, stop=4)
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: step 8 could not be saved, checkpoint.pt is the last one"):
            tiny_training.run(tmp_path, 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before
    assert_goes_on(tmp_path, unbroken)


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    train_points(out=tmp_path, facts={"data": ("a", 3)})
    before = files(tmp_path)
    for other, message in (
        ({"lr": 0.002}, r"another run \(lr was 0.001, is 0.002\): give another folder, or remove it"),
        ({"facts": {"data": ["b", 3]}}, r"another run \(data was \['a', 3\], is \['b', 3\]\)"),
        ({"precision": "bf16"}, "precision was no, is bf16"),
        ({"data": Points(24)}, "samples was 23, is 24"),
        ({"model": nn.Linear(3, 2)}, "another network"),
        ({"model": nn.Sequential(linear())}, "another network"),
        ({"facts": None}, r"another run \(data was \['a', 3\], is not told\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train_points(**{"out": tmp_path, "facts": {"data": ["a", 3]}} | other)
    assert files(tmp_path) == before


def test_a_damaged_checkpoint_is_named(tmp_path):
    train_points(out=tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    at = whole.index(state_of(tmp_path)["model"]["weight"].numpy().tobytes())
    for harmed in (whole[:-9], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], b""):
        (tmp_path / "checkpoint.pt").write_bytes(harmed)
        with pytest.raises(
            ValueError, match=r"checkpoint.pt is not a whole checkpoint \(remove it, and the training beg"
        ):
            train_points(out=tmp_path)


def test_what_scales_the_loss_in_fp16_goes_on_too(tmp_path, monkeypatch):
    """On a GPU Accelerate makes the scaler; here it is given one that grows every second step."""

    own, made = Settings.accelerator, []

    def accelerator(settings):
        made.append(own(settings))
        made[-1].scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        return made[-1]

    monkeypatch.setattr(Settings, "accelerator", accelerator)
    whole, parts = linear(), linear()
    train_points(whole)
    train_points(parts, out=tmp_path, stop=3)
    assert state_of(tmp_path)["scaler"]["scale"] == 8
    train_points(parts, out=tmp_path)
    assert made[-1].scaler.get_scale() == 32
    assert_same(parts.state_dict(), whole.state_dict())


# Two processes


def launched(out: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "both", out], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def launched_from_a_notebook(out: Path) -> None:
    """As in the documentation: from a fresh kernel, where nothing was computed before, as the processes are forked."""
    launch = f"""import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
from accelerate import notebook_launcher
from tiny_training import both
notebook_launcher(both, ({str(out)!r},), num_processes=2)"""
    notebook = new_notebook(cells=[new_code_cell(launch)])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own
        patch.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, kernel_name="python3", timeout=120, extra_arguments=["--log-level=CRITICAL"]).execute()
    said = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "Launching training on 2 " in said, said


@pytest.mark.parametrize("launch", [launched, launched_from_a_notebook])
def test_two_processes_do_what_one_does(tmp_path, launch, commanded):
    launch(tmp_path)
    network, _, rows = tiny_training.run(None, 8, double=True)
    two = state_of(tmp_path / "run")
    losses = [[row["loss"] for row in measured] for measured in (rows, two["rows"])]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)  # they are handed on in single precision
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert_same(network.state_dict(), two["model"], rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(value, two["model"][key]) for key, value in network.state_dict().items())  # it ran apart
    out = tmp_path / "command"
    assert_same(load_checkpoint(out / "weights.safetensors").state_dict(), state_of(out)["model"])
    one, two = (provenance(folder / "weights.safetensors") for folder in (commanded, out))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-3)
    assert two["subset"].keys() == two["test"].keys() == one["test"].keys()


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_batch_norm_over_one_process_is_batch_norm(mode, tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(3).double()
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
        ours = loop._synchronised(nn.Sequential(nn.BatchNorm2d(3).double()))[0]
        assert type(ours) is not nn.BatchNorm2d
        ours.load_state_dict(plain.state_dict())
        plain.train(mode), ours.train(mode)
        x = torch.randn(4, 3, 5, 7, dtype=torch.float64) * 3 + 20
        results = []
        for layer in (plain, ours):
            given = x.clone().requires_grad_()
            y = layer(given)
            (y * torch.arange(7.0)).square().mean().backward()
            results.append([y, given.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


# The command


@pytest.fixture(scope="module")
def commanded(tmp_path_factory) -> Path:
    """The folder of a finished command; it finds tiny networks and data, here and in all that follows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_scenes", training._scenes)
        patch.setattr(training, "_NETWORKS", dict(training._NETWORKS))
        out = tmp_path_factory.mktemp("commanded") / "new" / "run"
        assert command(out) == 0
        yield out


def test_the_commands_weights_load_with_their_provenance_and_equal_runs_give_equal_bytes(commanded, tmp_path):
    weights, told = commanded / "weights.safetensors", provenance(commanded / "weights.safetensors")
    assert_same(load_checkpoint(weights).state_dict(), state_of(commanded)["model"])
    scored = training._scores(predict(load_checkpoint(weights), MultiView(scenes()[:2], size=64)))
    assert told["test"] == told["subset"] == scored
    assert len(told["losses"]) == 4 and told["begun_with"] is None and told["device"] == device_name()
    assert {"command", "commit", "seed", "data", "torch"} < told.keys() and "--network slim" in told["command"]
    for stop in (1, 3, 4):  # to the end, with a finished schedule
        assert command(tmp_path, *(("--stop", stop) if stop < 4 else ())) == 0
        assert load_checkpoint(tmp_path / "weights.safetensors") and state_of(tmp_path)["step"] == stop
    assert (tmp_path / "weights.safetensors").read_bytes() == weights.read_bytes()
    before = files(tmp_path)
    assert command(tmp_path) == 0 and files(tmp_path) == before  # a finished run


def test_the_command_in_bf16(commanded, tmp_path):
    assert command(tmp_path, "--precision", "bf16") == 0
    network = load_checkpoint(tmp_path / "weights.safetensors")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    one, two = (provenance(folder / "weights.safetensors")["losses"] for folder in (commanded, tmp_path))
    np.testing.assert_allclose(two, one, rtol=0.05)
    assert one != two


@pytest.mark.parametrize("kind", ["own", "official"])
def test_the_command_begins_with_weights(commanded, tmp_path, kind, monkeypatch):
    init = commanded / "weights.safetensors"
    network = load_checkpoint(init)
    if kind == "official":  # a plain state dict, of a network as the official code builds it: a tiny one here
        monkeypatch.setattr(PoseHRNet.__init__, "__defaults__", (4, 17, *list(TINY.values())[1:]))
        init = tmp_path / "pose_hrnet.pth"
        torch.save(network.state_dict(), init)
    out = tmp_path / "out"
    assert command(out, "--init", init, "--lr", "0") == 0
    told, found = provenance(out / "weights.safetensors"), load_checkpoint(out / "weights.safetensors")
    assert_same(dict(found.named_parameters()), dict(network.named_parameters()))
    assert told["begun_with"] == provenance(init) and f"--init {init}" in told["command"]
    assert kind == "own" or told["begun_with"]["file"] == "pose_hrnet.pth"


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [("new", ("--size", 48), "size must be a multiple of 32, got 48"),
     ("new", ("--batch", 0), "batch must be at least 1"),
     ("new", ("--lr", "nan"), "lr must be at least 0"),
     ("new", ("--stop", 9), "stop must be 1 to steps, 4, got 9"),
     ("new", ("--workers", -1), "workers at least 0, got -1"),
     ("new", ("--split", "train", "--human36m", "x"), "--human36m: not allowed with argument --split"),
     ("new", ("--init", "none.pth"), "none.pth: no such checkpoint"),
     ("new", ("--init", __file__), "test_training.py cannot be read as weights"),
     ("new", ("--init", "weights", "--network", "w32"), "weights.safetensors is of .*'width': 4.*--network w32 is"),
     ("new", ("--precision", "fp16"), "precision fp16 needs a GPU"),
     ("file", (), "File exists: .*file"),
     ("file/below", (), "Not a directory: .*file/below"),
     ("/proc/self", (), "/proc/self"),
     ("run", ("--size", 128), "another run .*size was 64, is 128"),
     ("run", ("--precision", "bf16"), "another run .*precision was no, is bf16"),
     ("run", ("--init", "weights"), "another run .*init was None, is [0-9a-f]{64}"),
     ("run", ("--network", "w32"), "another run .*network was .*'width': 4")],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_first_step(
    commanded, tmp_path, monkeypatch, capsys, out, options, message
):
    if "fp16" in options and torch.cuda.is_available():
        pytest.skip("a GPU can")
    monkeypatch.setattr(training, "pose_loss", lambda *_: pytest.fail("a step was taken"))
    (tmp_path / "file").write_text("")
    before = files(commanded)
    with pytest.raises(SystemExit, match="2"):
        options = [commanded / "weights.safetensors" if option == "weights" else option for option in options]
        command(commanded if out == "run" else tmp_path / out, *options)
    assert re.search(rf"training: error: .*{message}", capsys.readouterr().err)
    assert files(commanded) == before


def test_space_for_a_checkpoint_is_asked_for_first(tmp_path, monkeypatch):
    """The weights and, while one takes another's place, two checkpoints of three times their size."""
    with torch.device("meta"):
        network = PoseHRNet()
    size = 4 * sum(p.numel() for p in network.parameters())
    for checkpoint, copies in ((False, 7), (True, 4)):
        if checkpoint:
            (tmp_path / "checkpoint.pt").write_bytes(b"")
        for share, fits in ((0.95, False), (1.05, True)):
            usage = types.SimpleNamespace(free=int(share * copies * size))
            monkeypatch.setattr(loop.shutil, "disk_usage", lambda _, usage=usage: usage)
            with nullcontext() if fits else pytest.raises(OSError, match=r"\d+ MB are free, .* need \d+: .*"):
                Settings(steps=1).check(network, tmp_path)
