"""What cannot be read from the module graph: how a family's checkpoint names differ from its modules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finescale.errors import InputError


@dataclass(frozen=True)
class ExpertNames:
    """Names of an expert's three projections in the checkpoint (transformers 5 fuses them into 3-D parameters)."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: ``model_type`` of its config.
        experts: names of the experts' projections, when it has experts.
        renames: (part of the module path, part of the checkpoint name) pairs.
    """

    model_type: str
    experts: ExpertNames | None = None
    renames: tuple[tuple[str, str], ...] = ()


_EXPERTS = ExpertNames("gate_proj", "up_proj", "down_proj")
_NUMBERED_EXPERTS = ExpertNames("w1", "w3", "w2")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.\w+$")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("mixtral", _NUMBERED_EXPERTS, ((".mlp.", ".block_sparse_moe."),)),
        Family("opt"),
        Family("bloom"),
        Family("falcon"),
        Family("qwen2"),
        Family("qwen3"),
        Family("qwen2_moe", _EXPERTS),
        Family("qwen3_moe", _EXPERTS),
        Family("gpt2"),
    )
}


def find_family(config: dict[str, Any], allow_unknown: bool = False, keys: Iterable[str] = ()) -> Family:
    """The family of a config. An unknown one raises InputError unless ``allow_unknown``; what its experts are called is
    then read from the names of its tensors."""
    model_type = str(config.get("model_type", ""))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if allow_unknown and model_type:
        leaves = {found[1] for found in map(_ONE_EXPERT.search, keys) if found}
        named = (names for names in (_EXPERTS, _NUMBERED_EXPERTS) if {names.gate, names.up, names.down} <= leaves)
        return Family(model_type, next(named, None))
    raise InputError(
        f"the model family {model_type!r} is not known ({', '.join(FAMILIES)}); "
        "try --allow-unknown-family, which reads the blocks from the module graph."
    )
