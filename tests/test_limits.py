"""What the limits change is what they say, and nothing else; oracles bound what they bound."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import made_up, repaired

from epiutils.data import people
from epiutils.epipolar import epipoles, point_line_distance
from epiutils.fusion import RepairedFusion
from epiutils.heatmaps import found
from epiutils.studies.limits import FOCAL, _by_views, _claimed, _hide, _shifted, _with_oracle, once, other_rig
from epiutils.studies.predicted import found_by

SHAPE = (60, 80)


def off_lines(predicted) -> np.ndarray:
    """Distances (N, 12, J) in heatmap px of the joints from the lines of their partners."""
    x = predicted.joints / 4
    each = [point_line_distance(predicted.F[:, s, r], x[:, s], x[:, r]) for s in range(4) for r in range(4) if s != r]
    return torch.stack(each, 1).numpy()


@pytest.mark.parametrize("px", [5.0, 20.0])
def test_a_calibration_that_is_off_moves_lines_and_epipoles_by_what_it_says_and_not_the_pictures(px):
    predicted = made_up(3, shape=SHAPE)
    moved = _shifted(predicted, px, seed=1)
    unit = predicted.K[0, 0, 0, 0].item() / FOCAL / 4  # heatmap px a px; all made-up cameras are alike
    assert off_lines(predicted).max() < 1e-6
    distance = off_lines(moved) / unit
    assert px / 4 < distance.mean() < 2 * px and distance.max() < 4 * px  # both pictures move, and lines turn a little
    assert all(getattr(moved, key) is value for key, value in vars(predicted).items() if key != "F")
    largest, _, least = torch.linalg.svdvals(moved.F[:, 0, 1]).T
    assert least.max() < 1e-9 * largest.max()
    before, after = (e[:, :2] / e[:, 2:] for e in (epipoles(p.F[:, 0, 1])[1] for p in (predicted, moved)))
    step = torch.linalg.vector_norm(after - before, dim=-1)  # an epipole moves with the picture that it lies in
    torch.testing.assert_close(step, torch.full_like(step, px * unit), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(_shifted(predicted, 0.0).F, predicted.F, atol=1e-12, rtol=0)
    assert torch.equal(_shifted(predicted, px, 1).F, moved.F)
    assert not torch.allclose(_shifted(predicted, px, 2).F, moved.F)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_fewer_views_are_every_subset_fused_on_its_own(views):
    predicted, module = made_up(6, shape=SHAPE, lost=0.4), repaired()
    right = _by_views(module, predicted, views)
    subsets = [c for c in np.ndindex(*(4,) * views) if sorted(set(c)) == list(c)]
    assert right.shape == (3, views * len(subsets), 5)
    for k, chosen in enumerate(map(list, subsets)):
        fused = module.all_views(predicted.output[:, chosen], predicted.F[:, chosen][:, :, chosen]).detach()
        for n in range(3):
            expected = found(fused[n], predicted.target[n, chosen])
            np.testing.assert_array_equal(right[n, views * k : views * (k + 1)], expected)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_patches_hide_about_that_share_of_the_joints_and_what_they_cover_is_not_visible(share):
    views = people.scene(9, "wave", 10, 3)
    hidden = _hide(views, share, seed=4)
    for before, after in zip(views, hidden, strict=True):
        lost = before.visible & ~after.visible
        assert share <= lost.sum() / before.visible.sum() + 1e-9 < share + 0.35
        assert not (after.visible & ~before.visible).any()
        x, y = np.clip(np.round(before.joints).astype(int), 0, 255).T
        assert (after.image[y, x] != before.image[y, x]).any(-1)[lost].all()
        seen = after.visible
        assert (after.image[y, x] == before.image[y, x]).all(-1)[seen].all()
        assert (before.image == people.scene(9, "wave", 10, 3)[views.index(before)].image).all()  # not its input
    again, nothing = _hide(views, share, seed=4), _hide(views, 0.0, 0)
    assert all((a.image == b.image).all() for a, b in zip(hidden, again, strict=True))
    for before, after in zip(views, nothing, strict=True):
        assert (before.image == after.image).all() and (before.visible == after.visible).all()
    with pytest.raises(ValueError, match="nobody knows which of its joints are visible"):
        _hide([replace(views[0], visible=None)], share, 0)


@pytest.mark.parametrize("seed", range(4))
def test_another_rig_sees_the_person_from_elsewhere(seed):
    rig = other_rig(seed)
    assert [camera.size for camera in rig] == [camera.size for camera in people.rig()]
    assert min(np.linalg.norm(a.C - b.C) for a in rig for b in people.rig()) > 0.3
    views = people.scene(9, "walk", 20, 5, rig=rig)
    for view, camera in zip(views, rig, strict=True):
        np.testing.assert_allclose(view.camera.C, camera.C, atol=1e-9)
        assert ((view.joints > 0) & (view.joints < 256)).all()
        np.testing.assert_allclose(view.camera.project(view.joints_3d), view.joints, atol=1e-6)


def test_with_perfect_sources_each_view_keeps_its_own_map_and_is_told_the_others_targets():
    predicted, module = made_up(7, shape=SHAPE, lost=0.5), repaired()
    told = _with_oracle(module, predicted, "perfect")
    assert told.target is predicted.target and told.F is predicted.F
    for n, r in np.ndindex(3, 4):
        mixed = predicted.target[n].clone()
        mixed[r] = predicted.output[n, r]
        fused = module.all_views(mixed[None], predicted.F[n, None])[0, r].detach()
        torch.testing.assert_close(told.output[n, r], fused, atol=1e-6, rtol=0)
    assert np.nanmean(found_by(None, told)) > np.nanmean(found_by(module, predicted)) + 0.1
    right = found_by(None, _with_oracle(module, predicted, "right"))
    assert np.nanmean(right) >= np.nanmean(found_by(None, predicted))
    with pytest.raises(ValueError, match="'true'"):
        _with_oracle(module, predicted, "true")


def test_sources_that_are_wrong_say_nothing_at_all():
    predicted, module = made_up(8, shape=SHAPE), RepairedFusion()  # every view is right …
    torch.nn.init.constant_(module.gain, 0.8)
    elsewhere = made_up(9, shape=SHAPE, lost=1.0).output
    predicted.output.add_(1.05 * elsewhere)  # … but for a higher peak at another place
    alone = found_by(None, predicted)
    lost = np.nan_to_num(alone).sum(1) == 0  # (N, J) joints that no view finds
    assert lost.sum() > 5
    silent = _with_oracle(module, predicted, "right")
    own, fused = (p.output.transpose(1, 2)[lost] for p in (predicted, silent))
    torch.testing.assert_close(fused, own, atol=1e-9, rtol=0)
    np.testing.assert_array_equal(found_by(None, silent).transpose(0, 2, 1)[lost], alone.transpose(0, 2, 1)[lost])
    spoken = found_by(module, predicted)
    assert np.nanmean(spoken.transpose(0, 2, 1)[lost]) > 0.2  # had they spoken, their second peaks would have met


def test_arrays_are_computed_once_for_what_decides_them(tmp_path, monkeypatch):
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    asked = []

    def make():
        asked.append(1)
        return {"found": np.array([[1.0, np.nan]]), "losses": [0.5, 0.25], "weight": torch.eye(2), "share": 0.2}

    for depends, count in (([1.0], 1), ([1.0], 1), ([2.0], 2), ([1.0, torch.ones(2)], 3)):
        made = once("made", depends, make)
        assert len(asked) == count and all(isinstance(values, np.ndarray) for values in made.values())
        np.testing.assert_array_equal(made["found"], [[1.0, np.nan]])
        assert made["found"].dtype == np.float64 and made["losses"].tolist() == [0.5, 0.25] and made["share"] == 0.2


@pytest.mark.parametrize("seed", range(3))
def test_what_is_claimed_is_how_often_it_is_so(seed):
    """Joints drawn from the maps, or with the rest of the odds from anywhere, lie as often near the peak as claimed."""
    draw = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(40, 5, 24, 36, generator=draw).cumsum(-1).cumsum(-2).flatten(-2), -1)
    p, right = p.view(40, 5, 24, 36), torch.rand(40, 5, generator=draw)
    peak, hits, n = p.flatten(-2).argmax(-1), 0, 400
    for _ in range(n):
        true = torch.multinomial(p.flatten(0, 1).flatten(1), 1, generator=draw).view(40, 5)
        anywhere = torch.randint(24 * 36, (40, 5), generator=draw)
        true = torch.where(torch.rand(40, 5, generator=draw) < right, true, anywhere)
        away = torch.hypot((true % 36 - peak % 36).float(), (true // 36 - peak // 36).float())
        hits = hits + (away <= 3.2)
    inside = (peak % 36 > 2) & (peak % 36 < 33) & (peak // 36 > 2) & (peak // 36 < 21)  # the disk is whole
    claimed, seen = _claimed(p, right)[inside], hits[inside] / n
    assert inside.sum() > 20 and claimed.std() > 0.05
    assert ((claimed - seen).abs() < 5 * (claimed * (1 - claimed) / n).sqrt() + 1e-3).all()
