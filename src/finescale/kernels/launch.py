"""Launches a compiled kernel on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from finescale.kernels.jit import CompileError


def launch(
    function: int, grid: int, threads: int, shared_bytes: int, arguments: ctypes.Structure, device: torch.device
) -> None:
    """Puts the kernel into the current stream of ``device``; the structure is copied at once.

    The kernel may start while the one before it still runs; it waits for that one's results by itself
    (programmatic dependent launch).

    Raises:
        CompileError: the driver refuses the launch.
    """
    from cuda.bindings import driver

    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    config = _config(grid, threads, shared_bytes)
    config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    (status,) = driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0)
    if int(status) != 0:
        raise CompileError(f"a kernel could not be launched: {status.name}.")


@functools.cache
def _config(grid: int, threads: int, shared_bytes: int) -> Any:
    from cuda.bindings import driver

    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = [overlap], 1
    return config
