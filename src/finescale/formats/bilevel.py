"""Scales that are quantized themselves, in checkpoints: three tensors in the place of ``weight_scale``, known to
finescale only.

    weight_scale_packed  int32 [O, ceil(G*b/32)]  scale codes, a bit stream along the groups
    weight_scale_step    [Q, G]                   Q = ceil(O / rows)
    weight_scale_base    [Q, G]                   scale = base + step * code
    weight_scale_shape   int64 [4]                (O, G, bits of a code, rows)

Shape legend: O outputs, G groups, Q second-level groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from finescale.errors import CheckpointError
from finescale.formats.checks import SCALE_DTYPES, expect_shape, require
from finescale.grid.bilevel import SCALE_BITS, Bilevel
from finescale.grid.packing import pack_rows, packed_words, to_signed, to_unsigned, unpack_rows

PACKED, STEP, BASE, SHAPE = "weight_scale_packed", "weight_scale_step", "weight_scale_base", "weight_scale_shape"
SUFFIXES = (PACKED, STEP, BASE, SHAPE)


def pack(bilevel: Bilevel) -> dict[str, Tensor]:
    """The tensors by suffix."""
    return {
        PACKED: pack_rows(to_unsigned(bilevel.code_OG, bilevel.bits), bilevel.bits),
        STEP: bilevel.step_QG.contiguous(),
        BASE: bilevel.base_QG.contiguous(),
        SHAPE: torch.tensor([*bilevel.code_OG.shape, bilevel.bits, bilevel.rows], dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], rows: int, groups: int) -> Bilevel:
    """The quantized scales of a layer of so many rows and groups.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or type, or a scale is not positive and finite.
    """
    packed, step_QG, base_QG, shape = require(tensors, SUFFIXES, "compressed-tensors")
    expect_shape(shape, (4,), SHAPE)
    stored_rows, stored_groups, bits, shared = (int(size) for size in shape.tolist())
    if (stored_rows, stored_groups) != (rows, groups) or bits not in SCALE_BITS or shared < 1:
        raise CheckpointError(f"{SHAPE} does not fit the layer; the checkpoint is damaged.")
    expect_shape(packed, (rows, packed_words(groups, bits)), PACKED)
    for tensor, name in ((step_QG, STEP), (base_QG, BASE)):
        expect_shape(tensor, (-(-rows // shared), groups), name)
        if tensor.dtype not in SCALE_DTYPES:
            raise CheckpointError(f"{name} is of type {tensor.dtype}; float16, bfloat16 or float32 is needed.")
    bilevel = Bilevel(bits, shared, to_signed(unpack_rows(packed, bits, groups), bits), step_QG, base_QG)
    scale_OG = bilevel.scale_OG()
    if not bool(torch.isfinite(scale_OG).all()) or not bool((scale_OG > 0).all()):
        raise CheckpointError("some scales are not positive and finite; the checkpoint is damaged.")
    return bilevel
