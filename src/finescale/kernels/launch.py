"""Launches a compiled kernel on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from finescale.kernels.jit import CompileError, load_kernel

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
"""Of the driver's CUlaunchAttributeID."""
_Pointer = ctypes.c_void_p * 1


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute: an identifier, and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library. Called as C, for the Python objects of its bindings cost more than a launch does."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuOccupancyMaxActiveClusters.argtypes = [ctypes.c_void_p] * 3
    return library


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
    config = _config(grid, threads, shared_bytes, cluster, stream_of(device.index))
    pointers = _Pointer(ctypes.addressof(arguments))
    # A function belongs to the context of its device, which must be the current one.
    if torch.cuda.current_device() == device.index:
        status = _driver().cuLaunchKernelEx(config, function, pointers, None)
    else:
        with torch.cuda.device(device):
            status = _driver().cuLaunchKernelEx(config, function, pointers, None)
    if status != 0:
        _refuse(status, "a kernel could not be launched")


def prepared_launch(
    function: int, grid: int, threads: int, shared_bytes: int, arguments: ctypes.Structure, device: torch.device
) -> Callable[[], None]:
    """A function that does what ``launch`` does, for kernels that are launched many times with the same arguments; it
    wants ``device`` to be torch's current one, and takes the stream that is current now.

    Raises:
        CompileError: (the function) the driver refuses the launch.
    """
    config = _config(grid, threads, shared_bytes, 1, stream_of(device.index))
    pointers = _Pointer(ctypes.addressof(arguments))
    once_more = _driver().cuLaunchKernelEx

    def again(keep: tuple[Any, ...] = (pointers, arguments)) -> None:
        status = once_more(config, function, pointers, None)
        if status != 0:
            _refuse(status, "a kernel could not be launched")

    return again


def stream_of(device: int) -> int:
    """Handle of torch's current stream on a device."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def _refuse(status: int, what: str) -> None:
    from cuda.bindings import driver

    raise CompileError(f"{what}: {driver.CUresult(status).name}.")


@functools.lru_cache(maxsize=4096)
def _config(grid: int, threads: int, shared_bytes: int, cluster: int, stream: int) -> Any:
    """A reference to what the driver wants to know of a launch; never changed, since several threads may use it."""
    attributes = (_Attribute * (1 if cluster == 1 else 2))()
    attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
    if cluster > 1:
        attributes[1].id = _CLUSTER_DIMENSION
        attributes[1].value[:3] = cluster, 1, 1
    config = _Config((grid, 1, 1), (threads, 1, 1), shared_bytes, stream, attributes, len(attributes))
    return ctypes.byref(config)


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
        return multiprocessors_of(device)
    shared_bytes = 200 * 1024
    function = load_kernel("capacity.cu", (), (), "fill_multiprocessor", device, shared_bytes)
    clusters = ctypes.c_int()
    config = _config(cluster, 384, shared_bytes, cluster, stream_of(device))
    status = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(clusters), function, config)
    if status != 0:
        _refuse(status, f"the GPU does not tell how many clusters of {cluster} blocks it runs")
    return clusters.value * cluster
