"""Products of half-precision matrices summed in float32, on tensor cores of a GPU.

The product of two float16 or bfloat16 numbers is exact in float32, so that nothing is lost but the rounding of sums.

Shape legend: M rows, N columns, K depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor


def add_half_product_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """sum += left right, for float16 or bfloat16 factors and a float32 sum; anywhere, but fast on a GPU only."""
    half_product_adder(sum_MN, left_MK, right_KN)()


def half_product_adder(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Callable[[], object]:
    """A function that adds the product of what its factors then hold, for sums that are made many times."""
    if not sum_MN.is_cuda:
        return lambda: sum_MN.addmm_(left_MK.float(), right_KN.float())
    if _adds_in_place(sum_MN.device, left_MK.dtype):
        return partial(torch.addmm, sum_MN, left_MK, right_KN, out_dtype=torch.float32, out=sum_MN)
    return lambda: sum_MN.add_(torch.mm(left_MK, right_KN, out_dtype=torch.float32))


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds half-precision products to a float32 matrix; some versions want one of half precision."""
    factor, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return float(total[0, 0]) == 17.0
