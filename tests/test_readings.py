"""Long trainings of the original: the same steps as the plain loop's, and taken up where they stopped."""

import numpy as np
import pytest
import torch

from epiutils.data.dataset import Benchmark, MultiView
from epiutils.fusion import OriginalFusion
from epiutils.networks.hrnet import load_checkpoint
from epiutils.networks.predict import predict
from epiutils.studies import readings
from epiutils.studies.fitting import PAIRS, FusedNetwork, ViewPairs, train_pairs
from epiutils.studies.predicted import CHECKPOINTS, found_by, training_pictures
from epiutils.studies.runs import WithNext

SCENES = range(0, 6, 3)
FOLLOWING = [((v + 1) % 4, v) for v in range(4)]


@pytest.fixture(scope="module")
def lesson():
    return readings._Filmed("train", SCENES, PAIRS, "cpu")


def test_free_reading_takes_the_steps_of_the_plain_loop(lesson):
    run = readings._Run("free", 1, lesson)
    for _ in range(2):
        run.step()
    torch.manual_seed(1)
    fusion = OriginalFusion()
    model = FusedNetwork(load_checkpoint(CHECKPOINTS["original"]), fusion).train()
    losses = train_pairs(model, training_pictures(slice(0, 6, 3)), 2, seed=1)["losses"]
    np.testing.assert_allclose(run.losses[:2], losses, rtol=2e-4)
    # Adam's first steps are the signs of the gradients: where one is nearly zero, rounding decides
    np.testing.assert_allclose(run.fusion.weight.detach(), model.fusion.weight.detach(), atol=2e-5)


def test_frozen_reading_is_that_of_stored_heatmaps(lesson):
    network = load_checkpoint(CHECKPOINTS["original"]).eval()
    run = readings._Run("frozen", 2, lesson, readings._seen(network, lesson.images))
    for _ in range(4):
        run.step()
    predicted = predict(network, MultiView(torch.utils.data.Subset(Benchmark("train"), SCENES)))
    torch.manual_seed(2)
    module = OriginalFusion()
    train_pairs(module, ViewPairs(predicted), 4, seed=2)
    np.testing.assert_allclose(run.fusion.weight.detach(), module.weight.detach(), atol=2e-6)

    test = readings._Filmed("train", SCENES, FOLLOWING, "cpu")
    fused, alone = (f.reshape(-1, 4, 17) for f in run.found(test))
    np.testing.assert_array_equal(alone, found_by(None, predicted))
    np.testing.assert_array_equal(fused, found_by(WithNext(run.fusion), predicted))
    few = [f.reshape(-1, 4, 17) for f in run.found(test.every(2))]  # of the first instant
    np.testing.assert_array_equal(few, [fused[::2], alone[::2]])


def test_run_taken_up_ends_as_an_unbroken_one(lesson):
    whole, broken, later = (readings._Run("hold", 3, lesson) for _ in range(3))
    for run, steps in ((whole, 3), (broken, 2)):
        for _ in range(steps):
            run.step()
    later.restore(broken.state())
    later.step()
    assert int(later.k) == 3
    torch.testing.assert_close(later.losses, whole.losses, rtol=0, atol=0)
    torch.testing.assert_close(later.network.state_dict(), whole.network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backbone"), [("hold", 0.0), ("slow", 0.1), ("warmup", 1 / 500), ("free", 1.0)])
def test_what_heals_holds_the_backbone_back(lesson, name, backbone):
    run = readings._Run(name, 0, lesson)
    before = [p.detach().clone() for p in run.network.parameters()]
    nine = run.fusion.weight.detach().clone()
    run.step()
    moved = max((p - q).abs().max().item() for p, q in zip(run.network.parameters(), before, strict=True))
    assert moved == pytest.approx(1e-3 * backbone, rel=0.02)
    assert (run.fusion.weight - nine).abs().max().item() == pytest.approx(2e-6 if name == "warmup" else 1e-3, rel=0.02)


def test_seeds_that_were_stopped_at_other_moments_stand_each_where_it_was_measured(tmp_path, monkeypatch):
    rng, runs = np.random.default_rng(0), {}
    marks_of = {("free", 0): (0, 10, 60, 90), ("free", 1): (0, 10, 50), ("alone", 0): (0, 10, 60)}
    for (name, seed), marks in marks_of.items():
        fused, weights = rng.random(len(marks)), rng.random((len(marks), 9))
        measured = {"iterations": list(marks), "fused": fused, "unfused": fused / 2, "weights": weights}
        readings._store(tmp_path / f"{name}-{seed}", measured, np.ones((8, 3)), np.zeros((8, 3)))
        runs[name, seed] = dict(zip(marks, fused, strict=True))
    monkeypatch.setattr(readings, "STORED", tmp_path / "all.npz")
    readings._pack(tmp_path, readings.STORED)
    free = (stored := readings.load())["free"]
    assert free["iterations"].tolist() == [0, 10, 50, 60, 90] and free["weights"].shape == (2, 5, 9)
    assert np.isnan(free["fused"]).tolist() == [[False, False, True, False, False], [False, False, False, True, True]]
    stored["frozen"] = stored["alone"]
    for mark in (10, 60):
        seeds = [runs["free", seed][mark] for seed in (0, 1) if mark in runs["free", seed]]
        then = readings.at(stored, "free", mark)
        assert then["fused_by_seed"] == pytest.approx(seeds) and then["seeds"] == len(seeds)
        assert then["fused"] == pytest.approx(np.mean(seeds))
        assert then["control"] == pytest.approx(runs["alone", 0][mark])
    with pytest.raises(ValueError, match="70"):
        readings.at(stored, "free", 70)
