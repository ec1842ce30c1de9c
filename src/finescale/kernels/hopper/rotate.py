"""Rotary embedding of new tokens and their way into a paged cache, one kernel.

Shape legend: T tokens, H heads of queries, K heads of keys and values, D channels of a head, C = H * D, P positions of
the table, N pages of S slots.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.jit import load_kernel
from finescale.kernels.launch import launch

IN_TYPES = {torch.bfloat16: 0, torch.float16: 1}
THREADS = 256


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("position", "table", "query", "key", "value", "keys", "values", "slot")],
        ("page_stride", ctypes.c_longlong),
        *[(n, ctypes.c_int) for n in ("slot_stride", "head_stride", "query_stride", "key_stride", "value_stride")],
        *[(n, ctypes.c_int) for n in ("heads", "kv_heads", "slots")],
    ]


def fits(width: int, dtype: torch.dtype) -> bool:
    """Whether the kernel has a form for heads of so many channels."""
    return dtype in IN_TYPES and 16 <= width <= 16 * THREADS and width & (width - 1) == 0


@functools.cache
def _kernel(width: int, dtype: torch.dtype, device: int) -> int:
    settings = (("IN", IN_TYPES[dtype]), ("WIDTH", width), ("THREADS", THREADS))
    return load_kernel("rotate.cu", settings, (), "rotate_into_pages", device, 0)


def rotate_into_pages(
    position_T: Tensor, table_PD: Tensor, query_TC: Tensor, key_TKD: Tensor, value_TKD: Tensor,
    keys_NSKD: Tensor, values_NSKD: Tensor, slot_T: Tensor,
) -> None:  # fmt: skip
    """Rotates queries and keys in place, halves of a head against each other; keys and values go into their slots.

    Args:
        position_T: int64; of at least as many tokens as have slots. Tokens beyond them are left alone.
        table_PD: float32, contiguous; cosines, then sines, of half a head each.
        query_TC: bfloat16 or float16 [T, H * D], a token's channels side by side.
        key_TKD, value_TKD: in the same type, heads of a token side by side.
        keys_NSKD, values_NSKD: the cache, of equal strides, a head's channels side by side.
        slot_T: int64, page * S + slot; negative for none.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    tokens, kv_heads, width = slot_T.shape[0], *key_TKD.shape[1:]
    dtype = query_TC.dtype
    values = (query_TC, key_TKD, value_TKD, keys_NSKD, values_NSKD)
    strides = keys_NSKD.stride()
    if any(x.dtype != dtype or x.stride(-1) != 1 for x in values) or table_PD.dtype != torch.float32:
        raise InputError("queries, keys, values and their cache must be of one type, the table float32.")
    if key_TKD.shape != value_TKD.shape or key_TKD.stride(1) != width or value_TKD.stride(1) != width:
        raise InputError("keys and values must be [T, K, D] with a token's heads side by side.")
    if keys_NSKD.shape[2:] != key_TKD.shape[1:] or strides != values_NSKD.stride():
        raise InputError(f"a cache {tuple(keys_NSKD.shape)} does not fit keys {tuple(key_TKD.shape)}.")
    if table_PD.shape[1] != width or not table_PD.is_contiguous() or not fits(width, dtype):
        raise InputError(f"heads of {width} channels of {dtype} have no such kernel.")
    if tokens > min(position_T.shape[0], query_TC.shape[0], key_TKD.shape[0]) or position_T.stride(0) != 1:
        raise InputError(f"{tokens} slots for {position_T.shape[0]} positions.")
    if tokens == 0:
        return
    rows = (query_TC.stride(0), key_TKD.stride(0), value_TKD.stride(0))
    pointers = [x.data_ptr() for x in values]
    if any(stride % 8 for stride in (*rows, *strides[:3])) or any(pointer % 16 for pointer in pointers):
        raise InputError("heads must begin at multiples of 16 bytes.")
    arguments = _Arguments(
        position_T.data_ptr(), table_PD.data_ptr(), *pointers, slot_T.data_ptr(),
        strides[0], *strides[1:3], *rows, query_TC.shape[1] // width, kv_heads, keys_NSKD.shape[1],
    )  # fmt: skip
    device = query_TC.device
    launch(_kernel(width, dtype, device.index), tokens, THREADS, 0, arguments, device)
