"""What happens to a layer's input, against loops over tokens and channels."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import CheckpointError, InputError
from finescale.grid import (
    ActivationScheme,
    Gather,
    InputRule,
    StaticRange,
    fake_quantize,
    input_rule,
    inputs,
    static_range,
)
from finescale.grid.activation import quantize_activations

BITS = [4, 6, 8]


def slow_round(value, scale, zero, low, high):
    return min(max(round(value / scale) + zero, low), high)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(BITS), st.floats(-3, 3))
def test_asymmetric_tokens_equal_the_loop(seed, bits, shift):
    x_TI = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)) + shift
    scheme = ActivationScheme(bits, symmetric=False)
    codes_TI, scale_T1, zero_T1 = quantize_activations(x_TI, scheme)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for token, codes, scale, zero in zip(x_TI, codes_TI, scale_T1, zero_T1, strict=True):
        span = max(float(token.max()), 0.0) - min(float(token.min()), 0.0)
        assert float(scale) == pytest.approx(span / (2**bits - 1), rel=1e-6)
        assert low <= float(zero) <= high and float(zero) == round(float(zero))
        for value, code in zip(token, codes, strict=True):
            # The quotient is rounded in float32; at a tie it may fall on either side.
            assert abs(int(code) - slow_round(float(value), float(scale), int(zero), low, high)) <= 1
            assert abs((int(code) - float(zero)) * float(scale) - float(value)) <= 1.001 * float(scale)
    rounded_TI = fake_quantize(x_TI, scheme)
    torch.testing.assert_close(rounded_TI, (codes_TI - zero_T1) * scale_T1)


def test_asymmetric_codes_use_a_one_sided_range_fully():
    x_TI = torch.linspace(0, 5, 64)[None]
    steps = {bits: len(fake_quantize(x_TI, ActivationScheme(bits, symmetric=False)).unique()) for bits in (4, 6)}
    assert steps == {4: 16, 6: 64}
    assert len(fake_quantize(x_TI, ActivationScheme(4)).unique()) == 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_one_fixed_scale_for_all_tokens(bits, symmetric):
    scheme = ActivationScheme(bits, "tensor", False, symmetric)
    fixed = static_range(-2.0, 6.0, scheme)
    x_TI = torch.tensor([[-2.0, 6.0, 0.0, 0.1], [100.0, -100.0, 3.0, -0.3]])
    rounded_TI = fake_quantize(x_TI, scheme, fixed)
    top = 6.0 if symmetric else (scheme.code_max - fixed.zero) * fixed.scale
    bottom = -6.0 if symmetric else (scheme.code_min - fixed.zero) * fixed.scale
    assert rounded_TI[1, 0] == pytest.approx(top) and rounded_TI[1, 1] == pytest.approx(bottom)
    inside = (x_TI >= bottom) & (x_TI <= top)
    assert float((rounded_TI - x_TI)[inside].abs().max()) <= 0.5001 * fixed.scale
    assert rounded_TI[0, 2] == 0.0


def test_zero_tokens_stay_zero_and_bad_ones_show():
    for symmetric, dynamic, bad in product((True, False), (True, False), (math.nan, math.inf, -math.inf)):
        scheme = ActivationScheme(8, "token" if dynamic else "tensor", dynamic, symmetric)
        fixed = None if dynamic else StaticRange(0.25, 0 if symmetric else 3)
        assert torch.equal(fake_quantize(torch.zeros(2, 3), scheme, fixed), torch.zeros(2, 3))
        rounded_TI = fake_quantize(torch.tensor([[1.0, bad], [1.0, 2.0]]), scheme, fixed)
        assert not bool(torch.isfinite(rounded_TI[0]).all()) and bool(torch.isfinite(rounded_TI[1]).all())


def slow_gather(x_TI, gather):
    out_TJ = torch.zeros(x_TI.shape[0], gather.index_KJ.shape[1], dtype=x_TI.dtype)
    for t, x_I in enumerate(x_TI):
        for k in range(gather.index_KJ.shape[0]):
            for j in range(gather.index_KJ.shape[1]):
                out_TJ[t, j] += float(gather.gain_KJ[k, j]) * x_I[int(gather.index_KJ[k, j])]
    return out_TJ


def random_gather(channels=7, out=9, members=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index_KJ = torch.randint(0, channels, (members, out), generator=generator)
    gain_KJ = torch.randn(members, out, generator=generator)
    gain_KJ[1:] *= torch.rand(members - 1, out, generator=generator) < 0.4
    return Gather(index_KJ, gain_KJ)


def test_gather_equals_the_loop_and_folds_a_norms_gain():
    gather, x_TI = random_gather(), torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(gather.apply(x_TI), slow_gather(x_TI, gather))
    gain_I = torch.rand(7) + 0.5
    torch.testing.assert_close(gather.folded(gain_I).apply(x_TI), gather.apply(x_TI * gain_I))


def test_rules_survive_a_file():
    rule = InputRule(ActivationScheme(8, "tensor", False, False), StaticRange(0.125, -7), random_gather(), (4, 2))
    again = input_rule(rule.describe(), rule.tensors(), "layer")
    x_TI = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    rule, again = (InputRule(r.scheme, r.fixed, r.gather, None) for r in (rule, again))
    assert torch.equal(again.round(again.rearrange(x_TI)), rule.round(rule.rearrange(x_TI)))
    assert input_rule(InputRule().describe(), {}, "layer") == InputRule()


def test_incomplete_files_are_refused():
    rule = InputRule(ActivationScheme(8, "tensor", False), StaticRange(0.1), random_gather())
    for suffix in ("input_scale", "input_index"):
        tensors = {key: tensor for key, tensor in rule.tensors().items() if key != suffix}
        with pytest.raises(CheckpointError, match="layer"):
            input_rule(rule.describe(), tensors, "layer")


@pytest.mark.parametrize(
    ("suffix", "value"),
    [("input_scale", float("nan")), ("input_scale", 0.0), ("input_index", -1), ("input_gain", float("inf"))],
)
def test_damaged_files_are_refused(suffix, value):
    """A negative channel counts from the end: another channel than was meant, without a word."""
    rule = InputRule(ActivationScheme(8, "tensor", False), StaticRange(0.1), random_gather())
    tensors = rule.tensors()
    tensors[suffix].view(-1)[0] = value
    with pytest.raises(CheckpointError, match="layer"):
        input_rule(rule.describe(), tensors, "layer")


@pytest.mark.parametrize("values", [("tensor", True), ("token", False)])
def test_granularity_and_dynamics_go_together(values):
    with pytest.raises(InputError, match="activations"):
        ActivationScheme(8, *values)


def test_gradients_of_a_gather_are_those_of_its_definition(monkeypatch):
    gather = Gather(
        torch.tensor([[0, 2, 2, 1], [3, 0, 2, 0]]), torch.tensor([[0.5, 1.0, 0.25, 2.0], [0.5, 0, 0.25, 0]])
    )
    x_TI = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    towards_TJ = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for most in (inputs.MOST_OF_A_MATRIX, 0):
        monkeypatch.setattr(inputs, "MOST_OF_A_MATRIX", most)
        own_TI = x_TI.clone().requires_grad_()
        out_TJ = gather.apply(own_TI)
        assert torch.equal(out_TJ, gather.apply(x_TI))
        out_TJ.backward(towards_TJ)
        found.append(own_TI.grad)
    torch.testing.assert_close(*found)
