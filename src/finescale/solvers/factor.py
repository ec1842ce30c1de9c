"""Factorizing the Hessian for GPTQ.

Shape legend: I inputs, B columns of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.finite import all_finite

LARGEST_DAMPING = 1e4
BLOCKED_COLUMNS = 16384
"""Inputs from which on a GPU factorizes in blocks, in the place of the matrix: the library's inverse takes two more of
its size, which do not fit beside it for the widest layers there are."""
BLOCK = 2048
"""Columns of a block."""


def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of H^-1 (H^-1 = U^T U), float64 [I, I], and the damping that was needed.

    Inputs that were never active (H_jj = 0) count as independent with unit variance.

    Raises:
        NumericsError: even a damping of 10^4 times the mean diagonal does not make H positive definite.
    """
    diagonal_I = hessian_II.diagonal().double()
    dead_I = diagonal_I == 0
    mean = float(diagonal_I.mean()) or 1.0
    used = damping
    # One after the other in the same place: these are the largest matrices of all. Columns are contiguous as LAPACK
    # wants them (the matrix is symmetric).
    matrix_II = torch.empty(hessian_II.shape, dtype=torch.float64, device=hessian_II.device).T
    while used <= LARGEST_DAMPING:
        matrix_II.copy_(hessian_II.T)
        matrix_II.diagonal().add_(used * mean + dead_I.double())
        if matrix_II.is_cuda and matrix_II.shape[0] > BLOCKED_COLUMNS:
            found = inverse_factor_in_blocks_(matrix_II, BLOCK)
        else:
            matrix_II, found = _cholesky_(matrix_II)
            if found:
                matrix_II = torch.cholesky_inverse(matrix_II, out=None if matrix_II.is_cuda else matrix_II)
                matrix_II, found = _cholesky_(matrix_II, upper=True)
        if found and all_finite(matrix_II):
            return matrix_II, used
        used = max(used * 10, 1e-6)
    raise NumericsError("the Hessian cannot be factorized at any damping; calibrate with more or other text.")


def _cholesky_(matrix_II: Tensor, upper: bool = False) -> tuple[Tensor, bool]:
    """The factor, on the CPU in the place of the matrix, and whether there is one."""
    out = None if matrix_II.is_cuda else (matrix_II, torch.empty((), dtype=torch.int32))
    factor_II, failed = torch.linalg.cholesky_ex(matrix_II, upper=upper, out=out)
    return factor_II, not int(failed)


def inverse_factor_in_blocks_(matrix_II: Tensor, block: int) -> bool:
    """The upper Cholesky factor U of the inverse in the place of a symmetric matrix, 2/3 I^3 multiplications and
    additions, nearly all of them in products. Whether there is one; if not, the matrix is spoilt.

    H = R R^T with R upper triangular, made from the last columns to the first, is the usual factorization backwards;
    then H^-1 = R^-T R^-1, so that U = R^-1, which is made from the first columns to the last.
    """
    starts = range(0, matrix_II.shape[0], block)
    blocks = [slice(start, min(start + block, matrix_II.shape[0])) for start in starts]
    inverses: list[Tensor] = []
    for here in reversed(blocks):
        above, after = slice(0, here.start), slice(here.stop, None)
        of_columns = matrix_II[: here.stop, here]
        of_columns.addmm_(matrix_II[: here.stop, after], matrix_II[here, after].T, alpha=-1)
        lower_BB, failed = torch.linalg.cholesky_ex(matrix_II[here, here].flip(0, 1))
        if int(failed):
            return False
        upper_BB = lower_BB.flip(0, 1)
        eye_BB = torch.eye(upper_BB.shape[0], dtype=upper_BB.dtype, device=upper_BB.device)
        inverses.insert(0, torch.linalg.solve_triangular(upper_BB, eye_BB, upper=True))
        matrix_II[above, here] = torch.linalg.solve_triangular(
            upper_BB.T, matrix_II[above, here], upper=False, left=False
        )
    matrix_II.triu_()
    for number, (here, inverse_BB) in enumerate(zip(blocks, inverses, strict=True)):
        for rows in blocks[:number]:  # each needs the factor's rows from its own on, which are still there
            product_BB = matrix_II[rows, rows.start : here.start] @ matrix_II[rows.start : here.start, here]
            matrix_II[rows, here] = -product_BB @ inverse_BB
        matrix_II[here, here] = inverse_BB
    return True
