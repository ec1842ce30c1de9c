"""Compiles CUDA C++ at run time through NVRTC, and keeps the result on disk.

Only ``cuda-bindings`` and NVRTC are needed, both of which CUDA builds of torch bring along; no toolkit, no headers.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from finescale.environment import cache_folder
from finescale.errors import FinescaleError


class CompileError(FinescaleError):
    """A kernel could not be compiled or loaded."""


def source_text(name: str, settings: Mapping[str, int], generated: Mapping[str, str]) -> str:
    """One text of kernel ``name``: settings as macros, headers in place, ``generated`` for those not on disk."""
    folder = resources.files("finescale.kernels.hopper")

    def expanded(name: str) -> str:
        text = generated[name] if name in generated else folder.joinpath(name).read_text()
        lines = text.splitlines()
        return "\n".join(expanded(line.split('"')[1]) if line.startswith("#include") else line for line in lines)

    return "\n".join([*(f"#define {key} {value}" for key, value in settings.items()), expanded(name), ""])


def compile_source(text: str, architecture: str) -> bytes:
    """The machine code (cubin) of ``text`` for ``architecture`` ("sm_90a"), from the disk if it was compiled before.

    Raises:
        CompileError: NVRTC is missing or refuses the text.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError("compiling kernels needs cuda-bindings; install finescale[gpu].") from error
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device"]
    _, major, minor = nvrtc.nvrtcVersion()
    key = hashlib.sha256("\n".join([text, *options, f"{major}.{minor}"]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    _, program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, None, None))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise CompileError(f"NVRTC refused a kernel for {architecture}: {log.decode(errors='replace').strip()}")
    _, size = _checked(nvrtc.nvrtcGetCUBINSize(program))
    cubin = bytearray(size)
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    _write(path, bytes(cubin))
    return bytes(cubin)


def compile_all(texts: Iterable[str], architecture: str = "sm_90a") -> None:
    """Compile texts ahead, side by side.

    Raises:
        CompileError: see ``compile_source``.
    """
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: compile_source(text, architecture), texts))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        return  # A cache that cannot be written costs time, not results.


def _checked(result: tuple) -> tuple:
    if int(result[0]) != 0:
        raise CompileError(f"{type(result[0]).__name__} {result[0].name}")
    return result


@functools.cache
def load_kernel(
    name: str,
    settings: tuple[tuple[str, int], ...],
    generated: tuple[tuple[str, str], ...],
    entry: str,
    device: int,
    shared_bytes: int,
) -> int:
    """A handle of function ``entry`` of kernel ``name`` on CUDA device ``device``.

    Args:
        name: file in kernels/hopper.
        settings: macros.
        generated: texts of headers that are not files.
        entry: the function.
        device: index of the device.
        shared_bytes: dynamic shared memory the kernel may use.
    """
    import torch
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_source(source_text(name, dict(settings), dict(generated)), f"sm_{major}{minor}a")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that the device's context is the current one
        _, module = _checked(driver.cuModuleLoadData(cubin))
        _, function = _checked(driver.cuModuleGetFunction(module, entry.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if shared_bytes > 48 * 1024:
            _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return int(function)
