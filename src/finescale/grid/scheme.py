"""What a weight may become: the quantization schemes and the grid of one layer.

Shape legend: O outputs, I inputs, G groups along the inputs.

Codes are signed everywhere: a code and a zero point lie in ``[-2**(bits-1), 2**(bits-1) - 1]`` and the weight is
``scale * (code - zero)``. Formats that store unsigned integers add ``2**(bits-1)`` to both when they write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from finescale.errors import InputError, NumericsError
from finescale.grid.bilevel import Bilevel
from finescale.grid.integer_scale import common_factor
from finescale.grid.outliers import Outliers

WEIGHT_BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (4, 6, 8)
WEIGHTS_TOGETHER = 2**22
"""How many are rounded at a time in host memory."""
Clip = Literal["minmax", "mse", "signed"]


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of one layer are stored.

    Attributes:
        bits: 2, 3, 4, 6 or 8.
        group_size: consecutive inputs that share one scale; -1 is one scale per output channel. The last group may be
            shorter when the inputs do not divide.
        symmetric: no zero point; the step is absmax / ((2**bits - 1) / 2), so that -2**(bits-1) is used too.
        clip: ``minmax`` keeps the whole range, ``mse`` shrinks it where that lowers the weight error, ``signed`` also
            lets scales be negative, so that the one code more is on the side of each group that needs it (symmetric).
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    clip: Clip = "minmax"

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise InputError(f"weights.bits is {self.bits}; choose one of {', '.join(map(str, WEIGHT_BITS))}.")
        if self.group_size != -1 and self.group_size < 2:
            raise InputError(
                f"weights.group_size is {self.group_size}; use -1 (per channel) or a number of at least 2."
            )
        if self.clip not in ("minmax", "mse", "signed"):
            raise InputError(f"weights.clip is {self.clip!r}; choose minmax, mse or signed.")
        if self.clip == "signed" and not self.symmetric:
            raise InputError("weights.clip signed is for symmetric weights; set weights.symmetric true or clip mse.")

    @property
    def code_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def code_max(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class ActivationScheme:
    """How the inputs of a quantized layer are rounded at run time.

    Attributes:
        bits: 4, 6 or 8.
        granularity: ``token``, one scale per token; ``tensor``, one for all.
        dynamic: scales follow the data at run time (per token), or are fixed by calibration (per tensor).
        symmetric: no zero point. Integer kernels need it.
    """

    bits: int = 8
    granularity: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS:
            raise InputError(f"activations.bits is {self.bits}; choose one of {', '.join(map(str, ACTIVATION_BITS))}.")
        if self.granularity not in ("token", "tensor") or self.dynamic != (self.granularity == "token"):
            raise InputError(
                "activations.granularity is token with dynamic true (scales that follow the data) or tensor with "
                "dynamic false (one scale fixed by calibration)."
            )

    @property
    def code_max(self) -> int:
        """Largest code; the symmetric range is -127..127 for 8 bits, which the overflow bound relies on."""
        return 2 ** (self.bits - 1) - 1

    @property
    def code_min(self) -> int:
        return -self.code_max if self.symmetric else -self.code_max - 1


def number_of_groups(columns: int, group_size: int) -> int:
    """Groups needed to cover ``columns`` inputs; the last one may be ragged."""
    return 1 if group_size == -1 else -(-columns // group_size)


def contiguous_groups(columns: int, group_size: int, device: torch.device | str | None = None) -> Tensor:
    """Group index of each input column, int64 [I], for groups of consecutive columns."""
    step = max(columns, 1) if group_size == -1 else group_size
    return torch.arange(columns, device=device) // step


@dataclass(frozen=True)
class Grid:
    """The values each weight of one layer may take.

    Attributes:
        scheme: bits, groups, symmetry.
        scale_OG: float32 [O, G], positive, each value exactly representable in ``scale_dtype``.
        zero_OG: int8 [O, G] on the code range, or None when symmetric.
        group_of_I: int64 [I], the group of each input column.
        scale_dtype: the type in which a file stores the scales.
        amplifier: None for float scales; else a power of two such that ``scale * amplifier`` is an integer; 1 for
            folded scales.
        folded: every scale of an output is ``channel_scale_O`` times an integer from 1 to 15.
        bilevel: how the scales are quantized themselves, None when they are stored as they are; ``scale_OG`` then
            follows from it and may need more bits than ``scale_dtype`` has.
    """

    scheme: WeightScheme
    scale_OG: Tensor
    zero_OG: Tensor | None
    group_of_I: Tensor
    scale_dtype: torch.dtype = torch.float32
    amplifier: int | None = None
    bilevel: Bilevel | None = None
    folded: bool = False

    @property
    def rows(self) -> int:
        return self.scale_OG.shape[0]

    @property
    def columns(self) -> int:
        return self.group_of_I.shape[0]

    @property
    def groups_are_contiguous(self) -> bool:
        expected = contiguous_groups(self.columns, self.scheme.group_size, self.group_of_I.device)
        return torch.equal(self.group_of_I, expected)

    @property
    def channel_scale_O(self) -> Tensor | None:
        """The factor of each output, float32 [O], None unless the scales are folded; computed anew in each call.

        Raises:
            NumericsError: the scales are not folded though the grid says so.
        """
        return common_factor(self.scale_OG) if self.folded else None

    def integer_scale_OG(self) -> Tensor:
        """The integer scales S, int32 [O, G]: scale * amplifier, or scale / channel_scale where they are folded.

        Raises:
            NumericsError: the grid has float scales, or a stored scale is not an integer over the amplifier, or not one
                up to 15 times the factor of its output.
        """
        if self.amplifier is None:
            raise NumericsError(
                "this layer has float scales; quantize with integer_scale.mode before, after or folded."
            )
        channel_scale_O = self.channel_scale_O
        if channel_scale_O is not None:
            return (self.scale_OG.double() / channel_scale_O.double()[:, None]).to(torch.int32)
        exact_OG = self.scale_OG.double() * self.amplifier
        integer_OG = exact_OG.round()
        if not torch.equal(exact_OG, integer_OG) or bool((integer_OG < 1).any()) or bool((integer_OG >= 2**31).any()):
            raise NumericsError(
                f"scales times the amplifier {self.amplifier} are not all integers in [1, 2^31); "
                "quantize the model again."
            )
        return integer_OG.to(torch.int32)

    def rows_slice(self, rows: slice) -> Grid:
        """The grid of some output rows; columns and groups stay. Raises NumericsError for scales that are quantized
        themselves, over several rows."""
        if self.bilevel is not None:
            raise NumericsError("rows of a layer with quantized scales cannot be cut apart.")
        zero_OG = None if self.zero_OG is None else self.zero_OG[rows]
        return replace(self, scale_OG=self.scale_OG[rows], zero_OG=zero_OG)


@dataclass(frozen=True)
class QuantizedWeight:
    """A solved layer: int8 codes [O, I], the grid they index, and what is added to them (None: nothing)."""

    codes_OI: Tensor
    grid: Grid
    outliers: Outliers | None = None

    def dequantize(self) -> Tensor:
        """The weight, float32 [O, I] = scale * (code - zero), and the outliers."""
        value_OI = dequantize(self.codes_OI, self.grid)
        return value_OI if self.outliers is None else value_OI.add_(self.outliers.dense())

    def rows_slice(self, rows: slice) -> QuantizedWeight:
        """Some consecutive output rows."""
        outliers = None if self.outliers is None else self.outliers.rows_slice(rows)
        return QuantizedWeight(self.codes_OI[rows].contiguous(), self.grid.rows_slice(rows), outliers)

    def stored_bits(self) -> int:
        """Bits of codes, scales, zero points and outliers in a packed file (without padding and shapes)."""
        scheme, grid = self.grid.scheme, self.grid
        bits = scheme.bits * (self.codes_OI.numel() + (0 if grid.zero_OG is None else grid.zero_OG.numel()))
        if grid.bilevel is None:
            bits += 8 * grid.scale_dtype.itemsize * grid.scale_OG.numel()
        else:
            bits += grid.bilevel.stored_bits
        return bits + (0 if self.outliers is None else self.outliers.stored_bits)

    def sha256(self) -> str:
        """Hash of codes, scales, zero points and outliers: equal for equal weights, whatever file they went through."""
        digest = hashlib.sha256(str(tuple(self.codes_OI.shape)).encode())
        parts = [self.codes_OI, self.grid.scale_OG.float(), self.grid.zero_OG, self.grid.group_of_I]
        for tensor in parts:
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        if self.outliers is not None:
            for tensor in self.outliers.tensors():
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def dequantize(codes_OI: Tensor, grid: Grid) -> Tensor:
    """float32 [O, I] = scale * (code - zero) for int8 codes [O, I]."""
    value_OI = torch.empty(codes_OI.shape, dtype=torch.float32, device=codes_OI.device)
    for rows in row_pieces(codes_OI):
        part_OI = codes_OI[rows].to(torch.float32)
        if grid.zero_OG is not None:
            part_OI -= grid.zero_OG[rows].to(torch.float32)[:, grid.group_of_I]
        value_OI[rows] = part_OI.mul_(grid.scale_OG[rows][:, grid.group_of_I])
    return value_OI


def quantize_to_grid(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Nearest code, int8 [O, I], for float weights [O, I] (ties to even).

    Computed in float64 for float64 weights, else in float32.
    """
    # A 16-bit division would round scale and quotient and pick other codes.
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    for rows in row_pieces(weight_OI):
        part_OI = weight_OI[rows].to(dtype) / grid.scale_OG[rows].to(dtype)[:, grid.group_of_I]
        if grid.zero_OG is not None:
            part_OI += grid.zero_OG[rows].to(dtype)[:, grid.group_of_I]
        codes_OI[rows] = part_OI.round_().clamp_(grid.scheme.code_min, grid.scheme.code_max)
    return codes_OI


def row_pieces(matrix_OI: Tensor) -> Iterator[slice]:
    """Rows that are computed together. Each step makes a matrix as large as its operands, and of a whole layer these
    would be the largest that host memory ever holds."""
    rows, columns = matrix_OI.shape
    step = rows if matrix_OI.is_cuda else max(WEIGHTS_TOGETHER // max(columns, 1), 1)
    for first in range(0, rows, max(step, 1)):
        yield slice(first, first + step)
