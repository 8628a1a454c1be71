"""The original module, its second attempt, and a literal triple loop: one function of nine weights."""

import copy

import numpy as np
import pytest
import torch
from rigs import camera_pair, random_maps
from scipy.signal import correlate2d

from epiutils.epipolar import fundamental_from_cameras, transfer
from epiutils.fusion import OriginalFusion, SimpleFusion
from epiutils.redirect import Pencil

SHAPE, REFERENCE = (7, 10), (9, 6)
WEIGHTS = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6], [0.7, 0.8, 0.9]])  # no symmetry hides a flip


def rig(seed, shape=SHAPE, reference=REFERENCE):
    """F between the heatmaps of two seeded cameras."""
    pair = camera_pair(seed)
    A = [np.diag([w / c.size[0], h / c.size[1], 1]) for c, (h, w) in zip(pair, (shape, reference), strict=True)]
    return torch.from_numpy(transfer(fundamental_from_cameras(*pair), *A))


def modules(initial=WEIGHTS, **settings):
    """Both modules, in float64, with the same weights."""
    original = OriginalFusion(shape=SHAPE, initial=initial, **settings)
    return original.double(), SimpleFusion(initial=initial, **settings).double()


def maps(seed, batch=2, joints=3):
    return random_maps(batch, joints, *SHAPE, seed=seed), random_maps(batch, joints, *REFERENCE, seed=seed + 50)


def the_nine(module):
    (weight,) = module.parameters()
    return weight


def literal_fusion(source, reference, F, w, threshold):
    """One pair of maps: for each source pixel weigh its window, then visit each reference pixel."""
    H, W = source.shape
    padded = np.zeros((H + 2, W + 2))
    padded[1:-1, 1:-1] = source
    fused = reference.copy()
    for y in range(H):
        for x in range(W):
            value = sum(w[u][v] * padded[y + u][x + v] for u in range(3) for v in range(3))
            a, b, c = F @ np.array([x, y, 1.0])
            for y_ref in range(fused.shape[0]):
                for x_ref in range(fused.shape[1]):
                    if abs(a * x_ref + b * y_ref + c) / np.hypot(a, b) <= threshold:
                        fused[y_ref, x_ref] += value
    return fused


@pytest.mark.parametrize("module", [OriginalFusion(), SimpleFusion()], ids=lambda m: type(m).__name__)
def test_there_are_exactly_nine_trainable_parameters_and_nothing_else_is_stored(module):
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 9
    assert sum(p.numel() for p in module.parameters()) == sum(v.numel() for v in module.state_dict().values()) == 9
    bound = the_nine(module).abs().max()
    assert 0.05 < bound <= 1 / 3


@pytest.mark.parametrize("threshold", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_both_modules_are_the_literal_triple_loop(seed, threshold):
    (source, reference), F = maps(seed, 1, 2), rig(seed)
    for module in modules(threshold=threshold):
        fused = module(source, reference, F).detach()
        for j in range(2):
            arrays = (a[0, j].numpy() for a in (source, reference))
            expected = literal_fusion(*arrays, F.numpy(), WEIGHTS.double().numpy(), threshold)
            np.testing.assert_allclose(fused[0, j], expected, atol=1e-10)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["plain", "sigmoid"])
@pytest.mark.parametrize("seed", range(5))
def test_original_and_simple_agree_in_values_and_gradients(seed, sigmoid):
    (source, reference), F = maps(seed), torch.stack([rig(seed), rig(seed + 20)])
    results = []
    for module in modules(threshold=1.0, sigmoid=sigmoid, initial=WEIGHTS / 20):
        s, r = source.clone().requires_grad_(), reference.clone().requires_grad_()
        fused = module(s, r, F)
        gradients = torch.autograd.grad(fused.square().sum(), [the_nine(module), s, r])
        results.append([fused, gradients[0].reshape(3, 3), *gradients[1:]])
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_the_convolution_is_scipys_correlation_with_zeros_around():
    source = random_maps(2, 3, *SHAPE)
    for module in modules():
        convolved = module.convolve(source).detach().numpy()
        for b, j in np.ndindex(2, 3):
            expected = correlate2d(source[b, j], WEIGHTS, mode="same", boundary="fill")
            np.testing.assert_allclose(convolved[b, j], expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_each_weight_is_that_of_finite_differences(seed):
    (source, reference), F = maps(seed), rig(seed)
    for module in modules(sigmoid=True, initial=WEIGHTS / 20):
        weight = the_nine(module)

        def loss(module=module):
            return module(source, reference, F).square().sum()

        (gradient,) = torch.autograd.grad(loss(), weight)
        for i in range(9):
            both = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight.view(-1)[i] += step
                    both.append(loss())
                    weight.view(-1)[i] -= step
            torch.testing.assert_close(gradient.flatten()[i], (both[0] - both[1]) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_fused_heatmap_is_affine_in_the_weights():
    (source, reference), F = maps(1), rig(1)
    fused = [m(source, reference, F) for w in (WEIGHTS, 3 * WEIGHTS, 0 * WEIGHTS) for m in modules(initial=w)[:1]]
    torch.testing.assert_close(fused[2], reference, check_dtype=False)
    torch.testing.assert_close(fused[1] - reference, 3 * (fused[0] - reference), rtol=1e-5, atol=1e-6)


def test_the_sigmoid_squashes_the_sum():
    (source, reference), F = maps(2), rig(2)
    for plain, squashed in zip(modules(), modules(sigmoid=True), strict=True):
        expected = 1 / (1 + torch.exp(-plain(source, reference, F)))
        torch.testing.assert_close(squashed(source, reference, F), expected)


def test_the_methods_and_a_pencil_agree():
    (source, reference), F = maps(3, 1, 2), rig(3)
    for dense, loop, fast in zip(*(modules(method=m) for m in ("dense", "loop", "pencil")), strict=True):
        expected = dense(source, reference, F)
        torch.testing.assert_close(fast(source, reference, F), expected)
        torch.testing.assert_close(loop(source, reference, F), expected)
        torch.testing.assert_close(fast(source, reference, Pencil.from_fundamental(F, SHAPE, 1.0, REFERENCE)), expected)


def test_a_batch_equals_a_loop_over_it():
    (source, reference), F = maps(4), torch.stack([rig(4), rig(5)])
    for module in modules():
        looped = [module(s, r, f) for s, r, f in zip(source, reference, F, strict=True)]
        torch.testing.assert_close(module(source, reference, F), torch.stack(looped))


def test_joints_do_not_mix():
    (source, reference), F = maps(5), rig(5)
    changed = source.clone()
    changed[:, 1] += 1
    for module in modules():
        difference = module(changed, reference, F) - module(source, reference, F)
        assert difference[:, 1].abs().max() > 0.1 and not difference[:, [0, 2]].any()


def test_float32_is_the_default_and_inputs_stay_as_they_were():
    (source, reference), F = (m.float() for m in maps(6)), rig(6)
    before = source.clone(), reference.clone(), F.clone()
    for module in (OriginalFusion(shape=SHAPE, initial=WEIGHTS), SimpleFusion(initial=WEIGHTS)):
        assert module(source, reference, F).dtype == torch.float32
    for old, new in zip(before, (source, reference, F), strict=True):
        assert torch.equal(old, new)


def test_the_initial_weights_are_copied():
    initial = WEIGHTS.clone()
    for module in (OriginalFusion(initial=initial), SimpleFusion(initial=initial)):
        with torch.no_grad():
            the_nine(module).zero_()
        assert torch.equal(initial, WEIGHTS)


def test_weights_move_from_one_module_to_its_copy_by_state_dict():
    original = OriginalFusion(shape=SHAPE)
    other = copy.deepcopy(original)
    torch.nn.init.zeros_(other.weight)
    other.load_state_dict(original.state_dict())
    assert torch.equal(other.weight, original.weight)


def test_source_maps_of_another_size_are_refused_by_the_original():
    with pytest.raises(ValueError, match=r"source heatmaps must be \(..., 7, 10\), got \(1, 1, 10, 7\)"):
        OriginalFusion(shape=SHAPE)(torch.ones(1, 1, 10, 7), torch.ones(1, 1, *REFERENCE), rig(0))


def test_batches_or_joints_that_differ_are_refused():
    for module in (OriginalFusion(shape=SHAPE), SimpleFusion()):
        with pytest.raises(ValueError, match="must agree but for H, W"):
            module(torch.ones(2, 3, *SHAPE), torch.ones(2, 4, *REFERENCE), rig(0))


def test_an_unknown_method_is_refused():
    for module in modules(method="fast"):
        with pytest.raises(ValueError, match="method must be one of"):
            module(*maps(0), rig(0))


@pytest.mark.parametrize("module", [OriginalFusion, SimpleFusion])
def test_initial_weights_of_another_shape_are_refused(module):
    with pytest.raises(ValueError, match=r"initial weights must be \(3, 3\), got \(9,\)"):
        module(initial=torch.ones(9))


def test_a_pencil_of_another_reference_size_is_refused():
    source, reference = maps(0)
    for module in modules():
        with pytest.raises((ValueError, RuntimeError)):
            module(source, reference, Pencil.from_fundamental(rig(0), SHAPE, 1.0))


def test_a_pencil_for_another_size_of_the_reference_is_refused():
    F = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    pencil = Pencil.from_fundamental(F, (6, 9), 1.0, (8, 7))
    with pytest.raises(ValueError, match=r"Pencil is for a reference of \(8, 7\)"):
        SimpleFusion()(torch.rand(1, 2, 6, 9), torch.rand(1, 2, 6, 9), pencil)
