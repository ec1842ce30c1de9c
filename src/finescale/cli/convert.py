"""``finescale convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def convert(
    folder: Annotated[Path, typer.Argument(help="A symmetric compressed-tensors, GPTQ or AWQ checkpoint of any tool.")],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    amplifier: Annotated[str, typer.Option(help="auto, heuristic, or a power of two (the paper's is 1024).")] = "auto",
    round_again: Annotated[
        bool, typer.Option("--round-again", help="Round weights anew on the integer scales.")
    ] = False,
    folded: Annotated[
        bool, typer.Option("--folded", help="Integers up to 15 and one factor per output, in place of an amplifier.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an earlier result.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
) -> None:
    """Give an existing checkpoint integer scales (W4A8) without calibration."""
    quiet_libraries()
    from finescale.errors import InputError
    from finescale.grid.integer_scale import Amplifier
    from finescale.pipeline.convert import convert as run_conversion

    named: dict[str, Amplifier] = {"auto": "auto", "heuristic": "heuristic"}
    if amplifier not in named and not amplifier.isdecimal():
        raise InputError(f"--amplifier is {amplifier}; use auto, heuristic or a power of two such as 1024.")
    value = named[amplifier] if amplifier in named else int(amplifier)
    with progress_bar("files") as update:
        report = run_conversion(folder, out, value, round_again, fresh, update, folded)
    layers = report["layers"]
    errors = sorted(record["relative_error"] for record in layers)
    uses = [record["overflow_use"] for record in layers]
    amplifiers = sorted({record["amplifier"] for record in layers})
    scales = "folded scales" if folded else f"amplifiers {', '.join(map(str, amplifiers))}"
    console.print(
        f"{len(layers)} layers, {scales}; the conversion changed the weights by "
        f"{errors[len(errors) // 2]:.2e} of their squared norm in the median, {errors[-1]:.2e} at most; "
        f"the int32 bound is used to {max(uses):.1%} at most."
    )
    for record in layers:
        for note in record["notes"]:
            console.print(f"[yellow]note:[/] {record['name']}: {note}")
    console.print(f"checkpoint: {out}")
    write_json_file(json_, report)
