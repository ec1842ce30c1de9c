"""``finescale mix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finescale.cli import options
from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def mix(
    model: options.Model,
    recipe: Annotated[str, typer.Option(help="A recipe's name or a YAML file; its bits are chosen anew.")],
    out: Annotated[Path, typer.Option(help="The recipe that is written, a YAML file.")],
    target_bits: options.TargetBits = None,
    max_kl: options.MaxKl = None,
    choices: options.Choices = None,
    sensitivity: options.Sensitivity = None,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    length: options.Length = None,
    windows: Annotated[int, typer.Option(help="Windows on which the divergence is taken.")] = 8,
    set_: options.Settings = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; holds the whole original in float32.")] = "cpu",
    seed: options.Seed = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write what was chosen here.")] = None,
) -> None:
    """Choose bits layer by layer for a size or a loss, and write the recipe."""
    quiet_libraries()
    import yaml

    from finescale.recipe import Recipe
    from finescale.report.html import write_whole

    chosen, facts = mixed_recipe(
        model,
        Recipe.load(recipe, options.settings_of(set_, samples, length)),
        options.sensitivity_file(sensitivity, out),
        target_bits,
        max_kl,
        choices,
        calibration,
        seed,
        device,
        windows,
    )
    values = chosen.model_dump(mode="json", exclude_unset=True)
    write_whole(out, yaml.safe_dump(values, sort_keys=False))
    console.print(f"recipe: {out}")
    write_json_file(json_, facts)


def mixed_recipe(
    model: str,
    recipe: Any,
    file: Path,
    target_bits: float | None,
    max_kl: float | None,
    choices: str | None,
    calibration: str | None,
    seed: int,
    device: str,
    windows: int = 8,
) -> tuple[Any, dict[str, Any]]:
    """Measure or look up, choose, and say what was chosen."""
    from finescale.errors import InputError
    from finescale.mixed.choose import choices_around, choose_bits, read_choices, sensitivities
    from finescale.report import units

    if (target_bits is None) == (max_kl is None):
        raise InputError("give either --target-bits or --max-kl.")
    schemes = read_choices(choices) if choices else choices_around(target_bits)
    with progress_bar("blocks") as update:
        found = sensitivities(model, recipe, file, schemes, calibration, seed, device, windows, update, target_bits)
    chosen, facts = choose_bits(recipe, found, target_bits, max_kl)
    shares = ", ".join(f"{units.percent(share)} at {key}" for key, share in facts["by_bits"].items())
    console.print(
        f"{facts['bits_per_weight']:.3f} stored bits per weight ({shares} bits); "
        f"predicted KL {facts['predicted_kl']:.4g}, sum over layers quantized alone"
        + (f"; at most {facts['gap']:.2g} above the best" if facts["gap"] else "")
        + f".\nmeasurements: {file}"
    )
    return chosen, facts
