"""Running a block so that its output can be compared with what it should be, with gradients.

Shape legend: N windows, B windows of a batch, T tokens, C channels, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from finescale.grid import InputRule
from finescale.tuning.options import TunerOptions


class ReconstructionOptions(TunerOptions):
    """What all tuners of a block's output have in common.

    Attributes:
        loss: ``relative`` divides each token's squared error by the mean square of its output, ``mse`` does not.
        inputs: the block is fed the outputs of the ``quantized`` blocks before it, or of the ``float`` ones.
        target: the outputs to come close to are those of the float block on the ``float`` prefix's outputs or on the
            ``quantized`` prefix's.
        precision: of the block's products; weights, what is tuned and the residual stream stay float32.
        batch_size: windows per step.
        checks: how often the error on some fixed windows is measured; the best of these iterates is kept.
        held: the number of these windows.
    """

    loss: Literal["relative", "mse"] = "relative"
    inputs: Literal["quantized", "float"] = "quantized"
    target: Literal["quantized", "float"] = "float"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = Field(default=2, ge=1)
    checks: int = Field(default=4, ge=1)
    held: int = Field(default=8, ge=1)


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


@contextmanager
def weights_with_gradients(
    block: nn.Module, modules: Sequence[Any], options: ReconstructionOptions, device: torch.device
) -> Iterator[None]:
    """Give some layers empty weights that collect gradients, in the type of the products, and the rest of the block
    float32; afterwards everything is as it was."""
    originals: list[Any] = [module.weight for module in modules]
    before = originals[0].dtype
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    empty = [nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device)) for weight in originals]
    try:
        for module in modules:
            module.weight = None
        block.float()
        for module, parameter in zip(modules, empty, strict=True):
            module.weight = parameter
        yield
    finally:
        for module in modules:
            module.weight = None
        block.to(before)
        for module, original in zip(modules, originals, strict=True):
            module.weight = original


def shown_weight(module: nn.Module) -> Tensor:
    """The weight to write into, [O, I] whatever the layer's orientation."""
    weight: Any = module.weight
    return weight.data if isinstance(module, nn.Linear) else weight.data.T


def gradient_of(module: nn.Module) -> Tensor | None:
    """The gradient of the weight, [O, I]; None where an expert got no token. It is forgotten by the module."""
    weight: Any = module.weight
    gradient: Tensor | None = weight.grad
    weight.grad = None
    return gradient if gradient is None or isinstance(module, nn.Linear) else gradient.T


def window_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of different windows, each pass in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def block_loss(
    block: nn.Module,
    windows: Windows,
    numbers: Sequence[int],
    arguments_of: Callable[[int], Mapping[str, Any]],
    options: ReconstructionOptions,
    device: torch.device,
) -> Tensor:
    """The error of a block's output on some windows, a scalar with gradients."""
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


def fixed_windows(count: int, held: int, size: int) -> list[list[int]]:
    """About ``held`` windows spread over all, in batches of ``size``."""
    batches = max(1, min(held, count) // size)
    spread = [number * count // (batches * size) for number in range(batches * size)]
    return [spread[start : start + size] for start in range(0, len(spread), size)]


def is_check(iteration: int, iterations: int, checks: int) -> bool:
    """Whether the error is measured after this step: ``checks`` times in all, the last time after the last step."""
    return (iteration + 1) * checks % iterations < checks


def block_error(
    block: nn.Module,
    windows: Windows,
    fixed: Sequence[Sequence[int]],
    arguments_of: Callable[[int], Mapping[str, Any]],
    options: ReconstructionOptions,
    device: torch.device,
) -> float:
    """Mean of ``block_loss`` over some batches of windows."""
    with torch.no_grad():
        return sum(float(block_loss(block, windows, some, arguments_of, options, device)) for some in fixed) / len(
            fixed
        )
