"""Sorting tokens by expert, and summing their experts' outputs, on a GPU: one kernel each.

Shape legend: T tokens, K choices of a token, E experts, R rows sorted by expert, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from finescale.kernels.hopper.quantize import IN_TYPES
from finescale.kernels.jit import load_kernel
from finescale.kernels.launch import launch

LARGEST_EXPERTS = 1024


class _Route(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("choice", "position", "row_end")],
        *[(name, ctypes.c_int) for name in ("choices", "experts")],
    ]


def route(expert_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Row of each choice, int32 [T, K], and one past each expert's last row, int32 [E] (kernels/experts.py).

    Args:
        expert_TK: contiguous int32 or int64.
        experts: E, up to ``LARGEST_EXPERTS``.
    """
    device = expert_TK.device
    position_TK = torch.empty(expert_TK.shape, dtype=torch.int32, device=device)
    choices = expert_TK.numel()
    if choices == 0:
        return position_TK, torch.zeros(experts, dtype=torch.int32, device=device)
    row_end_E = torch.empty(experts, dtype=torch.int32, device=device)
    # As many warps as have something to do, as long as their counts fit.
    warps = next((w for w in (4, 8, 16) if choices <= w * 64), 32)
    shared = (warps + 1) * experts * 4
    settings = (("WARPS", warps), ("WIDE", int(expert_TK.dtype == torch.int64)))
    function = load_kernel("route.cu", settings, (), "route_tokens", device.index, shared)
    arguments = _Route(expert_TK.data_ptr(), position_TK.data_ptr(), row_end_E.data_ptr(), choices, experts)
    launch(function, 1, warps * 32, shared, arguments, device)
    return position_TK, row_end_E


class _Combine(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("y", "position", "weight", "out")],
        *[(name, ctypes.c_int) for name in ("outputs", "choices")],
    ]


def combine(y_RO: Tensor, position_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The sum over a token's choices of its rows times their weights, [T, O] in the type of ``y_RO``.

    Args:
        y_RO: contiguous bfloat16, float16 or float32.
        position_TK: int32, negative for none.
        weight_TK: float32.
    """
    tokens, outputs = position_TK.shape[0], y_RO.shape[1]
    out_TO = torch.empty(tokens, outputs, dtype=y_RO.dtype, device=y_RO.device)
    if out_TO.numel() == 0:
        return out_TO
    threads = next((t for t in (64, 128, 256) if outputs <= t * 8), 512)
    settings = (("IN", IN_TYPES[y_RO.dtype]), ("THREADS", threads))
    function = load_kernel("combine.cu", settings, (), "combine_experts", y_RO.device.index, 0)
    arguments = _Combine(
        y_RO.data_ptr(), position_TK.data_ptr(), weight_TK.data_ptr(), out_TO.data_ptr(), outputs, position_TK.shape[1]
    )
    launch(function, tokens, threads, 0, arguments, y_RO.device)
    return out_TO
