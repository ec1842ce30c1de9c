"""OmniQuant: its rounding against a slow one, gradients into ranges, kept functions, and that it learns something."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from finescale.errors import InputError
from finescale.grid import ActivationScheme, InputRule, WeightScheme, dequantize, fit_grid, quantize_to_grid
from finescale.models.skeleton import weight_OI_of
from finescale.transforms.omniquant import OmniQuantOptions, _Learned, apply_omniquant, rendered
from finescale.transforms.view import Learning, Target
from finescale.tuning.nearest import rounded
from finescale.tuning.reconstruction import RoundInput, Windows
from tests.helpers import KINDS
from tests.transforms.blocks import assert_function_kept, make_view, output

QUICK = {"iterations": 6, "batch_size": 2, "precision": "float32", "held": 2}


def learning(view, seed=0):
    """The view with windows whose targets are the block's own outputs."""
    inputs = [x_BTI for x_BTI, _ in view.batches]
    targets = [output(view.block, x_BTI, kwargs) for x_BTI, kwargs in view.batches]

    def arguments_of(count):
        return view.batches[0][1]

    return replace(view, learning=Learning(lambda _: Windows(inputs, targets), arguments_of, seed))


def with_targets(view, scheme, activations):
    return replace(view, targets={path: Target(scheme, activations) for path in view.targets})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 8])
def test_without_learned_ends_rounding_is_that_of_the_grid(symmetric, group):
    weight_OI = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(3, group, symmetric)
    grid = fit_grid(weight_OI, scheme)
    torch.testing.assert_close(rounded(weight_OI, scheme, ()), dequantize(quantize_to_grid(weight_OI, grid), grid))


def test_learned_ends_clip_like_a_clamped_weight():
    weight_OI = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(4, -1, False)
    ends = (torch.full((5, 1), 0.5), torch.full((5, 1), 1.0))
    low_O1 = weight_OI.amin(1, keepdim=True) * ends[0].sigmoid()
    high_O1 = weight_OI.amax(1, keepdim=True) * ends[1].sigmoid()
    clamped_OI = weight_OI.clamp(low_O1, high_O1)
    grid = fit_grid(clamped_OI, scheme)
    expected_OI = dequantize(quantize_to_grid(clamped_OI, grid), grid)
    torch.testing.assert_close(rounded(weight_OI, scheme, ends), expected_OI)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_reach_the_ranges_of_inputs(symmetric):
    """Against automatic differentiation of the formula, rounded numbers held constant."""
    scheme = ActivationScheme(4, symmetric=symmetric)
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(6, 9, generator=generator) * torch.tensor([1, 5, 1, 1, 2, 1, 1, 1, 0.1])
    gradient_TI = torch.randn(6, 9, generator=generator)
    found = x_TI.clone().requires_grad_()
    (RoundInput.apply(found, InputRule(scheme)) * gradient_TI).sum().backward()
    slow = x_TI.clone().requires_grad_()
    if symmetric:
        scale_T1, zero_T1 = slow.abs().amax(1, keepdim=True) / 7, 0.0
    else:
        low_T1 = slow.amin(1, keepdim=True).clamp(max=0)
        high_T1 = slow.amax(1, keepdim=True).clamp(min=0)
        scale_T1 = high_T1 / 15 - low_T1 / 15
        zero_T1 = (-8 - low_T1 / scale_T1).round().clamp(-8, 7).detach()
    place_TI = slow / scale_T1
    code_TI = place_TI + (place_TI.round() - place_TI).detach()
    if not symmetric:  # what the clamp does to a code does not depend on x
        code_TI = code_TI + ((code_TI + zero_T1).clamp(-8, 7) - zero_T1 - code_TI).detach()
    (code_TI * scale_T1 * gradient_TI).sum().backward()
    torch.testing.assert_close(found.grad, slow.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_the_same(kind):
    """Learned scales and shifts in float64: the function stays."""

    def apply(view):
        view = with_targets(view, WeightScheme(4, -1, False), ActivationScheme(4, symmetric=False))
        options = OmniQuantOptions(**QUICK | {"iterations": 2, "scale_rate": 0.1, "links": "all"})
        return apply_omniquant(learning(view), options)

    assert_function_kept(kind, apply)


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral", "gpt2"])
def test_what_is_rendered_is_the_block(kind):
    """8 bits everywhere: the block with its rendered parameters puts out nearly what it did."""
    view = with_targets(make_view(kind), WeightScheme(8, -1, True), None)
    x_BTI, kwargs = view.batches[0]
    expected = output(view.block, x_BTI, kwargs)
    originals = dict(view.block.named_parameters())
    values = rendered(view, originals, _Learned([], [], {}))
    with torch.no_grad():
        found = functional_call(view.block, values, (x_BTI,), kwargs)
    found = found[0] if isinstance(found, tuple) else found
    # The median over tokens, for now and then rounding sends one to another expert.
    error = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    assert 0 < error < 0.02


def spread(view, factor=8.0):
    """Outliers in the block: one channel of each norm's output is large."""
    for edge in view.edges:
        norm = view.block.get_submodule(edge.norm)
        norm.weight.data[3] *= factor
        for path in edge.consumers:
            weight_OI_of(view.block.get_submodule(path))[:, 3] /= factor


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_learning_lowers_the_error_that_it_reports(kind):
    view = with_targets(make_view(kind), WeightScheme(4, -1, False), ActivationScheme(4, symmetric=False))
    spread(view)
    found = {}
    for name, options in (("all", {}), ("clip", {"equivalence": False}), ("scales", {"clip": False})):
        chosen = OmniQuantOptions(**QUICK | {"iterations": 24, "loss": "relative"} | options)
        # Nothing may be left of one run in the next.
        state = {key: value.clone() for key, value in view.block.state_dict().items()}
        changes = apply_omniquant(learning(view), chosen)
        view.block.load_state_dict(state)
        found[name] = changes.facts["block"]
        assert set(changes.limits) == (set() if name == "scales" else set(view.targets))
    for facts in found.values():
        assert facts["error_after"] < 0.97 * facts["error_before"]
    assert found["all"]["error_after"] < found["clip"]["error_after"]


def test_what_it_reports_is_what_rounding_to_its_limits_gives():
    view = with_targets(make_view("llama"), WeightScheme(3, 32, True), None)
    chosen = OmniQuantOptions(**QUICK | {"iterations": 20, "loss": "relative"})
    ready = learning(view)
    windows = ready.learning.windows(chosen)
    changes = apply_omniquant(ready, chosen)
    for path, target in view.targets.items():
        weight_OI = weight_OI_of(view.block.get_submodule(path))
        limits = changes.limits[path]
        low_OI, high_OI = (end_OG.repeat_interleave(32, 1) for end_OG in (limits.low_OG, limits.high_OG))
        grid = fit_grid(weight_OI.clamp(low_OI, high_OI), target.scheme)
        weight_OI.copy_(dequantize(quantize_to_grid(weight_OI.float(), grid), grid))
    errors = []
    for (x_BTI, kwargs), target_BTI in zip(view.batches, windows.targets, strict=True):
        found = output(view.block, x_BTI, kwargs)
        errors += ((found - target_BTI).square().mean(-1) / target_BTI.square().mean(-1)).mean(-1).tolist()
    numbers = range(len(errors))
    held = [errors[n] for n in numbers if n in (0, len(errors) // 2)]
    assert changes.facts["block"]["error_after"] == pytest.approx(sum(held) / 2, rel=1e-3)


def test_the_same_seed_learns_the_same():
    limits = []
    for seed in (0, 0, 1):
        view = with_targets(make_view("llama"), WeightScheme(3, 32, True), None)
        changes = apply_omniquant(learning(view, seed), OmniQuantOptions(**QUICK))
        limits.append(torch.cat([part.high_OG.flatten() for part in changes.limits.values()]))
    assert torch.equal(limits[0], limits[1]) and not torch.equal(limits[0], limits[2])


def test_fixed_scales_are_refused():
    static = ActivationScheme(8, "tensor", dynamic=False)
    view = with_targets(make_view("llama"), WeightScheme(4), static)
    with pytest.raises(InputError, match="granularity token"):
        apply_omniquant(learning(view), OmniQuantOptions(**QUICK))
