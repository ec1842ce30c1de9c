"""NaN and Inf are found wherever they are, and large finite numbers are none."""

import pytest
import torch

from finescale.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_inf_are_found(dtype):
    largest = 1e300 if dtype == torch.float64 else torch.finfo(dtype).max
    tensor = torch.full((7, 9), largest, dtype=dtype)
    assert all_finite(tensor) and all_finite(tensor[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (6, 8), (3, 4)):
            changed = tensor.clone()
            changed[place] = bad
            assert not all_finite(changed)
    both = tensor.clone()
    both[0, 0], both[1, 1] = float("inf"), -float("inf")
    assert not all_finite(both)
