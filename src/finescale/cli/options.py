"""Options that several commands have, each with its one description."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model folder, a hub name or a .gguf file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe, as weights.bits=3.")]
Calibration = Annotated[
    str | None, typer.Option(help="Plain text or jsonl file, or hub data set (default: Python's language reference).")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows (default: the recipe's, 128).")]
Length = Annotated[int | None, typer.Option(help="Tokens of a window (default: the recipe's, 2048).")]
Seed = Annotated[int, typer.Option(help="Of the choice of calibration windows.")]
TargetBits = Annotated[
    float | None, typer.Option(help="Choose bits layer by layer: most stored bits per weight on average, as 3.5.")
]
MaxKl = Annotated[
    float | None, typer.Option(help="The same for a loss: most KL divergence, summed over layers quantized alone.")
]
Choices = Annotated[
    str | None, typer.Option(help="Bits to choose from, as 2,3,4 or with groups 3,4:32,4 (default: around the target).")
]
Sensitivity = Annotated[
    Path | None, typer.Option(help="Where measurements of layers are kept and found (default: beside OUT).")
]
EvaluationWindows = Annotated[int | None, typer.Option(help="How many windows (default: the whole text).")]
EvaluationLength = Annotated[int | None, typer.Option(help="Tokens of a window (default: 2048 or the model's limit).")]
Bos = Annotated[bool, typer.Option("--bos", help="Put the beginning-of-sequence token before each window.")]


def settings_of(
    settings: Sequence[str] | None, samples: int | None = None, length: int | None = None, format_: str | None = None
) -> tuple[str, ...]:
    """``--set`` and the options that are short for a setting, which come after it and so win."""
    short = {"calibration.samples": samples, "calibration.length": length, "format": format_}
    return (*(settings or ()), *(f"{key}={value}" for key, value in short.items() if value is not None))


def sensitivity_file(sensitivity: Path | None, out: Path) -> Path:
    """Where measurements are kept."""
    return sensitivity or out.with_name(f"{out.name}.sensitivity.json")
