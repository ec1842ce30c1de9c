"""Weights beside the grid: storing them, cutting and joining rows, and their part of the product."""

import pytest
import torch

from finescale.errors import NumericsError
from finescale.grid import QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.grid.outliers import column_outliers, place_gaps, places_from_gaps, single_outliers, stack_outliers


def example(structured, rows=7, columns=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    addend_OI = torch.randn(rows, columns, generator=generator).to(torch.float16).float()
    if structured:
        chosen_I = torch.rand(columns, generator=generator) < 0.3
        return addend_OI * chosen_I, column_outliers(addend_OI, chosen_I, dtype)
    chosen_OI = torch.rand(rows, columns, generator=generator) < 0.2
    chosen_OI[2] = False  # a row without any
    return addend_OI * chosen_OI, single_outliers(addend_OI, chosen_OI, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("structured", [False, True])
def test_dense_and_product(structured, dtype):
    addend_OI, outliers = example(structured, dtype=dtype)
    assert outliers.structured is structured and outliers.rows == 7
    assert torch.equal(outliers.dense(), addend_OI)
    x_TI = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outliers.linear(x_TI), x_TI @ addend_OI.T)
    places = outliers.column if structured else place_gaps(outliers)
    assert outliers.stored_bits == 8 * (outliers.value.nbytes + places.nbytes)
    assert outliers.count == (7 * int((addend_OI != 0).any(0).sum()) if structured else int((addend_OI != 0).sum()))


@pytest.mark.parametrize("structured", [False, True])
def test_rows_are_cut_and_joined(structured):
    addend_OI, outliers = example(structured)
    parts = [outliers.rows_slice(rows) for rows in (slice(0, 2), slice(2, 3), slice(3, 7))]
    assert torch.equal(parts[2].dense(), addend_OI[3:])
    whole = stack_outliers(parts)
    for one, other in zip(whole.tensors(), outliers.tensors(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("places", "codes", "dtype"),
    [
        ([], [], torch.uint8),
        ([0, 1, 4], [1, 1, 3], torch.uint8),
        ([254, 509, 510], [255, 255, 1], torch.uint8),
        ([0, 1, 2, 3, 259], [1, 1, 1, 1, 0, 1], torch.uint8),  # 256 steps
        ([2999], [3000], torch.int16),
        ([99999], [0, 0, 0, 100000 - 3 * 32767], torch.int16),
    ],
)
def test_gaps_between_places(places, codes, dtype):
    chosen_OI = torch.zeros(2, 50000, dtype=torch.bool)
    chosen_OI.view(-1)[places] = True
    gaps = place_gaps(single_outliers(torch.ones(2, 50000), chosen_OI, torch.float16))
    assert gaps.dtype == dtype and gaps.tolist() == codes
    assert places_from_gaps(gaps).tolist() == places


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3])
def test_places_come_back_from_their_gaps(share):
    chosen_OI = torch.rand(300, 700, generator=torch.Generator().manual_seed(3)) < share
    outliers = single_outliers(torch.ones(300, 700), chosen_OI, torch.float16)
    assert torch.equal(places_from_gaps(place_gaps(outliers)), chosen_OI.flatten().nonzero().squeeze(1))
    assert outliers.stored_bits <= (25 if share > 0.005 else 33) * outliers.count


def test_wide_layers_have_wide_indices():
    chosen_I = torch.zeros(32769, dtype=torch.bool)
    chosen_I[[3, 32768]] = True
    addend_OI = torch.ones(1, 32769)
    assert column_outliers(addend_OI, chosen_I, torch.float32).column.tolist() == [3, 32768]
    narrow = single_outliers(addend_OI[:, :32768], chosen_I[None, :32768], torch.float32)
    assert narrow.column.dtype == torch.int16 and narrow.column.tolist() == [3]


def test_values_that_do_not_fit_their_type_are_refused():
    with pytest.raises(NumericsError, match="outlier does not fit"):
        column_outliers(torch.full((2, 2), 1e6), torch.tensor([True, False]), torch.float16)


@pytest.mark.parametrize("structured", [False, True])
def test_a_weight_with_outliers(structured):
    addend_OI, outliers = example(structured)
    weight_OI = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    grid = fit_grid(weight_OI, WeightScheme(4, 4, False), torch.float16)
    plain = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
    weight = QuantizedWeight(plain.codes_OI, grid, outliers)
    assert torch.equal(weight.dequantize(), plain.dequantize() + addend_OI)
    assert torch.equal(weight.rows_slice(slice(2, 6)).dequantize(), weight.dequantize()[2:6])
    assert weight.sha256() != plain.sha256()
    assert plain.stored_bits() == 7 * (12 * 4 + 3 * (16 + 4))
    assert weight.stored_bits() == plain.stored_bits() + outliers.stored_bits
