"""Evidence in space on the benchmark: what is stored is what the code finds, and what other studies stored of HRNet."""

import numpy as np
import pytest
import torch

from epiutils.data import people
from epiutils.data.dataset import Benchmark, MultiView
from epiutils.data.views import BONES, JOINTS
from epiutils.metrics import joint_mean, mpjpe
from epiutils.networks.predict import predict
from epiutils.space import poses
from epiutils.studies import evidence, runs
from epiutils.studies.predicted import found_back, heatmaps_once

CHOSEN = slice(0, 3)
SIDES = ("hip", "kne", "ank", "sho", "elb", "wri")


@pytest.fixture(scope="module")
def stored():
    return evidence.load()


@pytest.mark.parametrize("point", ["original", "best"])
def test_hrnet_and_the_repaired_module_are_those_of_the_runs(stored, point):
    of_runs = runs.load(point)
    for name, run in (("hrnet", "hrnet"), ("repaired", "repaired_frozen")):
        right, mm = stored[point][name]["found"], stored[point][name]["mm"]
        differ = np.nan_to_num(right) != np.nan_to_num(of_runs[run]["found"][0])
        assert differ.mean() < 2e-3  # heatmaps in half precision: joints on the very limit
        assert np.nanmedian(np.abs(mm - of_runs[run]["dlt_mm"][0])) < 0.5


@pytest.mark.parametrize("point", ["original", "best", "strong", "w32"])
def test_what_is_stored_is_whole_and_ordered_as_it_must_be(stored, point):
    names = ("hrnet", "repaired", "robust_reprojected", "space", "space_tree", "space_parts")
    free = {f"{of}_{how}" for of in ("hrnet", "space") for how in ("free", "longer")}
    assert set(stored[point]) == {name + flip for name in names for flip in ("", "_flip")} | (
        free if point in ("best", "strong") else set()
    )
    about = {"command", "device", "torch"} | ({"calibration"} if point == "w32" else set())  # read as it was then
    assert about == stored["meta"][point].keys() == stored["meta"][f"{point}_flip"].keys()
    for values in stored[point].values():
        assert values["found"].shape == (420, 4, 17) and values["mm"].shape == (420, 17)
        assert set(np.unique(np.nan_to_num(values["found"], nan=1))) <= {0, 1}
        counted = np.isfinite(values["found"])
        assert (counted == np.isfinite(stored[point]["hrnet"]["found"])).all()  # the same joints for all
        assert np.isfinite(values["mm"]).mean() > 0.98 and np.nanmin(values["mm"]) >= 0


def test_a_few_instants_anew_give_what_is_stored(stored):
    seen = heatmaps_once("best", scenes=CHOSEN, progress=False)
    body = evidence.training_parts().body
    X = poses(seen.output, seen.P, evidence.calibrated("best").together(), body).numpy()
    mm = 1000 * mpjpe(X, seen.joints_3d.numpy())
    np.testing.assert_allclose(mm, stored["best"]["space_tree"]["mm"][CHOSEN], rtol=2e-3, atol=0.3)
    right = found_back(X, seen)
    np.testing.assert_array_equal(right, stored["best"]["space_tree"]["found"][CHOSEN])


def test_no_test_person_and_no_tested_action_is_in_what_is_learned():
    parts = evidence.training_parts()
    some = [i for i in Benchmark("train-large").instants if i.subject in (1, 5, 6, 7)]
    assert len(parts.poses) == 2 * len(some) and not {i.subject for i in some} & {8, 9, 11}
    assert set(parts.actions) == set(people.ACTIONS)
    for action in people.ACTIONS[:3]:
        assert action not in parts.without(action).actions
    assert parts.body.bones == tuple(map(tuple, BONES)) and abs(parts.body.mean.sum() - 1) < 1e-9


def test_bones_help_and_space_beats_rejection(stored):
    """The claim itself, at every point: a sign that would turn if the order of joints or views were mixed up."""
    for point in ("original", "best", "strong"):
        alone, robust, space, tree = (
            joint_mean(stored[point][name]["found"]) for name in ("hrnet", "robust_reprojected", "space", "space_tree")
        )
        assert alone < robust < space < tree + 0.002


def test_true_joints_projected_back_are_found_and_others_are_not():
    seen = heatmaps_once("best", scenes=CHOSEN, progress=False)
    true = seen.joints_3d.numpy()
    right = found_back(true, seen)
    assert (right[np.isfinite(right)] == 1).all() and np.isfinite(right).mean() > 0.9
    away = true.copy()
    away[0, 3] += 1.0  # metres
    away[1, 5] = np.nan
    changed = found_back(away, seen)
    assert (np.nan_to_num(changed[0, :, 3]) == 0).all() and (np.nan_to_num(changed[1, :, 5]) == 0).all()
    changed[0, :, 3], changed[1, :, 5] = right[0, :, 3], right[1, :, 5]
    np.testing.assert_array_equal(changed, right)


class Constant(torch.nn.Module):
    """Says the same maps (J, H, W) of every picture."""

    def __init__(self, maps):
        super().__init__()
        self.maps = torch.nn.Parameter(maps)

    def forward(self, pictures):
        return self.maps.expand(len(pictures), *self.maps.shape)


def test_the_flip_test_is_the_mean_with_the_mirrored_maps_left_and_right_exchanged():
    maps = torch.rand(17, 5, 8, generator=torch.Generator().manual_seed(0))
    data = MultiView([Benchmark("test").prepare(progress=False, only=[0])[0]])
    flipped = predict(Constant(maps), data, flip=True).output[0, 0]
    assert torch.equal(predict(Constant(maps), data).output[0, 0], maps)
    for j, name in enumerate(JOINTS):
        other = JOINTS.index({"l": "r", "r": "l"}[name[0]] + name[1:]) if name[1:] in SIDES else j
        for x in range(8):  # pixel x shows input pixel 4 x; its mirror image 255 − 4 x is nearest to map pixel 8 − x
            mirrored = maps[other, :, min(8 - x, 7)]
            torch.testing.assert_close(flipped[j, :, x], (maps[j, :, x] + mirrored) / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--points", "nowhere.safetensors"],
            "expected original, best, strong, or a file of weights, got 'nowhere.saf",
        ),
        (["--points", "--free", "better"], "argument --free: expected original, best, strong, or a file"),
        (
            ["--points", "--free", "best", "--steps", "0"],
            "argument --steps: expected a whole number from 1 on, got '0'",
        ),
        (["--batch", "-4"], "argument --batch: expected a whole number from 1 on, got '-4'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_work(arguments, said, capsys):
    with pytest.raises(SystemExit):
        evidence._main(arguments)
    assert said in " ".join(capsys.readouterr().err.split())
