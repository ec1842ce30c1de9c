"""Launches a compiled kernel on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from finescale.kernels.jit import CompileError, load_kernel


def launch(
    function: int,
    grid: int,
    threads: int,
    shared_bytes: int,
    arguments: ctypes.Structure,
    device: torch.device,
    cluster: int = 1,
) -> None:
    """Puts the kernel into the current stream of ``device``; the structure is copied at once.

    ``cluster`` neighbouring blocks, a divisor of ``grid``, run side by side and may use each other's shared memory.

    The kernel may start while the one before it still runs; it waits for that one's results by itself
    (programmatic dependent launch).

    Raises:
        CompileError: the driver refuses the launch.
    """
    from cuda.bindings import driver

    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    config = _config(grid, threads, shared_bytes, cluster)
    config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    # A function belongs to the context of its device, which must be the current one.
    with torch.cuda.device(device):
        _launched(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


def prepared_launch(
    function: int, grid: int, threads: int, shared_bytes: int, arguments: ctypes.Structure, device: torch.device
) -> Callable[[], None]:
    """A function that does what ``launch`` does, for kernels that are launched many times with the same arguments; it
    wants ``device`` to be torch's current one, and takes the stream that is current now.

    Raises:
        CompileError: (the function) the driver refuses the launch.
    """
    from cuda.bindings import driver

    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    config = _new_config(grid, threads, shared_bytes, 1)
    config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    address = ctypes.addressof(pointers)

    def again(keep: tuple[Any, ...] = (pointers, arguments)) -> None:
        _launched(driver.cuLaunchKernelEx(config, function, address, 0))

    return again


def _launched(result: tuple[Any]) -> None:
    if int(result[0]) != 0:
        raise CompileError(f"a kernel could not be launched: {result[0].name}.")


@functools.cache
def _config(grid: int, threads: int, shared_bytes: int, cluster: int) -> Any:
    return _new_config(grid, threads, shared_bytes, cluster)


def _new_config(grid: int, threads: int, shared_bytes: int, cluster: int) -> Any:
    from cuda.bindings import driver

    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    attributes = [overlap]
    if cluster > 1:
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        together.value.clusterDim.x, together.value.clusterDim.y, together.value.clusterDim.z = cluster, 1, 1
        attributes.append(together)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@functools.cache
def multiprocessors_of(device: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def blocks_on_multiprocessor(function: int, threads: int, shared_bytes: int) -> int:
    """Blocks of a kernel that one multiprocessor runs at once."""
    from cuda.bindings import driver

    status, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared_bytes)
    if int(status) != 0 or blocks < 1:
        raise CompileError(f"a kernel of {threads} threads does not fit on a multiprocessor: {status.name}.")
    return int(blocks)


@functools.cache
def blocks_at_once(device: int, cluster: int) -> int:
    """Blocks that fit on the GPU at once, one a multiprocessor, in clusters of ``cluster``; a multiple of it."""
    if cluster == 1:
        return torch.cuda.get_device_properties(device).multi_processor_count
    from cuda.bindings import driver

    shared_bytes = 200 * 1024
    function = load_kernel("capacity.cu", (), (), "fill_multiprocessor", device, shared_bytes)
    status, clusters = driver.cuOccupancyMaxActiveClusters(function, _config(cluster, 384, shared_bytes, cluster))
    if int(status) != 0:
        raise CompileError(f"the GPU does not tell how many clusters of {cluster} blocks it runs: {status.name}.")
    return int(clusters) * cluster
