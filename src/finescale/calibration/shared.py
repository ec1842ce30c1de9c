"""Statistics of the original's activations on disk, once for many runs over one model.

A run whose recipe says ``calibration.sequential: false`` solves every block on the second moments of what the original
model puts into it, and these do not depend on the recipe.

Shape legend: I inputs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finescale.calibration.statistics import Moments
from finescale.errors import CheckpointError
from finescale.models import Step

DONE = "statistics.json"


@dataclass(frozen=True)
class SharedStatistics:
    """A folder with the statistics of every block, complete."""

    folder: Path

    def file(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"block-{block:05d}.safetensors"

    def steps(self, block: int) -> tuple[Step, ...]:
        """A block's linears by shared input. Raises CheckpointError when the file is damaged."""
        facts, _ = self._read(block, "cpu", tensors=False)
        return tuple(Step(tuple(linears), norm) for linears, norm in facts["steps"])

    def moments(self, block: int, device: torch.device) -> dict[str, Moments]:
        """The moments of each linear's input by its path. Raises CheckpointError when the file is damaged."""
        facts, sums = self._read(block, str(device), tensors=True)
        found = {name: Moments(sum_II, facts["tokens"][name]) for name, sum_II in sums.items()}
        return {path: found[linears[0]] for linears, _ in facts["steps"] for path in linears}

    def _read(self, block: int, device: str, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        path = self.file(block)
        try:
            with safe_open(path, framework="pt", device=device) as handle:
                facts: dict[str, Any] = json.loads(handle.metadata()["facts"])
                return facts, {name: handle.get_tensor(name) for name in facts["tokens"]} if tensors else {}
        except Exception as error:  # safetensors raises a type of its own for each kind of damage
            raise CheckpointError(f"{path} is damaged ({error}); remove its folder and start again.") from error


def collected(folder: Path, signature: str) -> SharedStatistics | None:
    """The statistics of a folder if they are complete and of this signature."""
    done = folder / DONE
    if not done.is_file() or json.loads(done.read_text(encoding="utf-8")) != signature:
        return None
    return SharedStatistics(folder)
