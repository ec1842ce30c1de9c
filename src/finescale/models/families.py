"""What cannot be read from the module graph: how a family's checkpoint names differ from its modules."""

from __future__ import annotations

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


_SWIGLU_EXPERTS = ExpertNames("gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("mixtral", ExpertNames("w1", "w3", "w2"), ((".mlp.", ".block_sparse_moe."),)),
        Family("opt"),
        Family("bloom"),
        Family("falcon"),
        Family("qwen2"),
        Family("qwen3"),
        Family("qwen2_moe", _SWIGLU_EXPERTS),
        Family("qwen3_moe", _SWIGLU_EXPERTS),
        Family("gpt2"),
    )
}


def find_family(config: dict[str, Any], allow_unknown: bool = False) -> Family:
    """The family of a config. Raises InputError for an unknown one unless ``allow_unknown``."""
    model_type = str(config.get("model_type", ""))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if allow_unknown and model_type:
        return Family(model_type)
    raise InputError(
        f"the model family {model_type!r} is not known ({', '.join(FAMILIES)}); "
        "try --allow-unknown-family, which reads the blocks from the module graph."
    )
