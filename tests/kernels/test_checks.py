"""What kernels refuse."""

import pytest
import torch

from finescale.errors import InputError
from finescale.kernels.checks import check_tensors


@pytest.mark.parametrize(
    "tensor, words",
    [
        (
            torch.zeros(2, 3, dtype=torch.int8),
            r"a thing must be contiguous torch.float32 \[2, 3\], not torch.int8 \[2, 3\]",
        ),
        (torch.zeros(3, 2), r"must be contiguous torch.float32 \[2, 3\], not torch.float32 \[3, 2\]"),
        (torch.zeros(3, 2).T, "must be contiguous"),
        (torch.zeros(2, 3, device="meta"), "a thing is on meta, the other tensors on cpu"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor, words):
    with pytest.raises(InputError, match=words):
        check_tensors(torch.device("cpu"), ("a thing", tensor, (2, 3), torch.float32))


def test_what_fits_and_what_is_left_out_passes():
    fitting = ("a thing", torch.zeros(2, 3), torch.Size((2, 3)), torch.float32)
    check_tensors(torch.device("cpu"), fitting, ("another", None, (5,), torch.int32))
