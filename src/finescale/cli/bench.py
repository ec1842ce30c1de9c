"""``finescale bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from finescale.cli.common import console, write_json_file

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
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Seconds of the solvers on one layer, beside the plain column-by-column loop."""
    from finescale.bench.solver import bench_solver
    from finescale.errors import InputError

    try:
        shapes = [(int(rows), int(columns)) for rows, _, columns in (s.partition("x") for s in shape or ["2048x2048"])]
    except ValueError as error:
        raise InputError("write --shape as OUTPUTSxINPUTS, for instance 2048x2048.") from error
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
