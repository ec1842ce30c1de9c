"""Fused activation quantizers on a GPU: norm, residual or silu * gate, then int8 per token, one kernel each.

Shape legend: T tokens, I inputs, B blocks of 128 inputs.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.jit import load_kernel
from finescale.kernels.launch import launch
from finescale.kernels.layout import packed_tokens_shape

if TYPE_CHECKING:
    from finescale.kernels.gather import GatherTable

SHARED_BYTES = 227 * 1024
KINDS = {"plain": 0, "rms": 1, "layer": 2, "silu": 3}
IN_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LARGEST_INPUTS = 8 * 1024 * 8


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "residual", "gain", "shift", "codes", "scale", "sum", "position")],
        *[(name, ctypes.c_int) for name in ("tokens", "inputs", "slabs", "choices")],
        ("epsilon", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("index", "index_gain", "more_start", "more_index", "more_gain")],
        ("gathered", ctypes.c_int),
    ]


def run(
    x_TI: Tensor,
    kind: str = "plain",
    residual_TI: Tensor | None = None,
    gain_I: Tensor | None = None,
    shift_I: Tensor | None = None,
    epsilon: float = 0.0,
    position_TK: Tensor | None = None,
    rows: int = 0,
    gather: GatherTable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [B, slabs, 1024] (kernels/layout.py), token scales float32 [T], code sums int32 [T].

    With ``position_TK`` all three have ``rows`` rows sorted by expert instead of tokens (kernels/experts.py): each
    token goes to all its rows, but ``silu`` reads rows as well and gives one for each.

    Args:
        x_TI: contiguous bfloat16, float16 or float32; [T, 2 * I] for ``silu`` (gate, then up).
        kind: what is computed before the rounding: ``plain``, ``rms``, ``layer``, ``silu``.
        residual_TI: added before the norm, and replaced by the sum.
        gain_I, shift_I: of the norm, in the type of ``x_TI``.
        epsilon: of the norm.
        position_TK: int32, the row of each choice of a token, negative for none.
        rows: a multiple of 8 that holds all of them.
        gather: what is rounded are channels made of those of x, so many that codes are wider or narrower than x.

    Raises:
        InputError: tokens too wide for the kernel.
    """
    tokens = x_TI.shape[0]
    given = tokens if position_TK is None else rows
    inputs = x_TI.shape[1] // 2 if kind == "silu" else x_TI.shape[1]
    device = x_TI.device
    gathered = inputs if gather is None else gather.index_J.shape[0]
    shape = packed_tokens_shape(given, gathered)
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    scale_T = torch.empty(given, dtype=torch.float32, device=device)
    sum_T = torch.empty(given, dtype=torch.int32, device=device)
    by_row = position_TK is not None and kind == "silu"
    grid = position_TK.numel() if position_TK is not None and by_row else tokens
    if grid == 0:
        return codes, scale_T, sum_T
    widest = max(-(-inputs // 128) * 128, shape[0] * 128)
    threads = next((t for t in (128, 256, 512, 1024) if widest <= t * 16), 1024)
    pieces = -(-inputs // (threads * 8))
    out_pieces = pieces if gather is None else -(-shape[0] * 128 // (threads * 8))
    size = x_TI.element_size()
    # The token, and four bytes a channel of the table, or eight where gains are float32.
    shared_bytes = 0 if gather is None else -(-inputs * size // 16) * 16 + gathered * max(4, 2 * size)
    if max(pieces, out_pieces) > 8 or shared_bytes > SHARED_BYTES:
        raise InputError(f"tokens of {inputs} inputs are too wide for the fused quantizer (at most {LARGEST_INPUTS}).")
    if gather is not None:
        # Blocks that gather stay, as many as fit.
        blocks = max(1, min(2048 // threads, SHARED_BYTES // (shared_bytes + 1024)))
        grid = min(grid, blocks * torch.cuda.get_device_properties(device).multi_processor_count)
    settings = (
        ("KIND", KINDS[kind]),
        ("ADD", int(residual_TI is not None)),
        ("IN", IN_TYPES[x_TI.dtype]),
        ("PIECES", pieces),
        ("OUT_PIECES", out_pieces),
        ("THREADS", threads),
        ("ROUTED", 0 if position_TK is None else 1 + int(by_row)),
        ("GATHER", int(gather is not None)),
    )
    function = load_kernel("quantize.cu", settings, (), "quantize_tokens", device.index, shared_bytes)
    arguments = _Arguments(
        *(None if t is None else t.data_ptr() for t in (x_TI, residual_TI, gain_I, shift_I, codes, scale_T, sum_T)),
        None if position_TK is None else position_TK.data_ptr(),
        tokens,
        inputs,
        shape[1],
        0 if position_TK is None else position_TK.shape[1],
        epsilon,
        *((None,) * 5 if gather is None else (tensor.data_ptr() for tensor in gather.tensors())),
        gathered,
    )
    launch(function, grid, threads, shared_bytes, arguments, device)
    return codes, scale_T, sum_T
