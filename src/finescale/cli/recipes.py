"""``finescale recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from finescale.cli.common import console, write_json_file
from finescale.recipes import recipe_names, recipe_text


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe with all its keys.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write them here.")] = None,
) -> None:
    """The named recipes and what each is for."""
    if name is not None:
        from finescale.recipe import Recipe

        values = Recipe.named(name).to_dict()
        console.print(yaml.safe_dump(values, sort_keys=False), end="", markup=False)
        write_json_file(json_, values)
        return
    table = Table(title="Recipes")
    table.add_column("recipe", no_wrap=True)  # a name cut short could be another's
    for column in ("weights", "activations", "what it is for"):
        table.add_column(column)
    for recipe_name in recipe_names():
        table.add_row(recipe_name, *summary(yaml.safe_load(recipe_text(recipe_name))))
    console.print(table)
    if json_ is not None:
        from finescale.recipe import Recipe

        write_json_file(json_, {each: Recipe.named(each).to_dict() for each in recipe_names()})


def summary(values: dict[str, Any]) -> tuple[str, str, str]:
    """Weights, activations and purpose of a recipe as its file says them: the recipe itself would load torch."""
    weights, inputs = values["weights"], values.get("activations")
    size = weights["group_size"]
    group = "per channel" if size == -1 else f"group {size}"
    kind = "symmetric" if weights["symmetric"] else "asymmetric"
    return (
        f"{weights['bits']} bits, {group}, {kind}",
        f"{inputs['bits']} bits per token" if inputs else "16 bits",
        values["description"],
    )
