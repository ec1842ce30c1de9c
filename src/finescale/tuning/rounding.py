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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from finescale.errors import NumericsError
from finescale.grid import InputRule, QuantizedWeight
from finescale.tuning.moving import MovingWeight, finish, render, start_from, step
from finescale.tuning.options import TunerOptions


class RoundingOptions(TunerOptions):
    """Options of learned rounding.

    Attributes:
        iterations: steps per block.
        batch_size: windows per step.
        rate: first step of the offsets, in steps of the grid.
        scale_rate: first step of the scale factors; 0 keeps the scales.
        bound: how far an offset may go.
        loss: ``relative`` divides each token's squared error by the mean square of its output, ``mse`` does not.
        inputs: the block is fed the outputs of the ``quantized`` blocks before it, or of the ``float`` ones.
        target: the outputs to come close to are those of the float block on the ``float`` prefix's outputs or on the
            ``quantized`` prefix's.
        start: ``solver`` starts the offsets from the values that the solver rounded, ``weight`` from the weights.
        checks: how often the error on some fixed windows is measured; the best of these iterates is kept.
        held: the number of these windows.
        precision: of the block's products; weights, offsets and the residual stream stay float32.
    """

    iterations: int = Field(default=128, ge=1)
    batch_size: int = Field(default=2, ge=1)
    rate: float = Field(default=0.02, gt=0.0)
    scale_rate: float = Field(default=0.001, ge=0.0)
    bound: float = Field(default=0.5, gt=0.0)
    loss: Literal["relative", "mse"] = "relative"
    inputs: Literal["quantized", "float"] = "quantized"
    target: Literal["quantized", "float"] = "float"
    start: Literal["solver", "weight"] = "solver"
    checks: int = Field(default=4, ge=1)
    held: int = Field(default=8, ge=1)
    precision: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class TuningLayer:
    """A solved layer to be tuned: its path in the block, the solver's result, and the values that it rounded."""

    path: str
    weight: QuantizedWeight
    target_OI: Tensor


@dataclass(frozen=True)
class Windows:
    """What a block is fed and what it should put out, float [B, T, C] per batch, on the CPU."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def __len__(self) -> int:
        return sum(batch.shape[0] for batch in self.inputs)

    def pick(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some windows, [len(numbers), T, C] each."""
        size = self.inputs[0].shape[0]
        input_BTC, target_BTC = (
            torch.stack([source[n // size][n % size] for n in numbers]).to(device)
            for source in (self.inputs, self.targets)
        )
        return input_BTC, target_BTC


class _RoundInput(torch.autograd.Function):
    """Rounding as at run time that lets gradients through."""

    @staticmethod
    def forward(context: Any, x_TI: Tensor, rule: InputRule) -> Tensor:
        return rule.round(x_TI)

    @staticmethod
    def backward(context: Any, gradient_TI: Tensor) -> tuple[Tensor, None]:
        return gradient_TI, None


def round_inputs(block: nn.Module, rules: Mapping[str, InputRule]) -> list[Any]:
    """Round the inputs of some layers as at run time, gradients passing straight through; returns the hooks."""

    def hook_of(rule: InputRule) -> Any:
        return lambda module, args: (_RoundInput.apply(args[0], rule), *args[1:])

    return [
        block.get_submodule(path).register_forward_pre_hook(hook_of(rule))
        for path, rule in rules.items()
        if rule.scheme is not None
    ]


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
    states = [start_from(layer.weight, layer.target_OI) for layer in layers]
    modules = [block.get_submodule(layer.path) for layer in layers]
    originals: list[Any] = [module.weight for module in modules]
    dtype = originals[0].dtype
    size = min(options.batch_size, len(windows))
    fixed = _fixed_windows(len(windows), options.held, size)
    hooks = round_inputs(block, rules)
    try:
        parameters = [_trained(module, state, options, device) for module, state in zip(modules, states, strict=True)]
        block.float()
        for module, parameter in zip(modules, parameters, strict=True):
            module.weight = parameter
        order = _batches(len(windows), size, seed)
        first = best = _error(block, windows, fixed, arguments_of, options, device)
        kept = [_copy(state) for state in states]
        for iteration in range(options.iterations):
            _loss(block, windows, next(order), arguments_of, options, device).backward()
            left = 1 - iteration / options.iterations
            for module, state, parameter in zip(modules, states, parameters, strict=True):
                if parameter.grad is not None:  # an expert may have got no token
                    gradient_OI = parameter.grad if isinstance(module, nn.Linear) else parameter.grad.T
                    step(state, gradient_OI, options.rate * left, options.scale_rate * left, options.bound)
                    parameter.grad = None
                    _show(module, state)
            if (iteration + 1) * options.checks % options.iterations < options.checks:
                error = _error(block, windows, fixed, arguments_of, options, device)
                if not math.isfinite(error):
                    raise NumericsError("learned rounding met NaN or Inf; tune with precision float32.")
                if error < best:
                    best, kept = error, [_copy(state) for state in states]
    finally:
        for hook in hooks:
            hook.remove()
        for module, original in zip(modules, originals, strict=True):
            module.weight = original
        block.to(dtype)
    for state, (offset_OGP, factor_OG) in zip(states, kept, strict=True):
        state.offset_OGP, state.factor_OG = offset_OGP, factor_OG
    return [finish(state) for state in states], {"error_before": first, "error_after": best}


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of different windows, each pass in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _trained(module: nn.Module, state: MovingWeight, options: RoundingOptions, device: torch.device) -> nn.Parameter:
    """A weight for the module that collects gradients, in the type of the products; put in place at once."""
    weight: Any = module.weight
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    parameter = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device))
    module.weight = parameter
    _show(module, state)
    return parameter


def _show(module: nn.Module, state: MovingWeight) -> None:
    weight: Any = module.weight
    render(state, weight.data if isinstance(module, nn.Linear) else weight.data.T)


def _copy(state: MovingWeight) -> tuple[Tensor, Tensor]:
    return state.offset_OGP.clone(), state.factor_OG.clone()


def _loss(
    block: nn.Module,
    windows: Windows,
    numbers: Sequence[int],
    arguments_of: Callable[[int], Mapping[str, Any]],
    options: RoundingOptions,
    device: torch.device,
) -> Tensor:
    input_BTC, target_BTC = windows.pick(numbers, device)
    precise: AbstractContextManager[Any] = nullcontext()
    if options.precision == "bfloat16":
        precise = torch.autocast(device.type, dtype=torch.bfloat16)
    with precise:
        output = block(input_BTC.float(), **arguments_of(len(numbers)))
    output_BTC = output[0] if isinstance(output, tuple) else output
    error_BT = (output_BTC.float() - target_BTC.float()).square().mean(-1)
    if options.loss == "relative":
        size_BT = target_BTC.float().square().mean(-1)
        error_BT = error_BT / size_BT.clamp(min=torch.finfo(torch.float32).tiny)
    return error_BT.mean()


def _fixed_windows(count: int, held: int, size: int) -> list[list[int]]:
    """About ``held`` windows spread over all, in batches of ``size``."""
    batches = max(1, min(held, count) // size)
    spread = [number * count // (batches * size) for number in range(batches * size)]
    return [spread[start : start + size] for start in range(0, len(spread), size)]


def _error(
    block: nn.Module,
    windows: Windows,
    fixed: Sequence[Sequence[int]],
    arguments_of: Callable[[int], Mapping[str, Any]],
    options: RoundingOptions,
    device: torch.device,
) -> float:
    with torch.no_grad():
        return sum(float(_loss(block, windows, some, arguments_of, options, device)) for some in fixed) / len(fixed)
