"""One batch of columns of QuantEase in one launch of a CUDA kernel, on Hopper GPUs (kernels/hopper/sweep.cu).

Shape legend: B columns of the batch, O outputs, G groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from finescale.kernels.jit import load_kernel
from finescale.kernels.launch import prepared_launch

WIDTH = 128
"""Columns of the kernel's matrix; those of the batch at most."""
ROWS_OF_WARP = 8
FEW_ROWS = 132 * 32
"""Rows up to which programs of 4 warps are taken, so that all multiprocessors of a GPU have one; above it of 8."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("beta", "current", "change", "inner", "scale", "zero", "group", "free")],
        ("columns", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]


@cache
def supported(device: torch.device) -> bool:
    """Whether the kernel runs on this device."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and find_spec("cuda") is not None
        and find_spec("cuda.bindings") is not None
    )


def quantease_batch(
    beta_BO: Tensor,
    current_BO: Tensor,
    change: Tensor,
    inner_BW: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor | None,
    group_B: Tensor,
    free_BO: Tensor | None,
    low: float,
    high: float,
    relaxed: bool,
) -> Callable[[], None]:
    """A function that makes one sweep over the columns of a batch, with what the tensors then hold (all contiguous, and
    float32 unless said).

    Args:
        beta_BO: running targets, without what changes inside the batch.
        current_BO: values; replaced by the new ones.
        change: old less new values, written: float32 [B, O]; or float16 [3 * B, O], the high parts, what these leave
            over, and the high parts again; or float16 [2 * B, O], twice the same: values then follow changes that are
            float16 numbers.
        inner_BW: row k holds H_kj / H_jj of the batch's columns j, [B, 128], zeros beyond them.
        scale_GO: scales.
        zero_GO: zero points, None when symmetric.
        group_B: int32, group of each column.
        free_BO: bool, entries that take their target unrounded; None for none.
        low: smallest code.
        high: largest code.
        relaxed: no column is rounded.
    """
    columns, rows = beta_BO.shape
    warps = 4 if rows <= FEW_ROWS else 8
    settings = (
        ("WARPS", warps),
        ("GROUPED", int(scale_GO.shape[0] > 1)),
        ("ZERO", int(zero_GO is not None)),
        ("FREE", int(free_BO is not None)),
        ("RELAXED", int(relaxed)),
        ("PARTS", change.shape[0] // columns if change.dtype == torch.float16 else 0),
    )
    shared_bytes = 4 * WIDTH * (WIDTH + warps * ROWS_OF_WARP)
    function = load_kernel("sweep.cu", settings, (), "sweep", beta_BO.device.index, shared_bytes)
    tensors = (beta_BO, current_BO, change, inner_BW, scale_GO, zero_GO, group_B, free_BO)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    arguments = _Arguments(*pointers, columns, rows, low, high)
    programs = -(-rows // (warps * ROWS_OF_WARP))
    once_more = prepared_launch(function, programs, warps * 32, shared_bytes, arguments, beta_BO.device)

    def sweep(keep: tuple[Tensor | None, ...] = tensors) -> None:
        once_more()

    return sweep
