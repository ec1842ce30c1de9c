"""Scales, zero points and codes against loops on Python numbers, written from the definitions.

Shape legend: O outputs, I inputs, G groups.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError, NumericsError
from finescale.grid import (
    Grid,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    dequantize,
    fit,
    fit_grid,
    number_of_groups,
    quantize_to_grid,
    row_pieces,
    scheme,
)
from finescale.grid.fit import smallest_scale

BITS = [2, 3, 4, 6, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [-1, 8, 7, 64]
"""Group sizes for 20 inputs: one group, ragged (8, 8, 4), ragged (7, 7, 6), larger than the row."""


def weight_of(rows=5, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight_OI = 0.05 * torch.randn(rows, columns, generator=generator)
    return weight_OI * torch.randn(rows, columns, generator=generator).exp()


def members(columns, group_size):
    """Column numbers of each group."""
    size = columns if group_size == -1 else group_size
    return [list(range(start, min(start + size, columns))) for start in range(0, columns, size)]


def slow_scale(values, bits, symmetric, shrink=1.0):
    """The step before it is stored, in float64. Symmetric: 2**bits - 1 steps cover -absmax..absmax."""
    low, high = min(0.0, *values) * shrink, max(0.0, *values) * shrink
    steps = 2**bits - 1
    return 2 * max(-low, high) / steps if symmetric else (high - low) / steps


def slow_zero(values, scale, bits, shrink=1.0):
    low = min(0.0, *values) * shrink
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return min(max(round(least - low / scale), least), most)


def slow_code(value, scale, zero, bits):
    return min(max(round(value / scale) + zero, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


def slow_error(values, scale, zero, bits):
    return sum(abs(scale * (slow_code(v, scale, zero, bits) - zero) - v) ** 2 for v in values)


def stored(value, dtype):
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def near_a_tie(value, scale):
    return abs(abs(value / scale) % 1 - 0.5) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_minmax_equals_the_definition(bits, symmetric, group_size, dtype):
    weight_OI = weight_of()
    scheme = WeightScheme(bits, group_size, symmetric)
    grid = fit_grid(weight_OI, scheme, dtype)
    codes_OI = quantize_to_grid(weight_OI, grid)
    value_OI = dequantize(codes_OI, grid)
    groups = members(20, group_size)
    assert grid.scale_OG.shape == (5, len(groups)) and number_of_groups(20, group_size) == len(groups)
    assert grid.scale_OG.dtype == torch.float32 and codes_OI.dtype == torch.int8
    assert (grid.zero_OG is None) == symmetric
    assert torch.equal(grid.scale_OG.to(dtype).float(), grid.scale_OG), "scales must be what the file will hold"
    for row in range(5):
        for group, columns in enumerate(groups):
            values = [float(weight_OI[row, column]) for column in columns]
            scale = float(grid.scale_OG[row, group])
            assert scale == pytest.approx(slow_scale(values, bits, symmetric), rel=torch.finfo(dtype).eps)
            zero = 0 if symmetric else slow_zero(values, scale, bits)
            assert zero == (0 if symmetric else int(grid.zero_OG[row, group]))
            for column, value in zip(columns, values, strict=True):
                code = int(codes_OI[row, column])
                if near_a_tie(value, scale):
                    assert abs(code - slow_code(value, scale, zero, bits)) <= 1
                    continue
                assert code == slow_code(value, scale, zero, bits)
                assert float(value_OI[row, column]) == pytest.approx(scale * (code - zero), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_search_finds_the_best_of_forty_shrunk_ranges(bits, symmetric, group_size, dtype):
    weight_OI = weight_of(rows=4, seed=1)
    grid = fit_grid(weight_OI, WeightScheme(bits, group_size, symmetric, "mse"), dtype)
    for row in range(4):
        for group, columns in enumerate(members(20, group_size)):
            values = [float(weight_OI[row, column]) for column in columns]
            candidates = []
            for shrink in (1 - 0.02 * step for step in range(40)):
                scale = stored(slow_scale(values, bits, symmetric, shrink), dtype)
                zero = 0 if symmetric else slow_zero(values, scale, bits, shrink)
                candidates.append((slow_error(values, scale, zero, bits), scale))
            scale = float(grid.scale_OG[row, group])
            zero = 0 if symmetric else int(grid.zero_OG[row, group])
            found = slow_error(values, scale, zero, bits)
            assert found <= min(candidates)[0] * (1 + 1e-3)
            assert any(scale == pytest.approx(other, rel=2 * torch.finfo(dtype).eps) for _, other in candidates)


def test_mse_search_shrinks_a_range_that_one_outlier_spoils():
    weight_OI = torch.cat([weight_of(3, 128).clamp(-0.1, 0.1), torch.full((3, 1), 0.4)], 1)
    wide, narrow = (fit_grid(weight_OI, WeightScheme(3, -1, True, clip)) for clip in ("minmax", "mse"))
    assert bool((narrow.scale_OG < 0.9 * wide.scale_OG).all())


finite = st.floats(-8, 8, width=32).filter(lambda value: value == 0 or abs(value) > 1e-20)


@st.composite
def fitted(draw, clips=("minmax", "mse")):
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    values = draw(st.lists(st.lists(finite, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    scheme = WeightScheme(
        draw(st.sampled_from(BITS)),
        draw(st.sampled_from([-1, 2, 5])),
        draw(st.booleans()),
        draw(st.sampled_from(clips)),
    )
    weight_OI = torch.tensor(values, dtype=torch.float32)
    return weight_OI, fit_grid(weight_OI, scheme, draw(st.sampled_from(DTYPES)))


@settings(max_examples=60, deadline=None)
@given(fitted())
def test_rounding_moves_a_weight_by_half_a_step_at_most_or_to_the_end_of_the_grid(layer):
    weight_OI, grid = layer
    codes_OI = quantize_to_grid(weight_OI, grid)
    scheme = grid.scheme
    assert int(codes_OI.min()) >= scheme.code_min and int(codes_OI.max()) <= scheme.code_max
    scale_OI = grid.scale_OG[:, grid.group_of_I].double()
    error_OI = (dequantize(codes_OI, grid).double() - weight_OI.double()).abs()
    at_end_OI = (codes_OI == scheme.code_min) | (codes_OI == scheme.code_max)
    within_OI = error_OI <= scale_OI * (0.5 + 1e-5 * 2**scheme.bits)
    assert bool((within_OI | at_end_OI).all())


@settings(max_examples=60, deadline=None)
@given(fitted(clips=("minmax",)))
def test_minmax_never_clips_by_more_than_the_rounding_of_its_stored_scale(layer):
    weight_OI, grid = layer
    error_OI = (dequantize(quantize_to_grid(weight_OI, grid), grid).double() - weight_OI.double()).abs()
    scale_OI = grid.scale_OG[:, grid.group_of_I].double()
    # A scale stored in few bits covers slightly less than the range, and subnormal float16 steps even less than that.
    slack_OI = scale_OI * 2.0**grid.scheme.bits * torch.finfo(grid.scale_dtype).eps + 2**grid.scheme.bits * 2.0**-24
    assert bool((error_OI <= 0.5 * scale_OI * (1 + 1e-4) + slack_OI).all())


@settings(max_examples=60, deadline=None)
@given(fitted())
def test_grid_points_round_to_themselves(layer):
    weight_OI, grid = layer
    codes_OI = quantize_to_grid(weight_OI, grid)
    assert torch.equal(quantize_to_grid(dequantize(codes_OI, grid), grid), codes_OI)
    assert torch.equal(quantize_to_grid(dequantize(codes_OI, grid).double(), grid), codes_OI)


@settings(max_examples=60, deadline=None)
@given(fitted())
def test_zero_weights_stay_exactly_zero(layer):
    weight_OI, grid = layer
    value_OI = dequantize(quantize_to_grid(weight_OI, grid), grid)
    assert bool((value_OI[weight_OI == 0] == 0).all())
    assert bool((dequantize(quantize_to_grid(torch.zeros_like(weight_OI), grid), grid) == 0).all())


@pytest.mark.parametrize("shift", [1.0, -1.0])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_asymmetric_grids_of_one_sign_keep_zero(clip, shift):
    weight_OI = shift * (1 + weight_of(4, 16).abs())
    weight_OI[:, 3] = 0
    grid = fit_grid(weight_OI, WeightScheme(4, 8, False, clip))
    value_OI = dequantize(quantize_to_grid(weight_OI, grid), grid)
    assert bool((value_OI[:, 3] == 0).all())
    assert bool(((value_OI * shift) >= 0).all())


@settings(max_examples=40, deadline=None)
@given(fitted(clips=("minmax",)))
def test_mse_is_never_worse_than_minmax_in_its_own_measure(layer):
    weight_OI, wide = layer
    scheme = WeightScheme(wide.scheme.bits, wide.scheme.group_size, wide.scheme.symmetric, "mse")
    narrow = fit_grid(weight_OI, scheme, wide.scale_dtype)

    def error_of(grid):
        difference_OI = (dequantize(quantize_to_grid(weight_OI, grid), grid) - weight_OI).double()
        error_OG = torch.zeros(grid.scale_OG.shape, dtype=torch.float64)
        return error_OG.index_add_(1, grid.group_of_I, difference_OI**2)

    assert bool((error_of(narrow) <= error_of(wide) * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signed_scales_are_the_better_of_a_weight_and_its_mirror(bits):
    """The negative of a weight has its one code more on the other side."""
    weight_OI = weight_of(9, 64)
    plain, mirrored = (fit_grid(w_OI, WeightScheme(bits, 16, True, "mse")) for w_OI in (weight_OI, -weight_OI))
    signed = fit_grid(weight_OI, WeightScheme(bits, 16, True, "signed"))

    def error_of(grid, w_OI):
        difference_OI = dequantize(quantize_to_grid(w_OI, grid), grid) - w_OI
        return difference_OI.square().view(-1, 4, 16).sum(2)

    one_OG, other_OG = error_of(plain, weight_OI), error_of(mirrored, -weight_OI)
    torch.testing.assert_close(error_of(signed, weight_OI), torch.minimum(one_OG, other_OG), rtol=1e-4, atol=1e-9)
    taken_OG = signed.scale_OG < 0
    assert torch.equal(signed.scale_OG, torch.where(taken_OG, -mirrored.scale_OG, plain.scale_OG))
    assert bool(taken_OG.any()) and bool((~taken_OG).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros(symmetric, clip, dtype):
    weight_OI = weight_of(3, 16)
    weight_OI[:, 8:] = 0
    grid = fit_grid(weight_OI, WeightScheme(4, 8, symmetric, clip), dtype)
    assert bool((grid.scale_OG[:, 1] == smallest_scale(dtype)).all())
    assert bool((grid.scale_OG > 0).all()) and bool((grid.scale_OG.to(dtype) > 0).all())
    assert bool((dequantize(quantize_to_grid(weight_OI, grid), grid)[:, 8:] == 0).all())


def test_float16_holds_the_steps_of_small_eight_bit_weights():
    weight_OI = 0.001 * weight_of(3, 64) / weight_of(3, 64).abs().amax()
    grid = fit_grid(weight_OI, WeightScheme(8, -1, True), torch.float16)
    exact = fit_grid(weight_OI, WeightScheme(8, -1, True))
    assert torch.allclose(grid.scale_OG, exact.scale_OG, rtol=0.05)
    assert grid.scale_OG.max() < torch.finfo(torch.float16).tiny, "the case is meant to need subnormals"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(bad):
    weight_OI = weight_of()
    weight_OI[2, 3] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        fit_grid(weight_OI, WeightScheme())


def test_a_scale_that_the_file_cannot_hold_is_refused():
    with pytest.raises(NumericsError, match="float16"):
        fit_grid(torch.full((1, 4), 1e7), WeightScheme(4, -1, True), torch.float16)
    assert torch.isfinite(fit_grid(torch.full((1, 4), 1e7), WeightScheme(4, -1, True), torch.bfloat16).scale_OG).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_scattered_groups_are_those_of_the_permuted_weight(symmetric):
    weight_OI = weight_of(4, 20)
    order_I = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    scheme = WeightScheme(4, 8, symmetric, "mse")
    position_I = torch.empty_like(order_I)
    position_I[order_I] = torch.arange(20)
    scattered = fit_grid(weight_OI, scheme, group_of_I=position_I // 8)
    straight = fit_grid(weight_OI[:, order_I], scheme)
    assert torch.equal(scattered.scale_OG, straight.scale_OG)
    assert symmetric or torch.equal(scattered.zero_OG, straight.zero_OG)
    assert torch.equal(
        quantize_to_grid(weight_OI, scattered)[:, order_I], quantize_to_grid(weight_OI[:, order_I], straight)
    )
    assert straight.groups_are_contiguous and not scattered.groups_are_contiguous


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_get_the_codes_of_their_float32_values(dtype):
    weight_OI = weight_of(16, 64).to(dtype)
    for symmetric in (True, False):
        grid = fit_grid(weight_OI, WeightScheme(8, 16, symmetric))
        assert torch.equal(quantize_to_grid(weight_OI, grid), quantize_to_grid(weight_OI.float(), grid))


def test_quantize_leaves_its_input_alone():
    weight_OI = weight_of()
    before_OI = weight_OI.clone()
    quantize_to_grid(weight_OI, fit_grid(weight_OI, WeightScheme(4, 8, False, "mse")))
    assert torch.equal(weight_OI, before_OI)


def test_group_numbers():
    assert contiguous_groups(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert contiguous_groups(4, -1).tolist() == [0] * 4
    assert contiguous_groups(4, 9).tolist() == [0] * 4
    assert [number_of_groups(*case) for case in ((7, 3), (6, 3), (6, -1), (6, 9))] == [3, 2, 1, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [((5, -1, True), "weights.bits"), ((4, 1, True), "weights.group_size"), ((4, 0, True), "weights.group_size"),
     ((4, -2, True), "weights.group_size"), ((4, -1, True, "mean"), "weights.clip")],
)  # fmt: skip
def test_schemes_that_cannot_be_are_refused_by_name(values, words):
    with pytest.raises(InputError, match=words):
        WeightScheme(*values)


def test_hash_sees_codes_scales_zeros_groups_and_shape():
    weight_OI = weight_of(4, 16)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, False))
    codes_OI = quantize_to_grid(weight_OI, grid)
    base = QuantizedWeight(codes_OI, grid)
    assert base.sha256() == QuantizedWeight(codes_OI.clone(), grid.rows_slice(slice(None))).sha256()
    other_OI = codes_OI.clone()
    other_OI[0, 0] ^= 1

    def changed(**parts):
        return Grid(**(vars(grid) | parts))

    hashes = {
        base.sha256(),
        QuantizedWeight(other_OI, grid).sha256(),
        QuantizedWeight(codes_OI, changed(scale_OG=grid.scale_OG * 2)).sha256(),
        QuantizedWeight(codes_OI, changed(zero_OG=grid.zero_OG + 1)).sha256(),
        QuantizedWeight(codes_OI, changed(zero_OG=None)).sha256(),
        QuantizedWeight(codes_OI, changed(group_of_I=grid.group_of_I.flip(0))).sha256(),
        QuantizedWeight(codes_OI.reshape(2, 32), grid).sha256(),
    }
    assert len(hashes) == 7


def test_rows_slice_keeps_the_rest():
    weight_OI = weight_of(6, 16)
    grid = fit_grid(weight_OI, WeightScheme(4, 8, False))
    part = grid.rows_slice(slice(2, 5))
    assert (part.rows, part.columns) == (3, 16)
    assert torch.equal(quantize_to_grid(weight_OI[2:5], part), quantize_to_grid(weight_OI, grid)[2:5])


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 7, 64])
def test_groups_fitted_together_are_those_fitted_one_by_one(monkeypatch, group_size, symmetric, clip):
    weight_OI, scheme = weight_of(9), WeightScheme(3, group_size, symmetric, clip)
    single = fit_grid(weight_OI, scheme, torch.float16)
    monkeypatch.setattr(fit, "_many_together", lambda device: True)
    monkeypatch.setattr(fit, "MOST_TOGETHER", 4 * weight_OI.shape[1])  # rows in pieces, as of a large layer
    together = fit_grid(weight_OI, scheme, torch.float16)
    assert torch.equal(single.scale_OG, together.scale_OG)
    assert symmetric or torch.equal(single.zero_OG, together.zero_OG)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, False), (8, True), (7, False)])
def test_pieces_of_rows_change_no_bit(monkeypatch, group_size, symmetric, clip):
    weight_OI = torch.randn(11, 20, generator=torch.Generator().manual_seed(5))
    found = []
    for together in (2**22, 60, 1):
        monkeypatch.setattr(scheme, "WEIGHTS_TOGETHER", together)
        grid = fit_grid(weight_OI, WeightScheme(3, group_size, symmetric, clip), torch.float16)
        codes_OI = quantize_to_grid(weight_OI, grid)
        found.append((grid.scale_OG, codes_OI, dequantize(codes_OI, grid)))
    assert [len(list(row_pieces(weight_OI))), len(list(row_pieces(weight_OI[:0])))] == [11, 0]
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
