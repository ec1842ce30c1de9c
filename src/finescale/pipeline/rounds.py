"""Solving the layers of a round: those whose inputs are known at the same time, in one process or several.

Rows are independent, so that layers of one input and scheme are stacked and solved as one. Several processes get whole
stacks as far as that is even; where a stack is cut, by rows. Every process ends up with every weight, and computes the
records of the layers whose first row it solved, which the others are told.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from finescale.calibration.statistics import matrix_power
from finescale.errors import NumericsError
from finescale.grid import Grid, QuantizedWeight
from finescale.pipeline.exchange import Found, from_owners, joined, stacked
from finescale.pipeline.layers import (
    FEW_TOKENS_DAMPING,
    LayerResult,
    PlannedWeight,
    Solved,
    by_scheme,
    check_weight,
    finished,
    initial_grid,
    record_of,
    rows_fit_apart,
)
from finescale.pipeline.plan import LayerPlan
from finescale.ranks import ALONE, DETERMINISTIC_ROWS, Load, Ranks, shares
from finescale.recipe import Recipe
from finescale.solvers import Solution, ratio, row_energies

ALIGNED_ROWS = 64
"""Rows at which a stack may be cut: tensor cores want few odd sizes."""
LEAST_ROWS = 1024
"""Rows that a process pays for anyhow, however few it has: it goes column by column."""
FACTOR_COST = 4.0
"""Of factorizing H, in I^3, where a pass over O rows costs O I (I + ``column_cost``); two to nine on an H100."""
POWER_COST = 1000.0
"""Of a power of H, by its eigenvalues."""


@dataclass(frozen=True)
class Stack:
    """Layers of one scheme and one input, whose rows lie one below the other.

    Attributes:
        step: number of the input.
        members: plans with weights, float [O, I].
        shares: the rows that are each process's.
    """

    step: int
    members: tuple[PlannedWeight, ...]
    shares: tuple[slice, ...] = ()

    @property
    def rows(self) -> int:
        return sum(weight_OI.shape[0] for _, weight_OI in self.members)

    def parts(self, rows: slice) -> Iterator[tuple[int, slice]]:
        """Which members have some of these rows of the stack, and which of their own these are."""
        start = 0
        for number, (_, weight_OI) in enumerate(self.members):
            stop = start + weight_OI.shape[0]
            first, last = max(rows.start, start), min(rows.stop, stop)
            if first < last:
                yield number, slice(first - start, last - start)
            start = stop

    def owners(self, member: int) -> list[int]:
        """The processes that have rows of a member, in the order of these."""
        found = [rank for rank, rows in enumerate(self.shares) if member in dict(self.parts(rows))]
        return sorted(found, key=lambda rank: self.shares[rank].start)


def solve_together(
    layers: Sequence[PlannedWeight],
    hessian_II: Tensor,
    tokens: int,
    recipe: Recipe,
    scale_dtype: torch.dtype,
    block: int,
) -> list[LayerResult]:
    """``solve_round`` for layers of one input, in one process."""
    return solve_round([layers], [(hessian_II, tokens)], recipe, scale_dtype, block)


def solve_round(
    steps: Sequence[Sequence[PlannedWeight]],
    moments: list[tuple[Tensor, int]],
    recipe: Recipe,
    scale_dtype: torch.dtype,
    block: int,
    ranks: Ranks = ALONE,
) -> list[LayerResult]:
    """Solve layers, and get those that others solved.

    Args:
        steps: layers by input, plans with their weights, float [O, I].
        moments: of each of these inputs, the Hessian, float32 [I, I], mean of x x^T, and of how many tokens it was
            made; the solver gets their ``calibration.power``. Used up: a process keeps the Hessians of its own layers,
            one process one after the other.
        recipe: solver and integer scales.
        scale_dtype: type in which scales are stored.
        block: number of the block, for the record.
        ranks: processes that share the layers.

    Raises:
        NumericsError: NaN in a weight, a Hessian that cannot be factorized, or a fixed amplifier that could overflow
            int32; names the layer.
    """
    for layers in steps:
        for plan, weight_OI in layers:
            check_weight(plan, weight_OI)
    stacks = dealt([Stack(n, tuple(m)) for n, layers in enumerate(steps) for m in by_scheme(layers, recipe)],
                   recipe, ranks)  # fmt: skip
    if ranks.count > 1:
        return _solve(stacks, moments, recipe, scale_dtype, block, ranks)
    results = []
    for step in range(len(steps)):
        of_step = [replace(stack, step=0) for stack in stacks if stack.step == step]
        results += _solve(of_step, [moments.pop(0)], recipe, scale_dtype, block, ranks)
    return results


def dealt(stacks: Sequence[Stack], recipe: Recipe, ranks: Ranks) -> list[Stack]:
    """The stacks with their rows shared over the processes: whole ones where outliers are counted over the layer, or
    scales move."""
    options = recipe.solver.options()
    loads = []
    for stack in stacks:
        columns = stack.members[0][1].shape[1]
        row = float(columns * (columns + options.column_cost) * options.pass_count)
        once = LEAST_ROWS * row + FACTOR_COST * columns**3 * options.factorizes
        power = POWER_COST * columns**3 * (recipe.calibration.power != 1)
        if options.rows_apart and ranks.deterministic:  # every piece is solved for itself
            loads.append(Load(stack.rows, DETERMINISTIC_ROWS, power, row + once / DETERMINISTIC_ROWS))
        else:
            loads.append(Load(stack.rows, ALIGNED_ROWS if options.rows_apart else stack.rows, once + power, row))
    found = shares(loads, ranks.count)
    return [replace(stack, shares=tuple(rows)) for stack, rows in zip(stacks, found, strict=True)]


def _solve(
    stacks: Sequence[Stack],
    moments: list[tuple[Tensor, int]],
    recipe: Recipe,
    scale_dtype: torch.dtype,
    block: int,
    ranks: Ranks,
) -> list[LayerResult]:
    mine = [stack.shares[ranks.rank] for stack in stacks]
    own = {stack.step for stack, rows in zip(stacks, mine, strict=True) if rows.stop > rows.start}
    inputs: list[tuple[Tensor | None, int, tuple[str, ...]]] = []
    while moments:
        inputs.append(_damped(*moments.pop(0), recipe, kept=len(inputs) in own))
    hessians = [inputs[stack.step][0] for stack in stacks]
    # What takes time is done for all layers before anything is exchanged: then nobody waits in between.
    found: list[dict[int, Found]] = []
    for step, (hessian_II, _, _) in enumerate(inputs):
        powered = cache(partial(_powered, hessian_II, recipe))  # once for all stacks, when the first asks for it
        found += [_solve_rows(stack, powered, recipe, scale_dtype, ranks) for stack in stacks if stack.step == step]
        del powered
    solutions, finals = [], []
    for stack, hessian_II, parts in zip(stacks, hessians, found, strict=True):
        for number, (plan, weight_OI) in enumerate(stack.members):
            owners = stack.owners(number)
            solutions.append(joined(from_owners(parts.pop(number, None), owners, plan.scheme, ranks)))
            again = partial(_solve_again, (plan, weight_OI), hessian_II, owners[0], recipe, ranks)
            finals.append(finished(plan, weight_OI, solutions[-1].weight, recipe, scale_dtype, again))
    energies: list[Tensor] = []
    for stack, hessian_II in zip(stacks, hessians, strict=True):
        energies += _energies(stack, finals[len(energies) :], hessian_II, ranks)
    errors = [ratio(*map(float, ranks.sum_(energies_O2).sum(0))) for energies_O2 in energies]
    layers = [(stack, number) for stack in stacks for number in range(len(stack.members))]
    results = []
    for (stack, number), solution, final, error in zip(layers, solutions, finals, errors, strict=True):
        plan, weight_OI = stack.members[number]
        hessian_II, tokens, notes = inputs[stack.step]
        notes, record, solved = notes + solution.notes, {}, None
        if ranks.rank == stack.owners(number)[0]:
            record = record_of(plan, weight_OI, final, error, solution, recipe, block, tokens, notes)
        if recipe.tuning:
            assert hessian_II is not None  # recipes that tune run in one process
            solved = Solved(weight_OI.clone(), hessian_II, solution, tokens, notes)
        results.append(LayerResult(plan, final, record, solved))
    return [
        replace(result, record=ranks.tell(result.record, stack.owners(number)[0]))
        for result, (stack, number) in zip(results, layers, strict=True)
    ]


def _damped(hessian_II: Tensor, tokens: int, recipe: Recipe, kept: bool) -> tuple[Tensor | None, int, tuple[str, ...]]:
    """The Hessian if it is kept, damped when it was made of few tokens, and a note of that."""
    columns = hessian_II.shape[0]
    notes: tuple[str, ...] = ()
    if recipe.solver.entry().needs_hessian and tokens < columns:
        notes = (f"short of tokens: {tokens} for {columns} inputs, damped by {FEW_TOKENS_DAMPING:g}",)
        if kept:
            mean = float(hessian_II.diagonal().mean())
            hessian_II = hessian_II.clone()
            hessian_II.diagonal().add_(FEW_TOKENS_DAMPING * mean)
    return hessian_II if kept else None, tokens, notes


def _powered(hessian_II: Tensor | None, recipe: Recipe) -> Tensor | None:
    """What a solver gets of a Hessian that is kept; raises NumericsError as ``matrix_power`` does."""
    return None if hessian_II is None else matrix_power(hessian_II, recipe.calibration.power)


def _solve_rows(
    stack: Stack, powered: Callable[[], Tensor | None], recipe: Recipe, scale_dtype: torch.dtype, ranks: Ranks
) -> dict[int, Found]:
    """This process's rows of a stack, by number of the member; ``powered`` gives what the solver gets of H."""
    entry, options = recipe.solver.entry(), recipe.solver.options()
    rows = stack.shares[ranks.rank]
    grid_of = _grid_maker(stack, recipe, scale_dtype)
    pieces: dict[int, list[Solution]] = {}
    try:
        for piece in ranks.pieces(rows) if options.rows_apart else [rows] if rows.stop else []:
            solved_II = powered()
            assert solved_II is not None
            parts = list(stack.parts(piece))
            weights = [stack.members[number][1][of_member] for number, of_member in parts]
            grids = [grid_of(*part) for part in parts]
            weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
            solution = entry.solve(weight_OI, solved_II, stacked(grids), options)
            start = 0
            for (number, _), grid in zip(parts, grids, strict=True):
                part = solution
                if len(parts) > 1:
                    weight = solution.weight.rows_slice(slice(start, start + grid.rows))
                    weight = replace(weight, grid=replace(weight.grid, amplifier=grid.amplifier))
                    part = replace(solution, weight=weight)
                pieces.setdefault(number, []).append(part)
                start += grid.rows
    except NumericsError as error:
        return {number: _of_layer(stack.members[number][0], error) for number, _ in stack.parts(rows)}
    return {number: joined(of_member) for number, of_member in pieces.items()}


def _grid_maker(stack: Stack, recipe: Recipe, scale_dtype: torch.dtype) -> Callable[[int, slice], Grid]:
    """Makes the grids that members are solved on, of some of their rows: as cheap as these are few, or the whole one
    once."""
    whole = cache(lambda number: initial_grid(*stack.members[number], recipe, scale_dtype))

    def grid_of(number: int, rows: slice) -> Grid:
        plan, weight_OI = stack.members[number]
        if rows_fit_apart(plan, recipe):
            return initial_grid(plan, weight_OI[rows], recipe, scale_dtype)
        return whole(number).rows_slice(rows)

    return grid_of


def _of_layer(plan: LayerPlan, error: NumericsError) -> NumericsError:
    return NumericsError(f"{plan.name}: {error}")


def _solve_again(
    layer: PlannedWeight, hessian_II: Tensor | None, owner: int, recipe: Recipe, ranks: Ranks, grid: Grid
) -> QuantizedWeight:
    """A whole layer by one process, on another grid."""
    plan, weight_OI = layer
    found: Found | None = None
    if ranks.rank == owner:
        try:
            solved_II = _powered(hessian_II, recipe)
            assert solved_II is not None
            found = recipe.solver.entry().solve(weight_OI, solved_II, grid, recipe.solver.options())
        except NumericsError as error:
            found = _of_layer(plan, error)
    return from_owners(found, [owner], grid.scheme, ranks)[0].weight


def _energies(stack: Stack, finals: Sequence[QuantizedWeight], hessian_II: Tensor | None, ranks: Ranks) -> list[Tensor]:
    """``row_energies`` of each member in the rows that are this process's, zero in the others; ``finals`` begins with
    the stack's."""
    energies = [torch.zeros(weight_OI.shape[0], 2, dtype=torch.float64) for _, weight_OI in stack.members]
    values: dict[int, Tensor] = {}
    for piece in ranks.pieces(stack.shares[ranks.rank]):
        assert hessian_II is not None
        for number, rows in stack.parts(piece):
            if number not in values:
                values = {number: finals[number].dequantize()}  # the last one goes
            weight_OI = stack.members[number][1][rows]
            energies[number][rows] = row_energies(weight_OI, values[number][rows], hessian_II)
    return energies
