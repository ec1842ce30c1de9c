"""Outliers in checkpoints: the same values back, and damaged tensors named."""

import pytest
import torch

from finescale.errors import CheckpointError, InputError
from finescale.formats import registry
from finescale.formats.outliers import COLUMNS, ROWS, VALUES, pack, unpack
from finescale.grid import QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.grid.outliers import single_outliers
from tests.grid.test_outliers import example


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
    assert pack(None) == {} and unpack({}, 3, 4) is None


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (VALUES, lambda t: t[:-1]),
        (VALUES, lambda t: t.double()),
        (VALUES, lambda t: t * torch.inf),
        (COLUMNS, lambda t: t.flip(0)),
        (COLUMNS, lambda t: t + 12),
        (COLUMNS, lambda t: t - 12),
        (COLUMNS, lambda t: t.int()),
        (ROWS, lambda t: t[:-1]),
        (ROWS, lambda t: t + 1),
        (ROWS, lambda t: torch.cat([t[:1], t[1:].flip(0)])),
        (COLUMNS, lambda t: None),
    ],
)
def test_damage_is_named(key, change):
    tensors = pack(example(False)[1])
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    with pytest.raises(CheckpointError, match="outlier"):
        unpack(tensors, 7, 12)
