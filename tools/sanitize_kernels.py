"""Runs every family of CUDA kernels on small sizes under compute-sanitizer: memory errors and races.

    python tools/sanitize_kernels.py --json benchmarks/results/sanitizer-h100.json

Needs a Hopper GPU and compute-sanitizer of the CUDA toolkit. All cases run without it first, in several processes;
that compiles their kernels and compares every result with an exact one; the sanitizer then finds them on disk.

When a stage of a product is handed back, one lane arrives at a barrier for its warp, after __syncwarp. racecheck does
not follow __syncwarp and reports what the other lanes have read, as CONTROL shows, which does nothing else. Products
are compiled here so that each lane arrives for itself (`Variant.checked`), and CONTROL runs both ways, and the way in
which blocks of a cluster store into each other's shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finescale.kernels.hopper.gemm import Variant

TOOLS = ("memcheck", "racecheck")
SIZES = (
    # tokens, outputs, inputs, group size, folded
    (5, 200, 2560, 128, False),
    (20, 1000, 640, 64, True),
    (100, 520, 1536, 128, False),
    (300, 520, 1024, 128, True),
    (40, 264, 384, 32, False),
    (3, 70, 777, -1, False),
)
Case = tuple[str, Callable[[], None]]
CONTROL = """
#include "ptx.cuh"
struct Arguments { int* out; };
extern "C" __global__ void hand_over(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) u32 given[32 * 4];
    u32 rank = blockIdx.x % 2, place = shared_address(given) + threadIdx.x * 16;
    cluster_meet();
    store_cluster16(cluster_address(place, 1 - rank), threadIdx.x, rank, 0, 0);
    cluster_meet();
    uint4 got = load_shared16(place);
    a.out[rank * 32 + threadIdx.x] = got.x + 100 * got.y;
}
extern "C" __global__ void arrive_and_reuse(const __grid_constant__ Arguments a) {
    __shared__ u32 given[32];
    __shared__ u64 storage;
    u32 barrier = shared_address(&storage), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) barrier_init(barrier, ARRIVING), fence_barrier_init();
    if (threadIdx.x < 32) given[lane] = lane;
    __syncthreads();
    if (threadIdx.x < 32) {
        a.out[lane] = given[31 - lane];
        __syncwarp();
        if (lane < ARRIVING) barrier_arrive(barrier);
    } else {
        barrier_wait(barrier, 0);
        given[lane] = 0;
    }
}
"""


@dataclass(frozen=True)
class Share:
    """Part ``index`` of a family's cases, dealt out to ``count`` processes; none is begun after ``seconds``."""

    family: str
    index: int
    count: int
    seconds: float


def product(variant: Variant, tokens: int, outputs: int, inputs: int, group_size: int, dtype: str = "bfloat16") -> None:
    """A dense product with bias and scales of outputs; inputs are made on the CPU, which no sanitizer slows down."""
    import torch

    from finescale.kernels import layout
    from finescale.kernels.hopper import gemm
    from finescale.kernels.reference import grouped_int32_product

    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes_OI = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scale_OG = torch.randint(1, 16, (outputs, groups), dtype=torch.int32)
    bits_OG = scale_OG.bfloat16().view(torch.int16).int() if variant.float_scales else scale_OG
    x_TI = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    scale_T, own_O, bias_O = torch.rand(tokens) + 0.5, torch.rand(outputs), torch.randn(outputs)
    expected_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, group_size).float() * (scale_T / 1024)[:, None]
    out_dtype = getattr(torch, dtype)
    out_TO = gemm.run(
        layout.pack_tokens(x_TI).cuda(), scale_T.cuda(), x_TI.sum(1, dtype=torch.int32).cuda(),
        layout.pack_weight(codes_OI, bits_OG, group_size).cuda(), tokens, outputs, 1024, bias_O.cuda(), out_dtype,
        variant.folded, variant, own_O.cuda(),
    ).cpu()  # fmt: skip
    assert torch.equal(out_TO, (expected_TO * own_O + bias_O).to(out_dtype)), "the product is not exact"


def products() -> list[Case]:
    """One variant of each way to share out tiles and of each width, at each size."""
    from dataclasses import replace

    from finescale.kernels import layout
    from finescale.kernels.hopper import gemm

    cases: list[Case] = []
    for tokens, outputs, inputs, group_size, folded in SIZES:
        for index, dtype in ((0, "bfloat16"), (1, "float16"), (2, "float32")):
            found = gemm.variants(tokens, layout.groups_in_block(group_size), folded, index)
            chosen = {(v.warpgroups, v.split, v.cluster): v for v in reversed(found)} | {v.tokens: v for v in found}
            some = list(dict.fromkeys(chosen.values()))[index::3]
            if dtype == "bfloat16" and not folded and group_size == 128:
                some.append(replace(some[0], float_scales=True, cluster=1))
            for variant in (replace(each, checked=True) for each in some):
                run = partial(product, variant, tokens, outputs, inputs, group_size, dtype)
                cases.append((f"{variant} {tokens} x {outputs} x {inputs}", run))
    return cases


def alone_or_shared(clusters: bool) -> list[Case]:
    """Products in which blocks of a cluster share tiles, or the others."""
    return [case for case in products() if ("cluster=1" not in case[0]) == clusters]


def control() -> list[Case]:
    """The kernels of CONTROL, launched once."""
    import ctypes

    class Arguments(ctypes.Structure):
        _fields_ = [("out", ctypes.c_void_p)]

    def run(entry: str, grid: int, threads: int, cluster: int, arriving: int, expected: list[int]) -> None:
        import torch

        from finescale.kernels.jit import load_kernel
        from finescale.kernels.launch import launch

        out = torch.zeros(len(expected), dtype=torch.int32, device="cuda")
        function = load_kernel(
            "control.cu", (("ARRIVING", arriving),), (("control.cu", CONTROL),), entry, out.device.index, 0
        )
        launch(function, grid, threads, 0, Arguments(out.data_ptr()), out.device, cluster)
        assert out.tolist() == expected, "what was handed over is wrong"

    lanes = list(range(32))
    return [
        ("one lane arrives", partial(run, "arrive_and_reuse", 1, 64, 1, 1, lanes[::-1])),
        ("each lane arrives", partial(run, "arrive_and_reuse", 1, 64, 1, 32, lanes[::-1])),
        ("hand over in a cluster", partial(run, "hand_over", 2, 32, 2, 1, [lane + 100 for lane in lanes] + lanes)),
    ]


def quantizer(
    kind: str, adds: bool, tokens: int, inputs: int, dtype: str, gathers: bool = False, choices: int = 0
) -> None:
    """A quantizer of activations; codes may differ by one where sums in another order or another exponential may."""
    import torch

    from finescale.grid import ActivationScheme, Gather, quantize_tokens
    from finescale.kernels import layout
    from finescale.kernels.gather import gather_table
    from finescale.kernels.hopper import quantize
    from finescale.kernels.plain import before_rounding

    kept, norm = getattr(torch, dtype), kind in ("rms", "layer")
    x_TI = torch.randn(tokens, inputs * (2 if kind == "silu" else 1)).to(kept)
    gain_I = torch.rand(inputs).to(kept) if norm else None
    residual_TI = torch.randn(tokens, inputs).to(kept) if adds else None
    index_KJ = torch.randint(0, inputs, (2, inputs + 10))
    gather = Gather(index_KJ, torch.rand(2, inputs + 10) * torch.tensor([[1.0], [0.1]])) if gathers else None
    y_TI = before_rounding(x_TI, kind, None if residual_TI is None else residual_TI.clone(), gain_I, None, 1e-5)
    codes_TJ = quantize_tokens(gather.apply(y_TI) if gather else y_TI, ActivationScheme(8))[0]
    position_TK = torch.arange(tokens * choices, dtype=torch.int32).reshape(tokens, choices) if choices else None
    rows = -(-tokens * choices // 8) * 8
    of_row = torch.arange(tokens).repeat_interleave(choices) if choices else torch.arange(tokens)
    if choices and kind == "silu":  # rows of choices are given too
        x_TI, codes_TJ = (torch.cat([t, t[:1].expand(rows - tokens, -1)]) for t in (x_TI, codes_TJ))
        of_row = torch.arange(tokens)
    residual_TI, gain_I, position_TK = (None if t is None else t.cuda() for t in (residual_TI, gain_I, position_TK))
    table = gather_table(Gather(gather.index_KJ.cuda(), gather.gain_KJ.cuda())) if gather else None
    packed = quantize.run(
        x_TI.contiguous().cuda(), kind, residual_TI, gain_I, None, 1e-5, position_TK, rows, gather=table
    )[0]
    got_TJ = layout.unpack_tokens(packed.cpu(), packed.shape[1] * 8, codes_TJ.shape[1])[: len(of_row)]
    assert (got_TJ.int() - codes_TJ[of_row].int()).abs().max() <= 1, "codes are wrong"


def quantizers() -> list[Case]:
    """Every kind, by loads and by bulk copies, of one warp and of many, gathered, and sorted by expert."""
    cases: list[Case] = []
    for kind, adds in (
        ("plain", False), ("rms", False), ("rms", True), ("layer", False), ("layer", True), ("silu", False),
    ):  # fmt: skip
        sizes = ((3, 777, "bfloat16"), (300, 1024, "bfloat16"), (290, 232, "float16"), (270, 512, "float32"))
        cases += [(f"{kind} {adds} {size}", partial(quantizer, kind, adds, *size)) for size in sizes]
        if kind != "silu":
            gathered = ((5, 520, "bfloat16"), (280, 1024, "float16"), (270, 264, "float32"))
            cases += [
                (f"{kind} {adds} {size} gathered", partial(quantizer, kind, adds, *size, True)) for size in gathered
            ]
    for kind in ("plain", "silu"):
        for tokens in (20, 280):
            choices = 2 if kind == "plain" else 1
            run = partial(quantizer, kind, False, tokens, 512, "bfloat16", False, choices)
            cases.append((f"{kind} of {tokens} tokens for experts", run))
    return cases


def mixture(tokens: int, folded: bool) -> None:
    """A whole feed-forward of experts: routing, quantizers, both grouped products, the sum."""
    import torch

    from finescale.kernels import experts as moe

    hidden, width, count, choices = 384, 200, 6, 2
    layers = []
    for outputs, inputs in ((2 * width, hidden), (hidden, width)):
        codes = torch.randint(-8, 8, (count, outputs, inputs), dtype=torch.int8)
        scales = torch.randint(1, 16, (count, outputs, -(-inputs // 64)), dtype=torch.int32)
        layers.append(moe.pack_experts(list(codes), list(scales), torch.full((count, outputs), 1 / 4096), 64, folded))
    x_TI = torch.randn(tokens, hidden).bfloat16()
    expert_TK, weight_TK = torch.rand(tokens, count).topk(choices).indices, torch.rand(tokens, choices)
    exact_TO = moe.exact_experts(x_TI, expert_TK, weight_TK, *layers).float()
    there = [moe.PackedExperts(layer.packed.cuda(), layer.factor_EO.cuda(), layer.folded) for layer in layers]
    out_TO = moe.w4a8_experts(x_TI.cuda(), expert_TK.cuda(), weight_TK.cuda(), *there).float().cpu()
    assert (out_TO - exact_TO).abs().max() <= 0.01 * exact_TO.abs().max(), "experts are wrong"


def grouped_product(variant: Variant, tokens: int, folded: bool) -> None:
    """The grouped product in a given variant."""
    import torch

    from finescale.kernels import experts as moe
    from finescale.kernels.hopper import grouped

    count, choices, outputs, inputs = 6, 2, 400, 384
    codes = torch.randint(-8, 8, (count, outputs, inputs), dtype=torch.int8)
    scales = torch.randint(1, 16, (count, outputs, inputs // 64), dtype=torch.int32)
    layer = moe.pack_experts(list(codes), list(scales), torch.full((count, outputs), 1 / 4096).cuda(), 64, folded)
    expert_TK = torch.rand(tokens, count).topk(choices).indices
    x_TI = torch.randn(tokens, inputs).bfloat16().cuda()
    position_TK, row_end_E = moe.route_tokens(expert_TK.cuda(), count)
    codes_R, scale_R, sum_R = moe.quantize_routed(x_TI, position_TK, "plain", count)
    product = partial(
        grouped.run,
        codes_R,
        scale_R,
        sum_R,
        row_end_E,
        layer.packed,
        layer.factor_EO,
        outputs,
        tokens,
        choices,
        torch.bfloat16,
        folded,
    )
    out_RO, other_RO = product(variant), product()
    held = position_TK.flatten().long().cpu()
    assert torch.equal(out_RO.cpu()[held], other_RO.cpu()[held]), "variants differ"


def mixtures() -> list[Case]:
    """Whole mixtures, and grouped products in their narrowest and widest tiles and each number of warpgroups."""
    from dataclasses import replace

    from finescale.kernels.hopper import grouped

    cases: list[Case] = []
    for tokens, folded in ((3, False), (120, True), (120, False)):
        cases.append((f"experts of {tokens} tokens", partial(mixture, tokens, folded)))
        found = grouped.variants(tokens, 2, folded, 0, 6)
        chosen = dict.fromkeys([found[0], found[-1], *{v.warpgroups: v for v in found}.values()])
        cases += [
            (f"{v} of {tokens} tokens", partial(grouped_product, replace(v, checked=True), tokens, folded))
            for v in chosen
        ]
    return cases


def sweep(rows: int, asymmetric: bool, outliers: bool, relaxed: bool, parts: bool) -> None:
    """One batch of columns of QuantEase; that its values are right is what tests/solvers shows."""
    import torch

    from finescale.solvers import cuda_sweep

    columns, groups = 96, 3
    beta_BO, current_BO = torch.randn(columns, rows), torch.randn(columns, rows)
    inner_BW = torch.zeros(columns, cuda_sweep.WIDTH)
    inner_BW[:, :columns] = 0.05 * torch.randn(columns, columns)
    scale_GO = 0.1 + torch.rand(groups, rows)
    zero_GO = torch.randint(0, 16, (groups, rows)).float() if asymmetric else None
    group_B = torch.arange(columns, dtype=torch.int32) // 32
    free_BO = torch.rand(columns, rows) < 0.1 if outliers else None
    change = torch.zeros(3 * columns if parts else columns, rows, dtype=torch.float16 if parts else torch.float32)
    low, high = (0.0, 15.0) if asymmetric else (-8.0, 7.0)
    there_BO, zero_GO, free_BO = (None if t is None else t.cuda() for t in (current_BO, zero_GO, free_BO))
    assert there_BO is not None
    cuda_sweep.quantease_batch(
        beta_BO.cuda(), there_BO, change.cuda(), inner_BW.cuda(), scale_GO.cuda(), zero_GO, group_B.cuda(), free_BO,
        low, high, relaxed,
    )()  # fmt: skip
    assert torch.isfinite(there_BO).all(), "values are not finite"


def sweeps() -> list[Case]:
    """The solver's kernel in each of its forms."""
    forms = (
        (False, False, False, False), (True, False, False, False), (False, True, False, True),
        (True, True, False, False), (False, False, True, False), (False, False, False, True),
    )  # fmt: skip
    return [(f"sweep of {rows} rows {form}", partial(sweep, rows, *form)) for rows in (100, 4300) for form in forms]


FAMILIES: dict[str, Callable[[], list[Case]]] = {
    "quantizers": quantizers,
    "products": partial(alone_or_shared, False),
    "products of clusters": partial(alone_or_shared, True),
    "mixtures": mixtures,
    "sweeps": sweeps,
    "control": control,
}
PROCESSES = {"quantizers": 2, "products": 3, "products of clusters": 2, "control": 3}


def run_share(share: Share) -> None:
    """Runs cases and says which."""
    import torch

    torch.set_num_threads(1)
    start = time.monotonic()
    for name, run in FAMILIES[share.family]()[share.index :: share.count]:
        if time.monotonic() - start > share.seconds:
            return
        torch.manual_seed(0)
        try:
            run()
            torch.cuda.synchronize()
            print("ran", name, flush=True)
        except Exception as error:  # whatever it is, the other cases come next
            print(f"failed {name}: {error!r}", flush=True)


def started(checker: list[str], share: Share) -> subprocess.Popen[str]:
    """A process that runs a share, under a sanitizer if ``checker`` is one."""
    own = ["--run", share.family, str(share.index), str(share.count), str(share.seconds)]
    # Torch's pool would hide accesses beyond a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    command = [*checker, sys.executable, str(Path(__file__).resolve()), *own]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def texts_of(processes: list[subprocess.Popen[str]], end: float) -> list[str]:
    """What processes print; those that are not through at a time are ended."""
    texts = []
    for process in processes:
        try:
            texts.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what the sanitizer started
            texts.append(process.communicate()[0] + "\nfailed: out of time\n")
    return texts


def summary_of(family: str, texts: list[str]) -> dict[str, object]:
    """Errors that a tool found in a family, and the cases that were run."""
    lines = [line for text in texts for line in text.splitlines()]
    summaries = [re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", text) for text in texts]
    clean = all(len(s) == 1 and re.search(r": 0 (errors|hazards)", s[0]) for s in summaries)
    found = [line[10:] for line in lines if line.startswith("=========") and "SUMMARY" not in line]
    return {
        "summaries": [s[-1] if s else "none" for s in summaries],
        "cases_run": sum(line.startswith("ran ") for line in lines),
        "cases": len(FAMILIES[family]()),
        "failures": [line for line in lines if line.startswith("failed")][:20],
        "races_by_kernel": dict(Counter(match for line in found for match in re.findall(r"Race.* at (\w+)\+", line))),
        "blocks_may_have_ended": sum("might have already exited" in line for line in found),
        "first_messages": [] if clean else found[1:20],
    }


def run_tool(tool: str, checker: list[str], seconds: float) -> Callable[[], dict[str, object]]:
    """Starts all families under a tool; gives what waits for them."""
    end = time.monotonic() + seconds + 30
    running = {
        family: [started(checker, Share(family, i, count, seconds)) for i in range(count)]
        for family, count in ((family, PROCESSES.get(family, 1)) for family in FAMILIES)
    }
    return lambda: {
        "tool": tool, **{family: summary_of(family, texts_of(processes, end)) for family, processes in running.items()}
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=4, metavar=("FAMILY", "INDEX", "COUNT", "SECONDS"), help="only run some cases")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--seconds", type=float, default=600, help="for each tool; no case is begun after them")
    options = parser.parse_args()
    if options.run:
        return run_share(Share(options.run[0], int(options.run[1]), int(options.run[2]), float(options.run[3])))
    if options.list:
        return print("\n".join(f"{family}: {name}" for family, cases in FAMILIES.items() for name, _ in cases()))
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(checker).is_file():
        raise SystemExit("compute-sanitizer was not found; it comes with the CUDA toolkit.")
    import torch

    from finescale.bench.machine import machine_facts

    start = time.monotonic()
    reports = [run_tool("none", [], options.seconds)()]
    print(json.dumps(reports[0], indent=1), f"\nafter {time.monotonic() - start:.0f} s", flush=True)
    # cuda-bindings asks for functions that a driver may lack, and takes errors as answers.
    commands = {tool: [checker, "--tool", tool, "--report-api-errors", "no"] for tool in TOOLS}
    for waiting in [run_tool(tool, command, options.seconds) for tool, command in commands.items()]:
        reports.append(waiting())
        print(json.dumps(reports[-1], indent=1), f"\nafter {time.monotonic() - start:.0f} s", flush=True)
    if options.json:
        facts = {
            "benchmark": "sanitizer", "machine": machine_facts(), "cuda": torch.version.cuda, "sizes": SIZES,
            "command": " ".join(["python tools/sanitize_kernels.py", *sys.argv[1:]]), "results": reports,
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
