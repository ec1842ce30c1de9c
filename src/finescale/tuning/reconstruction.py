"""Running a block so that its output can be compared with what it should be, with gradients.

Shape legend: N windows, B windows of a batch, T tokens, C channels, I inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finescale.grid import InputRule
from finescale.tuning.options import TunerOptions

_SMALL_PART = 0.1
Loss = Literal["relative", "mse", "balanced"]


class ReconstructionOptions(TunerOptions):
    """What all tuners of a block's output have in common.

    Attributes:
        loss: ``relative`` divides each token's squared error by the mean square of its output, ``mse`` does not;
            ``balanced`` is the mean of ``relative`` and of the squared error of all tokens over their squared size, in
            which a few huge tokens (attention sinks) weigh as much as all others together.
        first: share of the relative error that the first tokens of the windows have; 0 counts them like all others.
            What a model makes of a first token, its attention sink, spoils every token after it, and few of the
            calibration's tokens are first ones.
        inputs: the block is fed the outputs of the ``quantized`` blocks before it, or of the ``float`` ones.
        target: the outputs to come close to are those of the float block on the ``float`` prefix's outputs or on the
            ``quantized`` prefix's.
        precision: of the block's products; weights, what is tuned and the residual stream stay float32.
        batch_size: windows per step.
        checks: how often the error on some fixed windows is measured; the best of these iterates is kept.
        held: the number of these windows.
        unseen: these windows are not learned from; the best iterate is then the one that does best on other text.
    """

    loss: Loss = "relative"
    first: float = Field(default=0.0, ge=0.0, lt=1.0)
    inputs: Literal["quantized", "float"] = "quantized"
    target: Literal["quantized", "float"] = "float"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = Field(default=2, ge=1)
    checks: int = Field(default=4, ge=1)
    held: int = Field(default=8, ge=1)
    unseen: bool = False


@dataclass(frozen=True)
class Windows:
    """What a block is fed and what it should put out, float [B, T, C] per batch, on the CPU or `near` the block."""

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def __len__(self) -> int:
        return sum(batch.shape[0] for batch in self.inputs)

    def near(self, device: torch.device) -> Windows:
        """The same on a GPU, if it takes only a small part of what is free there."""
        tensors = [*self.inputs, *self.targets]
        if device.type != "cuda" or not tensors:
            return self
        if sum(x_BTC.nbytes for x_BTC in tensors) > torch.cuda.mem_get_info(device)[0] * _SMALL_PART:
            return self
        return Windows([x_BTC.to(device) for x_BTC in self.inputs], [x_BTC.to(device) for x_BTC in self.targets])

    def pick(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some windows, [len(numbers), T, C] each, float32 or better."""
        size = self.inputs[0].shape[0]
        input_BTC, target_BTC = (
            torch.stack([source[n // size][n % size] for n in numbers]).to(device)
            for source in (self.inputs, self.targets)
        )
        precise = torch.promote_types(input_BTC.dtype, torch.float32)
        return input_BTC.to(precise), target_BTC.to(precise)


class RoundInput(torch.autograd.Function):
    """Rounding as at run time. Gradients pass straight through the rounding and into the ranges: x ~ code * scale, and
    the scale of a token follows its largest (and smallest) element, which gets (code - x / scale) dscale / dx too."""

    @staticmethod
    def forward(context: Any, x_TI: Tensor, rule: InputRule) -> Tensor:
        rounded_TI = rule.round(x_TI)
        context.rule = rule
        context.save_for_backward(x_TI, rounded_TI)
        return rounded_TI

    @staticmethod
    def backward(context: Any, gradient_TI: Tensor) -> tuple[Tensor, None]:
        scheme = context.rule.scheme
        if scheme is None or not scheme.dynamic:
            return gradient_TI, None
        x_TI, rounded_TI = context.saved_tensors
        pull_T1 = (gradient_TI.float() * (rounded_TI.float() - x_TI.float())).sum(-1, keepdim=True)
        result_TI = gradient_TI.float().clone()
        if scheme.symmetric:
            ends = [x_TI.abs().argmax(-1, keepdim=True)]
        else:
            ends = [x_TI.argmax(-1, keepdim=True), x_TI.argmin(-1, keepdim=True)]
        values = [x_TI.gather(-1, end_T1).float() for end_T1 in ends]
        if not scheme.symmetric:  # the range always holds zero, which is no element's doing
            values = [values[0].clamp(min=0), values[1].clamp(max=0)]
        span_T1 = sum(value_T1.abs() for value_T1 in values)
        for end_T1, value_T1 in zip(ends, values, strict=True):
            share_T1 = (pull_T1 * value_T1.sign() / span_T1).masked_fill(value_T1 == 0, 0.0)
            result_TI = _added_at(result_TI, end_T1, share_T1)
        return result_TI.to(gradient_TI.dtype), None


def _added_at(value_TI: Tensor, place_T1: Tensor, addend_T1: Tensor) -> Tensor:
    """``value_TI`` with one element of each token made larger; it may be changed in place."""
    if value_TI.device.type == "cpu":
        return value_TI.scatter_add_(-1, place_T1, addend_T1)
    # A GPU that is asked for a fixed order sorts what it scatters, which takes longer than a pass over everything.
    here_TI = torch.arange(value_TI.shape[-1], device=value_TI.device) == place_T1
    return torch.where(here_TI, value_TI + addend_T1, value_TI)


def round_inputs(block: nn.Module, rules: Mapping[str, InputRule]) -> list[Any]:
    """Round the inputs of some layers as at run time, gradients passing straight through; returns the hooks."""

    def hook_of(rule: InputRule) -> Any:
        return lambda module, args: (RoundInput.apply(args[0], rule), *args[1:])

    return [
        block.get_submodule(path).register_forward_pre_hook(hook_of(rule))
        for path, rule in rules.items()
        if rule.scheme is not None
    ]


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a GPU, gradients that add up in a fixed order, which those of attention and of gathered channels do not by
    themselves. What PyTorch warns of then is the multiplication library: on one stream it is reproducible anyway. Fused
    attention keeps an order only where errors instead of warnings are asked for, which that library would raise too: it
    is written out instead."""
    if device.type != "cuda":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills


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
        with reproducible(device):
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


def window_batches(count: int, size: int, seed: int, left_out: Sequence[Sequence[int]] = ()) -> Iterator[list[int]]:
    """Endless batches of different windows, each pass in a new order; some are ``left_out`` if enough others remain."""
    generator = torch.Generator().manual_seed(seed)
    never = {number for numbers in left_out for number in numbers}
    never = never if count - len(never) >= size else set()
    while True:
        order = [number for number in torch.randperm(count, generator=generator).tolist() if number not in never]
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def block_loss(
    block: Callable[..., Any],
    input_BTC: Tensor,
    target_BTC: Tensor,
    arguments: Mapping[str, Any],
    options: ReconstructionOptions,
) -> Tensor:
    """The error of a block's output on some windows, a scalar with gradients."""
    precise: AbstractContextManager[Any] = nullcontext()
    if options.precision == "bfloat16":
        precise = torch.autocast(input_BTC.device.type, dtype=torch.bfloat16)
    with precise:
        output = block(input_BTC, **arguments)
    output_BTC = output[0] if isinstance(output, tuple) else output
    error_BT = (output_BTC - target_BTC).square().mean(-1)
    if options.loss == "mse":
        return error_BT.mean()
    size_BT = target_BTC.square().mean(-1)
    least = torch.finfo(torch.float32).tiny
    relative_BT = error_BT / size_BT.clamp(min=least)
    relative = relative_BT.mean()
    if options.first and relative_BT.shape[1] > 1:
        relative = options.first * relative_BT[:, 0].mean() + (1 - options.first) * relative_BT[:, 1:].mean()
    if options.loss == "relative":
        return relative
    return (relative + error_BT.sum() / size_BT.sum().clamp(min=least)) / 2


def fixed_windows(count: int, held: int, size: int) -> list[list[int]]:
    """About ``held`` windows spread over all, in batches of ``size``."""
    batches = max(1, min(held, count) // size)
    spread = [number * count // (batches * size) for number in range(batches * size)]
    return [spread[start : start + size] for start in range(0, len(spread), size)]


def is_check(iteration: int, iterations: int, checks: int) -> bool:
    """Whether the error is measured after this step: ``checks`` times in all, the last time after the last step."""
    return (iteration + 1) * checks % iterations < checks


def block_error(
    block: Callable[..., Any],
    windows: Windows,
    fixed: Sequence[Sequence[int]],
    arguments_of: Callable[[int], Mapping[str, Any]],
    options: ReconstructionOptions,
    device: torch.device,
) -> float:
    """Mean of ``block_loss`` over some batches of windows."""
    with torch.no_grad():
        errors = [block_loss(block, *windows.pick(some, device), arguments_of(len(some)), options) for some in fixed]
    return float(torch.stack(errors).double().mean())
