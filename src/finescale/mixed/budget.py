"""One choice for each unit, the least loss within a budget of cost: the multiple-choice knapsack, solved exactly.

By dynamic programming: states are the Pareto front of (cost, loss) after each unit, so that no other selection so far
has both less cost and less loss. While the front stays below ``LIMIT`` states the result is exact; above, states of
nearly the same cost are thinned out to the best of each, and `Selection.gap` bounds what that can have lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finescale.errors import InputError

LIMIT = 50_000
"""States kept after each unit."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """What one choice of a unit costs (bits, whole) and loses (any unit, additive, not negative)."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Selection:
    """A choice for each unit, by number.

    Attributes:
        chosen: numbers of the choices.
        cost, loss: their sums.
        gap: at most so much more loss than the best selection; 0 where the search was exact.
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    gap: float


@dataclass(frozen=True)
class _Stage:
    """The front after a unit: sums, and where each state came from."""

    cost: Ints
    loss: Floats
    before: Ints
    choice: Ints


def least_loss(units: Sequence[Sequence[Choice]], budget: int) -> Selection:
    """The selection of least loss whose cost is at most ``budget``.

    Raises:
        InputError: even the cheapest choices cost more.
    """
    cheapest = sum(min(choice.cost for choice in unit) for unit in units)
    if cheapest > budget:
        raise InputError(
            f"the cheapest choice for every layer takes {cheapest} bits and the budget is {budget}; raise the target "
            "or allow fewer bits."
        )
    stages, exact = _fronts(units, budget)
    last = stages[-1]
    state = int(np.flatnonzero(last.cost <= budget)[-1])  # costs ascend and losses descend along the front
    return _selection(units, stages, state, budget, exact)


def least_cost(units: Sequence[Sequence[Choice]], most_loss: float) -> Selection:
    """The selection of least cost whose loss is at most ``most_loss``.

    Raises:
        InputError: even the best choices lose more.
    """
    budget = sum(max(choice.cost for choice in unit) for unit in units)
    stages, exact = _fronts(units, budget)
    last = stages[-1]
    good = np.flatnonzero(last.loss <= most_loss)
    if good.size == 0:
        raise InputError(
            f"the best choice for every layer loses {float(last.loss[-1]):.4g} and {most_loss:g} is allowed; allow "
            "more, or more bits."
        )
    state = int(good[0])
    return _selection(units, stages, state, int(last.cost[state]), exact)


def lower_bound(units: Sequence[Sequence[Choice]], budget: int) -> float:
    """A loss that no selection within the budget can go below: the best Lagrangian bound, found by bisection."""
    low, high = 0.0, 1.0
    while sum(_priced(unit, high)[0] for unit in units) > budget and high < 1e300:
        high *= 4
    best = -np.inf
    for _ in range(100):
        price = (low + high) / 2
        picks = [_priced(unit, price) for unit in units]
        cost, loss = sum(pick[0] for pick in picks), sum(pick[1] for pick in picks)
        best = max(best, loss + price * (cost - budget))
        low, high = (price, high) if cost > budget else (low, price)
    return float(best)


def _priced(unit: Sequence[Choice], price: float) -> tuple[int, float]:
    choice = min(unit, key=lambda each: each.loss + price * each.cost)
    return choice.cost, choice.loss


def _fronts(units: Sequence[Sequence[Choice]], budget: int) -> tuple[list[_Stage], bool]:
    """Fronts after each unit. States whose cheapest completion is over the budget are dropped."""
    rest = sum(min(choice.cost for choice in unit) for unit in units)
    stages: list[_Stage] = []
    exact = True
    cost, loss = np.zeros(1, np.int64), np.zeros(1, np.float64)
    for unit in units:
        rest -= min(choice.cost for choice in unit)
        stage = _grown(cost, loss, unit, budget - rest)
        if stage.cost.size > LIMIT:
            stage, exact = _thinned(stage), False
        stages.append(stage)
        cost, loss = stage.cost, stage.loss
    return stages, exact


def _grown(cost: Ints, loss: Floats, unit: Sequence[Choice], most: int) -> _Stage:
    costs = np.concatenate([cost + choice.cost for choice in unit])
    losses = np.concatenate([loss + choice.loss for choice in unit])
    before = np.tile(np.arange(cost.size), len(unit))
    choice = np.repeat(np.arange(len(unit)), cost.size)
    order = np.lexsort((losses, costs))
    order = order[costs[order] <= most]
    sorted_losses = losses[order]
    # A state stays if it loses less than every cheaper one.
    least_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    kept = order[sorted_losses < least_before]
    return _Stage(costs[kept], losses[kept], before[kept], choice[kept])


def _thinned(stage: _Stage) -> _Stage:
    """The state of least loss in each of ``LIMIT`` equal ranges of cost."""
    span = int(stage.cost[-1] - stage.cost[0]) + 1
    bucket = (stage.cost - stage.cost[0]) * LIMIT // span
    last = np.flatnonzero(np.diff(bucket, append=bucket[-1] + 1))  # losses descend: the last of a range is its best
    last = np.union1d(last, [0])  # the cheapest of all, which always fits
    return _Stage(stage.cost[last], stage.loss[last], stage.before[last], stage.choice[last])


def _selection(
    units: Sequence[Sequence[Choice]], stages: Sequence[_Stage], state: int, budget: int, exact: bool
) -> Selection:
    chosen = []
    at = state
    for stage in reversed(stages):
        chosen.append(int(stage.choice[at]))
        at = int(stage.before[at])
    chosen.reverse()
    cost = sum(unit[number].cost for unit, number in zip(units, chosen, strict=True))
    loss = sum(unit[number].loss for unit, number in zip(units, chosen, strict=True))
    gap = 0.0 if exact else max(0.0, loss - lower_bound(units, budget))
    return Selection(tuple(chosen), cost, loss, gap)
