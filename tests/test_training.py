"""Training: against a plain loop, killed and taken up again, interrupted, and shared between two processes."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from torch import nn

from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.people import scene
from epiutils.data.views import Predicted
from epiutils.heatmaps import accuracy
from epiutils.networks.batchnorm import GlobalBatchNorm2d, synchronised
from epiutils.networks.hrnet import SLIM, PoseHRNet, load_checkpoint, provenance
from epiutils.networks.loop import batches, train
from epiutils.networks.predict import device_name, predict, scores
from epiutils.networks.training import subset, train_pose

SCRIPT = Path(tiny_training.__file__)
CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"


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


def squares(model, batch, done):
    return (model(batch["x"]) - batch["y"]).square().mean()


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def state_of(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(
            value, b[key], **({"rtol": 0, "atol": 0} | tolerance), msg=lambda m, k=key: f"{k}: {m}"
        )


# The loop


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("seed", [0, 1])
def test_train_is_a_plain_adamw_loop(schedule, seed):
    data, model = Points(), linear()
    settings = {"steps": 17, "batch": 4, "lr": 0.05, "weight_decay": 0.02, "warmup": 5, "clip": 0.7, "seed": seed}
    epochs, rows = train(model, squares, data, schedule=schedule, every=6, progress=False, **settings)
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
    watched = lambda m: {"slope": m[1].weight.grad.item()}
    epochs, rows = train(model, squares, Points(), steps=5, batch=8, every=2, progress=False, log=watched,
                         validate=lambda m: {"bias": m[1].bias.item()})  # fmt: skip
    assert torch.equal(model[0].weight, before)
    assert all(row["slope"] != 0 for row in rows) and epochs[-1]["bias"] == model[1].bias.item()


def test_bad_settings_and_losses_are_named():
    for wrong, message in (
        ({"schedule": "linear"}, "schedule must be"),
        ({"batch": 0}, "batch"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            train(linear(), squares, Points(), **({"steps": 3, "batch": 2, "progress": False} | wrong))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        train(linear(), lambda m, b, done: squares(m, b, done) * (math.nan if done > 0 else 1), Points(), steps=3,
              batch=2, progress=False)  # fmt: skip


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model := nn.Linear(3, 1), squares, Points(), steps=2, batch=2, progress=False)
    del model
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


# Stopping and going on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    tiny_training.run(out, 14)
    return out


def test_a_stopped_run_goes_on_as_if_unbroken(unbroken, tmp_path):
    for stop in (4, 7, None):
        network, epochs, rows = tiny_training.run(tmp_path, 14, stop=stop)
    whole = state_of(unbroken)
    assert_same(network.state_dict(), whole["model"])
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole["rows"]] and len(rows) == 14
    assert [row["step"] for row in epochs] == [4, 7, 8, 12, 14]
    written = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in written] == [row["loss"] for row in rows]
    again, *_ = tiny_training.run(tmp_path, 14)  # a finished run has nothing left to do
    assert_same(again.state_dict(), whole["model"])


def test_loading_in_workers_changes_nothing(unbroken):
    network, _, _ = tiny_training.run(None, 14, workers=2)
    assert_same(network.state_dict(), state_of(unbroken)["model"])


def test_settings_of_another_run_are_refused(unbroken):
    before = (unbroken / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"another run \(lr was 0.003, is 0.001\)"):
        tiny_training.run(unbroken, 14, lr=1e-3)
    assert (unbroken / "checkpoint.pt").read_bytes() == before


def wait_for(condition, process, seconds: float = 90) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.05)


def start(out: Path, steps: int, pause: float) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(out), str(steps), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_as_if_unbroken(unbroken, tmp_path):
    process = start(tmp_path, 14, 0.1)
    wait_for(lambda: (tmp_path / "checkpoint.pt").exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert state_of(tmp_path)["step"] < 14
    network, _, rows = tiny_training.run(tmp_path, 14)
    assert_same(network.state_dict(), state_of(unbroken)["model"])
    assert [row["loss"] for row in rows] == [row["loss"] for row in state_of(unbroken)["rows"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_it_is_at(unbroken, tmp_path, number):
    process = start(tmp_path, 14, 0.4)
    wait_for(lambda: (tmp_path / "checkpoint.pt").exists(), process)
    time.sleep(0.5)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    step = state_of(tmp_path)["step"]
    assert process.returncode == 130 and f"stopped after step {step} of 14" in said and not errors
    assert 4 <= step < 14
    network, *_ = tiny_training.run(tmp_path, 14)
    assert_same(network.state_dict(), state_of(unbroken)["model"])


# Two processes


def test_two_processes_do_what_one_does(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path), "10", "double"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    network, _, rows = tiny_training.run(None, 10, double=True)
    two = state_of(tmp_path)
    losses = [[row["loss"] for row in measured] for measured in (rows, two["rows"])]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)  # they are handed on in single precision
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert_same(network.state_dict(), two["model"], rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(value, two["model"][key]) for key, value in network.state_dict().items())  # it ran apart


def test_a_notebook_launches_two_processes_that_do_what_one_does(tmp_path):
    """As in the README: from a fresh kernel, before anything was computed there, because the processes are forked."""
    launch = f"""import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
from accelerate import notebook_launcher
from tiny_training import run
notebook_launcher(run, ({str(tmp_path)!r}, 6, 0.0, True), num_processes=2)"""
    notebook = new_notebook(cells=[new_code_cell(launch)])
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own
        patch.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, kernel_name="python3", timeout=120, extra_arguments=["--log-level=CRITICAL"]).execute()
    said = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert "Launching training on 2 " in said, said
    network, _, rows = tiny_training.run(None, 6, double=True)
    two = state_of(tmp_path)
    np.testing.assert_allclose([row["loss"] for row in two["rows"]], [row["loss"] for row in rows], rtol=1e-6)
    assert_same(network.state_dict(), two["model"], rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(value, two["model"][key]) for key, value in network.state_dict().items())  # it ran apart


@pytest.mark.parametrize("training", [True, False])
def test_global_batch_norm_alone_is_batch_norm(training, tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(3).double()
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
        ours = synchronised(nn.Sequential(nn.BatchNorm2d(3).double()))[0]
        assert type(ours) is GlobalBatchNorm2d
        ours.load_state_dict(plain.state_dict())
        plain.train(training), ours.train(training)
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


# Scores


def test_scores_of_perfect_and_of_shifted_maps():
    data = MultiView([scene(9, "walk", f, 2) for f in (3, 50)])
    batch = torch.utils.data.default_collate([data[0], data[1]])
    del batch["image"]
    assert set(scores(Predicted(output=batch["target"], **batch)).values()) == {1.0}
    moved = batch["target"].roll(4, -1)  # 4 px are wrong, 3 px are right
    wrong = torch.where(batch["visible"][..., None, None], batch["target"], moved)
    measured = scores(Predicted(output=wrong, **batch))
    assert measured["pck_visible"] == 1 and measured["pck_occluded"] == 0
    assert measured["pck"] == pytest.approx(batch["visible"].double().mean().item(), abs=1e-9)
    assert measured["accuracy"] == accuracy(wrong.flatten(0, 1), batch["target"].flatten(0, 1))


def test_predict_gives_evaluation_mode_maps_in_order():
    data = MultiView([scene(9, "sit", f, 2, size=64) for f in (3, 50, 70)], size=64)
    torch.manual_seed(0)
    network = PoseHRNet(width=4, modules=(1, 1, 1), blocks=1, stem=(8, 8), stem_blocks=1).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    predicted = predict(network, data, batch=2)
    assert network.training and predicted.output.shape == (3, 4, 17, 16, 16)
    assert_same(network.state_dict(), before)
    again = predict(network, data, batch=1)
    torch.testing.assert_close(predicted.output, again.output, rtol=1e-4, atol=1e-6)
    assert torch.equal(predicted.joints[2], data[2]["joints"])


# The checkpoints that ship


@pytest.mark.parametrize(("name", "size"), [("original", 256), ("best", 256), ("best-128", 128)])
def test_checkpoints_reproduce_their_accuracy(name, size):
    """On the part of the test set that training validates on; other kernels may move a few joints."""
    test = Benchmark("test")
    chosen = subset(len(test))
    told = provenance(CHECKPOINTS / f"{name}.safetensors")
    data = MultiView(torch.utils.data.Subset(test.prepare(only=chosen, progress=False), chosen), size=size)
    measured = scores(predict(load_checkpoint(CHECKPOINTS / f"{name}.safetensors"), data, workers=1))
    assert measured == pytest.approx(told["subset"], abs=0.005)
    assert told["test"] == pytest.approx(told["subset"], abs=0.04)
    assert {"command", "commit", "seed", "data", "device"} <= told.keys()


def test_operating_points():
    original, best = (provenance(CHECKPOINTS / f"{name}.safetensors") for name in ("original", "best"))
    assert 0.43 <= original["test"]["accuracy"] <= 0.49 and best["test"]["accuracy"] >= 0.80
    assert "--split train " in original["command"] and original["begun_with"] is None
    assert best["begun_with"] == provenance(CHECKPOINTS / "best-128.safetensors")
    for file in CHECKPOINTS.glob("*.safetensors"):
        assert file.stat().st_size < 10e6


@pytest.mark.parametrize(
    ("name", "split", "settings"),
    [
        ("original", "train", {"steps": 105, "stop": 50}),
        ("best-128", "train-large", {"steps": 2400, "stop": 10, "batch": 8, "size": 128}),
        ("best", "train-large", {"steps": 1600, "stop": 10, "lr": 1e-3}),
    ],
)
def test_training_run_afresh_gives_the_recorded_losses(name, split, settings):
    """As the command in data/checkpoints/README.md: to rounding on the machine of record, nearly so on others."""
    told = provenance(CHECKPOINTS / f"{name}.safetensors")
    torch.manual_seed(0)
    network = load_checkpoint(CHECKPOINTS / "best-128.safetensors") if name == "best" else PoseHRNet(**SLIM)
    network = network.train().to(memory_format=torch.channels_last)
    _, rows = train_pose(network, Benchmark(split), progress=False, **settings)
    losses, expected = [row["loss"] for row in rows], told["losses"][: settings["stop"]]
    assert len(losses) == settings["stop"]
    same = told["device"] == device_name() and told["torch"] == torch.__version__
    np.testing.assert_allclose(losses[:5], expected[:5], rtol=1e-3 if same else 2e-2)
    if same and losses[0] == pytest.approx(expected[0], rel=1e-6):  # the arithmetic of record, which no name tells
        np.testing.assert_allclose(losses[:5], expected[:5], rtol=1e-5)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert np.mean(losses) == pytest.approx(np.mean(expected), rel=0.1)
