"""What a run is, settled and checked before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from finescale.calibration.data import CalibrationData
from finescale.calibration.shared import SharedStatistics
from finescale.formats.registry import Format
from finescale.models import Skeleton
from finescale.pipeline.plan import Plan
from finescale.pipeline.transform import Turned
from finescale.ranks import ALONE, Ranks
from finescale.recipe import Recipe

Progress = Callable[[str, int, int], None]
"""``(what is being done, blocks done, blocks in all)``."""


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing has been computed or written yet."""

    skeleton: Skeleton
    recipe: Recipe
    fmt: Format
    plan: Plan
    calibration: CalibrationData
    out: Path
    device: torch.device
    compute_dtype: torch.dtype
    scale_dtype: torch.dtype
    signature: str
    memory_bytes: int
    output_bytes: int
    notes: tuple[str, ...]
    turned: Turned | None = None
    ranks: Ranks = ALONE
    spill: bool = False
    statistics: SharedStatistics | None = None
