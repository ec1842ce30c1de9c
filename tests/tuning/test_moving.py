"""Weights that move under gradients, against automatic differentiation of the formula they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.grid import (
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    with_folded_scales,
    with_integer_scales,
)
from finescale.tuning import moving
from finescale.tuning.moving import EDGE, finish, render, rounded_values, start_from, step, stored_scales
from tests.solvers.examples import layer, solve

SCHEMES = [(2, 8, True), (3, 7, False), (4, -1, True), (4, 5, True), (4, 8, False), (3, 8, "signed")]


def solved(bits, group, symmetric, integer=False, seed=0, dtype=torch.float32):
    """A weight rounded to its grid, not always to the nearest code."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(6, 21, generator=generator)
    clip = "signed" if symmetric == "signed" else "minmax"
    grid = fit_grid(weight_OI, WeightScheme(bits, group, bool(symmetric), clip), dtype)
    if integer:
        grid = with_integer_scales(grid, weight_OI, 256)
    away_OI = weight_OI + 0.8 * grid.scale_OG[:, grid.group_of_I] * torch.randn(6, 21, generator=generator)
    return weight_OI, QuantizedWeight(quantize_to_grid(away_OI, grid), grid)


def shown(state):
    out_OI = torch.empty(state.rows, state.columns)
    render(state, out_OI)
    return out_OI


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.round()

    @staticmethod
    def backward(context, gradient):
        return gradient


def traced(state, offset_OGP, scale_OG):
    """The formula of the module's docstring, with gradients by automatic differentiation."""
    grid = state.grid
    place_OGP = state.position_OGP * grid.scale_OG[:, :, None] / scale_OG[:, :, None] + offset_OGP
    low, high = float(grid.scheme.code_min), float(grid.scheme.code_max)
    zero_OG1 = torch.zeros(*scale_OG.shape, 1) if grid.zero_OG is None else grid.zero_OG.float()[:, :, None]
    code_OGP = torch.clamp(_Round.apply(place_OGP), low - zero_OG1, high - zero_OG1)
    return (code_OGP * scale_OG[:, :, None]).flatten(1)[:, : state.columns]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_the_start_is_the_solution_itself(bits, group, symmetric, integer):
    if integer and symmetric is not True:
        pytest.skip("integer scales are symmetric and above zero")
    weight_OI, weight = solved(bits, group, symmetric, integer)
    state = start_from(weight, weight_OI)
    assert torch.equal(shown(state), weight.dequantize())
    assert finish(state).sha256() == weight.sha256()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(0, 1000), st.booleans())
def test_a_step_follows_the_signs_of_the_traced_gradients(scheme, seed, small_pieces):
    weight_OI, weight = solved(*scheme, seed=seed)
    state = start_from(weight, weight_OI)
    generator = torch.Generator().manual_seed(seed + 1)
    state.offset_OGP += 0.3 * torch.randn(state.offset_OGP.shape, generator=generator)
    state.factor_OG *= 1 + 0.1 * torch.rand(state.factor_OG.shape, generator=generator)
    gradient_OI = torch.randn(6, 21, generator=generator)
    offset_OGP = state.offset_OGP.clone().requires_grad_()
    scale_OG = stored_scales(state.grid, state.factor_OG).requires_grad_()
    (traced(state, offset_OGP, scale_OG) * gradient_OI).sum().backward()
    expected_offset = (offset_OGP.detach() - 0.01 * offset_OGP.grad.sign()).clamp(-0.5, 0.5)
    expected_factor = state.factor_OG - 0.002 * scale_OG.grad.sign() * state.grid.scale_OG.sign()
    whole, now_OI = moving.PIECE["cpu"], torch.empty(6, 21)
    moving.PIECE["cpu"] = 30 if small_pieces else whole
    try:
        step(state, gradient_OI, now_OI, 0.01, 0.002, 0.5)
    finally:
        moving.PIECE["cpu"] = whole
    assert torch.equal(now_OI, shown(state))
    width = state.position_OGP[0].numel()
    columns = torch.arange(width) < 21  # padding may move: it is never shown
    assert torch.equal(state.offset_OGP.flatten(1)[:, columns], expected_offset.flatten(1)[:, columns])
    clear = scale_OG.grad.abs() > 1e-4  # sums in another order may differ in the sign of a zero
    torch.testing.assert_close(state.factor_OG[clear], expected_factor[clear], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        shown(state), traced(state, state.offset_OGP, stored_scales(state.grid, state.factor_OG)), rtol=0, atol=1e-6
    )


def test_what_is_stored_is_what_was_shown():
    weight_OI, weight = solved(3, 7, False, seed=4)
    state, now_OI = start_from(weight, weight_OI), torch.empty(6, 21)
    for number in range(20):
        gradient_OI = torch.randn(6, 21, generator=torch.Generator().manual_seed(number))
        step(state, gradient_OI, now_OI, 0.05, 0.01, 0.5)
    result = finish(state)
    assert torch.equal(result.dequantize(), shown(state)) and torch.equal(now_OI, shown(state))
    assert int(result.codes_OI.min()) >= -4 and int(result.codes_OI.max()) <= 3
    assert not torch.equal(result.codes_OI, weight.codes_OI)
    assert float(state.offset_OGP.abs().max()) <= 0.5


def test_negative_scales_stay_negative():
    weight_OI, weight = solved(3, 8, "signed")
    state = start_from(weight, weight_OI)
    state.factor_OG[:] = torch.linspace(-0.1, 1.2, state.factor_OG.numel()).view_as(state.factor_OG)
    assert bool((weight.grid.scale_OG < 0).any()) and bool((weight.grid.scale_OG > 0).any())
    assert torch.equal(stored_scales(state.grid, state.factor_OG).sign(), weight.grid.scale_OG.sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integer", [False, True])
def test_tuned_scales_can_be_stored(dtype, integer):
    weight_OI, weight = solved(4, 8, True, integer, dtype=dtype)
    state = start_from(weight, weight_OI)
    for number in range(10):
        gradient_OI = torch.randn(6, 21, generator=torch.Generator().manual_seed(number))
        step(state, gradient_OI, torch.empty(6, 21), 0.05, 0.03, 0.5)
    grid = finish(state).grid
    assert torch.equal(grid.scale_OG.to(dtype).float(), grid.scale_OG)
    assert not torch.equal(grid.scale_OG, weight.grid.scale_OG)
    if integer:
        assert int(grid.integer_scale_OG().min()) >= 1  # raises where a scale is no integer over the amplifier


def test_starting_positions_stay_near_their_codes():
    weight_OI, weight = solved(4, 8, True)
    state = start_from(weight, weight_OI)
    code_OI = weight.codes_OI.float()
    position_OI = state.position_OGP.flatten(1)[:, :21]
    assert float((position_OI - code_OI).abs().max()) <= EDGE + 1e-6
    near_OI = (weight_OI / weight.grid.scale_OG[:, weight.grid.group_of_I] - code_OI).abs() < EDGE
    assert 0 < int(near_OI.sum()) < near_OI.numel()
    kept_OI = weight_OI / weight.grid.scale_OG[:, weight.grid.group_of_I]
    torch.testing.assert_close(position_OI[near_OI], kept_OI[near_OI])


def test_scattered_groups_are_refused():
    weight_OI = torch.randn(4, 8)
    group_of_I = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    grid = fit_grid(weight_OI, WeightScheme(4, 4, True), group_of_I=group_of_I)
    with pytest.raises(InputError, match="static_groups"):
        start_from(QuantizedWeight(quantize_to_grid(weight_OI, grid), grid), weight_OI)


def test_rounded_values_are_the_best_values_one_by_one():
    weight_OI, hessian_II = layer(5, 12, seed=3)
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    quantized_OI = solve("gptq", weight_OI, hessian_II, grid).weight.dequantize()
    found_OI = rounded_values(weight_OI, quantized_OI, hessian_II)
    for row in range(5):
        for column in range(12):
            errors = []
            for value in (-1.0, 0.0, 1.0):  # the error is a parabola in this weight
                changed_I = quantized_OI[row].double().clone()
                changed_I[column] = value
                difference_I = weight_OI[row].double() - changed_I
                errors.append(float(difference_I @ hessian_II.double() @ difference_I))
            left, middle, right = errors
            best = 0.5 * (left - right) / (left - 2 * middle + right)
            assert float(found_OI[row, column]) == pytest.approx(best, rel=1e-3, abs=1e-4)


def test_codes_of_a_converged_descent_are_roundings_of_the_rounded_values():
    weight_OI, hessian_II = layer(8, 24, seed=5)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True))
    weight = solve("quantease", weight_OI, hessian_II, grid, sweeps=60, relax_every=0).weight
    values_OI = rounded_values(weight_OI, weight.dequantize(), hessian_II)
    assert torch.equal(quantize_to_grid(values_OI, grid), weight.codes_OI)
    state = start_from(weight, values_OI)
    assert torch.equal(finish(state).codes_OI, weight.codes_OI)


def test_a_dead_input_keeps_its_weight():
    weight_OI, hessian_II = layer(4, 10, seed=6)
    hessian_II[3] = 0
    hessian_II[:, 3] = 0
    values_OI = rounded_values(weight_OI, weight_OI + 0.1, hessian_II)
    assert torch.equal(values_OI[:, 3], weight_OI[:, 3]) and bool(torch.isfinite(values_OI).all())


def test_folded_scales_stay_and_codes_move():
    weight_OI, weight = solved(4, 5, True, dtype=torch.float16)
    folded = with_folded_scales(weight.grid, weight_OI)
    weight = QuantizedWeight(quantize_to_grid(weight_OI, folded), folded)
    state = start_from(weight, weight_OI)
    assert torch.equal(shown(state), weight.dequantize())
    for _ in range(20):
        step(state, torch.randn(6, 21, generator=torch.Generator().manual_seed(5)), torch.empty(6, 21), 0.05, 0.05, 1.0)
    tuned = finish(state)
    assert tuned.grid.folded and torch.equal(tuned.grid.scale_OG, folded.scale_OG)
    assert not torch.equal(tuned.codes_OI, weight.codes_OI)
    assert torch.equal(shown(state), tuned.dequantize())
