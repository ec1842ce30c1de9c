"""Kernels of kernels/hopper on a CPU, for tests: compiled by g++ with emulator.h in the place of ptx.cuh."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from finescale.kernels import launch as launching
from finescale.kernels.hopper import gemm, quantize
from finescale.kernels.jit import source_text

HERE = Path(__file__).parent
LIBRARIES = Path(tempfile.gettempdir()) / "finescale-emulator"
WGMMA = """
inline void wgmma_u8(int (&d)[TOKENS / 2], const u32* a, u64 tile, int more) { wgmma<false, TOKENS>(d, a, tile, more); }
inline void wgmma_s8(int (&d)[TOKENS / 2], const u32* a, u64 tile, int more) { wgmma<true, TOKENS>(d, a, tile, more); }
"""
LAUNCH = """
extern "C" int launch(const Arguments* a, int grid, int threads, int shared_bytes, int cluster, u64 seed) {
    body = [a] { %s(*a); };
    return run_grid(grid, threads, shared_bytes, cluster, seed);
}
"""
seed = 1


def as_cpp(text: str) -> str:
    """CUDA C++ as plain C++: shared memory is the block's own."""
    text = re.sub(r"extern __shared__ .*? memory\[\];", "#define memory (::self->block->memory)", text)
    return re.sub(
        r"__shared__ (\w+) (\w+)((?:\[\w+\])+);",
        r'\1 (&\2)\3 = *reinterpret_cast<\1 (*)\3>(static_shared("\2", sizeof(\1\3)));',
        text,
    )


@functools.cache
def load_kernel(name, settings, generated, entry, device, shared_bytes):
    """Like ``jit.load_kernel``, but the function is one of a CPU library."""
    text = as_cpp(source_text(name, dict(settings), {"ptx.cuh": "", "wgmma.cuh": WGMMA}))
    text = (HERE / "emulator.h").read_text() + text + LAUNCH % entry
    LIBRARIES.mkdir(exist_ok=True)
    library = LIBRARIES / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
    if not library.exists():
        # Under names of its own until it is whole: other processes may be testing too.
        source, made = library.with_suffix(f".{os.getpid()}.cpp"), library.with_suffix(f".{os.getpid()}.so")
        source.write_text(text)
        # Products and sums are rounded one by one, as the kernels ask for; warnings are the CUDA compiler's business.
        options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
        done = subprocess.run(["g++", *options, "-o", made, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        made.replace(library)
    return ctypes.CDLL(str(library)).launch


def launch(function, grid, threads, shared_bytes, arguments, device, cluster=1):
    """Like ``launch.launch``; raises if threads wait for one another."""
    status = function(ctypes.byref(arguments), grid, threads, shared_bytes, cluster, ctypes.c_uint64(seed))
    assert status == 0, "the kernel hangs"


def emulate(monkeypatch, multiprocessors: int) -> None:
    """From here on the modules gemm and quantize compute on a CPU that passes for a small GPU."""
    for module in (gemm, quantize):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(gemm, "blocks_at_once", lambda device, cluster: multiprocessors // cluster * cluster)
    monkeypatch.setattr(gemm, "multiprocessors_of", lambda device: multiprocessors)
    monkeypatch.setattr(gemm, "capacity", lambda device: tuple((c, multiprocessors // c * c) for c in gemm.CLUSTERS))
    monkeypatch.setattr(gemm, "stream_of", lambda device: 0)
    monkeypatch.setattr(quantize, "blocks_on_multiprocessor", lambda function, threads, shared_bytes: 1)
    monkeypatch.setattr(quantize, "multiprocessors_of", lambda device: multiprocessors)
    for kept in (quantize._plan, gemm._plan):  # depend on the GPU
        kept.cache_clear()
    assert launching  # the real ones stay where they are
