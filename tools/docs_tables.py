"""Writes the parts of the documentation that follow from the code: options, recipes, engines, commands, errors.

    python -m tools.docs_tables [OUT]

writes one Markdown file a table into OUT (docs/generated), which the pages of docs/ include. `make docs` runs it first,
so that no table can be older than the code. The tables of benchmarks/results are those of tools/docs_benchmarks.py.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from finescale import recipe as recipes
from finescale.cli.main import app
from finescale.formats import FORMATS
from finescale.formats.engines import engine_table
from finescale.grid import ActivationScheme, WeightScheme
from finescale.recipe import Recipe
from finescale.recipes import recipe_names
from finescale.solvers import SOLVERS
from finescale.transforms import TRANSFORMS
from finescale.tuning import TUNERS
from tools.docs_benchmarks import KINDS, benchmark_tables
from tools.docs_claims import CLAIMS, claims_table, load_results
from tools.docs_comparisons import changes, compared, merged_channels, mixed_tables, rounded_scales, scales
from tools.docs_errors import error_tables
from tools.docs_headlines import accuracy_headline, speed_headline
from tools.docs_peers import peers_tables
from tools.docs_speed import decode_table, product_table, serving_table
from tools.docs_text import table

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "weights": recipes.WeightsPart,
    "activations": recipes.ActivationsPart,
    "kv_cache": recipes.KvCachePart,
    "integer_scale": recipes.IntegerScalePart,
    "calibration": recipes.CalibrationPart,
    "overrides (a list)": recipes.Override,
}
ENGINE_CASES: dict[str, tuple[str, WeightScheme, ActivationScheme | None]] = {
    "W4A16, symmetric groups of 128": ("compressed-tensors", WeightScheme(4, 128, True), None),
    "W4A16, asymmetric, per channel": ("compressed-tensors", WeightScheme(4, -1, False), None),
    "W3A16, symmetric groups of 128": ("compressed-tensors", WeightScheme(3, 128, True), None),
    "W4A8, symmetric groups of 128": ("compressed-tensors", WeightScheme(4, 128, True), ActivationScheme(8)),
    "W4A8, symmetric groups of 128, integer scales": (
        "compressed-tensors",
        WeightScheme(4, 128, True),
        ActivationScheme(8),
    ),
    "W8A8, per channel": ("int-quantized", WeightScheme(8, -1, True), ActivationScheme(8)),
    "W4A16, symmetric groups of 128, gptq": ("gptq", WeightScheme(4, 128, True), None),
    "W4A16, asymmetric groups of 128, awq": ("awq", WeightScheme(4, 128, False), None),
    "dense": ("dense", WeightScheme(4, 128, True), None),
}


def prose(text: str) -> str:
    """A docstring's text for Markdown: double backticks as single ones, one line per paragraph."""
    return re.sub(r"``(.+?)``", r"`\1`", inspect.cleandoc(text)).strip()


def described(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What a model's docstring says before its list of attributes, and of each attribute; inherited ones included."""
    found: dict[str, str] = {}
    head = ""
    for owner in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        head, _, attributes = prose(owner.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in attributes.splitlines():
            start = re.match(r" {4}(\w+): (.*)", line)
            if start:
                name = start[1]
                found[name] = start[2]
            elif name and line.strip():
                found[name] += " " + line.strip()
    return head.strip(), found


def values_of(annotation: Any) -> str:
    """What an option may be, in words: `a` or `b` for literals, names of types otherwise."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    inner = typing.get_args(annotation)
    if inner and typing.get_origin(annotation) not in (dict, tuple, list):
        return ", ".join(values_of(each) for each in inner if each is not type(None))
    names = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", dict: "keys and values"}
    return names.get(typing.get_origin(annotation) or annotation, getattr(annotation, "__name__", str(annotation)))


def limits_of(metadata: list[Any]) -> str:
    """`>= 1` and the like, from a field's constraints."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(f"{sign} {getattr(c, key)}" for c in metadata for key, sign in signs.items() if hasattr(c, key))


def options_table(model: type[BaseModel]) -> str:
    """Options of a model: name, default, values, meaning. The docstring comes before the table."""
    head, meanings = described(model)
    if not model.model_fields:
        return head + "\n"
    rows = []
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        limits = limits_of(field.metadata)
        values = values_of(field.annotation) + (f" {limits}" if limits else "")
        rows.append((f"`{name}`", default, values, *([meanings.get(name, "")] if meanings else [])))
    header = ("option", "default", "values", *(["meaning"] if meanings else []))
    return (head + "\n\n" if head else "") + table(header, rows)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def recipe_table() -> str:
    """Every recipe that comes with finescale."""
    rows = []
    for name in recipe_names():
        recipe = Recipe.named(name)
        weights, inputs = recipe.weights, recipe.activations
        group = {-1: "per channel", "auto": "groups"}.get(weights.group_size, f"groups of {weights.group_size}")
        kind = "symmetric" if weights.symmetric else "asymmetric"
        before = [part.name for part in recipe.tuning if not part.entry().after_solver]
        after = [part.name for part in recipe.tuning if part.entry().after_solver]
        steps = [*(part.name for part in recipe.transforms), *before, recipe.solver.name, *after]
        scales = {"off": "", "before": ", integer scales", "after": ", integer scales afterwards"}
        rows.append(
            (
                f"`{name}`",
                f"{weights.bits} bits, {kind}, {group}{scales.get(recipe.integer_scale.mode, '')}",
                "16 bits" if inputs is None else f"{inputs.bits} bits per {inputs.granularity}",
                " → ".join(steps),
                recipe.description,
            )
        )
    return table(("recipe", "weights", "activations", "steps", "what it is for"), rows)


def methods_table() -> str:
    """Every solver, transform and tuner."""
    rows = [("solver", f"`{name}`", entry.summary) for name, entry in SOLVERS.items()]
    rows += [("transform", f"`{name}`", entry.summary) for name, entry in TRANSFORMS.items()]
    rows += [("tuner", f"`{name}`", entry.summary) for name, entry in TUNERS.items()]
    return table(("part", "name", "what it does"), rows)


def engines_tables() -> str:
    """Which engine loads which kind of checkpoint of a Llama, and what runs there."""
    parts = []
    for title, (format_name, scheme, activations) in ENGINE_CASES.items():
        rows = engine_table(format_name, [scheme], activations, "llama", integer="integer scales" in title)
        cells = [(r["engine"], "yes" if r["loads"] else "no", r["runs_as"], r["remark"]) for r in rows]
        parts.append(
            f"### {title}\n\nFormat `{format_name}`.\n\n" + table(("engine", "loads", "runs as", "remark"), cells)
        )
    return "\n".join(parts)


def command_tables() -> str:
    """Every command with its arguments and options."""
    return "\n".join(_commands(typer.main.get_command(app), "finescale"))


def _commands(command: Any, name: str) -> list[str]:
    if hasattr(command, "commands"):
        return [part for key, inner in command.commands.items() for part in _commands(inner, f"{name} {key}")]
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        argument = parameter.param_type_name == "argument"
        label = parameter.name.upper() if argument else ", ".join(parameter.opts)
        default = "" if parameter.default in (None, ()) or callable(parameter.default) else str(parameter.default)
        default = "required" if parameter.required else default
        rows.append((f"`{label}`", default if default != "False" else "", parameter.help or ""))
    return [f"## `{name}`\n\n{prose(command.help or '')}\n\n" + table(("option", "default", "meaning"), rows)]


def pages() -> dict[str, str]:
    """All generated files by name."""
    made = {f"options-solver-{name}": options_table(entry.options) for name, entry in SOLVERS.items()}
    made |= {f"options-transform-{name}": options_table(entry.options) for name, entry in TRANSFORMS.items()}
    made |= {f"options-tuner-{name}": options_table(entry.options) for name, entry in TUNERS.items()}
    made["recipe-keys"] = "\n".join(f"### `{key}`\n\n{options_table(part)}" for key, part in PARTS.items())
    made["recipe-keys-integer_scale"] = options_table(PARTS["integer_scale"])
    made["recipes"] = recipe_table()
    made["methods"] = methods_table()
    made["formats"] = table(("format", "what it is"), [(f"`{f.name}`", f.purpose) for f in FORMATS.values()])
    made["engines"] = engines_tables()
    made["commands"] = command_tables()
    made["errors"] = error_tables(ROOT / "src" / "finescale")
    made["benchmarks"] = benchmark_tables(
        ROOT / "benchmarks" / "results",
        KINDS
        | {
            "compare": ("Methods side by side", compared),
            "scale_rounding": ("Scales made integers", rounded_scales),
            "merged_channels": ("Merging channels or dropping them", merged_channels),
        },
    )
    results = load_results(ROOT / "benchmarks" / "results")
    made["peers"] = peers_tables(results)
    made["headline-accuracy"], made["headline-speed"] = accuracy_headline(results), speed_headline(results)
    made["speed-products"], made["speed-serving"] = product_table(results), serving_table(results)
    made["speed-decode"] = decode_table(results)
    made["changes-of-tasks"] = changes(results["tasks-smollm2"])
    made["scales"] = scales(results["compare-smollm2"])
    made["merged-channels"] = merged_channels(results["merged-channels-smollm2"])
    made["scale-rounding"] = rounded_scales(results["scale-rounding-smollm2"])
    made["mixed"] = mixed_tables(results)
    made |= {f"claims-{page}": claims_table(page, results) for page in CLAIMS}
    return made


def main() -> None:
    """Write all files; those of an earlier run that are no longer made are removed."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "generated"
    out.mkdir(parents=True, exist_ok=True)
    made = pages()
    for old in out.glob("*.md"):
        if old.stem not in made:
            old.unlink()
    for name, text in made.items():
        (out / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
