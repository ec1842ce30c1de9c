"""Runs every family of Hopper kernels on small sizes under compute-sanitizer: memory errors and races.

    python tools/sanitize_kernels.py --json benchmarks/results/sanitizer-h100.json

Needs a Hopper GPU and compute-sanitizer of the CUDA toolkit. Every result is compared with the exact product too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finescale.kernels.hopper.gemm import Variant

TOOLS = ("memcheck", "racecheck")
SIZES = (
    # tokens, outputs, inputs, group size, folded
    (5, 200, 1152, 128, False),
    (20, 1000, 640, 64, True),
    (100, 520, 512, 128, False),
    (300, 520, 1024, 128, True),
    (40, 264, 384, 32, False),
    (3, 70, 777, -1, False),
)


def products() -> Iterator[str]:
    """Every variant at each size; says which, after comparing it with the exact product."""
    import torch

    from finescale.kernels import layout
    from finescale.kernels.hopper import gemm
    from finescale.kernels.reference import grouped_int32_product

    for tokens, outputs, inputs, group_size, folded in SIZES:
        chosen = _chosen(tokens, group_size, folded)
        groups = 1 if group_size == -1 else -(-inputs // group_size)
        codes_OI = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device="cuda")
        scale_OG = torch.randint(1, 16, (outputs, groups), dtype=torch.int32, device="cuda")
        x_TI = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8, device="cuda")
        x_scale_T, x_sum_T = torch.ones(tokens, device="cuda"), x_TI.sum(1, dtype=torch.int32)
        weight, packed_x = layout.pack_weight(codes_OI, scale_OG, group_size), layout.pack_tokens(x_TI)
        sums_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, group_size)
        for variant in chosen:
            out_TO = gemm.run(
                packed_x, x_scale_T, x_sum_T, weight, tokens, outputs, 1, None, torch.bfloat16, folded, variant
            )
            if not torch.equal(out_TO, sums_TO.float().bfloat16()):
                raise SystemExit(f"{variant} is not exact at {tokens} x {outputs} x {inputs}.")
            yield f"{variant} {tokens} x {outputs} x {inputs}"


def _chosen(tokens: int, group_size: int, folded: bool) -> list[Variant]:
    """Variants of each way to share out tiles, for blocks of up to two computing warpgroups."""
    from finescale.kernels import layout
    from finescale.kernels.hopper import gemm

    found = gemm.variants(tokens, layout.groups_in_block(group_size), folded, 0)
    return [variant for variant in found if variant.warpgroups <= 2 and variant.split]


def compile_all() -> None:
    """Side by side, so that the sanitizer finds them on disk."""
    from concurrent.futures import ThreadPoolExecutor

    from finescale.kernels.jit import compile_source, source_text

    chosen = {(v.settings(), v.headers()) for size in SIZES for v in _chosen(size[0], size[3], size[4])}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda v: compile_source(source_text("gemm.cu", dict(v[0]), dict(v[1])), "sm_90a"), chosen))


def quantizers() -> Iterator[str]:
    """Every kind of activation quantizer."""
    import torch

    from finescale.kernels.hopper import quantize

    for kind in quantize.KINDS:
        for tokens, inputs in ((3, 777), (300, 1024)):
            x_TI = torch.randn(tokens, inputs * (2 if kind == "silu" else 1), device="cuda").bfloat16()
            norm = kind in ("rms", "layer")
            gain_I = torch.ones(inputs, device="cuda").bfloat16() if norm else None
            residual_TI = torch.zeros_like(x_TI) if norm else None
            quantize.run(x_TI, kind, residual_TI, gain_I, None, 1e-5)
            yield f"{kind} {tokens} x {inputs}"


def mixtures() -> Iterator[str]:
    """Whole feed-forwards of experts, and a grouped product in its narrowest and widest tiles."""
    import torch

    from finescale.kernels import experts as moe
    from finescale.kernels.hopper import grouped

    hidden, width, count, choices = 384, 200, 6, 2
    for tokens, folded in ((3, False), (120, True)):
        layers = []
        for outputs, inputs in ((2 * width, hidden), (hidden, width)):
            codes = torch.randint(-8, 8, (count, outputs, inputs), dtype=torch.int8, device="cuda")
            scales = torch.randint(1, 16, (count, outputs, -(-inputs // 64)), dtype=torch.int32, device="cuda")
            factor_EO = torch.full((count, outputs), 1 / 4096, device="cuda")
            layers.append(moe.pack_experts(list(codes), list(scales), factor_EO, 64, folded))
        x_TI = torch.randn(tokens, hidden, device="cuda").bfloat16()
        expert_TK = torch.rand(tokens, count, device="cuda").topk(choices).indices
        weight_TK = torch.rand(tokens, choices, device="cuda")
        out_TO = moe.w4a8_experts(x_TI, expert_TK, weight_TK, *layers).float()
        exact_TO = moe.exact_experts(x_TI, expert_TK, weight_TK, *layers).float()
        if (out_TO - exact_TO).abs().max() > 0.01 * exact_TO.abs().max():
            raise SystemExit(f"experts of {tokens} tokens are not those of the exact product.")
        yield f"experts of {tokens} tokens"
        position_TK, row_end_E = moe.route_tokens(expert_TK, count)
        routed = moe.quantize_routed(x_TI, position_TK, "plain", count)
        layer = layers[0]
        found = grouped.variants(tokens, 2, folded, 0, count)
        for variant in (found[0], found[-1]):
            grouped.run(
                *routed, row_end_E, layer.packed, layer.factor_EO, 2 * width, tokens, choices, torch.bfloat16, folded,
                variant,
            )  # fmt: skip
            yield f"{variant} of {tokens} tokens"


def run_all(seconds: float) -> None:
    """One of each family in turn, until the time is over."""
    import torch

    torch.manual_seed(0)
    start, families = time.monotonic(), [quantizers(), products(), mixtures()]
    while families and time.monotonic() - start < seconds:
        for family in list(families):
            name = next(family, None)
            if name is None:
                families.remove(family)
                continue
            torch.cuda.synchronize()
            print("ran", name, flush=True)


def sanitized(tool: str, checker: str, seconds: float) -> dict[str, object]:
    """What a tool of compute-sanitizer says about `run_all`."""
    command = [checker, "--tool", tool, sys.executable, str(Path(__file__).resolve()), "--run", f"--seconds={seconds}"]
    # Torch's pool would hide accesses beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    summary = re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout)
    found = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    return {
        "tool": tool,
        "summary": summary[-1] if summary else f"no summary, exit code {done.returncode}: {done.stderr[-500:]}",
        "launches": done.stdout.count("\nran ") + done.stdout.startswith("ran "),
        "first_messages": found[1:12] if summary and not re.search(r": 0 (errors|hazards)", summary[-1]) else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", action="store_true", help="only run the kernels, without the sanitizer")
    parser.add_argument("--seconds", type=float, default=1e9, help="for each tool; no kernel is begun after them")
    options = parser.parse_args()
    if options.run:
        return run_all(options.seconds)
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(checker).is_file():
        raise SystemExit("compute-sanitizer was not found; it comes with the CUDA toolkit.")
    import torch

    compile_all()
    results = [sanitized(tool, checker, options.seconds) for tool in TOOLS]
    for result in results:
        print(json.dumps(result, indent=1))
    if options.json:
        facts = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "sizes": SIZES, "results": results}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
