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
from finescale.pipeline.plan import LayerPlan
from finescale.recipe import Recipe
from finescale.transforms.rotation import Rotation
from finescale.tuning import (
    LowRankOptions,
    ReconstructionOptions,
    RoundingOptions,
    TuningLayer,
    Windows,
    correct_weights,
    tune_rounding,
)
from finescale.tuning.moving import rounded_values


@dataclass
class FloatStream:
    """The hidden states of the float model, one block ahead of those of the quantized one, never rotated.

    Attributes:
        inputs: what the float block is fed, float [B, T, C] per batch, where the quantized one's inputs are kept.
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
    """A block's outputs, float [B, T, C] per batch, where the inputs are kept."""
    return [run_block(block, x_BTC.to(device), dict(kwargs)).to(x_BTC.device) for x_BTC, kwargs in batches]


def learning_options(recipe: Recipe) -> tuple[ReconstructionOptions, ...]:
    """Options of all that learns from a block's output: transforms and tuners."""
    transforms = [part.options_model() for part in recipe.transforms if part.entry().learned]
    return tuple(
        options for options in (*transforms, *tuner_options(recipe)) if isinstance(options, ReconstructionOptions)
    )


def tuner_options(recipe: Recipe) -> list[ReconstructionOptions]:
    """Options of the recipe's tuners, settled for its solver."""
    found: list[Any] = [part.options_model() for part in recipe.tuning]
    nearest = not recipe.solver.entry().needs_hessian  # without it nothing better can be done
    return [options.before(nearest) if isinstance(options, LowRankOptions) else options for options in found]


def tuning_batches(recipe: Recipe) -> tuple[int, ...]:
    """Windows in a batch of each of these."""
    return tuple(min(options.batch_size, recipe.calibration.samples) for options in learning_options(recipe))


@dataclass(frozen=True)
class Tuning:
    """What tunes one block: each part of the recipe with its windows, and what they share.

    Attributes:
        parts: options and windows of each tuner, in order.
        arguments_of: the block's other arguments for a number of windows; of `Chain` for several blocks.
        rules: rounding of the layers' inputs, by path.
        seed: of the order of the windows and of random starts.
        device: where the block lives.
    """

    parts: tuple[tuple[ReconstructionOptions, Windows], ...]
    arguments_of: Callable[[int], Mapping[str, Any]]
    rules: Mapping[str, InputRule]
    seed: int
    device: torch.device


def windows_of(
    block: nn.Module,
    stream: FloatStream,
    rotation: Rotation | None,
    batches: Batches,
    device: torch.device,
    options: ReconstructionOptions,
) -> Windows:
    """What a tuner is told to come close to.

    Args:
        block: transformed, not yet quantized.
        stream: inputs and outputs of the float block.
        rotation: of the hidden states in the transformed model.
        batches: outputs of the quantized blocks before it, rotated, with the block's other arguments.
        device: where the block lives.
        options: which inputs and targets.
    """

    def turned(hidden: list[Tensor]) -> list[Tensor]:
        return hidden if rotation is None else [rotation.apply(x_BTC) for x_BTC in hidden]

    inputs = [x_BTC for x_BTC, _ in batches] if options.inputs == "quantized" else turned(stream.inputs)
    local = options.target == "quantized"
    return Windows(inputs, _outputs(block, batches, device) if local else turned(stream.outputs))


class Chain(nn.Module):
    """Consecutive blocks as one: each gets the outputs of the one before and its own of the ``arguments``."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden_BTC: Tensor, arguments: Sequence[Mapping[str, Any]]) -> Tensor:
        for block, kwargs in zip(self.blocks, arguments, strict=True):
            output = block(hidden_BTC, **kwargs)
            hidden_BTC = output[0] if isinstance(output, tuple) else output
        return hidden_BTC


def blocks_together(recipe: Recipe) -> int:
    """How many blocks the recipe corrects at a time."""
    options = [part.options_model() for part in recipe.tuning]
    return max([1, *(chosen.blocks for chosen in options if isinstance(chosen, LowRankOptions))])


def correct_blocks(
    blocks: Sequence[nn.Module],
    plans: Sequence[Mapping[str, LayerPlan]],
    rules: Sequence[Mapping[str, InputRule]],
    tuning: Tuning,
) -> list[dict[str, float]]:
    """Change the weights of some consecutive blocks before they are solved.

    Args:
        blocks: filled.
        plans: of each, by path; those without any are only passed through.
        rules: rounding of the layers' inputs of each, by path.
        tuning: by the output of the last.

    Returns:
        The error of the last block's output before and after each tuner.
    """
    module: nn.Module = blocks[0] if len(blocks) == 1 else Chain(blocks)
    prefixes = [""] if len(blocks) == 1 else [f"blocks.{number}." for number in range(len(blocks))]
    schemes = {
        prefix + path: plan.scheme for prefix, part in zip(prefixes, plans, strict=True) for path, plan in part.items()
    }
    rounding = {
        prefix + path: rule for prefix, part in zip(prefixes, rules, strict=True) for path, rule in part.items()
    }
    facts = []
    for options, windows in tuning.parts if schemes else ():
        if isinstance(options, LowRankOptions):
            merged, fact = correct_weights(
                module, schemes, windows, tuning.arguments_of, rounding, options, tuning.seed, tuning.device
            )
            for path, weight_OI in merged.items():
                set_weight_OI(module.get_submodule(path), weight_OI)
            facts.append(fact)
    return facts


def tune_block(
    block: nn.Module, results: list[LayerResult], tuning: Tuning, recipe: Recipe, fmt: Format
) -> tuple[list[LayerResult], list[dict[str, float]]]:
    """Tune a block's solved layers and install the tuned weights.

    Args:
        block: filled, with the solved weights in place.
        results: its solved layers.
        tuning: see there.
        recipe: for the proof that int32 holds.
        fmt: the format to be written.

    Returns:
        The results with tuned weights, and the block's error before and after.
    """
    facts = []
    for options, windows in tuning.parts:
        if isinstance(options, RoundingOptions):
            layers = [TuningLayer(r.plan.path, r.weight, _starting_values(r, options.start)) for r in results]
            weights, fact = tune_rounding(
                block, layers, windows, tuning.arguments_of, tuning.rules, options, tuning.seed, tuning.device
            )
            results = [
                with_tuned_weight(result, weight, recipe) for result, weight in zip(results, weights, strict=True)
            ]
            for result in results:
                set_weight_OI(block.get_submodule(result.plan.path), stored_weight(fmt, result.plan, result.weight))
            facts.append(fact)
    return results, facts


def _starting_values(result: LayerResult, start: str) -> Tensor:
    assert result.solved is not None
    weight_OI = result.solved.weight_OI.float()
    if start == "weight":
        return weight_OI
    return rounded_values(weight_OI, result.weight.dequantize(), result.solved.hessian_II)
