"""The long experiments: what is scored, and that runs are kept, taken up, packed and read back as they were."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import JOINTS, made_up, repaired

from epiutils.fusion import OriginalFusion, RepairedFusion, SimpleFusion
from epiutils.heatmaps import found
from epiutils.studies import runs, search
from epiutils.studies.fitting import ViewPairs, train_pairs
from epiutils.studies.predicted import found_by
from epiutils.studies.runs import WithNext
from epiutils.studies.stored import load_arrays, save_arrays

SHAPE = (60, 80)


@pytest.mark.parametrize("seed", range(2))
def test_a_lost_view_costs_plain_triangulation_more_than_the_robust_one(seed):
    scored = runs._evaluate(None, made_up(seed, shape=SHAPE))  # perfect heatmaps
    assert scored["found"].shape == (3, 4, JOINTS) and np.nanmin(scored["found"]) == 1
    assert max(scored["dlt_mm"].max(), scored["robust_mm"].max()) < 1
    predicted = made_up(seed, shape=SHAPE, lost=0.15)
    scored = runs._evaluate(None, predicted)
    literal = np.stack([found(o, t) for o, t in zip(predicted.output, predicted.target, strict=True)])
    np.testing.assert_array_equal(scored["found"], literal)
    assert np.nanmean(scored["found"]) < 1
    assert np.nanmedian(scored["robust_mm"]) < 10 < np.nanmean(scored["dlt_mm"])


def test_the_maps_of_modules_that_give_logarithms_become_probabilities_first():
    predicted, module = made_up(1, shape=SHAPE), repaired(0.7)
    fused = module.all_views(predicted.output, predicted.F).detach()
    p = torch.softmax(module.sharpness.detach() * fused.flatten(-2), -1).view_as(fused)
    scored, of_p, of_fused = (
        runs._evaluate(*given)
        for given in ((module, predicted), *((None, replace(predicted, output=maps)) for maps in (p, fused)))
    )
    assert np.nanmin(scored["found"]) == 1 and max(scored[f"{way}_mm"].max() for way in ("dlt", "robust")) < 30
    np.testing.assert_allclose(of_p["dlt_mm"], scored["dlt_mm"], atol=1e-3)
    assert np.abs(of_fused["dlt_mm"] - scored["dlt_mm"]).max() > 0.1


@pytest.mark.parametrize("views", [2, 4])
def test_each_view_is_fused_with_the_next_camera(views):
    predicted = made_up(2, shape=SHAPE)
    maps, F = predicted.output[:, :views], predicted.F[:, :views, :views]
    torch.manual_seed(0)
    original = OriginalFusion(1.0, shape=SHAPE)
    with torch.no_grad():
        fused = WithNext(original).all_views(maps, F)
        for r in range(views):
            s = 0 if r == views - 1 else r + 1
            torch.testing.assert_close(fused[:, r], original(maps[:, s], maps[:, r], F[:, s, r]))


def test_the_originals_experiments_are_made_where_they_are_not_stored(monkeypatch):
    lesson, test = (made_up(seed, shape=(64, 64), twice=0.5) for seed in (5, 6))
    training = {"weights": np.eye(3, dtype=np.float32) / 50, "losses": np.ones(4), "path": np.zeros((4, 2, 9))}
    asked = []
    monkeypatch.setattr(runs, "heatmaps_once", lambda point, split, *_: {"train": lesson, "test": test}[split])
    monkeypatch.setattr(runs, "freed", lambda *given: asked.append(given) or (test, dict(training)))
    made = runs.originals("original", "a folder", 3, 3, 1.5, 2, 4, 4, 2)
    assert asked == [("original", 3, 4, 1e-3, 1.5, 4, 3, "a folder")]
    for method, (make, batch) in {
        "original_frozen": (OriginalFusion, 4),
        "original_frozen_sigmoid": (OriginalFusion, 4),
        "second_attempt": (SimpleFusion, 8),
    }.items():
        assert made[method]["found"].shape == (2, 3, 4, JOINTS) and made[method]["path"].shape == (2, 2, 2, 9)
        for seed in range(2):
            torch.manual_seed(seed)
            module = make(1.5, method.endswith("sigmoid"))
            losses = train_pairs(module, ViewPairs(lesson), 2, batch, seed=seed)["losses"]
            np.testing.assert_array_equal(made[method]["losses"][seed], losses)
            np.testing.assert_array_equal(made[method]["weights"][seed], next(module.parameters()).detach().flatten())
            np.testing.assert_array_equal(made[method]["found"][seed], found_by(WithNext(module), test))
    free = OriginalFusion(1.5, initial=torch.eye(3) / 50)
    np.testing.assert_array_equal(made["original_free"]["found"], [found_by(WithNext(free), test)])
    np.testing.assert_array_equal(made["original_free"]["found_unfused"], [found_by(None, test)])
    np.testing.assert_array_equal(made["hrnet"]["found"], [found_by(None, test)])


def test_stored_experiments_of_the_original_are_cut_to_the_chosen_seeds_and_instants():
    stored, cut = runs.load("original"), runs.originals("original", test_scenes=60, seeds=2)
    assert cut.keys() == {"hrnet", *runs.PAIRED, "original_free"}
    for method, of in cut.items():
        np.testing.assert_array_equal(of["found"], stored[method]["found"][:2, ::7])
        for key in of.keys() - {"found"}:
            np.testing.assert_array_equal(of[key], stored[method][key][:2])


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs that take no time: results of the right kinds, a list of what was run, and folders of the test's own."""
    asked = []

    def run(point, method, seed):
        asked.append((point, method, seed))
        rng = np.random.default_rng([len(point), len(method), seed])
        right = np.where(rng.random((3, 4, 5)) < 0.1, np.nan, rng.random((3, 4, 5)) < 0.5)
        off = rng.uniform(0, 400, (3, 5)).astype(np.float16)
        off[0, 0] = np.nan
        return {"found": right, "robust_mm": off, "losses": [1.0, 0.5], "seconds": 2.0}

    monkeypatch.setattr(runs, "_run", run)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    arguments = ["--points", "original", "--methods", "hrnet", "alone", "--out", str(tmp_path / "runs")]
    return asked, lambda *more: runs.main([*arguments, *more]), run


def test_what_is_stored_is_small_and_comes_back(tmp_path):
    given = {"a/found": [1.0, 0.0, np.nan], "a/dlt_mm": np.array([12.5, np.nan, np.inf]), "a/seconds": 0.1}
    given |= {"meta": {"n": 3}}
    save_arrays(tmp_path / "runs" / "x.npz", given)
    with np.load(tmp_path / "runs" / "x.npz", allow_pickle=False) as file:
        assert file["a/found"].tolist() == [1, 0, 2] and file["a/found"].dtype == np.uint8
        assert file["a/dlt_mm"].dtype == np.float16
    back = load_arrays(tmp_path / "runs" / "x.npz")
    assert back["meta"] == {"n": 3} and back["a/seconds"] == 0.1
    np.testing.assert_array_equal(back["a/found"], given["a/found"])
    np.testing.assert_array_equal(back["a/dlt_mm"], [12.5, np.nan, 65504])
    save_arrays(tmp_path / "again.npz", back)
    np.testing.assert_equal(load_arrays(tmp_path / "again.npz"), back)


def test_runs_are_packed_and_read_back_as_they_were(quick, tmp_path):
    asked, main, run = quick
    assert main("--seeds", "2") == 0
    assert asked == [("original", "hrnet", 0), ("original", "alone", 0), ("original", "alone", 1)]
    stored = runs.load("original")
    assert stored.keys() == {"hrnet", "alone", "meta"} and stored["meta"]["seeds"] == 2
    assert {"command", "device", "torch"} < stored["meta"].keys()
    for _, method, seed in list(asked):
        for key, value in run("original", method, seed).items():
            np.testing.assert_array_equal(stored[method][key][seed], np.asarray(value))
    (tmp_path / "results" / "original.npz").unlink()
    (tmp_path / "runs" / "original-alone-1.npz").unlink()
    runs._pack("original", tmp_path / "runs", 2)  # a method is packed once all its seeds are there
    assert runs.load("original").keys() == {"hrnet", "meta"}


def test_what_is_done_is_not_done_again_and_a_stop_loses_one_run(quick, monkeypatch, tmp_path):
    asked, main, run = quick

    def stopped(point, method, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return run(point, method, seed)

    monkeypatch.setattr(runs, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        main("--seeds", "3")
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(runs, "_run", run)
    asked.clear()
    main("--seeds", "3")
    assert asked == [("original", "alone", 1), ("original", "alone", 2)]
    assert len(runs.load("original")["alone"]["found"]) == 3


def test_packing_keeps_what_is_stored_of_others_and_more_seeds_than_there_are(quick, tmp_path):
    _, main, _ = quick
    main("--seeds", "2")
    before = runs.load("original")
    main("--methods", "dense", "--seeds", "1", "--out", str(tmp_path / "elsewhere"))
    main("--methods", "alone", "--seeds", "1", "--out", str(tmp_path / "elsewhere"))
    after = runs.load("original")
    assert after.keys() == {*before, "dense"} and len(after["alone"]["found"]) == 2
    for method in ("hrnet", "alone"):
        for key, values in before[method].items():
            np.testing.assert_array_equal(after[method][key], values)


def test_without_stored_runs_it_says_which_file_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="best.npz"):
        runs.load("best")


def test_a_stored_module_is_the_one_that_was_trained(monkeypatch):
    module, predicted = RepairedFusion(), made_up(3, shape=SHAPE, lost=0.3)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters(), 1):
            parameter += 0.1 * k
    weights = torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()
    monkeypatch.setattr(runs, "load", lambda point: {"repaired_frozen": {"weights": weights[None]}})
    again = runs.repaired("best").all_views(predicted.output, predicted.F)
    assert torch.equal(again, module.all_views(predicted.output, predicted.F).detach())


@pytest.mark.parametrize("point", ["original", "best"])
def test_what_is_stored_is_every_method_by_all_seeds(point):
    stored = runs.load(point)
    for method in runs.METHODS:
        if seeds := len(runs._seeds(point, method, runs.SEEDS)):
            key, shape = ("alone", (12,)) if method == "quality" else ("found", (420, 4, 17))
            assert stored[method][key].shape == (seeds, *shape), method
    eleven = runs.load(point, 11)
    assert eleven.keys() == {"hrnet", "hrnet_flip", "robust_reprojected", *runs._ON_ELEVEN, "meta"}
    assert eleven["repaired_frozen"]["found"].shape == (5, 140, 4, 17)


def test_the_search_tries_each_rate_and_the_best_of_them_for_longer(tmp_path, monkeypatch):
    """A module that finds the more the nearer log10 of its rate is to −1.2, and a little more when it is trained longer."""
    tried = []

    def pretended(make, heatmaps, seed, steps, lr):
        tried.append((lr, steps))
        return (lr, steps), []

    monkeypatch.setattr(search, "train_together", pretended)
    monkeypatch.setattr(search, "heatmaps_once", lambda point, split, *_, **__: split)
    right = lambda module, judge: np.full((2, 4, 3), 0.5 - 0.1 * abs(np.log10(module[0]) + 1.2) + 1e-5 * module[1])
    monkeypatch.setattr(search, "found_by", right)
    monkeypatch.setattr(search, "STORED", tmp_path / "search.json")
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    for methods in (["line_sum"], ["line_max"], ["line_sum"]):  # the third finds its trainings done
        assert search._main(["--methods", *methods, "--out", str(tmp_path / "kept")]) == 0
    assert tried == 2 * [(0.01, 100), (0.05, 100), (0.2, 100), (0.05, 400)]
    rows = runs.measured("search")["rows"]
    assert [row["method"] for row in rows] == 4 * ["line_sum"] + 4 * ["line_max"]
    assert rows[3]["steps"] == 400 and rows[3]["lr"] == max(rows[:3], key=lambda row: row["accuracy"])["lr"]
