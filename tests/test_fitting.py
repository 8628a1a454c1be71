"""Pairs of views that fusion modules learn from, the network behind them, and their trainings."""

import itertools
import math

import numpy as np
import pytest
import torch
from scenes import SHAPE, TOY, WEIGHTS, literal_views, made_up, repaired, toy
from torch import nn

from epiutils.cameras import homogeneous
from epiutils.data import people
from epiutils.data.dataset import MultiView
from epiutils.epipolar import epipolar_lines
from epiutils.fusion import OriginalFusion, SimpleFusion
from epiutils.heatmaps import HEATMAP_FROM_INPUT, joints_mse
from epiutils.metrics import joint_mean
from epiutils.networks.hrnet import PoseHRNet, normalise
from epiutils.networks.loop import batches, train
from epiutils.networks.predict import predict
from epiutils.studies import fitting, runs
from epiutils.studies.fitting import PAIRS, FusedNetwork, ViewPairs, train_pairs, train_together
from epiutils.studies.predicted import found_by


def fusion(initial=WEIGHTS, shape=SHAPE, **settings) -> OriginalFusion:
    return OriginalFusion(shape=shape, initial=initial, **settings)


def batch_of(data, indices=range(4)) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate([data[i] for i in indices])


@pytest.fixture(scope="module")
def people_data() -> MultiView:
    return MultiView([people.scene(9, "walk", frame, 2, size=64) for frame in (3, 50)], size=64)


@pytest.mark.parametrize("kind", ["heatmaps", "pictures"])
def test_pairs_are_all_ordered_ones_of_each_instant_and_give_the_views_that_they_name(people_data, kind):
    assert sorted(PAIRS) == [(s, r) for s in range(4) for r in range(4) if s != r]
    if kind == "heatmaps":
        seen = made_up(2, twice=0.5)
        data, instants = ViewPairs(seen), [{key: value[n] for key, value in vars(seen).items()} for n in range(3)]
    else:
        data, instants = ViewPairs(people_data), [people_data[n] for n in range(2)]
        assert data[0]["source"].dtype == torch.uint8
    assert len(list(data)) == len(data) == 12 * len(instants)  # they come to an end
    assert data[0].keys() == {"source", "reference", "target", "weight", "F"}
    for (n, instant), (k, (s, r)) in itertools.product(enumerate(instants), enumerate(PAIRS)):
        sample, shown = data[12 * n + k], instant["output" if kind == "heatmaps" else "image"]
        assert torch.equal(sample["source"], shown[s]) and torch.equal(sample["reference"], shown[r])
        assert torch.equal(sample["target"], instant["target"][r]) and torch.equal(
            sample["weight"], instant["weight"][r]
        )
        x = (instant["joints"] @ torch.tensor(HEATMAP_FROM_INPUT[:2, :2]))[[s, r]]
        off, other_way = (
            (epipolar_lines(sample["F"], a) * homogeneous(b)).sum(-1).abs().max() for a, b in (x, x.flip(0))
        )
        assert off < 1e-6 and other_way > 0.1


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_without_weights_the_fused_maps_are_the_networks_of_the_reference(people_data, training):
    batch, network = batch_of(ViewPairs(people_data), (0, 7, 13, 22)), toy()
    fused = FusedNetwork(network, fusion(0 * WEIGHTS, (16, 16))).train(training)
    both = torch.cat([batch["source"], batch["reference"]])
    with torch.no_grad():
        given, maps = fused(batch["source"], batch["reference"], batch["F"]), network(normalise(both))
        alone = network(normalise(batch["reference"]))
    torch.testing.assert_close(given, maps[4:], rtol=1e-5, atol=1e-5)
    assert maps[4:].abs().max() > 0.1
    same = torch.allclose(given, alone, rtol=1e-4, atol=1e-4)
    assert same != training  # in training, both pictures share one batch normalisation


@pytest.mark.parametrize("module", [fusion(shape=(16, 16)), SimpleFusion(initial=WEIGHTS)])
def test_pictures_through_a_frozen_network_are_its_heatmaps_fused(people_data, module):
    network = toy()
    pictures, heatmaps = ViewPairs(people_data), ViewPairs(predict(network, people_data))
    batch, maps = (batch_of(data, (1, 8, 14, 23)) for data in (pictures, heatmaps))
    with torch.no_grad():
        expected = module(maps["source"], maps["reference"], maps["F"])
        given = FusedNetwork(network, module)(batch["source"], batch["reference"], batch["F"])
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert (expected - maps["reference"]).abs().max() > 0.1


class Double(nn.Module):
    def forward(self, images):
        return images.double()


@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_reaches_the_nine_weights_and_the_network_through_both_pictures(people_data, seed):
    """It is that of the two pictures seen apart, in float64."""
    network, module = toy(seed).double(), fusion(shape=(16, 16)).double()
    batch = batch_of(ViewPairs(people_data), (2, 17))
    images = [normalise(batch[key]).double() for key in ("source", "reference")]
    parameters = [*network.parameters(), module.weight]
    literal = module(network(images[0]), network(images[1]), batch["F"])
    expected = torch.autograd.grad(literal.square().sum(), parameters)

    fused = FusedNetwork(nn.Sequential(Double(), network), module)
    fused(batch["source"], batch["reference"], batch["F"]).square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))
    assert module.weight.grad.abs().min() > 0 and network.conv1.weight.grad.abs().max() > 0
    without = module(network(images[0]).detach(), network(images[1]), batch["F"]).square().sum()
    (without,) = torch.autograd.grad(without, network.conv1.weight)
    assert not torch.allclose(without, network.conv1.weight.grad, rtol=1e-3)  # the source has its part in it


def test_all_views_through_the_network_are_its_heatmaps_and_these_fused(people_data):
    network, module = toy(), repaired()
    batch, fused = batch_of(people_data, range(2)), FusedNetwork(network, module).eval()
    with torch.no_grad():
        maps, given = fused.all_views(batch["image"], batch["F"])
        expected = torch.stack([torch.cat([network(normalise(view)) for view in views]) for views in batch["image"]])
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(given, literal_views(module, expected, batch["F"]), rtol=1e-3, atol=1e-4)
    assert maps.shape == given.shape == (2, 4, 17, 16, 16) and not torch.allclose(maps, given, atol=1e-2)


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
    train(model.train(), runs._free_loss, people_data, steps=2, batch=1, progress=False)
    assert model.training  # and it is so in a loop that switches to training itself
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if key.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved & statistics == (set() if frozen else statistics)
    assert {key for key in before if key.endswith("weight")} <= moved  # scale and shift still learn


# Losses and trainings


def literal_mse(output, target, weight) -> float:
    """HRNet's: half the mean square of the joints that weigh."""
    return 0.5 * float(((output - target).double() * weight[..., None, None]).square().mean().detach())


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


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_views_are_trained_together_on_what_each_becomes_by_the_others(seed, squares):
    predicted, module = made_up(seed, scenes=4, twice=0.5), repaired()
    fused = literal_views(module, predicted.output, predicted.F)
    hit = literal_hit(module.sharpness * fused, predicted.target, predicted.weight)
    expected = literal_mse(fused, predicted.target, predicted.weight) if squares else hit
    before = [p.detach().clone() for p in module.parameters()]
    trained, followed = train_together(lambda: module, predicted, seed, 2, squares=squares)
    assert trained is module and followed["path"].shape == (0, 2, 9) and followed["losses"].shape == (2,)
    assert followed["losses"][0] == pytest.approx(expected, rel=1e-4)
    assert not any(map(torch.equal, module.parameters(), before))


def test_training_the_views_together_finds_more_joints_the_same_for_the_same_seed():
    predicted = made_up(5, scenes=6, twice=0.5)
    module, followed = train_together(lambda: repaired(0.1), predicted, 3, 40)
    assert followed["losses"][-1] < followed["losses"][0]
    assert joint_mean(found_by(module, predicted)) > joint_mean(found_by(None, predicted)) + 0.05
    first, again, other = (train_together(runs.TOGETHER["weighted_max"], predicted, seed, 2)[0] for seed in (3, 3, 4))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_the_loss_of_a_free_network_is_that_of_the_fused_maps_and_of_its_own(people_data):
    network, batch = toy(), batch_of(people_data, range(2))
    model = FusedNetwork(network, repaired(), frozen_statistics=True).train()
    loss = runs._free_loss(model, batch, 0.0)
    maps, fused = model.all_views(batch["image"], batch["F"])
    p, q = (torch.softmax(10 * x.double().flatten(-2), -1) for x in (maps, batch["target"]))
    divergence = ((q * (q / p).log()).sum(-1) * batch["weight"]).sum().item() / batch["weight"].sum().item()
    hit = literal_hit(model.fusion.sharpness * fused, batch["target"], batch["weight"])
    mse = literal_mse(maps, batch["target"], batch["weight"])
    assert loss.item() == pytest.approx(hit + 100 * mse + 0.25 * divergence, rel=1e-4)
    loss.backward()
    assert model.fusion.gain.grad != 0 and network.conv1.weight.grad.abs().max() > 0


def test_pairs_are_trained_on_as_the_original_did_and_followed():
    """HRNet's loss, AdamW without decay at one rate; weights and gradients are those before each step."""
    data, modules, steps = ViewPairs(made_up(twice=0.5)), [fusion(), fusion()], 8
    given = train_pairs(modules[0], data, steps, 6, 0.05, seed=3)
    literal = torch.optim.AdamW(modules[1].parameters(), lr=0.05, weight_decay=0)
    path, losses, weight = [], [], modules[1].weight
    for drawn in itertools.islice(batches(36, 6, 3), steps):
        batch = batch_of(data, [index for _, index in drawn])
        literal.zero_grad()
        fused, truth = modules[1](batch["source"], batch["reference"], batch["F"]), (batch["target"], batch["weight"])
        joints_mse(fused, *truth).backward()
        path.append([part.detach().flatten().numpy().copy() for part in (weight, weight.grad)])
        losses.append(literal_mse(fused.detach(), *truth))
        literal.step()
    assert given["path"].shape == (steps, 2, 9) and given["path"].dtype == np.float32
    assert given["path"][0, 0].tolist() == WEIGHTS.flatten().tolist() and 0 < batch["weight"].mean() < 1
    np.testing.assert_allclose(given["path"], path, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(given["losses"], losses, rtol=1e-5)
    torch.testing.assert_close(*(module.weight for module in modules), rtol=1e-4, atol=1e-6)
    assert given["losses"][-1] < 0.5 * given["losses"][0]


@pytest.mark.parametrize("module", [fusion(), SimpleFusion(initial=WEIGHTS)], ids=lambda m: type(m).__name__)
def test_watch_names_weights_and_gradients_row_by_row(module):
    (weight,) = module.parameters()
    (weight.flatten() * torch.arange(9)).sum().backward()
    expected = {f"w{k}": v for k, v in enumerate(WEIGHTS.flatten().tolist())} | {f"g{k}": float(k) for k in range(9)}
    given = fitting._watch(module)
    assert list(given.items()) == list(expected.items()) and all(type(v) is float for v in given.values())
    for width in (4, 9):  # a network of nine channels has normalisations of nine parameters
        assert fitting._watch(FusedNetwork(PoseHRNet(**TOY | {"width": width}), module)) == expected
