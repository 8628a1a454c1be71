"""Pairs, scores and losses of fusion against literal loops over scenes and views; heatmaps that are computed once."""

import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from rigs import look_at, world_points
from test_human36m import labels, write_jpeg, write_karfly
from torch import nn

from epiutils.data import people
from epiutils.data.dataset import SPLITS, Augmentation, Benchmark, MultiView
from epiutils.data.human36m import Human36M
from epiutils.epipolar import epipolar_lines, fundamental_from_cameras, homogeneous, transfer
from epiutils.fusion import OriginalFusion, RepairedFusion, SimpleFusion
from epiutils.heatmaps import HEATMAP_FROM_INPUT, accuracy, render
from epiutils.metrics import bootstrap, joint_mean
from epiutils.networks.hrnet import PoseHRNet, load_checkpoint, normalise, save_checkpoint
from epiutils.networks.loop import train
from epiutils.networks.predict import predict
from epiutils.studies import predicted as experiments
from epiutils.studies.fitting import (
    PAIRS,
    FusedNetwork,
    HeatmapPairs,
    HeatmapScenes,
    PicturePairs,
    free_loss,
    fusion_loss,
    views_loss,
    watch,
)
from epiutils.studies.predicted import (
    choose,
    fuse_views,
    heatmaps_once,
    open_split,
    score,
    score_views,
    summary,
    training_pictures,
)

SHAPE, JOINTS = (24, 36), 5
WEIGHTS = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.6, -0.1], [0.1, 0.0, 0.2]])  # no symmetry hides a flip
FAINT = WEIGHTS / 30  # the ridge of a source is then about as high as the reference
TOY = {"width": 4, "modules": (1, 1, 1), "blocks": 1, "stem": (8, 8), "stem_blocks": 1}
TEST = ((9,), 1, 1, 30_000)  # 14 instants


def fusion(initial=WEIGHTS, shape=SHAPE, **settings) -> OriginalFusion:
    return OriginalFusion(shape=shape, initial=initial, **settings)


def toy(seed=0, **settings) -> PoseHRNet:
    torch.manual_seed(seed)
    network = PoseHRNet(**TOY | settings).eval()
    nn.init.normal_(network.final_layer.weight)
    return network


def made_up(seed=0, scenes=3) -> dict[str, torch.Tensor]:
    """What `predict` gives, for scenes of four cameras of their own; half of the maps have a higher peak elsewhere."""
    rng = np.random.default_rng(seed)
    scale = np.diag([SHAPE[1] / 320, SHAPE[0] / 240, 1])
    joints, F = np.empty((scenes, 4, JOINTS, 2)), np.zeros((scenes, 4, 4, 3, 3))
    for n in range(scenes):
        angles = rng.uniform(0, 2 * np.pi) + np.array([0, 1.3, 2.9, 4.4])
        centres = np.stack([4 * np.cos(angles), 4 * np.sin(angles), rng.uniform(0, 3, 4)], -1)
        cameras = [look_at(C, (0, 0, 1), roll=rng.uniform(-0.6, 0.6)) for C in centres]
        points = world_points(10 * seed + n, JOINTS)
        for v, camera in enumerate(cameras):
            joints[n, v] = camera.project(points) @ scale[:2, :2]
        for s, r in PAIRS:
            F[n, s, r] = transfer(fundamental_from_cameras(cameras[s], cameras[r]), scale, scale)
    joints, wrong = torch.from_numpy(joints), torch.from_numpy(rng.uniform((4, 4), (31, 19), joints.shape))
    lost = torch.from_numpy(rng.random(joints.shape[:-1]) < 0.5)
    return {
        "output": (render(joints, SHAPE, peak=0.7) + render(wrong, SHAPE, peak=lost.double())).float(),
        "target": render(joints.round(), SHAPE).float(),
        "weight": torch.from_numpy(rng.random(joints.shape[:-1]) < 0.8).float(),
        "visible": torch.from_numpy(rng.random(joints.shape[:-1]) < 0.6),
        "joints": joints,
        "F": torch.from_numpy(F),
    }


def literal_right(output, target):
    """HRNet's rule for one map, in Python; nan where the joint is left out."""
    (y, x), (y0, x0) = (np.unravel_index(int(m.argmax()), m.shape) if m.max() > 0 else (0, 0) for m in (output, target))
    unit = np.array(target.shape) / 10
    return float(np.hypot((x - x0) / unit[0], (y - y0) / unit[1]) < 0.5) if x0 > 1 and y0 > 1 else math.nan


def batch_of(data, indices=range(4)) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([data[i] for i in indices])


def distance_from_lines(x_src, x_ref, F) -> float:
    return float((epipolar_lines(F, x_src) * homogeneous(x_ref)).sum(-1).abs().max())


@pytest.fixture(scope="module")
def people_data() -> MultiView:
    return MultiView([people.scene(9, "walk", frame, 2, size=64) for frame in (3, 50)], size=64)


# Pairs of views


def test_the_pairs_are_all_ordered_ones_each_once():
    assert sorted(PAIRS) == [(s, r) for s in range(4) for r in range(4) if s != r]


@pytest.mark.parametrize("seed", range(3))
def test_heatmap_pairs_give_the_views_that_they_name(seed):
    predicted = made_up(seed)
    data = HeatmapPairs(predicted)
    assert len(data) == 36 and data[0].keys() == {"source", "reference", "target", "weight", "F"}
    for n, (k, (s, r)) in itertools.product(range(3), enumerate(PAIRS)):
        sample = data[12 * n + k]
        assert torch.equal(sample["source"], predicted["output"][n, s])
        assert torch.equal(sample["reference"], predicted["output"][n, r])
        assert torch.equal(sample["target"], predicted["target"][n, r])
        assert torch.equal(sample["weight"], predicted["weight"][n, r])
        joints = predicted["joints"][n]
        assert distance_from_lines(joints[s], joints[r], sample["F"]) < 1e-6
        assert distance_from_lines(joints[r], joints[s], sample["F"]) > 0.1  # the other way it does not hold


@pytest.mark.parametrize("augmentation", [None, Augmentation(shift=1.0)], ids=["plain", "augmented"])
def test_picture_pairs_are_the_same_pairs_as_pictures(people_data, augmentation):
    scenes = MultiView(people_data.scenes, augmentation, size=64, seed=3)
    data = PicturePairs(scenes)
    assert len(data) == 24
    for epoch in (0, 2):
        samples = [scenes.sample(n, epoch) for n in range(2)]
        predicted = torch.utils.data.default_collate(samples)
        pairs = HeatmapPairs(predicted | {"output": predicted["image"]})
        assert predicted["weight"].all() == (augmentation is None)  # some joints are shifted out of the picture
        on_map = predicted["joints"] @ torch.tensor(HEATMAP_FROM_INPUT[:2, :2])
        for i in range(len(data)):
            sample, (s, r) = data.sample(i, epoch), PAIRS[i % 12]
            assert sample.keys() == pairs[i].keys() and sample["source"].dtype == torch.uint8
            assert all(torch.equal(sample[key], value) for key, value in pairs[i].items())
            assert distance_from_lines(on_map[i // 12, s], on_map[i // 12, r], sample["F"]) < 1e-6
    for key, value in data[13].items():
        assert torch.equal(value, data.sample(13, 0)[key])
    assert torch.equal(data.sample(13, 0)["source"], data.sample(13, 2)["source"]) == (augmentation is None)


def test_pairs_come_to_an_end(people_data):
    for data in (HeatmapPairs(made_up(scenes=1)), PicturePairs(MultiView(people_data.scenes[:1], size=64))):
        assert len(list(data)) == len(data) == 12


# The network and the module together


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_without_weights_the_fused_maps_are_the_networks_of_the_reference(people_data, training):
    batch, network = batch_of(PicturePairs(people_data), (0, 7, 13, 22)), toy()
    fused = FusedNetwork(network, fusion(0 * WEIGHTS, (16, 16))).train(training)
    both = torch.cat([batch["source"], batch["reference"]])
    with torch.no_grad():
        given, maps = fused(batch["source"], batch["reference"], batch["F"]), network(normalise(both))
        alone = network(normalise(batch["reference"]))
    torch.testing.assert_close(given, maps[4:], rtol=1e-5, atol=1e-5)
    assert maps[4:].abs().max() > 0.1
    same = torch.allclose(given, alone, rtol=1e-4, atol=1e-4)
    assert same != training  # in training, both pictures share one batch normalisation


@pytest.mark.parametrize("module", [OriginalFusion(shape=(16, 16), initial=WEIGHTS), SimpleFusion(initial=WEIGHTS)])
def test_pictures_through_a_frozen_network_are_its_heatmaps_fused(people_data, module):
    network = toy()
    pictures, heatmaps = PicturePairs(people_data), HeatmapPairs(predict(network, people_data))
    batch, maps = (batch_of(data, (1, 8, 14, 23)) for data in (pictures, heatmaps))
    fused = FusedNetwork(network, module)
    with torch.no_grad():
        expected = module(maps["source"], maps["reference"], maps["F"])
        given = fused(batch["source"], batch["reference"], batch["F"])
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        assert (expected - maps["reference"]).abs().max() > 0.1
        torch.testing.assert_close(fusion_loss(fused, batch), fusion_loss(module, maps), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_reaches_the_nine_weights_and_the_network_through_both_pictures(people_data, seed):
    """It is that of the two pictures seen apart, in float64."""
    network, module = toy(seed).double(), fusion(shape=(16, 16)).double()
    batch = batch_of(PicturePairs(people_data), (2, 17))
    images = [normalise(batch[key]).double() for key in ("source", "reference")]
    parameters = [*network.parameters(), module.weight]
    literal = module(network(images[0]), network(images[1]), batch["F"])
    expected = torch.autograd.grad(literal.square().sum(), parameters)

    fused = FusedNetwork(nn.Sequential(_Double(), network), module)
    fused(batch["source"], batch["reference"], batch["F"]).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
    assert module.weight.grad.abs().min() > 0 and network.conv1.weight.grad.abs().max() > 0
    (without,) = torch.autograd.grad(
        module(network(images[0]).detach(), network(images[1]), batch["F"]).square().sum(), network.conv1.weight
    )
    assert not torch.allclose(without, network.conv1.weight.grad, rtol=1e-3)  # the source has its part in it


class _Double(nn.Module):
    def forward(self, images):
        return images.double()


# All views together


def repaired(gain=0.8, **settings) -> RepairedFusion:
    """A repaired module in the middle of its training."""
    module = RepairedFusion(1.5, **settings)
    with torch.no_grad():
        module.weight.copy_(WEIGHTS)
        module.gain.fill_(gain)
    return module


def literal_views(module, maps, F):
    """Each view of each instant fused with all others, one at a time: maps (B, V, J, H, W)."""
    views = range(maps.shape[1])
    rows = [
        [module(maps[None, n, [s for s in views if s != r]], maps[None, n, r], F[None, n, [s for s in views if s != r], r])
         for r in views]
        for n in range(len(maps))
    ]  # fmt: skip
    return torch.stack([torch.cat(row) for row in rows])


def literal_hit(logits, target, weight) -> float:
    """The mean over the joints that weigh of −log of the probability of a place that counts as right."""
    total = 0.0
    for z, t, w in zip(logits.flatten(0, -3).double(), target.flatten(0, -3), weight.flatten(), strict=True):
        y0, x0 = np.unravel_index(int(t.argmax()), t.shape)
        y, x = np.mgrid[: t.shape[0], : t.shape[1]]
        near = np.hypot((x - x0) / (t.shape[0] / 10), (y - y0) / (t.shape[1] / 10)) < 0.5
        p = torch.softmax(z.flatten(), 0).reshape(t.shape).detach().numpy()
        total -= float(w) * math.log(p[near].sum())
    return total / float(weight.sum())


@pytest.mark.parametrize("seed", range(2))
def test_heatmap_scenes_are_all_views_of_an_instant(seed):
    predicted = made_up(seed)
    data = HeatmapScenes(predicted)
    assert len(data) == 3 and len(list(torch.utils.data.DataLoader(data, 2))) == 2
    for n in range(3):
        expected = {"heatmaps": "output", "target": "target", "weight": "weight", "F": "F"}
        assert data[n].keys() == expected.keys()
        assert all(torch.equal(data[n][key], predicted[name][n]) for key, name in expected.items())


@pytest.mark.parametrize("seed", range(2))
def test_the_loss_of_all_views_is_that_of_each_fused_with_the_others(seed):
    batch, module = batch_of(HeatmapScenes(made_up(seed)), range(3)), repaired()
    loss = views_loss(module, batch)
    fused = literal_views(module, batch["heatmaps"], batch["F"])
    expected = literal_hit(module.sharpness * fused, batch["target"], batch["weight"])
    assert loss.item() == pytest.approx(expected, rel=1e-4) and loss.shape == ()
    assert views_loss(module, batch, 0.5) == loss  # at any time of the training
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_training_the_views_together_finds_more_joints():
    predicted, module = made_up(5, scenes=6), RepairedFusion(1.5)
    alone = joint_mean(score_views(None, predicted)["found"])
    _, rows = train(module, views_loss, HeatmapScenes(predicted), steps=40, batch=3, lr=0.05, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert joint_mean(score_views(module, predicted)["found"]) > alone + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_scored_views_are_a_literal_loop(seed):
    predicted, module = made_up(seed), repaired()
    scored, given = score_views(module, predicted), list(fuse_views(module, predicted))
    with torch.no_grad():
        fused = literal_views(module, predicted["output"], predicted["F"])
    torch.testing.assert_close(torch.stack(given), fused, rtol=1e-4, atol=1e-4)
    assert scored.keys() == {"found", "visible"} and not any(maps.requires_grad for maps in given)
    for n, v, j in np.ndindex(3, 4, JOINTS):
        right = literal_right(given[n][v, j], predicted["target"][n, v, j])
        np.testing.assert_array_equal(scored["found"][n, v, j], right)
    np.testing.assert_array_equal(scored["visible"], predicted["visible"])
    assert (scored["found"] != score_views(None, predicted)["found"]).any()
    np.testing.assert_array_equal(score_views(None, predicted)["found"], score(None, predicted, 1)["found"][:, :, 0])
    assert summary(scored)["accuracy"] == joint_mean(scored["found"])


def test_only_the_chosen_instants_are_fused_in_their_order():
    predicted, module = made_up(), repaired()
    whole = list(fuse_views(module, predicted))
    for chosen in ([2], [2, 0], [], range(0, 3, 2)):
        given = list(fuse_views(module, predicted, chosen))
        assert len(given) == len(chosen) and all(torch.equal(g, whole[n]) for g, n in zip(given, chosen, strict=True))
    assert torch.equal(next(fuse_views(None, predicted, [1])), predicted["output"][1])


def test_all_views_through_the_network_are_its_heatmaps_and_these_fused(people_data):
    network, module = toy(), repaired()
    batch, fused = batch_of(people_data, range(2)), FusedNetwork(network, module).eval()
    with torch.no_grad():
        maps, given = fused.all_views(batch["image"], batch["F"])
        views = [[network(normalise(view))[0] for view in instant] for instant in batch["image"]]
        expected = torch.stack([torch.stack(row) for row in views])
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(given, literal_views(module, expected, batch["F"]), rtol=1e-3, atol=1e-4)
    assert maps.shape == given.shape == (2, 4, 17, 16, 16) and not torch.allclose(maps, given, atol=1e-2)


def test_the_loss_of_a_free_network_is_that_of_the_fused_maps_and_of_its_own(people_data):
    network, batch = toy(), batch_of(people_data, range(2))
    model = FusedNetwork(network, repaired(), frozen_statistics=True).train()
    loss = free_loss(model, batch)
    maps, fused = model.all_views(batch["image"], batch["F"])
    weight = batch["weight"][..., None, None]
    mse = 0.5 * ((maps - batch["target"]) * weight).double().square().mean().item()
    p, q = (torch.softmax(10 * x.double().flatten(-2), -1) for x in (maps, batch["target"]))
    divergence = ((q * (q / p).log()).sum(-1) * batch["weight"]).sum().item() / batch["weight"].sum().item()
    hit = literal_hit(model.fusion.sharpness * fused, batch["target"], batch["weight"])
    assert loss.item() == pytest.approx(hit + 100 * mse + 0.25 * divergence, rel=1e-4)
    loss.backward()
    assert model.fusion.gain.grad != 0 and network.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_do_not_move_and_are_what_training_normalises_with(people_data, frozen):
    network = toy()
    with torch.no_grad():
        network.final_layer.weight *= 0.1  # heatmaps as high as trained ones
    model = FusedNetwork(network, repaired(), frozen_statistics=frozen)
    assert model.train() is model and model.training and network.training and model.fusion.training
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batch = batch_of(people_data, range(2))
    with torch.no_grad():
        training, evaluating = (model.train(mode).all_views(batch["image"], batch["F"])[0] for mode in (True, False))
    assert torch.equal(training, evaluating) == frozen
    train(model.train(), free_loss, people_data, steps=2, batch=1, progress=False)
    assert model.training  # and it is so in a loop that switches to training itself
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {
        key for key in before if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert moved & statistics == (set() if frozen else statistics)
    assert {key for key in before if key.endswith("weight")} <= moved  # scale and shift still learn


# The loss


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_half_the_mean_square_of_the_joints_that_weigh(seed):
    batch, module = batch_of(HeatmapPairs(made_up(seed)), range(0, 36, 9)), fusion()
    loss = fusion_loss(module, batch)
    fused = module(batch["source"], batch["reference"], batch["F"]).detach()
    literal = sum(
        float(w**2 * (o - t).double().square().sum())
        for output, target, weight in zip(fused, batch["target"], batch["weight"], strict=True)
        for o, t, w in zip(output, target, weight, strict=True)
    )
    assert loss.item() == pytest.approx(0.5 * literal / fused.numel(), rel=1e-5)
    assert loss.shape == () and loss.requires_grad and 0 < batch["weight"].mean() < 1
    ignored = batch["target"] + 10 * (1 - batch["weight"])[..., None, None]
    assert fusion_loss(module, batch | {"target": ignored}, 0.5) == loss  # at any time of the training
    assert fusion_loss(module, batch | {"weight": 1 - batch["weight"]}) > 0


def test_train_takes_it_and_what_is_watched_is_of_before_the_step():
    data, module = HeatmapPairs(made_up()), fusion()
    first = np.random.default_rng((0, 0)).permutation(36)[:6]
    (gradient,) = torch.autograd.grad(fusion_loss(module, batch_of(data, first)), module.weight)
    _, rows = train(module, fusion_loss, data, steps=30, batch=6, lr=0.05, log=watch, progress=False)
    names = [*(f"w{k}" for k in range(9)), *(f"g{k}" for k in range(9))]
    assert [key for key in rows[0] if key in names] == names
    assert [rows[0][f"w{k}"] for k in range(9)] == WEIGHTS.flatten().tolist()
    torch.testing.assert_close(torch.tensor([rows[0][f"g{k}"] for k in range(9)]), gradient.flatten())
    assert rows[1]["w4"] != rows[0]["w4"] and rows[-1]["loss"] < 0.5 * rows[0]["loss"]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_network_stays_while_the_nine_weights_train(people_data, frozen):
    network = toy()
    network.requires_grad_(not frozen)
    fused = FusedNetwork(network, fusion(shape=(16, 16)))
    before = network.final_layer.weight.clone(), fused.fusion.weight.clone()
    train(fused, fusion_loss, PicturePairs(people_data), steps=2, batch=2, log=watch, progress=False)
    assert torch.equal(network.final_layer.weight, before[0]) == frozen
    assert not torch.equal(fused.fusion.weight, before[1])


# What is watched


@pytest.mark.parametrize("module", [fusion(), SimpleFusion(initial=WEIGHTS)], ids=lambda m: type(m).__name__)
def test_watch_names_weights_and_gradients_row_by_row(module):
    (weight,) = module.parameters()
    (weight.flatten() * torch.arange(9)).sum().backward()
    expected = {f"w{k}": v for k, v in enumerate(WEIGHTS.flatten().tolist())} | {f"g{k}": float(k) for k in range(9)}
    assert watch(module) == expected
    assert list(watch(module)) == list(expected) and all(type(v) is float for v in watch(module).values())
    for width in (4, 9):  # a network of nine channels has normalisations of nine parameters
        assert watch(FusedNetwork(PoseHRNet(**TOY | {"width": width}), module)) == expected


# The score


@pytest.mark.parametrize("sources", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_a_literal_loop_over_scenes_references_and_sources(seed, sources):
    predicted, module = made_up(seed), fusion(FAINT, threshold=1.5, method="dense")
    scored = score(fusion(FAINT, threshold=1.5), predicted, sources)
    assert scored.keys() == {"found", "visible"}
    assert scored["found"].shape == scored["visible"].shape == (3, 4, sources, JOINTS)
    expected = np.empty((3, 4, sources, JOINTS))
    for n, r, k in np.ndindex(3, 4, sources):
        s = (r + 1 + k) % 4
        source, reference = (predicted["output"][n, v][None] for v in (s, r))
        with torch.no_grad():
            fused = module(source, reference, predicted["F"][n, s, r])[0]
        for j in range(JOINTS):
            expected[n, r, k, j] = literal_right(fused[j], predicted["target"][n, r, j])
            assert scored["visible"][n, r, k, j] == predicted["visible"][n, r, j]
    np.testing.assert_array_equal(scored["found"], expected)
    assert 0 < np.nanmean(expected) < 1
    if sources > 1:
        assert (np.nan_to_num(expected[:, :, 0]) != np.nan_to_num(expected[:, :, 1])).any()


@pytest.mark.parametrize("seed", range(3))
def test_without_a_module_the_score_is_the_accuracy_of_the_reference_views(seed):
    predicted = made_up(seed)
    predicted["target"][:, :, 1] = 0  # a joint that is nowhere
    alone = score(None, predicted)["found"]
    for n, r, j in np.ndindex(3, 4, JOINTS):
        right = literal_right(predicted["output"][n, r, j], predicted["target"][n, r, j])
        np.testing.assert_array_equal(alone[n, r, :, j], [right] * 3)
    flat = (predicted[key].flatten(0, 1) for key in ("output", "target"))
    expected = accuracy(*flat)
    assert joint_mean(alone) == pytest.approx(expected, abs=1e-12) and 0 < expected < 1
    assert joint_mean(score(None, predicted, 1)["found"]) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_array_equal(score(fusion(0 * WEIGHTS), predicted)["found"], alone)


def test_what_the_module_gives_is_scored_against_the_reference_view():
    predicted = made_up()
    alone = score(None, predicted)["found"]
    np.testing.assert_array_equal(score(lambda source, reference, F: reference, predicted)["found"], alone)
    crossed = score(lambda source, reference, F: source, predicted, 2)["found"]
    for n, r, k, j in np.ndindex(3, 4, 2, JOINTS):
        right = literal_right(predicted["output"][n, (r + 1 + k) % 4, j], predicted["target"][n, r, j])
        np.testing.assert_array_equal(crossed[n, r, k, j], right)
    assert np.nanmin(score(None, predicted | {"output": predicted["target"]})["found"]) == 1


def test_scoring_changes_nothing_and_asks_for_no_gradient():
    predicted, module = made_up(scenes=1), fusion()
    before = {key: value.clone() for key, value in predicted.items()}
    pairs = 0

    def fuse(source, reference, F):
        nonlocal pairs
        pairs += len(source)
        assert not torch.is_grad_enabled()
        assert source.shape == reference.shape == (len(F), JOINTS, *SHAPE) and F.shape[1:] == (3, 3)
        return module(source, reference, F)

    score(fuse, predicted)
    assert pairs == 12 and module.weight.grad is None and torch.is_grad_enabled()
    assert all(torch.equal(value, before[key]) for key, value in predicted.items())


@pytest.mark.parametrize("seed", range(3))
def test_the_summary_splits_the_accuracy_into_that_of_visible_and_of_hidden_joints(seed):
    predicted = made_up(seed, scenes=4)
    given = summary(score(None, predicted))
    output, target = (predicted[key].flatten(0, 1) for key in ("output", "target"))
    seen = predicted["visible"].flatten(0, 1)[..., None, None]
    assert given.keys() == {"accuracy", "accuracy_ci", "accuracy_visible", "accuracy_occluded"}
    assert given["accuracy"] == pytest.approx(accuracy(output, target), abs=1e-12)
    assert given["accuracy_visible"] == pytest.approx(accuracy(output, target * seen), abs=1e-12)
    assert given["accuracy_occluded"] == pytest.approx(accuracy(output, target * ~seen), abs=1e-12)
    low, high = given["accuracy_ci"]
    assert low < given["accuracy"] < high and (low, high) == bootstrap(score(None, predicted, 1)["found"])


def test_where_no_joint_is_hidden_their_accuracy_is_no_number():
    given = summary(score(None, made_up() | {"visible": torch.ones(3, 4, JOINTS, dtype=torch.bool)}))
    assert given["accuracy_visible"] == given["accuracy"] and math.isnan(given["accuracy_occluded"])


# Heatmaps computed once


def predict_here(network, data, workers, **settings) -> dict:
    """`predict` without the seconds that a worker needs to begin, but of the data as it would get it."""
    assert workers > 0
    return predict(network, pickle.loads(pickle.dumps(data)), **settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of its own, splits of 14 instants, and two checkpoints of a tiny network."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        points = {point: folder / f"{point}.safetensors" for point in ("original", "best")}
        for seed, path in enumerate(points.values()):
            save_checkpoint(path, toy(seed))
        patch.setattr(experiments, "CHECKPOINTS", points)
        patch.setitem(SPLITS, "test", TEST)
        patch.setitem(SPLITS, "train", ((1,), 1, 1, 10_000))
        patch.setenv("EPIUTILS_CACHE", str(folder))
        patch.setattr(experiments, "predict", predict_here)
        yield folder


def kept(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.glob("heatmaps-*")}


@pytest.fixture
def asked(cache, monkeypatch, tmp_path) -> list:
    """Which instants are predicted, by a stand-in that renders nothing, in an empty cache."""
    monkeypatch.setenv("EPIUTILS_CACHE", str(tmp_path))
    monkeypatch.setattr(Benchmark, "prepare", lambda self, **_: self)
    asked = []

    def stand_in(network, data, **_):
        asked.append([data.scenes.dataset.instants[i] for i in data.scenes.indices])
        maps = network.final_layer.weight.detach().flatten()[:24].reshape(4, 6).repeat(len(data), 1, 1, 1, 1)
        return {"output": maps, "target": torch.zeros_like(maps), "joints": torch.zeros(len(data), 1, 1, 2)}

    monkeypatch.setattr(experiments, "predict", stand_in)
    return asked


def test_the_heatmaps_are_what_the_network_sees_in_half_precision(cache, monkeypatch):
    predicted = heatmaps_once("best", scenes=slice(0, 2), progress=False)
    network, data = load_checkpoint(experiments.CHECKPOINTS["best"]), MultiView(Benchmark("test"))
    output = predicted.pop("output")
    assert output.shape == (2, 4, 17, 64, 64) and output.dtype == torch.float32
    for n in range(2):
        sample = data[n]
        with torch.no_grad():
            maps = network(normalise(sample.pop("image")))
        torch.testing.assert_close(output[n], maps, rtol=2**-10, atol=1e-4)
        assert not torch.equal(output[n], maps) and torch.equal(output[n], output[n].half().float())
        assert sample.keys() == predicted.keys()
        for key, value in sample.items():
            assert torch.equal(predicted[key][n], value) and predicted[key].dtype == value.dtype, key

    assert len(list(Benchmark("test").folder.iterdir())) == 2  # no more are rendered than asked for
    ((path, written),) = kept(cache).items()
    assert path.name.startswith("heatmaps-best-test-")
    stored = torch.load(path, weights_only=True)
    assert [key for key, value in stored.items() if value.dtype == torch.float16] == ["output"]
    assert "target" not in stored  # twice the room of all the rest, and soon made of the joints
    for name in ("predict", "load_checkpoint"):
        monkeypatch.delattr(experiments, name)  # once is enough
    monkeypatch.setattr(Benchmark, "__getitem__", None)
    again = heatmaps_once("best", "test", slice(0, 2))
    assert torch.equal(again.pop("output"), output) and all(torch.equal(again[k], v) for k, v in predicted.items())
    assert kept(cache) == {path: written}


def test_a_pair_of_heatmaps_is_the_pair_of_pictures_seen(cache):
    heatmaps = HeatmapPairs(heatmaps_once("best", scenes=slice(0, 2), progress=False))
    benchmark = Benchmark("test")
    pictures = PicturePairs(MultiView([benchmark[0], benchmark[1]]))
    network = load_checkpoint(experiments.CHECKPOINTS["best"])
    for i in (0, 10, 17):
        maps, sample = heatmaps[i], pictures[i]
        for key in ("target", "weight", "F"):
            assert torch.equal(maps[key], sample[key])
        for key in ("source", "reference"):
            with torch.no_grad():
                torch.testing.assert_close(maps[key], network(normalise(sample[key]))[0], rtol=2**-10, atol=1e-4)


def test_the_same_instants_are_predicted_once_however_they_are_named(asked, tmp_path):
    first = heatmaps_once("best", scenes=slice(0, 2))
    for scenes in (slice(2), slice(-14, 2), slice(0, 2, 1), slice(-20, -12)):
        assert torch.equal(heatmaps_once("best", "test", scenes)["output"], first["output"])
    assert asked == [Benchmark("test").instants[:2]] and len(kept(tmp_path)) == 1


def test_another_checkpoint_slice_split_or_renderer_has_another_file(asked, tmp_path, monkeypatch):
    test = Benchmark("test").instants
    expected = []

    def computes(instants, *arguments):
        before = kept(tmp_path)
        given = heatmaps_once(*arguments)
        expected.append(instants)
        assert asked == expected and len(given["output"]) == len(instants)
        assert len(kept(tmp_path)) == len(expected) and before.items() <= kept(tmp_path).items()
        return given["output"]

    best = computes(test[:2], "best", "test", slice(0, 2))
    assert not torch.equal(computes(test[:2], "original", "test", slice(0, 2)), best)
    computes(test[:1], "best", "test", slice(0, 1))
    computes(test[1:3], "best", "test", slice(1, 3))
    computes(test[1::-1], "best", "test", slice(1, None, -1))
    computes(test, "best")
    computes(Benchmark("train").instants[:2], "best", "train", slice(0, 2))
    save_checkpoint(tmp_path / "trained on.safetensors", toy(7))
    with monkeypatch.context() as patch:
        patch.setitem(experiments.CHECKPOINTS, "best", tmp_path / "trained on.safetensors")
        assert not torch.equal(computes(test[:2], "best", "test", slice(0, 2)), best)
    with monkeypatch.context() as patch:
        (tmp_path / "people.py").write_text("different")
        patch.setattr(people, "__file__", str(tmp_path / "people.py"))
        computes(test[:2], "best", "test", slice(0, 2))
    with monkeypatch.context() as patch:
        patch.setitem(SPLITS, "test", ((9,), 1, 1, 40_000))
        computes(Benchmark("test").instants[:2], "best", "test", slice(0, 2))
    assert torch.equal(heatmaps_once("best", "test", slice(0, 2))["output"], best.half().float())
    assert len(asked) == len(expected)


def test_a_file_that_could_not_be_written_is_not_there(asked, tmp_path, monkeypatch):
    def half(_, path):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            heatmaps_once("best", scenes=slice(0, 2))
    assert not list(tmp_path.iterdir())
    heatmaps_once("best", scenes=slice(0, 2))
    assert len(asked) == 2 and len(list(tmp_path.iterdir())) == 1


def test_training_pictures_are_the_splits_own_in_every_epoch(cache):
    data = training_pictures(scenes=slice(1, 2))
    assert len(data) == 12
    views = Benchmark("train")[1]
    for i, (s, r) in enumerate(PAIRS):
        for epoch in (0, 3):
            sample = data.sample(i, epoch)
            np.testing.assert_array_equal(sample["source"], views[s].image)
            np.testing.assert_array_equal(sample["reference"], views[r].image)
    assert len(list(Benchmark("train").folder.glob("s01_*_jpg.npz"))) == 1


# Human3.6M in place of the benchmark


ONE_AND_NINE = {"train": [(1, 2, 1, 1 + 5 * k) for k in range(11)], "test": [(9, 2, 1, 1 + 64 * k) for k in range(130)]}
OTHERS = {"train": (5, 2, 1, 1), "test": (11, 2, 1, 1)}


@pytest.fixture(scope="module")
def human36m(tmp_path_factory):
    """Subjects 1 and 9 among others in karfly's layout, every picture the same grey."""
    folder = tmp_path_factory.mktemp("human36m")
    write_karfly(folder, labels([*ONE_AND_NINE["train"], *ONE_AND_NINE["test"], *OTHERS.values()]))
    for split, subject in (("train", 1), ("test", 9)):
        data = Human36M(folder, split, subjects=(subject,))
        for shot in itertools.chain(*data.shots):
            write_jpeg(folder / shot.picture, np.full((1000, 1000, 3), 128, np.uint8))
    return folder


def test_the_splits_are_subject_1_and_subject_9_as_the_original_had_them(human36m, tmp_path):
    assert type(open_split("test")) is Benchmark and open_split("train").split == "train"
    for split, subject, every in (("train", 1, 5), ("test", 9, 64)):
        data = open_split(split, str(human36m))
        images = [image for *_, image in ONE_AND_NINE[split]]
        assert type(data) is Human36M and [i.image for i in data.instants] == images[::every]
        assert {i.subject for i in data.instants} == {subject}
    with pytest.raises(KeyError, match="train-large"):
        open_split("train-large", str(human36m))
    with pytest.raises(FileNotFoundError):
        open_split("test", str(tmp_path))


def test_instants_are_chosen_by_a_slice_or_evenly_by_number():
    assert choose(range(10)) == range(10) and choose("abcde", slice(1, None, 2)) == range(1, 5, 2)
    assert list(choose(range(10), 3)) == [0, 3, 6] and list(choose(range(420), 5)) == [0, 84, 168, 252, 336]
    for there, wanted in itertools.product((1, 2, 7, 840), (1, 2, 3, 100)):
        chosen = list(choose(range(there), wanted))
        assert len(chosen) == min(there, wanted) and chosen == sorted(set(chosen)) and chosen[0] == 0
        assert chosen[-1] < there and len(set(np.diff(chosen))) <= 1


def test_heatmaps_of_human36m_are_computed_once_by_any_checkpoint(asked, human36m, tmp_path):
    def computes(*arguments, **settings):
        before = len(asked)
        given = heatmaps_once(*arguments, dataset=str(human36m), **settings)
        assert heatmaps_once(*arguments, dataset=str(human36m), **settings)["output"].equal(given["output"])
        assert len(asked) == before + 1 and len(kept(tmp_path)) == before + 1
        return given["output"], [i.image for i in asked[-1]]

    best, test = computes("best", "test")
    assert test == [1, 1 + 64 * 64, 1 + 64 * 128]
    assert computes("best", "test", 2)[1] == test[:2] and computes("best", "train", slice(1, 3))[1] == [26, 51]
    own = tmp_path / "pose_hrnet.safetensors"
    save_checkpoint(own, toy(11))
    assert not torch.equal(computes(str(own), "test")[0], best)
    assert any(path.name.startswith("heatmaps-pose_hrnet-test-") for path in kept(tmp_path))
    file = open_split("test", str(human36m)).file
    changed = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(changed, changed))  # the annotations were written anew
    computes("best", "test")


def test_what_the_network_sees_in_human36m_is_what_it_sees_in_the_benchmark(cache, human36m):
    predicted = heatmaps_once("best", "test", 1, progress=False, dataset=str(human36m))
    sample = MultiView(open_split("test", str(human36m)))[0]
    with torch.no_grad():
        maps = load_checkpoint(experiments.CHECKPOINTS["best"])(normalise(sample.pop("image")))
    torch.testing.assert_close(predicted["output"][0], maps, rtol=2**-10, atol=1e-4)
    assert predicted["visible"].all() and all(torch.equal(predicted[key][0], value) for key, value in sample.items())
    found = summary(score(None, predicted, 1))
    assert math.isnan(found["accuracy_occluded"]) and found["accuracy_visible"] == found["accuracy"]
    pictures = training_pictures("train", 1, str(human36m))
    assert len(pictures) == 12 and pictures[0]["source"].shape == (256, 256, 3)
