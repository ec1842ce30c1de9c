"""``finescale mix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def mix(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or a .gguf file.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name or a YAML file; its bits are chosen anew.")],
    out: Annotated[Path, typer.Option(help="The recipe that is written, a YAML file.")],
    target_bits: Annotated[
        float | None, typer.Option(help="Most stored bits per weight on average, scales included, as 3.5.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead: most KL divergence, the sum over layers quantized alone.")
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(help="Bits to choose from, as 2,3,4 or with groups 3,4:32,4 (default: around the target)."),
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Where measurements are kept and found (default: beside OUT).")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Plain text or jsonl file, or hub data set.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows for the solver.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    windows: Annotated[int, typer.Option(help="Windows on which the divergence is taken.")] = 8,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the recipe.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; holds the whole original in float32.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write what was chosen here.")] = None,
) -> None:
    """Choose bits layer by layer for a size or a loss, and write the recipe."""
    quiet_libraries()
    import yaml

    from finescale.recipe import Recipe
    from finescale.report.html import write_whole

    settings = list(set_ or [])
    settings += [f"calibration.samples={samples}"] if samples is not None else []
    settings += [f"calibration.length={length}"] if length is not None else []
    chosen, facts = mixed_recipe(
        model,
        Recipe.load(recipe, tuple(settings)),
        sensitivity or out.with_name(f"{out.name}.sensitivity.json"),
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
        found = sensitivities(model, recipe, file, schemes, calibration, seed, device, windows, update)
    chosen, facts = choose_bits(recipe, found, target_bits, max_kl)
    shares = ", ".join(f"{units.percent(share)} at {key}" for key, share in facts["by_bits"].items())
    console.print(
        f"{facts['bits_per_weight']:.3f} stored bits per weight ({shares} bits); "
        f"predicted KL {facts['predicted_kl']:.4g}, sum over layers quantized alone"
        + (f"; at most {facts['gap']:.2g} above the best" if facts["gap"] else "")
        + f".\nmeasurements: {file}"
    )
    return chosen, facts
