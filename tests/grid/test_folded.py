"""Folded scales against exact arithmetic on Python fractions.

Shape legend: O outputs, I inputs, G groups.
"""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finescale.errors import NumericsError
from finescale.grid import (
    WeightScheme,
    dequantize,
    fit_grid,
    integerized,
    quantize_to_grid,
    with_folded_scales,
    with_integer_scales,
)
from finescale.grid.folded import FOLDED_BITS, LARGEST_S
from finescale.grid.integer_scale import LARGEST_FOLDED_SCALE, common_factor, power_of_two, significand_bits
from finescale.kernels import layout
from finescale.solvers import find_solver

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def weight_of(rows=6, columns=48, seed=0, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    # Groups of different widths, as in real weights.
    spread = torch.exp(0.4 * torch.randn(rows, columns // 8, generator=generator)).repeat_interleave(8, 1)
    return size * torch.randn(rows, columns, generator=generator) * spread


def slow_factor(scales):
    """The greatest common divisor of floats, as a fraction."""
    values = [Fraction(scale) for scale in scales]
    unit = math.lcm(*(value.denominator for value in values))
    return Fraction(math.gcd(*(int(value * unit) for value in values)), unit)


def test_the_kernels_fold_what_the_grid_calls_folded():
    assert layout.LARGEST_FOLDED_SCALE == LARGEST_FOLDED_SCALE
    assert -(2 ** (FOLDED_BITS - 1)) * LARGEST_FOLDED_SCALE >= -128


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 2**20 - 1),
    st.integers(-140, 100),
    st.lists(st.integers(1, 15), min_size=1, max_size=6),
)
def test_the_common_factor_is_the_greatest_divisor(mantissa, exponent, integers):
    # 24 bits at most, and no smaller than float32 can hold.
    assume(math.frexp(mantissa * 2.0**exponent)[1] > -120)
    scale_OG = torch.tensor([[mantissa * s * 2.0**exponent for s in integers]], dtype=torch.float64).float()
    found = common_factor(scale_OG)
    assert found.dtype == torch.float32 and found.shape == (1,)
    assert Fraction(found.item()) == slow_factor(scale_OG[0].tolist())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(2.0**-20, 2.0**10, width=16), min_size=2, max_size=4))
def test_only_folded_scales_have_one(values):
    factor = slow_factor(values)
    if max(Fraction(value) for value in values) / factor <= LARGEST_FOLDED_SCALE:
        assert Fraction(common_factor(torch.tensor([values])).item()) == factor
    else:
        with pytest.raises(NumericsError, match="integers up to 15"):
            common_factor(torch.tensor([[1.0] * len(values), values]))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_scales_have_no_factor(bad):
    with pytest.raises(NumericsError, match="positive and finite"):
        common_factor(torch.tensor([[1.0, bad]]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([8, 16, 20]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-6, 1e-3, 1.0, 3000.0]),
    st.sampled_from(["minmax", "mse"]),
)
def test_folded_scales_are_stored_without_error_and_found_again(seed, group, bits, dtype, size, clip):
    weight_OI = weight_of(seed=seed, size=size)
    weight_OI[1, 8:16] = 0
    weight_OI[2] = 0
    grid = fit_grid(weight_OI, WeightScheme(bits, group, True, clip), dtype)
    folded = with_folded_scales(grid, weight_OI)
    assert folded.folded and folded.amplifier == 1
    stored_OG = folded.scale_OG.to(dtype)
    assert torch.equal(stored_OG.float(), folded.scale_OG), "what is stored is what was computed"
    integer_OG, factor_O = folded.integer_scale_OG(), folded.channel_scale_O
    assert integer_OG.dtype == torch.int32 and factor_O.dtype == torch.float32
    assert int(integer_OG.min()) >= 1 and int(integer_OG.max()) <= LARGEST_FOLDED_SCALE
    assert torch.equal(integer_OG.double() * factor_O.double()[:, None], stored_OG.double())
    for row, factor in zip(stored_OG.tolist(), factor_O.tolist(), strict=True):
        assert Fraction(factor) == slow_factor(row)
    codes_OI = quantize_to_grid(weight_OI, folded)
    wide_OI = codes_OI.int() * integer_OG[:, folded.group_of_I]
    assert int(wide_OI.abs().max()) <= 120
    # A kernel's int8 weight times the factor is the very number that a reader of the float scales gets.
    assert torch.equal((wide_OI.double() * factor_O.double()[:, None]).float(), dequantize(codes_OI, folded))
    again = replace(folded, scale_OG=stored_OG.float()).rows_slice(slice(1, 4))
    assert again.folded and torch.equal(again.integer_scale_OG(), integer_OG[1:4])


def slow_error(weight_I, scale):
    code_I = (weight_I.double() / scale).round().clamp(-8, 7)
    return float((code_I * scale - weight_I.double()).square().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_is_the_best_of_all_candidates(dtype):
    weight_OI = weight_of(5, 40, seed=3)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True, "mse"), dtype)
    folded = with_folded_scales(grid, weight_OI)
    bits = significand_bits(dtype) - 4
    for row in range(5):
        scales, errors = grid.scale_OG[row].tolist(), []
        for largest in LARGEST_S:
            wanted = max(scales) / largest
            step = 2.0 ** (math.frexp(wanted)[1] - bits)
            factor = round(wanted / step) * step
            error = 0.0
            for group, scale in enumerate(scales):
                below = min(max(math.floor(scale / factor), 1), 15)
                weight_I = weight_OI[row, 8 * group : 8 * group + 8]
                error += min(slow_error(weight_I, s * factor) for s in (below, min(below + 1, 15)))
            errors.append(error)
        chosen = sum(
            slow_error(weight_OI[row, 8 * group : 8 * group + 8], scale)
            for group, scale in enumerate(folded.scale_OG[row].tolist())
        )
        assert chosen == pytest.approx(min(errors), rel=1e-5)
        assert max(errors) > 1.001 * min(errors), "the search would have nothing to choose"


def test_kept_codes_get_the_scales_that_suit_them():
    weight_OI = weight_of(8, 64, seed=1)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True, "mse"), torch.float16)
    codes_OI = quantize_to_grid(weight_OI, grid)
    before_OI = dequantize(codes_OI, grid)

    def error(chosen, codes_OI):
        return float((dequantize(codes_OI, chosen) - before_OI).square().sum())

    kept = with_folded_scales(grid, before_OI, codes_OI)
    free = with_folded_scales(grid, before_OI)
    assert error(kept, codes_OI) <= error(free, codes_OI)
    assert error(free, quantize_to_grid(before_OI, free)) < error(kept, codes_OI)


def test_the_error_is_near_that_of_float_scales():
    weight_OI = weight_of(64, 512, seed=2)
    for dtype, limit in ((torch.float16, 1.03), (torch.bfloat16, 1.04)):
        grid = fit_grid(weight_OI, WeightScheme(4, 64, True, "mse"), dtype)

        def error(chosen):
            return float((dequantize(quantize_to_grid(weight_OI, chosen), chosen) - weight_OI).square().sum())

        assert 1.0 < error(with_folded_scales(grid, weight_OI)) / error(grid) < limit


def test_one_group_keeps_its_scale():
    weight_OI = weight_of()
    grid = fit_grid(weight_OI, WeightScheme(4, -1, True, "mse"), torch.float16)
    folded = with_folded_scales(grid, weight_OI)
    assert torch.equal(folded.scale_OG, grid.scale_OG) and torch.equal(folded.channel_scale_O, grid.scale_OG[:, 0])
    assert set(folded.integer_scale_OG().flatten().tolist()) == {1}


def test_the_largest_scales_of_a_type_stay_finite():
    weight_OI = torch.full((1, 16), 65504.0 * 7)
    weight_OI[0, 8:] *= 0.9
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True), torch.float16)
    grid = replace(grid, scale_OG=torch.tensor([[65504.0, 60000.0]]))
    assert bool(torch.isfinite(with_folded_scales(grid, weight_OI).scale_OG.to(torch.float16)).all())


def test_integer_scales_are_not_folded_any_more():
    weight_OI = weight_of()
    folded = with_folded_scales(fit_grid(weight_OI, WeightScheme(4, 8, True), torch.float16), weight_OI)
    whole = integerized(folded, 1024)
    assert not whole.folded and whole.channel_scale_O is None
    assert not with_integer_scales(folded, weight_OI, "auto").folded


def test_what_cannot_be_folded_says_so():
    weight_OI = weight_of()
    with pytest.raises(NumericsError, match="symmetric"):
        with_folded_scales(fit_grid(weight_OI, WeightScheme(4, 8, False)), weight_OI)
    with pytest.raises(NumericsError, match="6-bit codes"):
        with_folded_scales(fit_grid(weight_OI, WeightScheme(6, 8, True)), weight_OI)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True))
    with pytest.raises(NumericsError, match="integers up to 15"):
        replace(grid, amplifier=1, folded=True).integer_scale_OG()


@pytest.mark.parametrize("solver", ["rtn", "gptq", "quantease"])
def test_solvers_keep_folded_scales(solver):
    weight_OI = weight_of(5, 48)
    x_TI = torch.randn(200, 48, generator=torch.Generator().manual_seed(1))
    grid = with_folded_scales(fit_grid(weight_OI, WeightScheme(4, 16, True, "mse"), torch.float16), weight_OI)
    entry = find_solver(solver)
    solved = entry.solve(weight_OI, x_TI.T @ x_TI / 200, grid, entry.options())
    assert solved.weight.grid.folded and torch.equal(solved.weight.grid.scale_OG, grid.scale_OG)


def test_a_solver_that_fits_groups_anew_refuses_them():
    weight_OI = weight_of(5, 48)
    grid = with_folded_scales(fit_grid(weight_OI, WeightScheme(4, 16, True), torch.float16), weight_OI)
    for solver in ("gptq", "quantease"):
        entry = find_solver(solver)
        with pytest.raises(NumericsError, match="static_groups true"):
            entry.solve(weight_OI, torch.eye(48), grid, entry.options(static_groups=False))


def test_powers_of_two_are_exact():
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]
    assert power_of_two(exponents.double()).tolist() == power_of_two(exponents.int()).tolist()
