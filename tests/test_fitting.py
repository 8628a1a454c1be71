"""Pairs and sets of views that fusion modules learn from, the network behind them, and their losses."""

import itertools
import math

import numpy as np
import pytest
import torch
from scenes import SHAPE, TOY, WEIGHTS, literal_views, made_up, repaired, toy
from torch import nn

from epiutils.cameras import homogeneous
from epiutils.data import people
from epiutils.data.dataset import Augmentation, MultiView
from epiutils.data.views import Predicted
from epiutils.epipolar import epipolar_lines
from epiutils.fusion import OriginalFusion, RepairedFusion, SimpleFusion
from epiutils.heatmaps import HEATMAP_FROM_INPUT
from epiutils.metrics import joint_mean
from epiutils.networks.hrnet import PoseHRNet, normalise
from epiutils.networks.loop import batches, train
from epiutils.networks.predict import predict
from epiutils.studies import fitting
from epiutils.studies.fitting import (
    PAIRS,
    FusedNetwork,
    HeatmapPairs,
    HeatmapScenes,
    PicturePairs,
    followed,
    free_loss,
    fusion_loss,
    train_pairs,
    views_loss,
)
from epiutils.studies.predicted import found_by


def fusion(initial=WEIGHTS, shape=SHAPE, **settings) -> OriginalFusion:
    return OriginalFusion(shape=shape, initial=initial, **settings)


def batch_of(data, indices=range(4)) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([data[i] for i in indices])


def distance_from_lines(x_src, x_ref, F) -> float:
    return float((epipolar_lines(F, x_src) * homogeneous(x_ref)).sum(-1).abs().max())


@pytest.fixture(scope="module")
def people_data() -> MultiView:
    return MultiView([people.scene(9, "walk", frame, 2, size=64) for frame in (3, 50)], size=64)


def test_the_pairs_are_all_ordered_ones_each_once():
    assert sorted(PAIRS) == [(s, r) for s in range(4) for r in range(4) if s != r]


@pytest.mark.parametrize("seed", range(3))
def test_heatmap_pairs_give_the_views_that_they_name(seed):
    predicted = made_up(seed, twice=0.5)
    data = HeatmapPairs(predicted)
    assert len(data) == 36 and data[0].keys() == {"source", "reference", "target", "weight", "F"}
    for n, (k, (s, r)) in itertools.product(range(3), enumerate(PAIRS)):
        sample = data[12 * n + k]
        assert torch.equal(sample["source"], predicted.output[n, s])
        assert torch.equal(sample["reference"], predicted.output[n, r])
        assert torch.equal(sample["target"], predicted.target[n, r])
        assert torch.equal(sample["weight"], predicted.weight[n, r])
        joints = predicted.joints[n] / 4
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
        predicted = Predicted(output=predicted.pop("image"), **predicted)
        pairs = HeatmapPairs(predicted)
        assert predicted.weight.all() == (augmentation is None)  # some joints are shifted out of the picture
        on_map = predicted.joints @ torch.tensor(HEATMAP_FROM_INPUT[:2, :2])
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
    predicted = made_up(seed, twice=0.5)
    data = HeatmapScenes(predicted)
    assert len(data) == 3 and len(list(torch.utils.data.DataLoader(data, 2))) == 2
    for n in range(3):
        expected = {"heatmaps": "output", "target": "target", "weight": "weight", "F": "F"}
        assert data[n].keys() == expected.keys()
        assert all(torch.equal(data[n][key], getattr(predicted, name)[n]) for key, name in expected.items())


@pytest.mark.parametrize("seed", range(2))
def test_the_loss_of_all_views_is_that_of_each_fused_with_the_others(seed):
    batch, module = batch_of(HeatmapScenes(made_up(seed, twice=0.5)), range(3)), repaired()
    loss = views_loss(module, batch)
    fused = literal_views(module, batch["heatmaps"], batch["F"])
    expected = literal_hit(module.sharpness * fused, batch["target"], batch["weight"])
    assert loss.item() == pytest.approx(expected, rel=1e-4) and loss.shape == ()
    assert views_loss(module, batch, 0.5) == loss  # at any time of the training
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())


def test_training_the_views_together_finds_more_joints():
    predicted, module = made_up(5, scenes=6, twice=0.5), RepairedFusion(1.5)
    alone = joint_mean(found_by(None, predicted))
    _, rows = train(module, views_loss, HeatmapScenes(predicted), steps=40, batch=3, lr=0.05, progress=False)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert joint_mean(found_by(module, predicted)) > alone + 0.05


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


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_half_the_mean_square_of_the_joints_that_weigh(seed):
    batch, module = batch_of(HeatmapPairs(made_up(seed, twice=0.5)), range(0, 36, 9)), fusion()
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
    data, module = HeatmapPairs(made_up(twice=0.5)), fusion()
    first = np.random.default_rng((0, 0)).permutation(36)[:6]
    (gradient,) = torch.autograd.grad(fusion_loss(module, batch_of(data, first)), module.weight)
    _, rows = train(module, fusion_loss, data, steps=30, batch=6, lr=0.05, log=fitting._watch, progress=False)
    names = [*(f"w{k}" for k in range(9)), *(f"g{k}" for k in range(9))]
    assert [key for key in rows[0] if key in names] == names
    assert [rows[0][f"w{k}"] for k in range(9)] == WEIGHTS.flatten().tolist()
    torch.testing.assert_close(torch.tensor([rows[0][f"g{k}"] for k in range(9)]), gradient.flatten())
    assert rows[1]["w4"] != rows[0]["w4"] and rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_pairs_are_trained_on_as_the_original_did_and_followed():
    data, modules = HeatmapPairs(made_up(twice=0.5)), [fusion(), fusion()]
    rows = train_pairs(modules[0], data, 4, 6, 0.05, seed=3)
    literal = torch.optim.AdamW(modules[1].parameters(), lr=0.05, weight_decay=0)
    path, losses = [], []
    for drawn in itertools.islice(batches(36, 6, 3), 4):
        literal.zero_grad()
        loss = fusion_loss(modules[1], batch_of(data, [index for _, index in drawn]))
        loss.backward()
        path.append([modules[1].weight.detach().flatten().numpy().copy(), modules[1].weight.grad.flatten().numpy()])
        path[-1][1] = path[-1][1].copy()
        losses.append(loss.item())
        literal.step()
    given = followed(rows)
    assert given["path"].shape == (4, 2, 9) and given["path"].dtype == np.float32
    np.testing.assert_allclose(given["path"], path, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(given["losses"], losses, rtol=1e-5)
    torch.testing.assert_close(modules[0].weight, modules[1].weight, rtol=1e-4, atol=1e-6)
    assert followed([{"loss": 1.0}, {"loss": 0.5}])["path"].shape == (0, 2, 9)


@pytest.mark.parametrize("module", [fusion(), SimpleFusion(initial=WEIGHTS)], ids=lambda m: type(m).__name__)
def test_watch_names_weights_and_gradients_row_by_row(module):
    (weight,) = module.parameters()
    (weight.flatten() * torch.arange(9)).sum().backward()
    expected = {f"w{k}": v for k, v in enumerate(WEIGHTS.flatten().tolist())} | {f"g{k}": float(k) for k in range(9)}
    assert fitting._watch(module) == expected
    assert list(fitting._watch(module)) == list(expected) and all(
        type(v) is float for v in fitting._watch(module).values()
    )
    for width in (4, 9):  # a network of nine channels has normalisations of nine parameters
        assert fitting._watch(FusedNetwork(PoseHRNet(**TOY | {"width": width}), module)) == expected
