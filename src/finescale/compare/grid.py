"""Which recipes are compared: products of recipes, bits and groups, written on the command line or in a YAML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finescale.errors import InputError
from finescale.formats.source import read_utf8
from finescale.recipe import Recipe


@dataclass(frozen=True)
class Cell:
    """One recipe of the comparison.

    Attributes:
        key: its folder's name, unique in the comparison.
        label: for people.
        recipe: what is run.
    """

    key: str
    label: str
    recipe: Recipe


class Grid(BaseModel):
    """One product: every recipe at every number of bits and every group size, with some settings laid over all.

    Attributes:
        recipes: names, or YAML files.
        bits: of the weights; empty leaves each recipe's own.
        groups: group sizes, -1 for one scale per channel; empty leaves each recipe's own.
        set: ``key=value`` over every recipe, as with ``--set``.
        name: stands in the place of a single recipe's name.
        label: stands behind the names, for settings that they do not show.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipes: tuple[str, ...] = Field(min_length=1)
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    set: tuple[str, ...] = ()
    name: str = ""
    label: str = ""

    @model_validator(mode="after")
    def _check(self) -> Grid:
        if self.name and len(self.recipes) > 1:
            raise ValueError("name is for a single recipe; use label")
        return self


def read_grids(path: Path) -> list[Grid]:
    """The grids of a YAML file: a list of them under ``grids``. Raises InputError for anything else in it."""
    if not path.is_file():
        raise InputError(f"the grid file {path} does not exist; check the path.")
    try:
        values = yaml.safe_load(read_utf8(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML ({str(error).splitlines()[0]}).") from error
    entries = values.get("grids") if isinstance(values, dict) and set(values) == {"grids"} else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} must hold a list under the key grids and nothing else.")
    return [make_grid(entry, f"{path}, grid {number}") for number, entry in enumerate(entries, 1)]


def make_grid(values: Any, origin: str) -> Grid:
    """A grid out of plain values. Raises InputError that names what is wrong."""
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        parts = [
            f"{'.'.join(map(str, entry['loc'])) or 'grid'}: {entry['msg'].removeprefix('Value error, ')}"
            for entry in error.errors()
        ]
        raise InputError(f"{origin}: {'; '.join(parts)}.") from error


def cells_of(grids: Sequence[Grid], settings: Sequence[str] = ()) -> list[Cell]:
    """Every cell of some grids, each once; ``settings`` are laid over all of them.

    Raises:
        InputError: a recipe that does not exist, or that cannot have these bits or groups.
    """
    cells: dict[str, Cell] = {}
    seen: set[str] = set()
    for grid in grids:
        for name, bits, group in product(grid.recipes, grid.bits or (None,), grid.groups or (None,)):
            own = [] if bits is None else [f"weights.bits={bits}"]
            own += [] if group is None else [f"weights.group_size={group}"]
            recipe = Recipe.load(name, (*settings, *grid.set, *own))
            facts = str(recipe.to_dict() | {"name": "", "description": ""})
            if facts in seen:  # grids may overlap
                continue
            seen.add(facts)
            title = grid.name or Path(name).stem
            key = _slug(" ".join([title, _scheme(recipe), grid.label]))
            count = sum(other == key or other.startswith(f"{key}~") for other in cells)
            if count:
                key = f"{key}~{count + 1}"
            label = f"{grid.name or recipe.name}{f' {grid.label}' if grid.label else ''}"
            cells[key] = Cell(key, label, recipe)
    return list(cells.values())


def with_shared_statistics(cell: Cell) -> Cell:
    """The cell solved on the original's activations; one with transforms or tuning, which change them, as it is."""
    if cell.recipe.transforms or cell.recipe.tuning or cell.recipe.calibration.true_sequential:
        return cell
    recipe = cell.recipe.with_settings(("calibration.sequential=false",))
    return replace(cell, key=f"{cell.key}-shared", label=f"{cell.label}, shared statistics", recipe=recipe)


def _scheme(recipe: Recipe) -> str:
    weights, inputs = recipe.weights, recipe.activations
    group = {-1: "channel", "auto": "auto"}.get(weights.group_size, f"g{weights.group_size}")
    return f"w{weights.bits}{'' if inputs is None else f'a{inputs.bits}'} {group}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
