"""Low-rank correction of a block: the factors' gradients, and that what is merged is what was tuned."""

import pytest
import torch

from finescale.grid import ActivationScheme, InputRule, WeightScheme, dequantize, fit_grid, quantize_to_grid
from finescale.tuning import LowRankOptions, Windows, correct_weights
from finescale.tuning.low_rank import _Correction, _pass_on
from tests.tuning.test_rounding import CPU, Mlp


def setup():
    """A block of float weights and windows with its outputs."""
    block = Mlp()
    generator = torch.Generator().manual_seed(2)
    mix_CC = torch.randn(16, 16, generator=generator)
    inputs = [torch.randn(4, 10, 16, generator=generator) @ mix_CC for _ in range(2)]
    return block, Windows(inputs, [block(x_BTC)[0] for x_BTC in inputs])


def corrected(block, windows, rules=None, seed=0, **options):
    defaults = {"iterations": 80, "rate": 0.01, "batch_size": 2, "precision": "float32", "held": 8}
    schemes = {path: WeightScheme(3, 8, True) for path in ("up", "down")}
    chosen = LowRankOptions(**(defaults | options))
    return correct_weights(block, schemes, windows, lambda _: {}, rules or {}, chosen, seed, CPU)


def rounded_error(block, windows, weights):
    for path, weight_OI in weights.items():
        grid = fit_grid(weight_OI, WeightScheme(3, 8, True))
        block.get_submodule(path).weight.data.copy_(dequantize(quantize_to_grid(weight_OI, grid), grid))
    pairs = zip(windows.inputs, windows.targets, strict=True)
    return sum(float((block(x)[0] - y).square().mean()) for x, y in pairs) / len(windows.inputs)


def test_gradients_of_the_factors_are_those_of_automatic_differentiation():
    generator = torch.Generator().manual_seed(0)
    weight_OI, gradient_OI = torch.randn(2, 6, 9, generator=generator)
    a_RI, b_OR = torch.randn(3, 9, generator=generator), torch.randn(6, 3, generator=generator)
    layer = _Correction(weight_OI, WeightScheme(4), a_RI.clone(), b_OR.clone(), weight_OI)
    _pass_on(gradient_OI, layer, 0.25)
    a_RI.requires_grad_()
    b_OR.requires_grad_()
    ((weight_OI + 0.25 * b_OR @ a_RI) * gradient_OI).sum().backward()
    torch.testing.assert_close(layer.a_RI.grad, a_RI.grad)
    torch.testing.assert_close(layer.b_OR.grad, b_OR.grad)


@pytest.mark.parametrize("forward", ["merged", "sum"])
def test_the_merged_block_is_better_and_as_good_as_reported(forward):
    block, windows = setup()
    plain = {path: block.get_submodule(path).weight.clone() for path in ("up", "down")}
    weights, facts = corrected(block, windows, forward=forward)
    assert all(torch.equal(block.get_submodule(path).weight, plain[path]) for path in plain)
    before, after = rounded_error(block, windows, plain), rounded_error(block, windows, weights)
    assert facts["error_before"] == pytest.approx(before, rel=1e-4)
    assert facts["error_after"] == pytest.approx(after, rel=1e-4)
    assert after < (0.9 if forward == "merged" else 1.0 + 1e-6) * before


def test_additions_have_the_rank_asked_for():
    block, windows = setup()
    weights, _ = corrected(block, windows, rank=2)
    for path, weight_OI in weights.items():
        values = torch.linalg.svdvals(weight_OI - block.get_submodule(path).weight)
        assert float(values[1]) > 0 and float(values[2:].max()) < 1e-4 * float(values[0])


def test_what_is_merged_beats_what_was_only_added_beside():
    """The authors lose accuracy when they merge after training beside the rounded weight; training merged does not."""
    errors = []
    for forward in ("merged", "sum"):
        block, windows = setup()
        errors.append(corrected(block, windows, forward=forward)[1]["error_after"])
    assert errors[0] <= errors[1]


def test_the_same_seed_gives_the_same_weights():
    rules = {"up": InputRule(ActivationScheme(4)), "down": InputRule(ActivationScheme(4))}
    found = [corrected(*setup(), rules=rules, seed=seed, iterations=10)[0]["up"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_correction_for_other_solvers_is_of_rounded_inputs_alone():
    block, windows = setup()
    weights, facts = corrected(block, windows, forward="unrounded")
    assert facts["error_before"] == pytest.approx(0.0, abs=1e-9)  # nothing is rounded: there is nothing to correct
    rules = {path: InputRule(ActivationScheme(4)) for path in ("up", "down")}
    weights, facts = corrected(block, windows, rules, forward="unrounded")
    assert facts["error_after"] < 0.95 * facts["error_before"]
    for path, weight_OI in weights.items():
        linear = block.get_submodule(path)
        linear.weight.data.copy_(weight_OI)
        linear.register_forward_pre_hook(lambda _, args, rule=rules[path]: rule.round(args[0]))
    pairs = zip(windows.inputs, windows.targets, strict=True)
    after = sum(float((block(x)[0] - y).square().mean()) for x, y in pairs) / len(windows.inputs)
    assert facts["error_after"] == pytest.approx(after, rel=1e-4)
