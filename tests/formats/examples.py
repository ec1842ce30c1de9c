"""Random quantized layers for the tests of the formats."""

import torch
from hypothesis import strategies as st

from finescale.grid import Grid, QuantizedWeight, WeightScheme, contiguous_groups, number_of_groups


def random_weight(
    rows: int,
    columns: int,
    scheme: WeightScheme,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    lowest_zero: int | None = None,
) -> QuantizedWeight:
    """Codes and zero points over their whole range; scales exact in ``scale_dtype``."""
    generator = torch.Generator().manual_seed(seed)
    groups = number_of_groups(columns, scheme.group_size)
    low, high = scheme.code_min, scheme.code_max + 1
    codes_OI = torch.randint(low, high, (rows, columns), generator=generator).to(torch.int8)
    scale_OG = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype).float()
    zero_OG = None
    if not scheme.symmetric:
        first = low if lowest_zero is None else lowest_zero
        zero_OG = torch.randint(first, high, (rows, groups), generator=generator).to(torch.int8)
    grid = Grid(scheme, scale_OG, zero_OG, contiguous_groups(columns, scheme.group_size), scale_dtype)
    return QuantizedWeight(codes_OI, grid)


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    """Whether two layers agree in every code, scale, zero point and group, and in the type of the scales."""
    zeros = (left.grid.zero_OG is None) == (right.grid.zero_OG is None)
    if left.grid.zero_OG is not None and right.grid.zero_OG is not None:
        zeros = torch.equal(left.grid.zero_OG, right.grid.zero_OG)
    return (
        zeros
        and torch.equal(left.codes_OI, right.codes_OI)
        and torch.equal(left.grid.scale_OG, right.grid.scale_OG)
        and torch.equal(left.grid.group_of_I, right.grid.group_of_I)
        and left.grid.scale_dtype == right.grid.scale_dtype
    )


@st.composite
def layers(draw, bits=(2, 3, 4, 8), row_step=1, column_step=1, ragged=True):
    """A random layer whose dimensions are multiples of the steps."""
    rows = row_step * draw(st.integers(1, max(1, 40 // row_step)))
    columns = column_step * draw(st.integers(1, max(1, 72 // column_step)))
    sizes = [-1, 2, 8, 32, 64] if ragged else [-1, *(g for g in (2, 8, 32, 64) if columns % g == 0)]
    scheme = WeightScheme(draw(st.sampled_from(bits)), draw(st.sampled_from(sizes)), draw(st.booleans()))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return random_weight(rows, columns, scheme, draw(st.integers(0, 1000)), dtype)
