"""Fused activation quantizers on a GPU: norm, residual or silu * gate, then int8 per token, one kernel each.

Shape legend: T tokens, I inputs, B blocks of 128 inputs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.jit import load_kernel
from finescale.kernels.launch import blocks_on_multiprocessor, launch, multiprocessors_of
from finescale.kernels.layout import packed_tokens_shape

if TYPE_CHECKING:
    from finescale.kernels.gather import GatherTable

SHARED_BYTES = 227 * 1024
RESERVED_BYTES = 3 * 1024
"""Shared memory of a block beside its tokens."""
THREADS_AT_ONCE = 896
"""Of a multiprocessor, which leaves each of them 72 registers."""
KINDS = {"plain": 0, "rms": 1, "layer": 2, "silu": 3}
IN_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "residual", "gain", "shift", "codes", "scale", "sum", "position")],
        *[(name, ctypes.c_int) for name in ("items", "inputs", "slabs", "choices")],
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
    block: Block | None = None,
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
        block: how tokens are shared out, instead of as ``block_shape`` says.

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
    items = position_TK.numel() if position_TK is not None and by_row else tokens
    if items == 0:
        return codes, scale_T, sum_T
    aligned = x_TI.data_ptr() % 16 == 0 and (residual_TI is None or residual_TI.data_ptr() % 16 == 0)
    routed = 0 if position_TK is None else 1 + int(by_row)
    function, grid, threads, shared_bytes = _plan(
        kind, residual_TI is not None, x_TI.dtype, items, inputs, device.index, None if gather is None else gathered,
        routed, aligned, block,
    )  # fmt: skip
    arguments = _Arguments(
        *(None if t is None else t.data_ptr() for t in (x_TI, residual_TI, gain_I, shift_I, codes, scale_T, sum_T)),
        None if position_TK is None else position_TK.data_ptr(),
        items,
        inputs,
        shape[1],
        0 if position_TK is None else position_TK.shape[1],
        epsilon,
        *((None,) * 5 if gather is None else (tensor.data_ptr() for tensor in gather.tensors())),
        gathered,
    )
    launch(function, grid, threads, shared_bytes, arguments, device)
    return codes, scale_T, sum_T


@dataclass(frozen=True)
class Form:
    """A compiled form of the kernel: its macros, and how tokens are shared out."""

    settings: tuple[tuple[str, int], ...]
    block: Block


def form(
    kind: str,
    add: bool,
    dtype: torch.dtype,
    items: int,
    inputs: int,
    multiprocessors: int,
    gathered: int | None = None,
    routed: int = 0,
    aligned: bool = True,
) -> Form:
    """The form that runs for a size.

    Args:
        kind, inputs: see ``run``.
        add: there is a residual.
        dtype: of the tokens.
        items: tokens or rows.
        multiprocessors: of the GPU.
        gathered: channels after a gather; None for none.
        routed: 1 where tokens go to rows of experts, 2 where they are such rows, else 0.
        aligned: all rows begin at multiples of 16 bytes if their width is one.

    Raises:
        InputError: tokens too wide for the kernel.
    """
    parts, size = 2 if kind == "silu" or add else 1, dtype.itemsize
    channels = inputs if gathered is None else gathered
    block = block_shape(
        max(-(-inputs // 8), -(-channels // 128) * 16),
        slot_bytes(inputs, parts, size, gathered is not None),
        0 if gathered is None else gather_bytes(gathered, size),
        items,
        multiprocessors,
        aligned and inputs % 8 == 0,
        pieces_of_a_thread(kind, gathered is not None, size),
    )
    return Form(settings_of(kind, add, dtype, block, routed, gathered is not None), block)


@functools.lru_cache(maxsize=4096)
def _plan(
    kind: str,
    add: bool,
    dtype: torch.dtype,
    items: int,
    inputs: int,
    device: int,
    gathered: int | None,
    routed: int,
    aligned: bool,
    given: Block | None,
) -> tuple[int, int, int, int]:
    """The kernel of ``form`` on a device, its grid, threads of a block, and its shared memory."""
    multiprocessors = multiprocessors_of(device)
    used = form(kind, add, dtype, items, inputs, multiprocessors, gathered, routed, aligned)
    if given is not None:
        used = Form(settings_of(kind, add, dtype, given, routed, gathered is not None), given)
    threads, shared_bytes = used.block.threads, used.block.shared_bytes
    function = load_kernel("quantize.cu", used.settings, (), "quantize_tokens", device, shared_bytes)
    grid = min(items, multiprocessors * blocks_on_multiprocessor(function, threads, shared_bytes))
    return function, grid, threads, shared_bytes


def settings_of(
    kind: str, adds: bool, dtype: torch.dtype, block: Block, routed: int = 0, gathers: bool = False
) -> tuple[tuple[str, int], ...]:
    """What quantize.cu is compiled with."""
    return (
        ("KIND", KINDS[kind]),
        ("ADD", int(adds)),
        ("IN", IN_TYPES[dtype]),
        ("THREADS", block.threads),
        ("PIECES", block.pieces),
        ("BLOCKS", block.blocks),
        ("STAGES", block.stages),
        ("ROUTED", routed),
        ("GATHER", int(gathers)),
    )


def gather_fits(inputs: int, channels: int, size: int, parts: int = 1) -> bool:
    """Whether the kernel can gather tokens of ``parts`` times ``inputs`` values of ``size`` bytes to ``channels``."""
    # Places of 16-bit values in the token are 16-bit numbers of bytes.
    fits = slot_bytes(inputs, parts, size, True) + gather_bytes(channels, size) <= SHARED_BYTES - RESERVED_BYTES
    return fits and (size == 4 or 16 + 2 * inputs <= 2**16)


def gather_bytes(channels: int, size: int) -> int:
    """The table of where the inputs of channels lie in a token."""
    return -(-channels // 8) * 8 * size


def slot_bytes(inputs: int, parts: int, size: int, gathers: bool) -> int:
    """A token in shared memory."""
    return -(-inputs // 8) * 8 * size * parts + (16 if gathers else 0)


def pieces_of_a_thread(kind: str, gathers: bool, size: int) -> int:
    """Of 8 values, that a thread is to hold in registers; fewer where their gains and shifts are there too."""
    return 2 if gathers or kind == "layer" or size == 4 else 4


@dataclass(frozen=True)
class Block:
    """Threads of a block, pieces of 8 values that each of them has of a token, blocks that are to run on one
    multiprocessor, tokens that a block's shared memory holds (0 where threads load them), bytes of that memory."""

    threads: int
    pieces: int
    blocks: int
    stages: int
    shared_bytes: int


def block_shape(
    pieces: int, token_bytes: int, table_bytes: int, items: int, multiprocessors: int, bulk: bool, wanted: int
) -> Block:
    """How tokens are shared out.

    Args:
        pieces: of 8 values in a token, before or after a gather.
        token_bytes: in shared memory, of all that a token is made of.
        table_bytes: beside the tokens.
        items: tokens or rows.
        multiprocessors: of the GPU.
        bulk: rows lie so that bulk copies can fetch them.
        wanted: pieces of a thread, where they suffice.

    Raises:
        InputError: a token does not fit into shared memory.
    """
    if token_bytes + table_bytes > SHARED_BYTES - RESERVED_BYTES:
        raise InputError(f"tokens of {8 * pieces} inputs are too wide for the fused quantizer.")
    if not bulk or items <= 2 * multiprocessors:  # one token after the other, or at once: nothing to fetch meanwhile
        threads = max(32, min(1024, -(-pieces // 32) * 32))
        return Block(threads, -(-pieces // threads), 1, 0, token_bytes + table_bytes)
    threads = max(32, min(1024, -(-pieces // (wanted * 32)) * 32))
    blocks = min(32, max(1, THREADS_AT_ONCE // threads), SHARED_BYTES // (token_bytes + table_bytes + RESERVED_BYTES))
    stages = max(1, min(4, (SHARED_BYTES // blocks - table_bytes - RESERVED_BYTES) // token_bytes))
    return Block(threads, -(-pieces // threads), blocks, stages, stages * token_bytes + table_bytes)
