"""Outliers of a byte each: how near they come, what they refuse, and the same bytes again."""

import pytest
import torch

from finescale.errors import CheckpointError
from finescale.formats import registry
from finescale.formats.outliers import VALUES
from finescale.grid import QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.grid.narrow import narrow_outliers, value_bytes, values_of_bytes
from finescale.grid.outliers import single_outliers


def layer_with(largest, bits=3, group=-1, symmetric=False):
    """Codes, wanted values and outliers, among them one ``largest`` steps from zero."""
    generator = torch.Generator().manual_seed(5)
    value_OI = torch.randn(9, 40, generator=generator)
    grid = fit_grid(value_OI, WeightScheme(bits, group, symmetric), torch.float16)
    chosen_OI = torch.rand(9, 40, generator=generator) < 0.1
    value_OI = torch.where(chosen_OI, 4 * value_OI, value_OI)
    chosen_OI[4, 7], value_OI[4, 7] = True, largest * grid.scale_OG[4, grid.group_of_I[7]]
    return QuantizedWeight(quantize_to_grid(value_OI, grid), grid), value_OI, chosen_OI


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(3, -1, False), (4, 16, True), (2, 8, False), (8, -1, False)])
def test_they_miss_their_values_by_little(bits, group, symmetric):
    weight, value_OI, chosen_OI = layer_with(8.3, bits, group, symmetric)
    found = narrow_outliers(weight, value_OI, chosen_OI)
    assert torch.equal(found.outliers.mask(), chosen_OI) and found.outliers.narrow
    scale_OI = weight.grid.scale_OG[:, weight.grid.group_of_I]
    miss_N = ((found.dequantize() - value_OI) / scale_OI)[chosen_OI].abs()
    near_N = (found.outliers.dense() / scale_OI)[chosen_OI].abs() < 8
    assert float(miss_N.max()) <= 0.5 + 1e-4 and int(near_N.sum()) > 5
    assert float(miss_N[near_N].square().mean().sqrt()) < 0.1  # a rounded weight: 0.29
    plain = QuantizedWeight(weight.codes_OI, weight.grid).dequantize()
    assert torch.equal(found.dequantize()[~chosen_OI], plain[~chosen_OI])


def test_every_code_is_tried():
    """The best of all sums of a code and a float8 number, one by one."""
    weight, value_OI, chosen_OI = layer_with(20.0)
    found = narrow_outliers(weight, value_OI, chosen_OI).dequantize()
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    bytes_ = bytes_[torch.isfinite(bytes_)]
    for row, column in chosen_OI.nonzero().tolist():
        scale, zero = weight.grid.scale_OG[row, 0].double(), weight.grid.zero_OG[row, 0].double()
        sums = (torch.arange(-4, 4).double()[:, None] - zero + bytes_[None, :]) * scale
        best = float((sums - value_OI[row, column].double()).abs().min())
        assert float((found[row, column] - value_OI[row, column]).abs()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("steps", "fits"), [(100.0, True), (1e3, False), (torch.inf, False)])
def test_what_is_too_far_is_refused(steps, fits):
    assert (narrow_outliers(*layer_with(steps)) is not None) is fits


@pytest.mark.parametrize("name", ["compressed-tensors", "int-quantized"])
def test_the_same_bytes_again(name):
    weight = narrow_outliers(*layer_with(8.3))
    bytes_N = value_bytes(weight.outliers, weight.grid)
    assert bytes_N.dtype == torch.uint8
    assert torch.equal(values_of_bytes(bytes_N, weight.outliers, weight.grid), weight.outliers.value)
    tensors = registry.get(name).pack(weight)
    assert tensors[VALUES].dtype == torch.uint8
    again = registry.get(name).unpack(tensors, weight.grid.scheme)
    assert again.sha256() == weight.sha256() and again.stored_bits() == weight.stored_bits()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_a_byte_that_is_no_number_is_named():
    weight = narrow_outliers(*layer_with(8.3))
    tensors = registry.get("compressed-tensors").pack(weight)
    tensors[VALUES][3] = 0x7F  # NaN of e4m3
    with pytest.raises(CheckpointError, match=f"{VALUES}.*not finite"):
        registry.get("compressed-tensors").unpack(tensors, weight.grid.scheme)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_and_all_of_the_weights(share):
    weight, value_OI, _ = layer_with(8.3)
    chosen_OI = torch.full_like(value_OI, share, dtype=torch.bool)
    found = narrow_outliers(weight, value_OI, chosen_OI)
    again = registry.get("compressed-tensors").unpack(
        registry.get("compressed-tensors").pack(found), weight.grid.scheme
    )
    assert again.outliers.count == found.outliers.count == share * value_OI.numel()
    assert torch.equal(again.dequantize(), found.dequantize())


def test_they_take_half_of_the_bits():
    weight, value_OI, chosen_OI = layer_with(8.3)
    wide = single_outliers(value_OI, chosen_OI, torch.float16)
    assert wide.stored_bits - narrow_outliers(weight, value_OI, chosen_OI).outliers.stored_bits == 8 * wide.count
