"""Quantizing one block: statistics, solving, putting the quantized weights in place.

Shape legend: O outputs, I inputs, B sequences, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from finescale.calibration.capture import run_block
from finescale.calibration.shared import SharedStatistics
from finescale.calibration.statistics import collect_moments
from finescale.errors import NumericsError
from finescale.formats.registry import Format
from finescale.grid import InputRule
from finescale.models import Step
from finescale.models.skeleton import set_weight_OI, weight_OI_of
from finescale.pipeline.layers import LayerResult
from finescale.pipeline.output import stored_weight
from finescale.pipeline.plan import LayerPlan
from finescale.pipeline.rounds import solve_round
from finescale.ranks import ALONE, Ranks
from finescale.recipe import Recipe

P = ParamSpec("P")
R = TypeVar("R")
Batches = Sequence[tuple[Tensor, dict[str, Any]]]


@dataclass
class Timer:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, phase: str, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``work(*args, **kwargs)``, its time added to ``phase``."""
        start = time.perf_counter()
        result = work(*args, **kwargs)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        return result


def quantize_block(
    block: nn.Module,
    index: int,
    plans: Mapping[str, LayerPlan],
    steps: Sequence[Step],
    batches: Batches,
    recipe: Recipe,
    fmt: Format,
    scale_dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    ranks: Ranks = ALONE,
    statistics: SharedStatistics | None = None,
) -> list[LayerResult]:
    """Solve every planned layer of a block and install its weight.

    Args:
        block: filled with full-precision weights; holds the quantized ones afterwards.
        index: its number.
        plans: layers by module path.
        steps: layers that share an input, in order of execution.
        batches: the block's inputs and keyword arguments, out of the already quantized prefix.
        recipe: see there; with ``true_sequential`` each step sees the steps before it quantized.
        fmt: the format to be written.
        scale_dtype: type of the stored scales.
        device: where the block lives.
        timer: collects seconds for forward and solve.
        ranks: processes that share the work; all of them get all results.
        statistics: of the original's activations, where they are known already: nothing is run then.

    Raises:
        NumericsError: NaN or Inf, with the name of the layer.
    """
    wanted = [Step(tuple(n for n in step.linears if n in plans), step.norm) for step in steps]
    wanted = [step for step in wanted if step.linears]
    if not wanted:  # the whole block stays as it is
        return []
    rounds = [[step] for step in wanted] if recipe.calibration.true_sequential else [wanted]
    rounds = _merge_experts(rounds)
    results: list[LayerResult] = []
    for members in rounds:
        leaders = {step.linears[0]: plans[step.linears[0]].name for step in members}
        if statistics is None:
            found = timer.measure("forward", collect_moments, block, leaders, batches, device, ranks)
        else:
            found = timer.measure("load", statistics.moments, index, device)
        moments = [(found[path].hessian_(), found[path].tokens) for path in leaders]
        del found  # or it would keep what is used up
        layers = [[(plans[path], weight_OI_of(block.get_submodule(path))) for path in step.linears] for step in members]
        solved = timer.measure("solve", solve_round, layers, moments, recipe, scale_dtype, index, ranks)
        for result in solved:
            set_weight_OI(block.get_submodule(result.plan.path), stored_weight(fmt, result.plan, result.weight))
        results += solved
    return results


def _merge_experts(rounds: list[list[Step]]) -> list[list[Step]]:
    """In true-sequential order all experts' first layers are one round and all their last layers the next: one pass
    over the text each, not one per expert."""
    merged: list[list[Step]] = []
    pools: dict[str, list[Step]] = {}
    for steps in rounds:
        first = steps[0].linears[0]
        if len(steps) == 1 and ".experts." in first:
            leaf = first.rpartition(".")[2]
            if leaf not in pools:
                pools[leaf] = []
                merged.append(pools[leaf])
            pools[leaf].append(steps[0])
        else:
            merged.append(steps)
    return merged


def rearrange_inputs(block: nn.Module, rules: Mapping[str, InputRule]) -> list[Any]:
    """Apply gathers and rotations to the inputs of some layers from now on; returns the hooks to remove."""
    return [
        block.get_submodule(path).register_forward_pre_hook(lambda _, args, rule=rule: (rule.rearrange(args[0]),))
        for path, rule in rules.items()
        if not rule.is_plain
    ]


def quantize_inputs(block: nn.Module, rules: Mapping[str, InputRule]) -> list[Any]:
    """Round the inputs of some layers from now on, as at run time; returns the hooks to remove."""
    return [
        block.get_submodule(path).register_forward_pre_hook(lambda _, args, rule=rule: (rule.round(args[0]),))
        for path, rule in rules.items()
        if rule.scheme is not None
    ]


def propagate(
    block: nn.Module,
    name: str,
    hidden: MutableSequence[Tensor],
    arguments: Sequence[dict[str, Any]],
    device: torch.device,
) -> None:
    """Replace the inputs of a block by its outputs, batch by batch, where they are kept.

    Args:
        block: as it will be in the result.
        name: for messages.
        hidden: float [B, T, I] per batch; each input is dropped when its output is there, so that only one is kept.
        arguments: keyword arguments per batch.
        device: where the block lives.

    Raises:
        NumericsError: NaN or Inf came out.
    """
    kept = hidden[0].device if arguments else device
    for number, kwargs in enumerate(arguments):
        output = run_block(block, hidden[number].to(device), kwargs)
        if not bool(torch.isfinite(output).all()):
            raise NumericsError(
                f"{name} puts out NaN or Inf on the calibration text; its weights or its dtype are unfit."
            )
        hidden[number] = output.to(kept)
