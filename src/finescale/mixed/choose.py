"""From measured sensitivities to a recipe: bits for each unit, within a size or within a loss."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finescale.errors import InputError
from finescale.mixed.budget import Choice, least_cost, least_loss
from finescale.mixed.sensitivity import (
    WINDOWS,
    Progress,
    Scheme,
    Sensitivities,
    Unit,
    measure,
    prepare_measurement,
)
from finescale.pipeline.journal import write_json
from finescale.recipe import Recipe

BITS = (2, 3, 4, 6, 8)


def choices_around(target: float | None) -> tuple[Scheme, ...]:
    """Choices that a target of average bits calls for, from one below it to two above; all of them without a target,
    and for one that none is near to, which is then refused with their whole range (`check_target`)."""
    if target is None or not BITS[0] <= target < BITS[-1] + 1:
        return tuple((bits, None) for bits in BITS)
    low = min(math.floor(target) - 1, BITS[-2])
    return tuple((bits, None) for bits in BITS if low <= bits <= math.ceil(target) + 2)


def check_target(target_bits: float, least: float, most: float) -> None:
    """Raises InputError for a size that no choice of bits has."""
    least, most = math.ceil(least * 1000) / 1000, math.floor(most * 1000) / 1000  # so that what is shown is accepted
    if not least <= target_bits <= most:
        raise InputError(
            f"--target-bits {target_bits:g} is out of reach: with these choices and groups a weight takes {least:.3f} "
            f"to {most:.3f} stored bits, scales included; name a target in between, or other --choices or groups."
        )


def read_choices(text: str) -> tuple[Scheme, ...]:
    """``2,3,4:32``: bits, with a colon and a group size where that is not the recipe's. Raises InputError."""
    try:
        parts = [word.strip().split(":") for word in text.split(",")]
        return tuple((int(part[0]), int(part[1]) if len(part) > 1 else None) for part in parts)
    except ValueError as error:
        raise InputError(f"--choices {text}: write bits with commas between, as 2,3,4 or 3,4:32,4.") from error


def scheme_words(scheme: Scheme) -> str:
    """``4``, or with a group size of its own ``4:32``."""
    return str(scheme[0]) if scheme[1] is None else f"{scheme[0]}:{scheme[1]}"


def _weights(scheme: Scheme) -> dict[str, int]:
    """A choice as the weights part of a recipe or override."""
    return {"bits": scheme[0]} | ({} if scheme[1] is None else {"group_size": scheme[1]})


def choose_bits(
    recipe: Recipe, found: Sensitivities, target_bits: float | None = None, max_kl: float | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with bits for each layer, and what was chosen.

    Args:
        recipe: everything but the bits.
        found: measured for this recipe.
        target_bits: most stored bits per quantized weight, scales and zero points included; the least sum of
            divergences is sought.
        max_kl: largest sum of divergences, nats per token; the least size is sought.

    Returns:
        The recipe, whose ``overrides`` name the layers that differ from its own bits; and facts: ``bits_per_weight``,
        ``predicted_kl`` (the sum: layers together lose more), ``gap``, ``by_bits`` (share of weights at each choice).

    Raises:
        InputError: not exactly one goal, or one that no choice of bits reaches.
    """
    if (target_bits is None) == (max_kl is None):
        raise InputError("give either --target-bits or --max-kl.")
    choices = [[Choice(option.stored_bits, option.kl) for option in unit.options] for unit in found.units]
    weights = sum(unit.parameters for unit in found.units)
    if target_bits is not None:
        least, most = (sum(pick(choice.cost for choice in unit) for unit in choices) / weights for pick in (min, max))
        check_target(target_bits, least, most)
        selection = least_loss(choices, math.floor(target_bits * weights))
    else:
        selection = least_cost(choices, float(max_kl or 0.0))
    options = [unit.options[number] for unit, number in zip(found.units, selection.chosen, strict=True)]
    schemes = [(option.bits, option.group_size) for option in options]
    by_scheme: Counter[Scheme] = Counter()
    for unit, own in zip(found.units, schemes, strict=True):
        by_scheme[own] += unit.parameters
    usual = by_scheme.most_common(1)[0][0]
    overrides = [
        {"pattern": layer, "weights": _weights(own)}
        for unit, own in zip(found.units, schemes, strict=True)
        if own != usual
        for layer in unit.layers
    ]
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["overrides"] = [*values.get("overrides", ()), *overrides]
    values["weights"] = values.get("weights", {}) | _weights(usual)
    goal = f"{target_bits:g}b" if target_bits is not None else f"kl{max_kl:g}"
    values["name"] = f"{recipe.name}-{goal}"
    values["description"] = f"{recipe.name} with bits chosen layer by layer."
    facts = {
        "target_bits": target_bits,
        "max_kl": max_kl,
        "bits_per_weight": selection.cost / weights,
        "predicted_kl": selection.loss,
        "gap": selection.gap,
        "by_bits": {scheme_words(key): by_scheme[key] / weights for key in sorted(by_scheme, key=str)},
    }
    return Recipe.from_dict(values), facts


def sensitivities(
    model: str | Path,
    recipe: Recipe,
    file: Path,
    choices: Sequence[Scheme],
    calibration: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    windows: int = WINDOWS,
    on_progress: Progress | None = None,
    target_bits: float | None = None,
) -> Sensitivities:
    """What ``file`` holds if it was measured in the same setting, else measured now and kept there.

    A measurement that is interrupted goes on after its last block; ``FILE.partial.json`` has what it did. A
    ``target_bits`` that the choices cannot reach is refused before anything is measured.

    Raises:
        InputError: what cannot work; or ``file`` is something else.
    """
    job = prepare_measurement(model, recipe, choices, calibration, seed, device, windows)
    if target_bits is not None and job.size_range is not None:
        check_target(target_bits, *job.size_range)
    if file.is_file():
        try:
            kept = Sensitivities.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{file} holds no sensitivities; remove it or name another --sensitivity.") from error
        if kept.signature == job.signature:
            return kept
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial.json")

    def keep(blocks: list[list[Unit]]) -> None:
        write_json(partial, {"signature": job.signature, "blocks": [[asdict(unit) for unit in b] for b in blocks]})

    found = measure(job, on_progress, _interrupted(partial, job.signature), keep)
    write_json(file, found.to_dict())
    partial.unlink(missing_ok=True)
    return found


def _interrupted(partial: Path, signature: str) -> list[list[Unit]]:
    """Units of the blocks that an interrupted measurement has done."""
    if not partial.is_file():
        return []
    kept = json.loads(partial.read_text(encoding="utf-8"))
    same = kept["signature"] == signature
    return [[Unit.from_dict(unit) for unit in block] for block in kept["blocks"]] if same else []
