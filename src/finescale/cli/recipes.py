"""``finescale recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from finescale.cli.common import console, write_json_file


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe with all its keys.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write them here.")] = None,
) -> None:
    """The named recipes and what each is for."""
    from finescale.recipe import Recipe, recipe_names

    if name is not None:
        import yaml

        values = Recipe.named(name).to_dict()
        console.print(yaml.safe_dump(values, sort_keys=False), end="", markup=False)
        write_json_file(json_, values)
        return
    table = Table(title="Recipes")
    table.add_column("recipe", no_wrap=True)  # a name cut short could be another's
    for column in ("weights", "activations", "what it is for"):
        table.add_column(column)
    everything = {}
    for recipe_name in recipe_names():
        recipe = Recipe.named(recipe_name)
        weights = recipe.weights
        group = "per channel" if weights.group_size == -1 else f"group {weights.group_size}"
        kind = "symmetric" if weights.symmetric else "asymmetric"
        inputs = f"{recipe.activations.bits} bits per token" if recipe.activations else "16 bits"
        table.add_row(recipe_name, f"{weights.bits} bits, {group}, {kind}", inputs, recipe.description)
        everything[recipe_name] = recipe.to_dict()
    console.print(table)
    write_json_file(json_, everything)
