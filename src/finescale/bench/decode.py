"""Prefill and decoding speed of whole models of a named shape, in bfloat16 and W4A8, in one run.

Every model is the fused decoder that `finescale.load` makes (`finescale.runtime.fused`) inside a transformers model,
with random weights, a static cache and CUDA graphs. All arms share everything but the products and the rounding before
them: attention, rotary embedding, bfloat16 head, generation loop. Norms and silu * up are fused in each: into the
rounding in W4A8, into one kernel each in bfloat16.

Run it alone: ``python -m finescale.bench.decode --model llama-2-7b --json FILE``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from finescale.bench.machine import machine_facts
from finescale.bench.random_model import ARMS, ROUNDED_CACHE, USUAL_ARMS, kernel_of, random_model, weight_bytes
from finescale.bench.shapes import SHAPES
from finescale.bench.timeline import shares
from finescale.errors import InputError
from finescale.kernels.jit import compile_all
from finescale.report.speed import speed_figure
from finescale.runtime.cache import rounded_cache, scales_of
from finescale.runtime.products import PackedProduct

BATCHES = (1, 4, 16, 64, 128)
PREFILL = 2048
CONTEXT = 160
"""Tokens in the cache when decoding begins."""
STEPS = 64
"""Tokens decoded: on average 192 are in the cache, as when 128 follow a prompt of 128."""
REPEATS = 3
SEED = 0
GROUPS_OF_KERNELS = {
    "W4A8 products": ("w4a8_gemm",),
    "rounding with norms and silu": ("quantize_tokens",),
    "attention": ("_attend_kernel", "_rotate_kernel", "flash", "fmha", "sdpa"),
    "bfloat16 products": ("nvjet", "gemm", "gemv", "cutlass", "cublas", "splitk"),
    "norms, silu, rotary tables": ("_norm_kernel", "_silu_kernel", "_rotary_kernel"),
}


class Generation:
    """A model with a static cache, and one step of it: in a CUDA graph on a GPU, eager elsewhere.

    Args:
        model: the model.
        batch: sequences.
        context: tokens that stand in the cache before the first step.
        tokens: tokens of a step and sequence.
        slots: of the cache.
        rounded: whether the cache is int8.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, context: int, tokens: int, slots: int, rounded: bool = False
    ) -> None:
        self.model, self.context = model, context
        config, device = model.config, model.device
        self.cache = rounded_cache(config, slots) if rounded else StaticCache(config=config, max_cache_len=slots)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = torch.empty(batch, config.num_key_value_heads, 0, width, dtype=model.dtype, device=device)
        for layer in self.cache.layers:
            layer.lazy_initialization(empty, empty)
            for cache, scale in zip((layer.keys, layer.values), scales_of(layer), strict=True):
                if scale is None:
                    cache.normal_()
                else:
                    cache.random_(-127, 128)
                    scale.fill_(1 / 73)  # codes deviate by 73
        self.first_BT = torch.randint(3, config.vocab_size, (batch, tokens), device=device)
        self.input_BT = self.first_BT.clone()
        self.next_B1 = self.first_BT[:, :1].clone()
        self.graph: Any = None

    def restart(self) -> None:
        """Back to the first step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)
        self.input_BT.copy_(self.first_BT)

    def eager_step(self) -> None:
        """One forward pass; its likeliest tokens become the next step's input."""
        out = self.model(self.input_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next_B1.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        if self.input_BT.shape[1] == 1:
            self.input_BT.copy_(self.next_B1)
        else:
            torch._foreach_sub_([layer.cumulative_length for layer in self.cache.layers], self.input_BT.shape[1])

    def capture(self) -> None:
        """Puts a step into a CUDA graph, after some to warm up; nothing without a GPU."""
        if self.model.device.type != "cuda":
            return
        self.restart()
        # On the stream of the capture, so that the kernels' workspaces exist before.
        stream = _capture_stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.eager_step()
        torch.cuda.synchronize()
        self.restart()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.eager_step()

    def step(self) -> None:
        """The next step, from the graph if there is one."""
        if self.graph is None:
            self.eager_step()
        else:
            self.graph.replay()

    def tokens(self, step: Callable[[], None], count: int) -> Tensor:
        """Tokens of the first ``count`` steps, [B, count]."""
        self.restart()
        found = []
        for _ in range(count):
            step()
            found.append(self.next_B1.clone())
        return torch.cat(found, 1)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def milliseconds(run: Callable[[], None], count: int, device: torch.device) -> float:
    """Time of each of ``count`` runs, one after the other."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) * 1e3 / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


@torch.no_grad()
def measure(
    model: PreTrainedModel, batch: int, context: int, tokens: int, steps: int, profile: bool, rounded: bool = False
) -> dict[str, Any]:
    """Milliseconds of a step, its spread over repeats, tokens a second, memory; and whether a graph gives eager tokens.

    Args:
        model: the model.
        batch: sequences.
        context: tokens in the cache before.
        tokens: new tokens of each sequence and step.
        steps: of one repeat.
        profile: also say which kernels take the time.
        rounded: keys and values in the cache are int8.
    """
    device = model.device
    torch.manual_seed(SEED)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    generation = Generation(model, batch, context, tokens, context + (steps if tokens == 1 else tokens), rounded)
    generation.capture()
    check = min(4, steps)
    same = torch.equal(generation.tokens(generation.step, check), generation.tokens(generation.eager_step, check))
    times = []
    for _ in range(REPEATS):
        generation.restart()
        times.append(milliseconds(generation.step, steps, device))
    middle = statistics.median(times)
    found: dict[str, Any] = {
        "milliseconds": middle,
        "spread": [min(times), max(times)],
        "tokens_per_second": batch * tokens / middle * 1e3,
        "graph_equals_eager": same,
    }
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if profile and device.type == "cuda":
        generation.restart()
        try:
            found["profile"] = kernel_times(generation.step, min(8, steps))
        except (RuntimeError, AttributeError) as error:  # a machine whose GPU may not be traced
            found["profile_error"] = str(error).splitlines()[0]
    return found


def kernel_times(step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Microseconds of a step by group of kernels, and of the ten kernels that take most; see ``timeline.shares``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    kernels = shares([(event.name, event.time_range.start, event.time_range.end) for event in events])
    groups = dict.fromkeys([*GROUPS_OF_KERNELS, "other"], 0.0)
    for name, (microseconds, _) in kernels.items():
        groups[kernel_group(name)] += microseconds / steps
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
    return {
        "microseconds": groups,
        "kernels": sum(count for _, count in kernels.values()) / steps,
        "largest": [
            {"microseconds": t / steps, "launches": n / steps, "kernel": name[:120]} for name, (t, n) in largest
        ],
    }


def kernel_group(name: str) -> str:
    """Which of ``GROUPS_OF_KERNELS`` a kernel belongs to."""
    lower = name.lower()
    return next((g for g, marks in GROUPS_OF_KERNELS.items() if any(m in lower for m in marks)), "other")


def compile_ahead(model: PreTrainedModel, counts: Iterable[int]) -> None:
    """Compiles the product kernels for so many tokens, side by side."""
    if model.device.type != "cuda":
        return
    products = [module for module in model.modules() if isinstance(module, PackedProduct)]
    kinds = {(type(p), p.packed.shape, p.folded, p.outputs): p for p in products}.values()
    chosen = {kernel_of(product, count, model.dtype) for product, count in itertools.product(kinds, counts)}
    compile_all(variant.text() for variant in chosen)


def bench_decode(
    models: Iterable[str],
    batches: Iterable[int] = BATCHES,
    arms: Iterable[str] = USUAL_ARMS,
    device: str = "cuda",
    prefill: int = PREFILL,
    context: int = CONTEXT,
    steps: int = STEPS,
    profiled: Iterable[int] = (1, 64),
    layers: int | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All measurements.

    Args:
        models: names of shapes.
        batches: sequences decoded at once.
        arms: of ``random_model.ARMS``.
        device: ``cuda``, a Hopper GPU; on ``cpu`` everything runs eagerly and slowly, for tests.
        prefill: tokens of one sequence in one pass.
        context, steps: tokens in the cache when decoding begins, and tokens decoded.
        profiled: batches, and 0 for the prefill, whose kernels are timed one by one.
        layers: blocks of every model, instead of its own number: for models that do not fit in bfloat16.
        on_row: called after each model and arm with the result so far.

    Raises:
        InputError: an unknown shape or arm, a size that is none, or no Hopper GPU. An arm that a model does not
            have, or that finds no room, is a row that says so under ``stopped``.
    """
    models, batches, arms, profiled = tuple(models), tuple(batches), tuple(arms), set(profiled)
    for name in models:
        if name not in SHAPES:
            raise InputError(f"no shape is called {name}; use one of {', '.join(SHAPES)}.")
    if not set(arms) <= set(ARMS):
        raise InputError(f"arms are {', '.join(ARMS)}.")
    if min(*batches, prefill, context, steps, 1, 1 if layers is None else layers) < 1 or prefill < 2:
        raise InputError("batches, context, steps and layers must be at least 1, the prefill at least 2 tokens.")
    if device == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)):
        raise InputError("bench decode needs a Hopper GPU (compute capability 9.0).")
    if device != "cuda" and "w4a8-float" in arms:
        raise InputError("float scales on the kernel's skeleton need a Hopper GPU; leave out w4a8-float.")
    target = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    result: dict[str, Any] = {
        "benchmark": "decode",
        "machine": machine_facts() | {"transformers": transformers.__version__},
        "setting": {"prefill": prefill, "context": context, "steps": steps, "repeats": REPEATS, "seed": SEED}
        | ({} if layers is None else {"layers": layers}),
        "rows": [],
    }
    for name, arm in itertools.product(models, arms):
        result["rows"].append(_one_arm(name, arm, target, batches, prefill, context, steps, profiled, layers))
        on_row(result)
    return result


def _one_arm(
    name: str, arm: str, device: torch.device, batches: tuple[int, ...], prefill: int, context: int, steps: int,
    profiled: set[int], layers: int | None,
) -> dict[str, Any]:  # fmt: skip
    begin = time.perf_counter()
    row: dict[str, Any] = {"model": name, "arm": arm, "decode": {}} | ({} if layers is None else {"layers": layers})
    try:
        torch.manual_seed(SEED)
        model = random_model(name, arm, device, layers)
        row["weights_gb"] = weight_bytes(model) / 1e9
        compile_ahead(model, [*batches, prefill])
        rounded = arm in ROUNDED_CACHE
        row["prefill"] = measure(model, 1, 0, prefill, 5 if device.type == "cuda" else 1, 0 in profiled, rounded)
        for batch in batches:
            row["decode"][str(batch)] = measure(model, batch, context, 1, steps, batch in profiled, rounded)
    except (torch.OutOfMemoryError, InputError) as error:
        row["stopped"] = str(error).splitlines()[0]
    row["seconds"] = time.perf_counter() - begin
    model = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def speedups(rows: list[dict[str, Any]], model: str, arm: str) -> dict[str, float]:
    """How many times faster than bfloat16 an arm is, by batch, and at the prefill under ``prefill``."""
    by_arm = {row["arm"]: row for row in rows if row["model"] == model}
    if "bf16" not in by_arm or arm not in by_arm:
        return {}
    times = [{"prefill": row.get("prefill", {}), **row["decode"]} for row in (by_arm["bf16"], by_arm[arm])]
    return {
        key: times[0][key]["milliseconds"] / times[1][key]["milliseconds"]
        for key in times[1]
        if times[0].get(key) and times[1][key]
    }


def speedups_by_model(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """``speedups`` of all models and arms, for ``report.speed.speed_figure``."""
    names = dict.fromkeys(row["model"] for row in result["rows"])
    return {name: {arm: speedups(result["rows"], name, arm) for arm in ARMS[1:]} for name in names}


def text_row(row: dict[str, Any]) -> str:
    """One line: milliseconds of prefill and of a step by batch."""
    parts = [f"{row['model']:>14} {row['arm']:<12}", *([f"{row['layers']} blocks"] if "layers" in row else [])]
    parts.append(f"{row['weights_gb']:.2f} GB" if "weights_gb" in row else "no room")
    if "prefill" in row:
        parts.append(f"prefill {row['prefill']['milliseconds']:.2f} ms")
    parts += [f"{batch}: {cell['milliseconds']:.3f}" for batch, cell in row["decode"].items()]
    cells = [*row["decode"].values(), *([row["prefill"]] if "prefill" in row else [])]
    parts += ["tokens differ from eager!"] if not all(cell["graph_equals_eager"] for cell in cells) else []
    return "  ".join([*parts, f"({row['seconds']:.0f} s)", row.get("stopped", "")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=list(SHAPES), help="may be repeated")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--arms", default=",".join(USUAL_ARMS), help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--profiled", default="1,64", help="batches, 0 for the prefill")
    parser.add_argument("--layers", type=int, help="blocks, where a whole model does not fit in bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG file of the speed-ups")
    options = parser.parse_args()
    models = options.model or ["llama-2-7b"]
    counts, profiled = ([int(n) for n in text.split(",") if n] for text in (options.batches, options.profiled))
    command = " ".join(["python -m finescale.bench.decode", *sys.argv[1:]])

    def show_and_keep(result: dict[str, Any]) -> None:
        print(text_row(result["rows"][-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result | {"command": command}, indent=1) + "\n")
        if options.plot:
            options.plot.write_text(speed_figure(speedups_by_model(result)), encoding="utf-8")

    result = bench_decode(
        models,
        counts,
        options.arms.split(","),
        options.device,
        profiled=profiled,
        layers=options.layers,
        on_row=show_and_keep,
    )
    for model in models:
        for arm in options.arms.split(","):
            found = speedups(result["rows"], model, arm)
            print(f"{model} {arm} over bf16: " + "  ".join(f"{key}: {value:.2f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
