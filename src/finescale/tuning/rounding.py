"""Learned rounding: the codes and scales of a block, tuned by signed gradients on the error of the block's output.

The idea is AutoRound's ("Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
arXiv 2309.05516): a bounded offset per weight and a factor per scale, moved by the sign of their gradients with a step
that falls linearly to zero. What differs here: the start is a solver's solution instead of round to nearest; the error
of each token is taken relative to the size of its output, as the next norm will see it; and the best iterate is
chosen on fixed windows instead of on the batch it was just tuned on.

Shape legend: N windows, B windows of a batch, T tokens, C channels, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from finescale.errors import NumericsError
from finescale.grid import InputRule, QuantizedWeight
from finescale.tuning.moving import MovingWeight, finish, render, start_from, step
from finescale.tuning.reconstruction import (
    ReconstructionOptions,
    Windows,
    block_error,
    block_loss,
    fixed_windows,
    gradient_of,
    is_check,
    round_inputs,
    shown_weight,
    weights_with_gradients,
    window_batches,
)
from finescale.tuning.replay import replayed


class RoundingOptions(ReconstructionOptions):
    """Options of learned rounding, besides those of ``ReconstructionOptions``.

    Attributes:
        iterations: steps per block.
        rate: first step of the offsets, in steps of the grid.
        scale_rate: first step of the scale factors; 0 keeps the scales.
        bound: how far an offset may go.
        start: ``solver`` starts the offsets from the values that the solver rounded, ``weight`` from the weights.
    """

    iterations: int = Field(default=128, ge=1)
    rate: float = Field(default=0.02, gt=0.0)
    scale_rate: float = Field(default=0.001, ge=0.0)
    bound: float = Field(default=0.5, gt=0.0)
    start: Literal["solver", "weight"] = "solver"


@dataclass(frozen=True)
class TuningLayer:
    """A solved layer to be tuned: its path in the block, the solver's result, and the values that it rounded."""

    path: str
    weight: QuantizedWeight
    target_OI: Tensor


def tune_rounding(
    block: nn.Module,
    layers: Sequence[TuningLayer],
    windows: Windows,
    arguments_of: Callable[[int], Mapping[str, Any]],
    rules: Mapping[str, InputRule],
    options: RoundingOptions,
    seed: int,
    device: torch.device,
) -> tuple[list[QuantizedWeight], dict[str, float]]:
    """Tune the codes and scales of a block's layers.

    Args:
        block: filled, everything but the layers' weights as it will be; computed in float32 meanwhile.
        layers: solved layers.
        windows: the block's inputs and target outputs.
        arguments_of: the block's other arguments for a number of windows.
        rules: how the layers' inputs are rounded, by path.
        options: see ``RoundingOptions``.
        seed: of the order of the windows.
        device: where the block lives.

    Returns:
        The tuned weights in the order of ``layers``, and the error before and after on the fixed windows.

    Raises:
        NumericsError: the error is NaN or Inf.
    """
    windows = windows.near(device)
    states = [start_from(layer.weight, layer.target_OI) for layer in layers]
    modules = [block.get_submodule(layer.path) for layer in layers]
    size = min(options.batch_size, len(windows))
    fixed = fixed_windows(len(windows), options.held, size)
    order = window_batches(len(windows), size, seed, fixed if options.unseen else ())
    hooks = round_inputs(block, rules)
    try:
        with weights_with_gradients(block, modules, options, device):
            for module, state in zip(modules, states, strict=True):
                render(state, shown_weight(module))
            first = best = block_error(block, windows, fixed, arguments_of, options, device)
            kept = [_copy(state) for state in states]
            arguments = arguments_of(size)

            def one(input_BTC: Tensor, target_BTC: Tensor, left: Any) -> None:
                block_loss(block, input_BTC, target_BTC, arguments, options).backward()
                scale_rate = options.scale_rate * left if options.scale_rate else 0.0
                for module, state in zip(modules, states, strict=True):
                    gradient_OI = gradient_of(module)
                    if gradient_OI is not None:
                        shown_OI = shown_weight(module)
                        step(state, gradient_OI, shown_OI, options.rate * left, scale_rate, options.bound)

            run = replayed(one, block, device)
            for iteration in range(options.iterations):
                run(*windows.pick(next(order), device), 1 - iteration / options.iterations)
                if is_check(iteration, options.iterations, options.checks):
                    error = block_error(block, windows, fixed, arguments_of, options, device)
                    if not math.isfinite(error):
                        raise NumericsError("learned rounding met NaN or Inf; tune with precision float32.")
                    if error < best:
                        best, kept = error, [_copy(state) for state in states]
    finally:
        for hook in hooks:
            hook.remove()
    for state, (offset_OGP, factor_OG) in zip(states, kept, strict=True):
        state.offset_OGP, state.factor_OG = offset_OGP, factor_OG
    return [finish(state) for state in states], {"error_before": first, "error_after": best}


def _copy(state: MovingWeight) -> tuple[Tensor, Tensor]:
    return state.offset_OGP.clone(), state.factor_OG.clone()
