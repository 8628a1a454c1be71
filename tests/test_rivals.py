"""The rival fusions against brute force over bands, samples and matrices; all begin at the reference views."""

import itertools
import math

import numpy as np
import pytest
import torch
from rigs import random_maps, rig
from scipy.ndimage import map_coordinates

from epiutils.heatmaps import hit_loss, render
from epiutils.studies.rivals import RIVALS, _along

SHAPE, JOINTS = (8, 11), 3
SETTINGS = {"attention": {"joints": JOINTS, "samples": 6, "width": 2}, "dense": {"shape": SHAPE}}
PARAMETERS = {
    "alone": 1, "line_sum": 2, "line_mean": 2, "line_max": 2, "weighted_max": 43, "attention": 22, "dense": 1 + 12 * 88**2
}  # fmt: skip
FUSING = [*RIVALS][1:]


def new(name):
    return RIVALS[name](**SETTINGS.get(name, {}))


def maps(seed, batch=2, views=4):
    return random_maps(batch, views, JOINTS, *SHAPE, seed=seed)


def trained(name, seed=0):
    """The rival with parameters of no particular kind, in float64."""
    module, draw = new(name).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return module


def in_band(F, x, y, x_ref, y_ref, threshold):
    a, b, c = F @ np.array([x, y, 1.0])
    return abs(a * x_ref + b * y_ref + c) <= threshold * np.hypot(a, b)


def literal_lines(collect, h, F, threshold):
    """What each source's band holds for each reference pixel: (V, V, J, H, W), [s, r]."""
    views, joints, height, width = h.shape
    out = np.zeros((views, views, joints, height, width))
    for s, r in itertools.permutations(range(views), 2):
        for y_ref, x_ref in np.ndindex(height, width):
            at = [(y, x) for y, x in np.ndindex(height, width) if in_band(F[s, r], x, y, x_ref, y_ref, threshold)]
            if band := [h[s, :, y, x] for y, x in at]:
                out[s, r, :, y_ref, x_ref] = {"sum": np.sum, "mean": np.mean, "max": np.max}[collect](band, 0)
    return out


@pytest.mark.parametrize("name", FUSING)
def test_each_begins_at_the_reference_views_and_can_leave_them(name):
    module, h, F = new(name), maps(1).float(), rig(1, batch=2, shape=SHAPE)
    fused = module.all_views(h, F)
    torch.testing.assert_close(fused, h, atol=0, rtol=0)
    (fused * random_maps(*h.shape, seed=2).float()).sum().backward()
    assert max(p.grad.abs().max() for p in module.parameters() if p.grad is not None) > 1e-6
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("collect", ["sum", "mean", "max"])
@pytest.mark.parametrize("seed", range(2))
def test_lines_are_collected_as_a_loop_over_the_pixels_does(seed, collect):
    module, h, F = trained(f"line_{collect}", seed), maps(seed, 1), rig(seed, shape=SHAPE)
    with torch.no_grad():
        fused = module.all_views(h, F)[0].numpy()
    lines = literal_lines(collect, h[0].numpy(), F[0].numpy(), module.threshold)
    np.testing.assert_allclose(fused, h[0].numpy() + module.gain.item() * lines.sum(0), atol=1e-9)


def test_the_weighted_maximum_weighs_each_view_by_what_it_and_the_others_see():
    module, h, F = trained("weighted_max", 1), maps(4, 1), rig(4, shape=SHAPE)
    with torch.no_grad():
        fused = module.all_views(h, F)[0].numpy()
    lines = literal_lines("max", h[0].numpy(), F[0].numpy(), module.threshold)
    trust = np.empty((4, JOINTS))
    for v, j in np.ndindex(4, JOINTS):
        values = h[0, v, j].numpy()
        p = np.exp(10 * values) / np.exp(10 * values).sum()
        y, x = np.unravel_index(values.argmax(), SHAPE)
        entropy = -(p * np.log(np.maximum(p, 1e-12))).sum() / math.log(p.size)
        seen = [values.max(), entropy, lines[:, v, j, y, x].sum() / 3]
        trust[v, j] = module.trust(torch.tensor(np.array(seen))).exp().item()
    for r in range(4):
        said = sum(trust[s][:, None, None] * lines[s, r] for s in range(4) if s != r)
        expected = trust[r][:, None, None] * h[0, r].numpy() + module.gain.item() * said
        np.testing.assert_allclose(fused[r], expected, atol=1e-8)


def test_attention_mixes_samples_of_the_epipolar_line():
    module, h, F = trained("attention", 2), maps(2, 1), rig(2, shape=SHAPE)
    Q, K, W = (layer.weight.detach().numpy() for layer in (module.query, module.key, module.value))
    with torch.no_grad():
        fused = module.all_views(h, F)[0].numpy()
    height, width = SHAPE
    for r, y, x in [(0, 0, 0), (1, 3, 7), (2, 7, 10), (3, 5, 2)]:
        expected = h[0, r, :, y, x].numpy().copy()
        for s in set(range(4)) - {r}:
            a, b, c = F[0, s, r].numpy().T @ (x, y, 1.0)
            corners = []  # where the line crosses the border of the map
            for border in (0.0, width - 1.0):
                corners += [(border, -(a * border + c) / b)]
            for border in (0.0, height - 1.0):
                corners += [(-(b * border + c) / a, border)]
            inside = [p for p in corners if -1e-9 <= p[0] <= width - 1 + 1e-9 and -1e-9 <= p[1] <= height - 1 + 1e-9]
            if len(inside) < 2:
                continue  # the line misses the map
            ends = np.array(sorted(inside))[[0, -1]]
            at = ends[0] + np.linspace(0, 1, module.samples)[:, None] * (ends[1] - ends[0])
            v = np.stack([map_coordinates(map_, at.T[::-1], order=1, mode="nearest") for map_ in h[0, s].numpy()], -1)
            score = (Q @ h[0, r, :, y, x].numpy()) @ (v @ K.T).T / math.sqrt(len(Q))
            a_k = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            expected += W @ (a_k @ v)
        np.testing.assert_allclose(fused[r, :, y, x], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_samples_lie_on_the_line_and_reach_from_border_to_border(seed):
    draw = torch.Generator().manual_seed(seed)
    angle, at = 6.3 * torch.rand(50, generator=draw), torch.rand(50, 2, generator=draw) * torch.tensor([10.0, 7.0])
    lines = torch.stack([angle.cos(), angle.sin(), -(angle.cos() * at[:, 0] + angle.sin() * at[:, 1])], -1)
    grid = _along(lines, SHAPE, 9)
    pixels = (grid + 1) / 2 * torch.tensor([10.0, 7.0])
    off = (pixels * lines[:, None, :2]).sum(-1) + lines[:, None, 2]
    assert off.abs().max() < 1e-4
    assert (grid.abs() <= 1 + 1e-5).all()
    ends = grid[:, [0, -1]].abs().amax(-1)
    torch.testing.assert_close(ends, torch.ones_like(ends), atol=1e-4, rtol=0)
    steps = torch.linalg.vector_norm(pixels[:, 1:] - pixels[:, :-1], dim=-1)
    torch.testing.assert_close(steps, steps.mean(-1, keepdim=True).expand_as(steps), atol=1e-4, rtol=0)
    beyond = lines - torch.tensor([0.0, 0.0, 1.0]) * 40
    assert (_along(beyond, SHAPE, 9).abs().amax(-1) > 1).all()


def test_the_dense_matrices_are_one_for_each_ordered_pair():
    module, h, F = trained("dense", 3), maps(3), rig(3, batch=2, shape=SHAPE)
    expected = h.clone()
    for k, (s, r) in enumerate(itertools.permutations(range(4), 2)):
        expected[:, r] += (h[:, s].flatten(-2) @ module.matrices[k].detach()).view_as(h[:, r])
    torch.testing.assert_close(module.all_views(h, F).detach(), expected)


@pytest.mark.parametrize("name", FUSING)
def test_each_learns(name):
    torch.manual_seed(0)
    F = rig(6, batch=2, shape=SHAPE)
    target = render(torch.rand(2, 4, JOINTS, 2) * torch.tensor([10.0, 7.0]), SHAPE, sigma=1.0)
    h = target + 0.5 * torch.rand_like(target)
    module, weight, alone = new(name), torch.ones(2, 4, JOINTS), new("alone")
    assert torch.equal(alone.all_views(h, F), h)
    first = hit_loss(alone.sharpness * h, target, weight).item()
    module.log_sharpness.requires_grad_(False)  # or it would be that which is learned
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        value = hit_loss(module.sharpness * module.all_views(h, F), target, weight)
        value.backward()
        optimizer.step()
    assert value.item() < first - 2e-3


def test_a_line_is_collected_in_no_other_way():
    with pytest.raises(ValueError, match="'sum', 'mean' or 'max', got 'least'"):
        RIVALS["line_sum"].func("least")
