"""QLLM's gather in the kernel that rounds: channels are split, merged and permuted between the norm and the int8 codes.

Shape legend: T tokens, I channels of the input, J channels that the layer multiplies, K channels that are summed into
one, P pieces of 8 channels J, M terms beyond each channel's first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.grid import ActivationScheme, Gather
from finescale.grid import quantize_tokens as to_codes
from finescale.kernels import plain
from finescale.kernels.checks import check_tensors
from finescale.kernels.layout import empty_tokens, pack_tokens
from finescale.kernels.operators import operator


@dataclass(frozen=True)
class GatherTable:
    """A `Gather` as the kernel reads it.

    Attributes:
        index_J: int32, the first channel that each one is made of.
        gain_J: float32.
        more_start_P: int32 [P + 1], where the further terms of each piece begin.
        more_index_M: int32, 8 * channel of the input + place in the piece; terms of one channel in the order of k.
        more_gain_M: float32.
    """

    index_J: Tensor
    gain_J: Tensor
    more_start_P: Tensor
    more_index_M: Tensor
    more_gain_M: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (self.index_J, self.gain_J, self.more_start_P, self.more_index_M, self.more_gain_M)


def gather_table(gather: Gather) -> GatherTable:
    """The table of a gather, on its device.

    Raises:
        InputError: a channel beyond 65535.
    """
    index_KJ, gain_KJ = gather.index_KJ, gather.gain_KJ.float()
    channels, device = index_KJ.shape[1], index_KJ.device
    if index_KJ.numel() and not 0 <= int(index_KJ.min()) <= int(index_KJ.max()) < 2**16:
        raise InputError("a gather in the rounding kernel takes inputs of at most 65536 channels.")
    k_M, j_M = gain_KJ[1:].nonzero(as_tuple=True)
    order_M = torch.argsort(j_M // 8, stable=True)
    k_M, j_M = k_M[order_M] + 1, j_M[order_M]
    counts_P = torch.bincount(j_M // 8, minlength=-(-channels // 8))
    return GatherTable(
        index_KJ[0].to(torch.int32).contiguous(),
        gain_KJ[0].contiguous(),
        torch.cat([counts_P.new_zeros(1), counts_P.cumsum(0)]).to(torch.int32).to(device),
        (8 * index_KJ[k_M, j_M] + j_M % 8).to(torch.int32),
        gain_KJ[k_M, j_M].contiguous(),
    )


def _empty_quantize_gathered(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
    index_J: Tensor,
    gain_J: Tensor,
    more_start_P: Tensor,
    more_index_M: Tensor,
    more_gain_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_tokens(x_TI, x_TI.shape[0], index_J.shape[0])


def _plain_quantize_gathered(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
    index_J: Tensor,
    gain_J: Tensor,
    more_start_P: Tensor,
    more_index_M: Tensor,
    more_gain_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    y_TI = plain.before_rounding(x_TI, kind, residual_TI, gain_I, shift_I, epsilon)
    y_TJ = apply(GatherTable(index_J, gain_J, more_start_P, more_index_M, more_gain_M), y_TI)
    codes_TJ, scale_T1 = to_codes(y_TJ, ActivationScheme(8))
    return pack_tokens(codes_TJ), scale_T1[:, 0].contiguous(), codes_TJ.sum(1, dtype=torch.int32)


@operator("quantize_gathered", _empty_quantize_gathered, mutates=("residual_TI",), cpu=_plain_quantize_gathered)
def quantize_gathered(
    x_TI: Tensor,
    kind: str,
    residual_TI: Tensor | None,
    gain_I: Tensor | None,
    shift_I: Tensor | None,
    epsilon: float,
    index_J: Tensor,
    gain_J: Tensor,
    more_start_P: Tensor,
    more_index_M: Tensor,
    more_gain_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear.quantize_tokens`` with a gather between what stands before the rounding and the rounding.

    Args:
        x_TI, kind, residual_TI, gain_I, shift_I, epsilon: see ``linear.quantize_tokens``.
        index_J, gain_J, more_start_P, more_index_M, more_gain_M: see ``GatherTable``.

    Returns:
        codes int8 [B, ceil(T / 8), 1024] of J channels, scales float32 [T], sums of codes int32 [T].

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    from finescale.kernels.hopper import quantize
    from finescale.kernels.linear import check_tokens

    check_tokens(x_TI, kind, residual_TI, gain_I, shift_I)
    table = GatherTable(index_J, gain_J, more_start_P, more_index_M, more_gain_M)
    channels, terms = index_J.numel(), more_index_M.numel()
    check_tensors(
        x_TI.device,
        ("channels of a gather", index_J, (channels,), torch.int32),
        ("gains of a gather", gain_J, (channels,), torch.float32),
        ("starts of a gather's pieces", more_start_P, (-(-channels // 8) + 1,), torch.int32),
        ("further channels of a gather", more_index_M, (terms,), torch.int32),
        ("further gains of a gather", more_gain_M, (terms,), torch.float32),
    )
    inputs = x_TI.shape[1] // 2 if kind == "silu" else x_TI.shape[1]
    parts = 2 if kind == "silu" or residual_TI is not None else 1
    if not quantize.gather_fits(inputs, index_J.shape[0], x_TI.element_size(), parts):
        # Too wide for the kernel's shared memory: the same in steps.
        y_TI = plain.before_rounding(x_TI, kind, residual_TI, gain_I, shift_I, epsilon)
        return quantize.run(apply(table, y_TI))
    return quantize.run(x_TI, kind, residual_TI, gain_I, shift_I, epsilon, gather=table)


def apply(table: GatherTable, x_TI: Tensor) -> Tensor:
    """What the kernel computes, float [T, I] -> [T, J]: the first terms, then of each channel the second, and so on."""
    y_TJ = x_TI[:, table.index_J] * table.gain_J.to(x_TI.dtype)
    piece_M = torch.repeat_interleave(table.more_start_P.diff())
    channel_M = 8 * piece_M + table.more_index_M % 8
    order_M = torch.argsort(channel_M, stable=True)
    _, counts = torch.unique_consecutive(channel_M[order_M], return_counts=True)
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(order_M.shape[0], device=x_TI.device) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    for rank in range(int(counts.max()) if counts.numel() else 0):
        some_M = rank_M == rank
        source, gain = table.more_index_M[some_M] // 8, table.more_gain_M[some_M].to(x_TI.dtype)
        y_TJ[:, channel_M[some_M]] += x_TI[:, source] * gain
    return y_TJ
