"""``finescale verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli.common import console, quiet_libraries, write_json_file


def verify(
    folder: Annotated[Path, typer.Argument(help="A quantized checkpoint.")],
    against: Annotated[str | None, typer.Option(help="The original model.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Reload what was saved and prove that it equals what was computed."""
    quiet_libraries()
    from finescale.pipeline.verify import verify as run_verification

    result = run_verification(folder, against)
    if result.packed_again:
        proof = "read back, all codes and scales as computed, same bytes when packed again"
    else:
        proof = "lie on grids of their bits (dense weights hold no codes and scales to read back)"
    console.print(f"[green]ok[/] {result.layers} layers {proof}")
    if result.shards:
        console.print(f"[green]ok[/] {result.shards} files are, byte for byte, those that were written")
    if result.integer_layers:
        console.print(
            f"[green]ok[/] {result.integer_layers} layers: int32 cannot overflow; equal to int64 up to the bound itself"
        )
    if result.folded_layers:
        console.print(
            f"[green]ok[/] {result.folded_layers} layers: scales are 1 to 15 times one factor per output; codes times "
            "these fit int8"
        )
    if result.copied is not None:
        console.print(f"[green]ok[/] {result.copied} other tensors equal the original byte for byte")
    if result.worst_relative is not None:
        console.print(f"[green]ok[/] quantized weights within {result.worst_relative:.1%} of the original's norm")
    write_json_file(json_, {"folder": str(folder), "ok": True, **result.to_dict()})
