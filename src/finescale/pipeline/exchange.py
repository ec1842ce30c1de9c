"""Solutions from one process to all others.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finescale.errors import NumericsError
from finescale.grid import Grid, QuantizedWeight, WeightScheme
from finescale.grid.bilevel import Bilevel
from finescale.grid.outliers import Outliers
from finescale.ranks import Ranks
from finescale.solvers import Solution

Found = Solution | NumericsError
"""What came of solving; that nothing did is news for all processes too, or they would wait."""


def from_owners(mine: Found | None, owners: Sequence[int], scheme: WeightScheme, ranks: Ranks) -> list[Solution]:
    """What each owner of rows has found, in all processes.

    Args:
        mine: this process's; None when it owns nothing.
        owners: the processes that found something.
        scheme: of the weights.
        ranks: all processes.

    Raises:
        NumericsError: one of them found no solution.
    """
    if ranks.count == 1:
        if isinstance(mine, NumericsError):
            raise mine
        return [] if mine is None else [mine]
    found = []
    for owner in owners:
        facts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        if ranks.rank == owner:
            assert mine is not None
            facts, tensors = ({"failed": str(mine)}, {}) if isinstance(mine, NumericsError) else packed(mine)
        facts = ranks.tell(facts, owner)
        if "failed" in facts:
            raise NumericsError(facts["failed"])
        found.append(unpacked(facts, ranks.pass_on(tensors, owner), scheme))
    return found


def packed(solution: Solution) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A solution as facts, which JSON holds, and tensors; its scheme apart."""
    weight, grid = solution.weight, solution.weight.grid
    bilevel, outliers = grid.bilevel, weight.outliers
    facts = {
        "damping": solution.damping,
        "notes": list(solution.notes),
        "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        "amplifier": grid.amplifier,
        "folded": grid.folded,
        "bilevel": None if bilevel is None else [bilevel.bits, bilevel.rows],
        "outliers": None if outliers is None else [outliers.columns, outliers.narrow],
    }
    tensors = {
        "codes_OI": weight.codes_OI,
        "scale_OG": grid.scale_OG,
        "zero_OG": grid.zero_OG,
        "group_of_I": grid.group_of_I,
        "code_OG": None if bilevel is None else bilevel.code_OG,
        "step_QG": None if bilevel is None else bilevel.step_QG,
        "base_QG": None if bilevel is None else bilevel.base_QG,
        "value": None if outliers is None else outliers.value,
        "column": None if outliers is None else outliers.column,
        "row_start_R": None if outliers is None else outliers.row_start_R,
    }
    return facts, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def unpacked(facts: dict[str, Any], tensors: dict[str, Tensor], scheme: WeightScheme) -> Solution:
    """What ``packed`` took apart."""
    bilevel = outliers = None
    if facts["bilevel"] is not None:
        bits, rows = facts["bilevel"]
        bilevel = Bilevel(bits, rows, tensors["code_OG"], tensors["step_QG"], tensors["base_QG"])
    if facts["outliers"] is not None:
        columns, narrow = facts["outliers"]
        outliers = Outliers(columns, tensors["value"], tensors["column"], tensors.get("row_start_R"), narrow)
    grid = Grid(
        scheme, tensors["scale_OG"], tensors.get("zero_OG"), tensors["group_of_I"],
        getattr(torch, facts["scale_dtype"]), facts["amplifier"], bilevel, facts["folded"],
    )  # fmt: skip
    return Solution(QuantizedWeight(tensors["codes_OI"], grid, outliers), facts["damping"], tuple(facts["notes"]))


def joined(parts: Sequence[Solution]) -> Solution:
    """Solutions of consecutive rows of one layer as one."""
    if len(parts) == 1:
        return parts[0]
    codes_OI = torch.cat([part.weight.codes_OI for part in parts])
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    grid = stacked([part.weight.grid for part in parts])
    return Solution(QuantizedWeight(codes_OI, grid), max(part.damping for part in parts), notes)


def stacked(grids: Sequence[Grid]) -> Grid:
    """Grids of one scheme one below the other; with an amplifier if they have the same."""
    if len(grids) == 1:
        return grids[0]
    zeros = [grid.zero_OG for grid in grids if grid.zero_OG is not None]
    return replace(
        grids[0],
        scale_OG=torch.cat([grid.scale_OG for grid in grids]),
        zero_OG=torch.cat(zeros) if zeros else None,
        amplifier=grids[0].amplifier if len({grid.amplifier for grid in grids}) == 1 else None,
    )
