"""Tuning a solved block: what it is fed, what it should put out, and the tuned weights put in place.

Shape legend: O outputs, I inputs, B sequences, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.calibration.capture import run_block
from finescale.formats.registry import Format
from finescale.grid import InputRule
from finescale.models.skeleton import set_weight_OI
from finescale.pipeline.block import Batches
from finescale.pipeline.layers import LayerResult, with_tuned_weight
from finescale.pipeline.output import stored_weight
from finescale.recipe import Recipe
from finescale.transforms.rotation import Rotation
from finescale.tuning import RoundingOptions, TuningLayer, Windows, tune_rounding
from finescale.tuning.moving import rounded_values


@dataclass
class FloatStream:
    """The hidden states of the float model, one block ahead of those of the quantized one, never rotated.

    Attributes:
        inputs: what the float block is fed, float [B, T, C] per batch, on the CPU.
        outputs: what it puts out.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]

    def advance(self, block: nn.Module, arguments: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Run the float block; its last outputs become its inputs."""
        self.inputs = self.outputs
        self.outputs = _outputs(block, zip(self.inputs, arguments, strict=True), device)


def _outputs(
    block: nn.Module, batches: Iterable[tuple[Tensor, Mapping[str, Any]]], device: torch.device
) -> list[Tensor]:
    """A block's outputs, float [B, T, C] per batch, on the CPU."""
    return [run_block(block, x_BTC.to(device), dict(kwargs)).cpu() for x_BTC, kwargs in batches]


def windows_of(
    recipe: Recipe,
    block: nn.Module,
    stream: FloatStream,
    rotation: Rotation | None,
    batches: Batches,
    device: torch.device,
) -> Windows:
    """What a block is tuned on.

    Args:
        recipe: its ``tuning``.
        block: transformed, not yet quantized.
        stream: inputs and outputs of the float block.
        rotation: of the hidden states in the transformed model.
        batches: outputs of the quantized blocks before it, rotated, with the block's other arguments.
        device: where the block lives.
    """
    options = _options(recipe)

    def turned(hidden: list[Tensor]) -> list[Tensor]:
        return hidden if rotation is None else [rotation.apply(x_BTC) for x_BTC in hidden]

    inputs = [x_BTC for x_BTC, _ in batches] if options.inputs == "quantized" else turned(stream.inputs)
    local = options.target == "quantized"
    return Windows(inputs, _outputs(block, batches, device) if local else turned(stream.outputs))


def _options(recipe: Recipe) -> RoundingOptions:
    assert recipe.tuning is not None
    options = recipe.tuning.options_model()
    assert isinstance(options, RoundingOptions)
    return options


def tuning_batch(recipe: Recipe) -> int | None:
    """Windows in a batch of the recipe's tuning; None without tuning."""
    if recipe.tuning is None:
        return None
    return min(_options(recipe).batch_size, recipe.calibration.samples)


def tune_block(
    block: nn.Module,
    results: Sequence[LayerResult],
    windows: Windows,
    arguments_of: Callable[[int], Mapping[str, Any]],
    rules: Mapping[str, InputRule],
    recipe: Recipe,
    fmt: Format,
    seed: int,
    device: torch.device,
) -> tuple[list[LayerResult], dict[str, float]]:
    """Tune a block's solved layers and install the tuned weights.

    Args:
        block: filled, with the solved weights in place.
        results: its solved layers.
        windows: see ``windows_of``.
        arguments_of: the block's other arguments for a number of windows.
        rules: rounding of the layers' inputs, by path.
        recipe: its ``tuning``.
        fmt: the format to be written.
        seed: of the order of the windows.
        device: where the block lives.

    Returns:
        The results with tuned weights, and the block's error before and after.
    """
    options = _options(recipe)
    layers = []
    for result in results:
        solved = result.solved
        assert solved is not None
        target_OI = solved.weight_OI.float()
        if options.start == "solver":
            target_OI = rounded_values(target_OI, result.weight.dequantize(), solved.hessian_II)
        layers.append(TuningLayer(result.plan.path, result.weight, target_OI))
    weights, facts = tune_rounding(block, layers, windows, arguments_of, rules, options, seed, device)
    tuned = [with_tuned_weight(result, weight, recipe) for result, weight in zip(results, weights, strict=True)]
    for result in tuned:
        set_weight_OI(block.get_submodule(result.plan.path), stored_weight(fmt, result.plan, result.weight))
    return tuned, facts
