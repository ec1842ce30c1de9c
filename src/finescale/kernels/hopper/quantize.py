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
from finescale.kernels.layout import empty_tokens

if TYPE_CHECKING:
    from finescale.kernels.gather import GatherTable

SHARED_BYTES = 227 * 1024
RESERVED_BYTES = 3 * 1024
"""Shared memory of a block beside its tokens."""
LARGEST_BYTES = SHARED_BYTES - RESERVED_BYTES
THREADS_AT_ONCE = 896
"""Of a multiprocessor, which leaves each of them 72 registers."""
GATHERING_THREADS = 768
"""The same for gathers, which need 80."""
MANY_BLOCKS = 6
"""From so many on a multiprocessor, each fetches one token ahead; fewer fetch further."""
CACHED_BYTES = 24 * 2**20
"""Of codes that the level-two cache holds beside other things."""
FETCHED_BYTES = 2**16
"""Of a token, up to which the next one stays in the cache until a gather is done with this one."""
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
    codes, scale_T, sum_T = empty_tokens(x_TI, given, gathered)
    by_row = position_TK is not None and kind == "silu"
    items = position_TK.numel() if position_TK is not None and by_row else tokens
    if items == 0:
        return codes, scale_T, sum_T
    read = (x_TI, residual_TI, gain_I, shift_I)
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in read)
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
        codes.shape[1],
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
        aligned: all tensors begin at multiples of 16 bytes.

    Raises:
        InputError: tokens too wide for the kernel.
    """
    facts = Facts(kind, add, dtype, inputs, gathered, routed, aligned and inputs % 8 == 0)
    block = block_shape(facts, items, multiprocessors)
    return Form(settings_of(facts, block), block)


@dataclass(frozen=True)
class Facts:
    """What the kernel computes; see ``form``."""

    kind: str
    add: bool
    dtype: torch.dtype
    inputs: int
    gathered: int | None = None
    routed: int = 0
    aligned: bool = True

    @property
    def pieces(self) -> int:
        """Of 8 values in a token, before or after a gather, with the zeros that fill up its last block."""
        channels = self.inputs if self.gathered is None else self.gathered
        return max(-(-self.inputs // 8), -(-channels // 128) * 16)

    @property
    def row_bytes(self) -> int:
        return -(-self.inputs // 8) * 8 * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """A token in shared memory."""
        parts = 2 if self.kind == "silu" or self.add else 1
        return self.row_bytes * parts + (0 if self.gathered is None else 16)

    @property
    def table_bytes(self) -> int:
        """Where the inputs of channels lie in a token, and their further terms in the list of them."""
        per_piece = 48 if self.dtype == torch.float32 else 24
        return 0 if self.gathered is None else -(-self.gathered // 8) * per_piece

    @property
    def parameter_bytes(self) -> int:
        """Gains and shifts of a norm, where they are in shared memory; without a gather, gains fit into registers."""
        rows = {"layer": 2, "rms": 0 if self.gathered is None else 1}.get(self.kind, 0)
        return rows * self.row_bytes


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
        facts = Facts(kind, add, dtype, inputs, gathered, routed, aligned and inputs % 8 == 0)
        used = Form(settings_of(facts, given), given)
    threads, shared_bytes = used.block.threads, used.block.shared_bytes
    function = load_kernel("quantize.cu", used.settings, (), "quantize_tokens", device, shared_bytes)
    grid = min(items, multiprocessors * blocks_on_multiprocessor(function, threads, shared_bytes))
    return function, grid, threads, shared_bytes


def settings_of(facts: Facts, block: Block) -> tuple[tuple[str, int], ...]:
    """What quantize.cu is compiled with."""
    whole = facts.inputs // 8 if facts.gathered is None else min(facts.inputs, facts.gathered) // 8
    return (
        ("KIND", KINDS[facts.kind]),
        ("ADD", int(facts.add)),
        ("IN", IN_TYPES[facts.dtype]),
        ("ALIGNED", int(facts.aligned)),
        ("THREADS", block.threads),
        ("PIECES", block.pieces),
        ("WHOLE", whole // block.threads),
        ("BLOCKS", block.blocks),
        ("STAGES", block.stages),
        ("KEPT", block.kept),
        ("FIRST", int(block.first)),
        ("AHEAD", int(facts.slot_bytes <= FETCHED_BYTES)),
        ("ROUTED", facts.routed),
        ("GATHER", int(facts.gathered is not None)),
    )


def gather_fits(inputs: int, channels: int, size: int, parts: int = 1) -> bool:
    """Whether the kernel can gather tokens of ``parts`` times ``inputs`` values of ``size`` bytes to ``channels``."""
    dtype = torch.float32 if size == 4 else torch.bfloat16
    facts = Facts("plain", parts == 2, dtype, inputs, channels)
    # Places of 16-bit values in the token are 16-bit numbers of bytes.
    return facts.slot_bytes + facts.table_bytes <= LARGEST_BYTES and (size == 4 or 16 + 2 * inputs <= 2**16)


@dataclass(frozen=True)
class Block:
    """How a block of threads works.

    Attributes:
        threads: of a block.
        pieces: of 8 values, that each of them has of a token.
        blocks: that are to run on one multiprocessor.
        stages: tokens that shared memory holds; 0 where threads load them.
        kept: where gains and shifts stay: 2 in registers, 1 in shared memory, 0 nowhere.
        shared_bytes: of a block.
        first: tokens leave the cache before all else, so that codes are still there when they are multiplied; where
            those do not fit, it is faster not to say so.
    """

    threads: int
    pieces: int
    blocks: int
    stages: int
    kept: int
    shared_bytes: int
    first: bool = True


def block_shape(facts: Facts, items: int, multiprocessors: int) -> Block:
    """How tokens are shared out.

    Args:
        facts: what is computed.
        items: tokens or rows.
        multiprocessors: of the GPU.

    Raises:
        InputError: a token does not fit into shared memory.
    """
    fixed = facts.table_bytes
    if facts.slot_bytes + fixed > LARGEST_BYTES:
        raise InputError(f"tokens of {8 * facts.pieces} inputs are too wide for the fused quantizer.")
    if not facts.aligned or items <= 2 * multiprocessors:  # one token after the other, or at once: nothing to fetch
        threads = max(32, min(512, -(-facts.pieces // 64) * 32))
        pieces = -(-facts.pieces // threads)
        kept = 2 if facts.kind != "layer" or pieces * facts.dtype.itemsize <= 8 else 0
        token_bytes = 0 if facts.gathered is None else facts.slot_bytes
        return Block(threads, pieces, 1, 0, kept, token_bytes + fixed)
    kept = _kept(facts, fixed)
    wanted = 2 if facts.dtype == torch.float32 else 4
    if facts.gathered is not None and facts.parameter_bytes > 0 and kept == 2:
        wanted = 7  # gains of a norm and of a gather beside the token: fewer threads have more registers
    threads = max(32, min(1024, -(-facts.pieces // (wanted * 32)) * 32))
    pieces = -(-facts.pieces // threads)
    fixed += facts.parameter_bytes if kept == 1 else 0
    fitting = SHARED_BYTES // (facts.slot_bytes + fixed + RESERVED_BYTES)
    at_once = THREADS_AT_ONCE if facts.gathered is None else GATHERING_THREADS
    blocks = max(1, min(32, at_once // threads, fitting))
    most = 1 if blocks >= MANY_BLOCKS or facts.gathered is not None else 4
    stages = max(1, min(most, (SHARED_BYTES // blocks - fixed - RESERVED_BYTES) // facts.slot_bytes))
    first = items * facts.pieces * 8 <= CACHED_BYTES
    return Block(threads, pieces, blocks, stages, kept, stages * facts.slot_bytes + fixed, first)


def _kept(facts: Facts, fixed: int) -> int:
    """Where gains and shifts stay."""
    if facts.parameter_bytes == 0:
        return 2
    if facts.slot_bytes + fixed + facts.parameter_bytes <= LARGEST_BYTES:
        return 1
    return 2 if facts.kind == "rms" else 0
