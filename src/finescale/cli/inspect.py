"""``finescale inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finescale.cli.common import console, quiet_libraries, write_json_file


def inspect(
    folder: Annotated[Path, typer.Argument(help="A quantized checkpoint.")],
    device: Annotated[
        str | None,
        typer.Option(
            help="Whose kernels are meant: cpu, cuda, or a compute capability such as 8.0; else this machine's."
        ),
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the list of layers here.")] = None,
) -> None:
    """Per layer: scheme, amplifier, use of int32 by the proved bound, error, and the kernel that runs."""
    quiet_libraries()
    from finescale.pipeline.inspect import inspect_layers
    from finescale.report import inspect_table

    layers: list[dict[str, Any]] = inspect_layers(folder, device)
    console.print(inspect_table(layers))
    for kernel, why in dict.fromkeys((layer["kernel"], layer["kernel_why"]) for layer in layers):
        console.print(f"{kernel}: {why}.", highlight=False)
    used = [layer["overflow_use"] for layer in layers if layer["overflow_use"] is not None]
    if used:
        console.print(
            f"int32 proof: the largest possible accumulator of any layer is {max(used):.1%} of 2^31, "
            "for every input and every order of summation."
        )
    write_json_file(json_, layers)
