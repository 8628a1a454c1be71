"""Headlines of the committed report, recomputed from the stored arrays by other code: plain sums over files."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def stored(name):
    with np.load(ROOT / "data" / name, allow_pickle=False) as file:
        return dict(file)


def reported(name):
    value = json.loads((ROOT / "reports" / "metrics.json").read_text("utf-8"))
    for part in name.split("."):
        value = value[part]
    return value


def accuracy(found):
    """Of codes (N, V, J), 1 found, 0 not, 2 left out: each joint's share, then their mean."""
    return np.mean([(joint == 1).sum() / (joint < 2).sum() for joint in np.moveaxis(found, -1, 0)])


OF_ORIGINAL = ("hrnet", "original_frozen", "repaired_frozen", "repaired_free", "hrnet_longer")
OF_BEST = ("hrnet", "repaired_frozen", "hrnet_longer", "line_mean")


@pytest.mark.parametrize(
    ("point", "method"), [*(("original", method) for method in OF_ORIGINAL), *(("best", method) for method in OF_BEST)]
)
def test_accuracies_of_all_seeds(point, method):
    seeds, name = stored(f"results/{point}.npz")[f"{method}/found"], f"benchmark.{point}.{method}"
    each = [accuracy(found) for found in seeds]
    assert reported(f"{name}.accuracy") == pytest.approx(np.mean(each), abs=1e-5)
    if len(seeds) > 1 and "accuracy_by_seed" in reported(name):
        assert reported(f"{name}.accuracy_by_seed") == pytest.approx(each, abs=1e-5)


@pytest.mark.parametrize("point", ["original", "best", "strong", "w32"])
@pytest.mark.parametrize("method", ["hrnet_flip", "robust_reprojected", "space", "space_tree", "space_parts"])
def test_evidence_in_space(point, method):
    space = stored("results/space.npz")
    right = accuracy(space[f"{point}/{method}/found"])
    assert reported(f"benchmark.{point}.{method}.accuracy") == pytest.approx(right, abs=1e-5)
    mm = space[f"{point}/{method}/mm"].astype(float)
    assert reported(f"benchmark.{point}.{method}.mpjpe_pooled_mm") == pytest.approx(mm[mm == mm].mean(), rel=1e-4)


@pytest.mark.parametrize("point", ["best", "strong"])
def test_a_backbone_trained_through_space_against_one_trained_alone(point):
    space = stored("results/space.npz")
    for method in ("space_free", "space_longer"):
        right = accuracy(space[f"{point}/{method}/found"])
        assert reported(f"benchmark.{point}.{method}.accuracy") == pytest.approx(right, abs=1e-5)
    mm = {method: space[f"{point}/{method}/mm"].astype(float) for method in ("space_free", "space_longer")}
    assert "H200" in str(space["meta"])  # what the prose says of its device
    assert mm["space_free"].mean() < mm["space_longer"].mean()


@pytest.mark.parametrize(
    ("name", "mark"),
    [("frozen_60", 60), ("frozen", 8800), ("free_600", 600), ("free_60", 60), ("zero_2200", 2200), ("hold_2200", 2200)],
)
def test_readings(name, mark):
    runs, reading, values = stored("results/readings.npz"), name.split("_")[0], []
    for seed in range(10):
        if f"{reading}/{seed}/fused" in runs:
            at = runs[f"{reading}/{seed}/iterations"].tolist().index(mark)
            values.append(runs[f"{reading}/{seed}/fused"][at])
    assert reported(f"readings.{name}.fused") == pytest.approx(np.mean(values), abs=1e-5)
    assert reported(f"readings.{name}.seeds") == len(values) and reported("readings.closest") == "frozen_60"


@pytest.mark.parametrize("case", ["second_person", "every_view", "one_view", "as_calibrated"])
@pytest.mark.parametrize("method", ["alone", "repaired", "space_tree"])
def test_real_pictures(case, method):
    found = stored("real/answers.npz")[f"{case}/{method}/found"]
    assert reported(f"real.{case}.{method}.accuracy") == pytest.approx((found == 1).sum() / (found < 2).sum(), abs=1e-5)
    assert reported(f"real.{case}.{method}.n") == (found < 2).sum()


def test_the_numbers_of_the_first_page():
    said = " ".join((ROOT / "README.md").read_text("utf-8").split())
    hidden = {way: reported(f"real.second_person.{way}") for way in ("alone", "original", "space_tree")}
    assert f"Of {hidden['alone']['n']} joints hidden so" in said
    for text, way in zip(("the network finds", "the original", "evidence in space with bones"), hidden, strict=True):
        assert f"{text} {100 * hidden[way]['accuracy']:.0f} %" in said
