"""Host (processor) time of a call of the W4A8 kernels, on a CPU with a driver that launches nothing.

    python benchmarks/launch_cost.py --json benchmarks/results/launch-cost-cpu.json

Everything that the host does for a launch runs as it does beside a GPU: torch's dispatch, checks, allocation of the
outputs, the choice of a kernel, its arguments. What the driver itself does is left out. ``custom_op`` is the same
function behind ``torch.library.custom_op`` instead of `finescale.kernels.operators`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from finescale.bench.machine import machine_facts
from finescale.kernels import launch, operators
from finescale.kernels.hopper import gemm, quantize

MULTIPROCESSORS, HANDLE = 132, 1 << 40
TOKENS, INPUTS, OUTPUTS = 1, 4096, 4096
"""Small, for a CPU's allocation of large outputs is not what a GPU's caching allocator does."""


def without_a_gpu() -> None:
    """The modules of the kernels believe in an H100 whose driver does nothing."""
    driver = SimpleNamespace(cuLaunchKernelEx=lambda *arguments: 0)
    launch._driver = lambda: driver  # type: ignore[assignment]
    torch.cuda.current_device = lambda: None  # type: ignore[assignment, return-value]
    launch.stream_of = gemm.stream_of = lambda device: 0  # type: ignore[attr-defined]
    for module in (gemm, quantize):
        module.load_kernel = lambda *arguments: HANDLE  # type: ignore[attr-defined]
        module.multiprocessors_of = lambda device: MULTIPROCESSORS  # type: ignore[attr-defined]
    gemm.capacity = lambda device: tuple((size, MULTIPROCESSORS) for size in gemm.CLUSTERS)  # type: ignore[assignment]
    quantize.blocks_on_multiprocessor = lambda *arguments: 1  # type: ignore[attr-defined, assignment]


def microseconds(call: Callable[[], Any], count: int = 2000, repeats: int = 7) -> float:
    """Processor time of the fastest of several runs, for other processes only ever make one slower."""
    for _ in range(count // 4):
        call()
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(count):
            call()
        times.append((time.thread_time() - begin) / count * 1e6)
    return min(times)


def functions_of_linear() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """What runs on CUDA devices behind the operators of kernels/linear.py, and their fakes, by name."""
    found: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    usual = operators.operator

    def noting(name: str, fake: Callable[..., Any], **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def define(function: Callable[..., Any]) -> Any:
            found[name] = function, fake
            return usual(name, fake, **options)(function)

        return define

    operators.operator = noting  # type: ignore[assignment]
    import finescale.kernels.linear

    operators.operator = usual
    assert finescale.kernels.linear
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    functions = functions_of_linear()
    without_a_gpu()
    x_TI, residual_TI = torch.zeros(2, TOKENS, INPUTS, dtype=torch.bfloat16)
    gain_I = torch.ones(INPUTS, dtype=torch.bfloat16)
    packed = torch.zeros(OUTPUTS // 64, INPUTS // 128, 4096 + 128, dtype=torch.uint8)
    before = (x_TI, "rms", residual_TI, gain_I, None, 1e-5)
    codes, scale_T, sum_T = quantize.run(*before)
    factor_O = torch.ones(OUTPUTS)
    calls = {
        "quantize_tokens": (before, ("residual_TI",)),
        "w4a8_product": ((codes, scale_T, sum_T, packed, None, factor_O, OUTPUTS, 1, True, torch.bfloat16), ()),
    }
    facts: dict[str, Any] = {
        "benchmark": "launch_cost",
        "machine": machine_facts(),
        "setting": {"tokens": TOKENS, "inputs": INPUTS, "outputs": OUTPUTS},
        "microseconds": {},
    }
    for name, (arguments, mutates) in calls.items():
        function, fake = functions[name]
        ours = operators.operator(f"{name}_on_a_cpu", fake, mutates=mutates, devices=("CPU",))(function)
        theirs = torch.library.custom_op(f"finescale::{name}_wrapped", function, mutates_args=mutates)
        found: dict[str, float] = {}
        ways = (("operator", ours), ("custom_op", theirs))
        for mode, context in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
            with context():
                found |= {f"{way}, {mode}": microseconds(lambda c=c, a=arguments: c(*a)) for way, c in ways}  # type: ignore[misc]
        facts["microseconds"][name] = found
        print(name, {key: round(value, 1) for key, value in found.items()}, flush=True)
    options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
