"""Matrix products of the solvers: full float32, or three products of TF32 parts; never plain TF32.

Shape legend: O outputs, I inputs, B columns of one batch, C columns of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_BATCH = 128
"""Columns that one kernel launch sweeps at most."""
TF32_MASK = -(1 << 13)
"""Bits of a float32 that TF32 keeps: sign, exponent and 10 bits of the fraction."""


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return find_spec("triton") is not None


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Matrix products of float32 on tensor cores with inputs cut to TF32, or in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tf32_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as an exact sum of a TF32 number and a rest below 2^-10 of it."""
    high = (matrix.view(torch.int32) & TF32_MASK).view(torch.float32)
    return high, matrix - high


class Products:
    """Products with the transposed normalized H, in float32 or as three products of TF32 parts.

    With the parts, a b is computed as a_high b_high + a_high b_low + a_low b_high on TF32 tensor cores. What is left
    out is 2^-20 of the product, near the rounding of float32 itself; a plain TF32 product would lose 2^-10.

    Args:
        normalized_II: H_kj / H_jj with a zero diagonal, in solving order.
        split: use TF32 parts (float32 only).
    """

    def __init__(self, normalized_II: Tensor, split: bool = False) -> None:
        split = split and normalized_II.dtype == torch.float32
        self.parts = tf32_parts(normalized_II) if split else (normalized_II,)

    def inner(self, start: int, end: int) -> Tensor:
        """[B, B], contiguous: row j holds H_kj / H_jj of the columns k of a batch."""
        parts = [part_II[start:end, start:end].T for part_II in self.parts]
        return (parts[0] + parts[1] if len(parts) == 2 else parts[0]).contiguous()

    def add_(self, beta_IO: Tensor, change_CO: Tensor, start: int, end: int, first: int, last: int) -> None:
        """beta[first:last] += N[start:end, first:last]^T change, for the changes of the columns start:end."""
        if first == last:
            return
        factors = [part_II[start:end, first:last].T for part_II in self.parts]
        if len(factors) == 1:
            with tf32_products(False):
                beta_IO[first:last].addmm_(factors[0], change_CO)
            return
        high_CO, low_CO = tf32_parts(change_CO)
        with tf32_products(True):
            beta_IO[first:last].addmm_(factors[0], low_CO)
            beta_IO[first:last].addmm_(factors[1], high_CO)
            beta_IO[first:last].addmm_(factors[0], high_CO)

    def targets(self, target_IO: Tensor, current_IO: Tensor) -> Tensor:
        """The running targets from scratch: W + N^T (W - Q)."""
        if len(self.parts) == 1:
            with tf32_products(False):
                return torch.addmm(target_IO, self.parts[0].T, target_IO - current_IO)
        columns = target_IO.shape[0]
        beta_IO = target_IO.clone()
        self.add_(beta_IO, target_IO - current_IO, 0, columns, 0, columns)
        return beta_IO
