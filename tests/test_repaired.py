"""The repaired module against literal loops; what makes it safe: identity at first, any views, missing views."""

import itertools

import numpy as np
import pytest
import torch
from rigs import look_at, random_maps, rig

from epiutils.epipolar import fundamental_from_cameras, transfer
from epiutils.fusion import RepairedFusion, of_sources, pairs, sum_at_references, view_pairs
from epiutils.heatmaps import hit_loss, render
from epiutils.redirect import Pencil

SHAPE, VIEWS, JOINTS = (8, 11), 4, 2
SWITCHES = [
    dict(zip(("normalise", "multiply", "confidence"), on, strict=True))
    for on in itertools.product((True, False), repeat=3)
]


def trained(seed=0, threshold=1.2, **switches) -> RepairedFusion:
    """A module with parameters of no particular kind, in float64."""
    module, draw = RepairedFusion(threshold, **switches).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        module.offset -= 4.0
        module.slope *= module.slope.requires_grad
    return module


def maps(seed, views=VIEWS, batch=1):
    return random_maps(batch, views, JOINTS, *SHAPE, seed=seed)


def literal(module, sources, reference, F):
    """One joint: sources (S, H, W), reference (H, W) and F (S, 3, 3) as arrays, by the formula, pixel by pixel."""
    w, beta = module.weight.detach().numpy(), module.sharpness.item()

    def weigh(image):
        H, W = image.shape
        padded = np.zeros((H + 2, W + 2))
        padded[1:-1, 1:-1] = image
        return np.array([[(w * padded[y : y + 3, x : x + 3]).sum() for x in range(W)] for y in range(H)])

    fused = weigh(reference)
    for source, f in zip(sources, F, strict=True):
        values = weigh(source)
        odds = np.exp(module.slope.item() * values.max() + module.offset.item())
        if module.normalise:
            values = np.exp(beta * values) / np.exp(beta * values).sum()
        band = np.zeros_like(fused)
        for (y, x), value in np.ndenumerate(values):
            a, b, c = f @ (x, y, 1.0)
            for y_ref, x_ref in np.ndindex(*fused.shape):
                if abs(a * x_ref + b * y_ref + c) <= module.threshold * np.hypot(a, b):
                    band[y_ref, x_ref] += odds * value
        said = np.log1p(np.maximum(band, 0)) if module.multiply else band
        fused = fused + module.gain.item() / beta * said
    return fused


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("ny"[v] for v in s.values()))
@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_formula_pixel_by_pixel(seed, switches):
    module, h, F = trained(seed, **switches), maps(seed), rig(seed)
    sources = [0, 2, 3]
    with torch.no_grad():
        fused = module(h[:, sources], h[:, 1], F[:, sources, 1])[0]
    for j in range(JOINTS):
        expected = literal(module, h[0, sources, j].numpy(), h[0, 1, j].numpy(), F[0, sources, 1].numpy())
        np.testing.assert_allclose(fused[j], expected, atol=1e-9)


def test_there_are_thirteen_parameters():
    assert sum(p.numel() for p in RepairedFusion().parameters() if p.requires_grad) == 13
    assert sum(p.numel() for p in RepairedFusion(confidence=False).parameters() if p.requires_grad) == 12


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("ny"[v] for v in s.values()))
def test_at_first_it_is_the_identity_and_it_can_leave_it(switches):
    module, h, F = RepairedFusion(**switches), maps(3).float(), rig(3)
    fused = module.all_views(h, F)
    assert torch.equal(fused, h)
    assert torch.equal(module(h[:, 1:], h[:, 0], F[:, 1:, 0]), h[:, 0])
    (fused * random_maps(*h.shape, seed=9).float()).sum().backward()
    assert module.gain.grad.abs() > 1e-6 and module.weight.grad.abs().min() > 1e-6


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_all_views_are_each_view_fused_with_the_others_in_any_order(seed, views):
    module, h, F = trained(seed), maps(seed, views, batch=2), rig(seed, views, batch=2)
    with torch.no_grad():
        fused = module.all_views(h, F)
        kept = module.all_views(h, Pencil.from_fundamental(view_pairs(F), SHAPE, module.threshold))
        for r in range(views):
            others = np.random.default_rng(seed).permutation([s for s in range(views) if s != r])
            torch.testing.assert_close(fused[:, r], module(h[:, others], h[:, r], F[:, others, r]), atol=1e-10, rtol=0)
    torch.testing.assert_close(fused, kept, atol=0, rtol=0)
    order = torch.from_numpy(np.random.default_rng(seed + 9).permutation(views))
    with torch.no_grad():
        again = module.all_views(h[:, order], F[:, order][:, :, order])
    torch.testing.assert_close(again, fused[:, order], atol=1e-10, rtol=0)


def test_one_source_may_come_without_its_dimension_and_f_without_a_batch():
    module, h, F = trained(1), maps(1, batch=2), rig(1).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        expected = module(h[:, :1], h[:, 1], F[:, :1, 1])
        for f in (F[:, 0, 1], F[0, 0, 1], Pencil.from_fundamental(F[:, 0, 1], SHAPE, module.threshold)):
            torch.testing.assert_close(module(h[:, 0], h[:, 1], f), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_view_is_as_if_it_were_not_there_whatever_its_maps_hold(seed):
    module, h, F = trained(seed), maps(seed, batch=2), rig(seed, batch=2)
    present = torch.tensor([[True, True, False, True], [True, True, True, True]])
    spoilt = h.masked_fill(~present[:, :, None, None, None], float("nan"))
    with torch.no_grad():
        fused, whole = module.all_views(spoilt, F, present), module.all_views(h, F)
        left = [0, 1, 3]
        without = module.all_views(h[:, left], F[:, left][:, :, left])
        one = module(spoilt[:, 1:], h[:, 0], F[:, 1:, 0], present[:, 1:])
        lost = module(h[:1, left], torch.zeros_like(h[:1, 2]), F[:1, left, 2])
    torch.testing.assert_close(fused[0, left], without[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(fused[1], whole[1], atol=1e-10, rtol=0)
    torch.testing.assert_close(one, fused[:, 0], atol=1e-10, rtol=0)
    torch.testing.assert_close(fused[0, 2], lost[0], atol=1e-10, rtol=0)  # what the others say of the view itself


def test_gradients_reach_parameters_and_maps_as_finite_differences_say():
    module, F = trained(2), rig(2, views=3)
    h = (0.3 * maps(2, views=3)).requires_grad_()  # as high as heatmaps are: odds grow with exp(8 h)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(h, *values):
        return torch.func.functional_call(
            _AllViews(module), {f"module.{n}": v for n, v in zip(names, values, strict=True)}, (h, F)
        )

    assert torch.autograd.gradcheck(run, (h, *values), atol=1e-6)


class _AllViews(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h, F):
        return self.module.all_views(h, F)


@pytest.mark.parametrize("seed", range(3))
def test_two_views_that_are_right_find_the_joint_that_a_third_has_lost(seed):
    shape, rng = (40, 48), np.random.default_rng(seed)
    angles = np.array([0.0, 1.4, 2.9]) + rng.uniform(0, 6)
    scale = np.diag([shape[1] / 320, shape[0] / 240, 1])
    cameras = [look_at((4 * np.cos(a), 4 * np.sin(a), 1.5), (0, 0, 1)) for a in angles]
    joint = rng.uniform((-0.5, -0.5, 0.6), (0.5, 0.5, 1.4))
    x = torch.tensor(np.stack([scale[:2, :2] @ camera.project(joint) for camera in cameras]))
    F = torch.zeros(1, 3, 3, 3, 3, dtype=torch.float64)
    for s, r in itertools.permutations(range(3), 2):
        F[0, s, r] = torch.from_numpy(transfer(fundamental_from_cameras(cameras[s], cameras[r]), scale, scale))
    h = render(x, shape)[None, :, None]
    wrong = torch.tensor([5.0, 33.0], dtype=torch.float64)
    h[0, 0, 0] = 0.5 * render(wrong, shape) + 0.1 * render(x[0], shape, sigma=6)  # a second thought at the right place
    module = RepairedFusion().double()
    with torch.no_grad():
        module.gain.fill_(1.0)
    fused = module.all_views(h, F)[0, :, 0]
    at = torch.stack([fused.flatten(-2).argmax(-1) % shape[1], fused.flatten(-2).argmax(-1) // shape[1]], -1)
    assert torch.linalg.vector_norm(wrong - x[0]) > 5
    assert (torch.linalg.vector_norm(at - x, dim=-1) < 2.5).all()


@pytest.mark.parametrize("seed", range(2))
def test_a_source_without_confidence_says_nothing(seed):
    module, h, F = trained(seed), maps(seed), rig(seed)
    with torch.no_grad():
        module.slope.fill_(0)
        module.offset.fill_(-60)
        fused = module.all_views(h, F)
    torch.testing.assert_close(fused, module.weigh(h), atol=1e-12, rtol=0)


def test_training_lowers_the_loss_from_that_of_the_reference_alone():
    torch.manual_seed(0)
    F = rig(5, shape=(24, 32), batch=2)
    target = render(torch.rand(2, 4, 3, 2) * torch.tensor([20.0, 14.0]) + 6, (24, 32))
    h = target + 0.4 * torch.rand_like(target)
    module, weight = RepairedFusion(), torch.ones(2, 4, 3)
    loss = lambda: hit_loss(module.sharpness * module.all_views(h, F), target, weight)
    first, optimizer = loss().item(), torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert value.item() < 0.8 * first


@pytest.mark.parametrize("views", [2, 3, 4, 6])
def test_pairs_go_to_their_sources_and_references(views):
    source, reference = pairs(views)
    assert list(zip(source, reference, strict=True)) == [(s, r) for s in range(views) for r in range(views) if s != r]
    values = random_maps(2, views, 3, seed=views)
    assert torch.equal(of_sources(values), torch.stack([values[:, s] for s in source], 1))
    each = random_maps(2, len(source), 3, seed=7)
    expected = torch.stack([sum(each[:, k] for k in range(len(source)) if reference[k] == r) for r in range(views)], 1)
    torch.testing.assert_close(sum_at_references(each), expected)
    F = random_maps(2, views, views, 3, 3, seed=8)
    assert torch.equal(view_pairs(F)[len(source)], F[1, source[0], reference[0]])


def test_bad_input_is_named():
    module = RepairedFusion()
    with pytest.raises(ValueError, match="rank 3"):
        module(torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4), torch.eye(3))
    with pytest.raises(ValueError, match="Pencil"):
        F = rig(0)[:, 0, 1]
        module(torch.rand(1, 2, *SHAPE), torch.rand(1, 2, 5, 5), Pencil.from_fundamental(F, SHAPE, 1.0))
