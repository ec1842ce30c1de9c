"""TEMPORARY: to be replaced as a whole by the writer of formats/ (keep these two signatures)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finescale.grid import ActivationScheme, WeightScheme


def engine_table(
    format_name: str, schemes: Sequence[WeightScheme], activations: ActivationScheme | None, family: str
) -> list[dict[str, Any]]:
    return []


def check_tensor_parallel(shape_OI: tuple[int, int], group_size: int, ranks: int, split: str, name: str) -> None:
    return None
