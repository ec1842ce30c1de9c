"""Outliers in checkpoints: the same values back, and damaged tensors named."""

import pytest
import torch

from finescale.errors import CheckpointError, InputError
from finescale.formats import registry
from finescale.formats.outliers import COLUMNS, GAPS, VALUES, pack, unpack
from finescale.grid import QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.grid.outliers import single_outliers
from tests.grid.test_outliers import example

GRID = fit_grid(
    torch.randn(7, 12, generator=torch.Generator().manual_seed(2)), WeightScheme(4, 4, False), torch.float16
)


def weight_with(structured):
    weight_OI = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    grid = fit_grid(weight_OI, WeightScheme(4, 4, False), torch.float16)
    return QuantizedWeight(quantize_to_grid(weight_OI, grid), grid, example(structured, dtype=torch.float16)[1])


@pytest.mark.parametrize("name", ["compressed-tensors", "int-quantized"])
@pytest.mark.parametrize("structured", [False, True])
def test_round_trip(structured, name):
    weight, fmt = weight_with(structured), registry.get(name)
    tensors = fmt.pack(weight)
    assert set(tensors) <= set(fmt.suffixes)
    assert fmt.unpack(tensors, weight.grid.scheme).sha256() == weight.sha256()


@pytest.mark.parametrize("structured", [False, True])
def test_dense_holds_the_sum(structured):
    weight = weight_with(structured)
    assert torch.equal(registry.get("dense").pack(weight)["weight"], weight.dequantize().half())


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_other_formats_refuse(name):
    weight_OI = torch.ones(32, 32)
    grid = fit_grid(weight_OI, WeightScheme(4, 32, True), torch.float16)
    kept = single_outliers(weight_OI, torch.eye(32, dtype=torch.bool), torch.float16)
    with pytest.raises(InputError, match="no place for outliers"):
        registry.get(name).pack(QuantizedWeight(quantize_to_grid(weight_OI, grid), grid, kept))


def test_none():
    assert pack(None, GRID) == {} and unpack({}, 7, 12, GRID) is None


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (VALUES, lambda t: t[:-1]),
        (VALUES, lambda t: t.double()),
        (VALUES, lambda t: t * torch.inf),
        (GAPS, lambda t: t[:-1]),
        (GAPS, lambda t: torch.cat([t, t[:1]])),
        (GAPS, lambda t: t + 12),
        (GAPS, lambda t: torch.cat([t, t.new_zeros(1)])),
        (GAPS, lambda t: -t.short()),
        (GAPS, lambda t: t.int()),
        (GAPS, lambda t: t[:, None]),
        (GAPS, lambda t: None),
        (VALUES, lambda t: None),
    ],
)
def test_damage_of_single_entries_is_named(key, change):
    expect_refusal(False, key, change)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (COLUMNS, lambda t: t.flip(0)),
        (COLUMNS, lambda t: t + 12),
        (COLUMNS, lambda t: t - 12),
        (COLUMNS, lambda t: t.int()),
        (COLUMNS, lambda t: t[:-1]),
        (COLUMNS, lambda t: None),
        (VALUES, lambda t: t[:-1]),
    ],
)
def test_damage_of_whole_columns_is_named(key, change):
    expect_refusal(True, key, change)


def test_places_of_both_kinds_are_refused():
    with pytest.raises(CheckpointError, match="exclude each other"):
        unpack(pack(example(False)[1], GRID) | pack(example(True)[1], GRID), 7, 12, GRID)


def expect_refusal(structured, key, change):
    tensors = pack(example(structured)[1], GRID)
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    with pytest.raises(CheckpointError, match="outlier"):
        unpack(tensors, 7, 12, GRID)
