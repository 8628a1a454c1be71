"""The fusion modules against literal loops: the original's nine weights, twice; the repaired one, and what makes it safe."""

import copy
import itertools

import numpy as np
import pytest
import torch
from rigs import brute_convolution, brute_members, camera_pair, heatmap_F, look_at, random_maps, rig, views_F
from scipy.signal import correlate2d

from epiutils.fusion import OriginalFusion, RepairedFusion, SimpleFusion, pairs, sum_at_references
from epiutils.heatmaps import render
from epiutils.redirect import Pencil

# The original and the second attempt

SHAPE, REFERENCE = (7, 10), (9, 6)
WEIGHTS = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6], [0.7, 0.8, 0.9]])  # no symmetry hides a flip
BOTH = [OriginalFusion, SimpleFusion]


def pair_F(seed):
    """F between the heatmaps of two seeded cameras."""
    return torch.from_numpy(heatmap_F(camera_pair(seed), SHAPE, REFERENCE))


def modules(initial=WEIGHTS, **settings):
    """Both modules, in float64, with the same weights."""
    original = OriginalFusion(shape=SHAPE, initial=initial, **settings)
    return original.double(), SimpleFusion(initial=initial, **settings).double()


def pair_maps(seed, batch=2, joints=3):
    return random_maps(batch, joints, *SHAPE, seed=seed), random_maps(batch, joints, *REFERENCE, seed=seed + 50)


@pytest.mark.parametrize("make, count", [(OriginalFusion, 9), (SimpleFusion, 9), (RepairedFusion, 13)])
def test_there_are_so_many_trainable_parameters_and_nothing_else_is_stored(make, count):
    module = make()
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count
    assert sum(v.numel() for v in module.state_dict().values()) == count
    if count == 9:
        (weight,) = module.parameters()
        assert 0.05 < weight.abs().max() <= 1 / 3
    else:
        assert not make(confidence=False).slope.requires_grad


@pytest.mark.parametrize("threshold", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_both_modules_are_the_literal_loops_over_windows_and_bands_and_change_no_input(seed, threshold):
    (source, reference), F = pair_maps(seed, joints=2), torch.stack([pair_F(seed), pair_F(seed + 20)])
    before = source.clone(), reference.clone(), F.clone()
    for module in modules(threshold=threshold):
        fused = module(source, reference, F).detach()
        single = copy.deepcopy(module).float()(source.float(), reference.float(), F)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), fused, rtol=0, atol=1e-4)
        for b, j in np.ndindex(2, 2):
            convolved = brute_convolution(source[b, j], WEIGHTS.double().numpy())
            ridge = brute_members(F[b], SHAPE, threshold, REFERENCE) @ convolved.ravel()
            np.testing.assert_allclose(correlate2d(source[b, j], WEIGHTS, mode="same"), convolved, atol=1e-6)
            np.testing.assert_allclose(module.convolve(source)[b, j].detach(), convolved, atol=1e-10)
            np.testing.assert_allclose(fused[b, j] - reference[b, j], ridge.reshape(REFERENCE), atol=1e-10)
    for old, new in zip(before, (source, reference, F), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["plain", "sigmoid"])
@pytest.mark.parametrize("seed", range(5))
def test_original_and_simple_agree_in_values_and_gradients(seed, sigmoid):
    (source, reference), F = pair_maps(seed), torch.stack([pair_F(seed), pair_F(seed + 20)])
    results = []
    for module in modules(threshold=1.0, sigmoid=sigmoid, initial=WEIGHTS / 20):
        s, r = source.clone().requires_grad_(), reference.clone().requires_grad_()
        fused = module(s, r, F)
        gradients = torch.autograd.grad(fused.square().sum(), [*module.parameters(), s, r])
        results.append([fused, gradients[0].reshape(3, 3), *gradients[1:]])
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_each_weight_is_that_of_finite_differences(seed):
    (source, reference), F = pair_maps(seed, joints=1), pair_F(seed)
    for module in modules(sigmoid=True, initial=WEIGHTS / 20):
        ((name, weight),) = module.named_parameters()
        fused = lambda w, m=module, n=name: torch.func.functional_call(m, {n: w}, (source, reference, F))
        assert torch.autograd.gradcheck(fused, weight)


def test_the_methods_and_a_pencil_agree_and_the_sigmoid_squashes():
    (source, reference), F = pair_maps(3, 1, 2), pair_F(3)
    settings = [{"method": "dense"}, {"method": "loop"}, {}, {"sigmoid": True}]
    for dense, loop, fast, squashed in zip(*(modules(**each) for each in settings), strict=True):
        expected = dense(source, reference, F)
        torch.testing.assert_close(fast(source, reference, F), expected)
        torch.testing.assert_close(loop(source, reference, F), expected)
        torch.testing.assert_close(fast(source, reference, Pencil.from_fundamental(F, SHAPE, 1.0, REFERENCE)), expected)
        torch.testing.assert_close(squashed(source, reference, F), 1 / (1 + torch.exp(-expected)))


def test_the_initial_weights_are_copied_and_move_to_a_copy_by_state_dict():
    initial = WEIGHTS.clone()
    for make in BOTH:
        module, other = make(initial=initial), make()
        other.load_state_dict(module.state_dict())
        assert all(torch.equal(p.reshape(3, 3), WEIGHTS) for p in other.parameters())
        torch.nn.init.zeros_(*module.parameters())
        assert torch.equal(initial, WEIGHTS)


@pytest.mark.parametrize("make", BOTH)
def test_bad_input_of_either_module_is_named(make):
    with pytest.raises(ValueError, match=r"initial weights must be \(3, 3\), got \(9,\)"):
        make(initial=torch.ones(9))
    settings, maps = {"shape": SHAPE} if make is OriginalFusion else {}, [m.float() for m in pair_maps(0)]
    with pytest.raises(ValueError, match="must agree but for H, W"):
        make(**settings)(maps[0][:, :2], maps[1], pair_F(0))
    with pytest.raises(ValueError, match="method must be one of"):
        make(**settings, method="fast")(*maps, pair_F(0))
    with pytest.raises(ValueError, match=r"Pencil is for a reference of \(7, 10\), got \(2, 3, 9, 6\)"):
        make(**settings)(*maps, Pencil.from_fundamental(pair_F(0), SHAPE, 1.0))
    with pytest.raises(ValueError, match=r"source heatmaps must be \(..., 7, 10\), got \(2, 3, 10, 7\)"):
        OriginalFusion(shape=SHAPE)(maps[0].mT, maps[1], pair_F(0))


# The repaired module

VIEWS, JOINTS, MAP = 4, 2, (8, 11)
SWITCHES = pytest.mark.parametrize(
    "switches",
    [
        dict(zip(("normalise", "multiply", "confidence"), on, strict=True))
        for on in itertools.product((True, False), repeat=3)
    ],
    ids=lambda s: "".join("ny"[v] for v in s.values()),
)


def trained(seed=0, threshold=1.2, **switches) -> RepairedFusion:
    """A module with parameters of no particular kind, in float64."""
    module, draw = RepairedFusion(threshold, **switches).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        module.offset -= 4.0
        module.slope *= module.slope.requires_grad
    return module


def pencil_of(F, threshold, shape=MAP) -> Pencil:
    """The set-up of all pairs of views: F (B, V, V, 3, 3)."""
    return Pencil.from_fundamental(F[:, *pairs(F.shape[1])].flatten(0, 1), shape, threshold)


def view_maps(seed, views=VIEWS, batch=1):
    return random_maps(batch, views, JOINTS, *MAP, seed=seed)


def literal(module, sources, reference, F):
    """One joint: sources (S, H, W), reference (H, W) and F (S, 3, 3) as arrays, by the formula."""
    w, beta = module.weight.detach().numpy(), module.sharpness.item()
    fused = brute_convolution(reference, w)
    for source, f in zip(sources, F, strict=True):
        values = brute_convolution(source, w)
        odds = np.exp(module.slope.item() * values.max() + module.offset.item())
        if module.normalise:
            values = np.exp(beta * values) / np.exp(beta * values).sum()
        members = brute_members(f, source.shape, module.threshold)  # (reference pixels, source pixels)
        each = (
            members @ values.ravel() if module.collect == "sum" else np.where(members, values.ravel(), -np.inf).max(1)
        )
        ridge = odds * each.reshape(fused.shape)
        evidence = np.log1p(np.maximum(ridge, 0)) if module.multiply else ridge
        fused = fused + module.gain.item() / beta * evidence
    return fused


@SWITCHES
@pytest.mark.parametrize("collect, threshold", [("sum", 1.2), ("max", 0.5)])
@pytest.mark.parametrize("seed", range(2))
def test_the_repaired_module_is_its_formula_pixel_by_pixel(seed, collect, threshold, switches):
    module, h, F = trained(seed, threshold, collect=collect, **switches), view_maps(seed), rig(seed)
    sources = [0, 2, 3]
    with torch.no_grad():
        fused = module(h[:, sources], h[:, 1], F[:, sources, 1])[0]
    for j in range(JOINTS):
        expected = literal(module, h[0, sources, j].numpy(), h[0, 1, j].numpy(), F[0, sources, 1].numpy())
        np.testing.assert_allclose(fused[j], expected, atol=1e-9)


@SWITCHES
def test_at_first_it_is_the_identity_and_it_can_leave_it(switches):
    module, h, F = RepairedFusion(**switches), view_maps(3).float(), rig(3)
    fused = module.all_views(h, F)
    assert torch.equal(fused, h)
    assert torch.equal(module(h[:, 1:], h[:, 0], F[:, 1:, 0]), h[:, 0])
    (fused * random_maps(*h.shape, seed=9).float()).sum().backward()
    assert module.gain.grad.abs() > 1e-6 and module.weight.grad.abs().min() > 1e-6


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_all_views_are_each_view_fused_with_the_others_in_any_order(seed, views):
    module, h, F = trained(seed), view_maps(seed, views, batch=2), rig(seed, views, batch=2)
    order = torch.from_numpy(np.random.default_rng(seed + 9).permutation(views))
    with torch.no_grad():
        fused = module.all_views(h, F)
        kept = module.all_views(h, pencil_of(F, module.threshold))
        again = module.all_views(h[:, order], F[:, order][:, :, order])
        for r in range(views):
            others = np.random.default_rng(seed).permutation([s for s in range(views) if s != r])
            torch.testing.assert_close(fused[:, r], module(h[:, others], h[:, r], F[:, others, r]), atol=1e-10, rtol=0)
    torch.testing.assert_close(fused, kept, atol=0, rtol=0)
    torch.testing.assert_close(again, fused[:, order], atol=1e-10, rtol=0)


def test_one_source_may_come_without_its_dimension_and_f_without_a_batch():
    module, h, F = trained(1), view_maps(1, batch=2), rig(1).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        expected = module(h[:, :1], h[:, 1], F[:, :1, 1])
        for f in (F[:, 0, 1], F[0, 0, 1], Pencil.from_fundamental(F[:, 0, 1], MAP, module.threshold)):
            torch.testing.assert_close(module(h[:, 0], h[:, 1], f), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_view_is_as_if_it_were_not_there_whatever_its_maps_hold(seed):
    module, h, F = trained(seed), view_maps(seed, batch=2), rig(seed, batch=2)
    present = torch.tensor([[True, True, False, True], [True, True, True, True]])
    spoilt, left = h.masked_fill(~present[:, :, None, None, None], float("nan")), [0, 1, 3]
    with torch.no_grad():
        fused, whole = module.all_views(spoilt, F, present), module.all_views(h, F)
        without = module.all_views(h[:, left], F[:, left][:, :, left])
        one = module(spoilt[:, 1:], h[:, 0], F[:, 1:, 0], present[:, 1:])
        lost = module(h[:1, left], torch.zeros_like(h[:1, 2]), F[:1, left, 2])  # what others send to the view itself
    given, expected = (fused[0, left], fused[1], one, fused[0, 2]), (without[0], whole[1], fused[:, 0], lost[0])
    torch.testing.assert_close(given, expected, atol=1e-10, rtol=0)


def test_gradients_reach_parameters_and_maps_as_finite_differences_say():
    module, F = trained(2), pencil_of(rig(2, views=3, shape=(4, 5)), 1.2, (4, 5))
    h = (0.3 * random_maps(1, 3, 2, 4, 5, seed=2)).requires_grad_()  # as high as heatmaps are: odds grow with exp(8 h)
    names, values = zip(*module.named_parameters(), strict=True)

    module.forward = module.all_views
    run = lambda h, *new: torch.func.functional_call(module, dict(zip(names, new, strict=True)), (h, F))
    assert torch.autograd.gradcheck(run, (h, *values), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_two_views_that_are_right_find_the_joint_that_a_third_has_lost(seed):
    shape, rng = (40, 48), np.random.default_rng(seed)
    angles = np.array([0.0, 1.4, 2.9]) + rng.uniform(0, 6)
    cameras = [look_at((4 * np.cos(a), 4 * np.sin(a), 1.5), (0, 0, 1)) for a in angles]
    joint = rng.uniform((-0.5, -0.5, 0.6), (0.5, 0.5, 1.4))
    x = torch.tensor(np.stack([camera.project(joint) * (48 / 320, 40 / 240) for camera in cameras]))
    h = render(x, shape)[None, :, None]
    wrong = torch.tensor([5.0, 33.0], dtype=torch.float64)
    h[0, 0, 0] = 0.5 * render(wrong, shape) + 0.1 * render(x[0], shape, sigma=6)  # a second thought at the right place
    module = RepairedFusion().double()
    with torch.no_grad():
        module.gain.fill_(1.0)
    fused = module.all_views(h, views_F(cameras, shape))[0, :, 0]
    at = torch.stack([fused.flatten(-2).argmax(-1) % shape[1], fused.flatten(-2).argmax(-1) // shape[1]], -1)
    assert torch.linalg.vector_norm(wrong - x[0]) > 5
    assert (torch.linalg.vector_norm(at - x, dim=-1) < 2.5).all()


@pytest.mark.parametrize("views", [2, 3, 4, 6])
def test_pairs_go_to_their_sources_and_references(views):
    source, reference = pairs(views)
    assert list(zip(source, reference, strict=True)) == [(s, r) for s in range(views) for r in range(views) if s != r]
    each = random_maps(2, len(source), 3, seed=7)
    expected = torch.stack([sum(each[:, k] for k in range(len(source)) if reference[k] == r) for r in range(views)], 1)
    torch.testing.assert_close(sum_at_references(each), expected)


def test_bad_input_of_the_repaired_module_is_named():
    with pytest.raises(ValueError, match=r"collect must be \"sum\" or \"max\", got 'mean'"):
        RepairedFusion(collect="mean")
    module = RepairedFusion()
    with pytest.raises(ValueError, match="rank 3"):
        module(torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4), torch.eye(3))
    with pytest.raises(ValueError, match="Pencil is for a reference"):
        F = rig(0)[:, 0, 1]
        module(torch.rand(1, 2, *MAP), torch.rand(1, 2, 5, 5), Pencil.from_fundamental(F, MAP, 1.0))
    with pytest.raises(ValueError, match="is of one source, but there are 2"):
        module(torch.rand(1, 2, 1, *MAP), torch.rand(1, 1, *MAP), rig(0)[:, 0, 1])
