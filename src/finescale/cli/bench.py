"""``finescale bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from finescale.cli.common import console, quiet_libraries, write_json_file

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Benchmarks against baselines in the same run."""


@app.command()
def solver(
    shape: Annotated[list[str] | None, typer.Option(help="OUTPUTSxINPUTS, may be repeated.")] = None,
    sweeps: Annotated[int, typer.Option(help="Sweeps of QuantEase.")] = 30,
    bits: Annotated[int, typer.Option(help="Bits of the weights.")] = 3,
    repeats: Annotated[int, typer.Option(help="Repeats; the fastest counts.")] = 1,
    full_plain: Annotated[
        bool, typer.Option("--full-plain", help="Run all of the plain loop, not a part of it.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    models: Annotated[
        bool, typer.Option("--models", help="Layer shapes of four large models beside Algorithm 2, for a GPU.")
    ] = False,
    budget: Annotated[float, typer.Option(help="With --models: seconds after which no shape is begun.")] = 120.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Seconds of the solvers on one layer, beside the plain column-by-column loop."""
    from finescale.bench.solver import bench_solver
    from finescale.errors import InputError

    try:
        shapes = [(int(rows), int(columns)) for rows, _, columns in (s.partition("x") for s in shape or ["2048x2048"])]
    except ValueError as error:
        raise InputError("write --shape as OUTPUTSxINPUTS, for instance 2048x2048.") from error
    if models:
        write_json_file(json_, _large_models(device, sweeps, budget, shapes if shape else None))
        return
    result = bench_solver(shapes, sweeps, bits, repeats, None if full_plain else 64, device)
    table = Table(
        "shape", "rtn s", "gptq s", "quantease s", "plain loop s", "quantease / plain", "error gptq", "error quantease"
    )
    for row in result["rows"]:
        table.add_row(
            "x".join(map(str, row["shape"])),
            *(f"{row[key]:.3g}" for key in ("rtn_seconds", "gptq_seconds", "quantease_seconds", "plain_seconds")),
            f"{row['speedup_over_plain']:.1f}x faster",
            f"{row['gptq_error']:.4f}",
            f"{row['quantease_error']:.4f}",
        )
    console.print(table)
    write_json_file(json_, result)


@app.command()
def gemm(
    shape: Annotated[list[str] | None, typer.Option(help="INPUTSxOUTPUTS, may be repeated.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, with commas.")] = None,
    peers: Annotated[bool, typer.Option(help="On a GPU: also time int8, fp8 and 4-bit products of torch.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say which kernel runs which layer here, and why.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speed-ups into this SVG file.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Microseconds of the W4A8 product beside bfloat16 or float32 and others, every result checked."""
    import torch

    from finescale.bench import gemm as gpu
    from finescale.bench import gemm_cpu as cpu
    from finescale.bench.gemm_products import OURS, PEERS
    from finescale.bench.plot import speedup_figure
    from finescale.errors import InputError
    from finescale.runtime.load import usable_device

    target = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if explain:
        return _explain(target, json_)
    try:
        shapes = tuple((int(a), int(b)) for a, _, b in (s.partition("x") for s in shape or ()))
        counts = tuple(int(count) for count in tokens.split(",")) if tokens else ()
    except ValueError as error:
        raise InputError("write --shape as INPUTSxOUTPUTS and --tokens as numbers with commas.") from error
    names: tuple[str, ...]
    if target.type == "cpu":
        base, names = "float32", cpu.NAMES[1:]
        result = cpu.bench_gemm_cpu(shapes or cpu.SHAPES, counts or cpu.TOKENS)
    else:
        base, names = "bf16", (*OURS, *(PEERS if peers else ()))
        result = gpu.bench_gemm(shapes or gpu.SHAPES, counts or (1, 16, 64, 128, 256, 1024, 4096), names)
    table = Table("inputs x outputs", "tokens", f"{base} us", *(f"{name} us (x {base})" for name in names))
    for row in result["rows"]:
        times = [f"{row[name]:.1f} ({row[base] / row[name]:.2f})" if row.get(name) else "-" for name in names]
        table.add_row(f"{row['inputs']} x {row['outputs']}", str(row["tokens"]), f"{row[base]:.1f}", *times)
    console.print(table)
    write_json_file(json_, result)
    if plot is not None:
        plot.write_text(speedup_figure(result["rows"], base, names), encoding="utf-8")


@app.command()
def moe(
    model: Annotated[list[str] | None, typer.Option(help="Sizes of a model's experts, may be repeated.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, with commas.")] = "1,16,64,256,1024",
    variants: Annotated[int, typer.Option(help="Variants of the kernel to time, best guesses first.")] = 1,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Microseconds of mixtures of experts in W4A8 on this GPU, beside bfloat16 grouped products, results checked."""
    from finescale.bench.moe import MODELS, bench_moe
    from finescale.errors import InputError

    try:
        counts = tuple(int(count) for count in tokens.split(","))
    except ValueError as error:
        raise InputError("write --tokens as numbers with commas.") from error
    result = bench_moe(model or tuple(MODELS), counts, variants)
    table = Table("model", "part", "tokens", "bf16 us", "integer us (x bf16)", "folded us (x bf16)", "exact")
    for row in result["rows"]:
        times = [f"{row[name]:.1f} ({row['bf16'] / row[name]:.2f})" for name in ("integer", "folded")]
        exact = "" if row["part"] == "experts" else str(row["integer_equal"] and row["folded_equal"])
        table.add_row(row["model"], row["part"], str(row["tokens"]), f"{row['bf16']:.1f}", *times, exact)
    console.print(table)
    write_json_file(json_, result)


@app.command()
def decode(
    model: Annotated[list[str] | None, typer.Option(help="A model's shape, may be repeated.")] = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded at once, numbers with commas.")] = "1,4,16,64,128",
    arms: Annotated[str, typer.Option(help="How layers multiply, with commas.")] = "bf16,w4a8,w4a8-folded,w4a8-float",
    profiled: Annotated[str, typer.Option(help="Batches whose kernels are timed; 0 is the prefill.")] = "1,64",
    layers: Annotated[int | None, typer.Option(help="Blocks, where a whole model does not fit in bfloat16.")] = None,
    device: Annotated[str, typer.Option(help="cuda; cpu only tries it out.")] = "cuda",
    plot: Annotated[Path | None, typer.Option(help="Also draw the speed-ups into this SVG file.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Prefill and decoding speed of whole models with random weights, W4A8 beside bfloat16, with CUDA graphs."""
    from finescale.bench.decode import bench_decode, speedups, speedups_by_model, text_row
    from finescale.errors import InputError

    try:
        counts, kernels = ([int(n) for n in text.split(",") if n] for text in (batches, profiled))
    except ValueError as error:
        raise InputError("write --batches and --profiled as numbers with commas.") from error
    quiet_libraries()
    names = model or ["llama-2-7b"]
    result = bench_decode(
        names, counts, arms.split(","), device, profiled=kernels, layers=layers,
        on_row=lambda result: console.print(text_row(result["rows"][-1]), soft_wrap=True),
    )  # fmt: skip
    table = Table("model", "layers", "weights GB", "prefill tok/s (x bf16)", *(f"batch {n} (x bf16)" for n in counts))
    for row in result["rows"]:
        found = speedups(result["rows"], row["model"], row["arm"])
        cells = {"prefill": row.get("prefill"), **{str(n): row["decode"].get(str(n)) for n in counts}}
        table.add_row(
            row["model"],
            row["arm"],
            f"{row['weights_gb']:.2f}" if "weights_gb" in row else "-",
            *(
                "-"
                if cell is None
                else f"{cell['tokens_per_second']:.0f}" + (f" ({found[key]:.2f})" if key in found else "")
                for key, cell in cells.items()
            ),
        )
    console.print(table)
    write_json_file(json_, result)
    if plot is not None:
        from finescale.report.speed import speed_figure

        plot.write_text(speed_figure(speedups_by_model(result)), encoding="utf-8")


@app.command()
def quantize(json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None) -> None:
    """Microseconds of the kernels that round activations on this GPU, beside a copy of as many bytes."""
    from finescale.bench.quantize import bench_quantizers

    result = bench_quantizers()
    table = Table("before the rounding", "tokens x inputs", "us", "TB/s", "of a copy")
    for row in result["rows"]:
        speed = f"{row['terabytes_per_second']:.2f}"
        size = f"{row['tokens']} x {row['inputs']}"
        table.add_row(row["kind"], size, f"{row['microseconds']:.1f}", speed, f"{row['share_of_copy']:.0%}")
    console.print(table)
    write_json_file(json_, result)


def _explain(device: Any, json_: Path | None) -> None:
    from finescale.kernels.dispatch import LayerFacts, choose_kernel

    layers = {
        "W4A8, groups of 128, integer scales": LayerFacts(4, 128, True, True, 1000, 8, True, False),
        "W4A8, groups of 128, integer scales up to 15": LayerFacts(4, 128, True, True, 15, 8, True, False),
        "W4A8, groups of 96, integer scales": LayerFacts(4, 96, True, True, 1000, 8, True, False),
        "W4A8, groups of 128, float scales": LayerFacts(4, 128, True, False, 0, 8, True, False),
        "W8A8, integer scales": LayerFacts(8, -1, True, True, 1000, 8, True, False),
        "W4A16": LayerFacts(4, 128, True, False, 0, None, False, False),
    }
    table = Table("layer", "kernel here", "why")
    choices = {name: choose_kernel(layer, device) for name, layer in layers.items()}
    for name, choice in choices.items():
        table.add_row(name, choice.kernel, choice.why)
    console.print(table)
    write_json_file(json_, {name: {"kernel": c.kernel, "why": c.why} for name, c in choices.items()})


def _large_models(device: str, sweeps: int, budget: float, shapes: list[tuple[int, int]] | None) -> dict[str, Any]:
    from finescale.bench.gpu_solver import WEIGHT, bench_gpu_solver

    result = bench_gpu_solver(device, sweeps, budget, shapes)
    keys = ("algorithm_2", "gptq", "quantease", "quantease_2xfp16", "quantease_gptq10_2xfp16", WEIGHT)
    ratio_keys = ("speedup_over_algorithm_2_2xfp16", "quantease_2xfp16_over_gptq", f"{WEIGHT}_over_gptq")
    ratio_names = ("over algorithm 2", "over gptq", "from the weight over gptq")
    table = Table("shape", "rows timed", *(f"{key.replace('_', ' ')} s" for key in keys), *ratio_names)
    for row in result["rows"]:
        seconds = (f"{row[f'{key}_seconds']:.3g}" if f"{key}_seconds" in row else "" for key in keys)
        ratios = (f"{row[key]:.1f}" if key in row else "" for key in ratio_keys)
        table.add_row("x".join(map(str, row["shape"])), str(row["rows_timed"]), *seconds, *ratios)
    console.print(table)
    different = sum(check["different"] for check in result["checks"])
    console.print(f"{different} codes differ from the float64 solver's, in {len(result['checks'])} checks.")
    for model, found in result["models"].items():
        console.print(f"{model}:")
        for key, sum_ in found["arithmetic"].items():
            console.print(f"  {key.replace('_', ' ')}: {sum_}")
    return result
