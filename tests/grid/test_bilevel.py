"""Scales that are quantized themselves."""

import pytest
import torch

from finescale.errors import CheckpointError
from finescale.formats import bilevel as stored
from finescale.grid.bilevel import join_groups, quantize_scales


def example(rows=37, groups=3, bits=3, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    scale_OG = 0.01 + torch.rand(rows, groups, generator=generator)
    return scale_OG, join_groups([quantize_scales(scale_OG[:, g], bits, 16, dtype, 6e-8) for g in range(groups)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_lie_within_half_a_step(bits):
    scale_OG, bilevel = example(bits=bits)
    steps_OG = bilevel.step_QG.float()[torch.arange(37) // 16]
    assert bool(((bilevel.scale_OG() - scale_OG).abs() <= 0.5 * steps_OG + 2e-3).all())
    for rows in (slice(0, 16), slice(16, 32), slice(32, 37)):  # the smallest is met up to the type's rounding
        torch.testing.assert_close(bilevel.scale_OG()[rows].amin(0), scale_OG[rows].amin(0), rtol=1e-3, atol=0)
    assert bilevel.stored_bits == 37 * 3 * bits + 3 * 3 * 2 * 16


def test_equal_scales_are_exact():
    bilevel = quantize_scales(torch.full((20,), 0.25), 3, 16, torch.float16, 6e-8)
    assert torch.equal(bilevel.scale_OG(), torch.full((20, 1), 0.25))


@pytest.mark.parametrize("bits", [3, 4])
def test_stored_and_read(bits):
    _, bilevel = example(bits=bits)
    found = stored.unpack(stored.pack(bilevel), 37, 3)
    assert torch.equal(found.scale_OG(), bilevel.scale_OG()) and torch.equal(found.code_OG, bilevel.code_OG)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (stored.STEP, lambda t: t[:-1]),
        (stored.BASE, lambda t: -t),
        (stored.BASE, lambda t: t.double()),
        (stored.PACKED, lambda t: t[:, :0]),
        (stored.SHAPE, lambda t: t + 1),
        (stored.SHAPE, lambda t: None),
    ],
)
def test_damage_is_named(suffix, change):
    tensors = stored.pack(example()[1])
    changed = change(tensors.pop(suffix))
    if changed is not None:
        tensors[suffix] = changed
    with pytest.raises(CheckpointError):
        stored.unpack(tensors, 37, 3)
