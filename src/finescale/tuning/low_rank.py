"""QLLM's error correction (arXiv 2310.08041): low-rank additions to a block's weights, tuned on the block's output.

Each layer gets W + c * B A with A [R, I] and B [O, R]; only A and B are tuned, by AdamW with a rate that falls linearly
to zero. At the end c * B A is merged into the weight, which is then quantized like any other: nothing remains at run
time. The authors tune quant(W) + c * B A and lose accuracy when they merge; ``forward: merged`` tunes what will be
stored, quant(W + c * B A), gradients passing straight through the rounding. As in their code, the gains and biases of
the norms are tuned too.

Shape legend: O outputs, I inputs, R rank.
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
from finescale.grid import InputRule, WeightScheme
from finescale.models.edges import is_norm
from finescale.tuning.nearest import rounded
from finescale.tuning.reconstruction import (
    Loss,
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
from finescale.tuning.replay import adamw, replayed, set_rates


class LowRankOptions(ReconstructionOptions):
    """Options of the low-rank correction, besides those of ``ReconstructionOptions``; defaults are the paper's.

    Attributes:
        rank: columns of B.
        rate: first step of AdamW.
        iterations: steps per block (10 passes over 128 windows).
        scaling: c; the authors' code has 1 / rank.
        forward: see above; ``unrounded`` tunes W + c * B A beside rounded inputs alone, for solvers that round in
            another way than to nearest, which undo a correction of nearest rounding's errors. ``auto`` is ``merged``
            before round to nearest and ``unrounded`` before every other solver.
        norms: tune the gains and biases of norms too.
        blocks: consecutive blocks that are corrected together, by the output of the last.
    """

    loss: Loss = "mse"
    rank: int = Field(default=4, ge=1)
    rate: float = Field(default=5e-4, gt=0.0)
    iterations: int = Field(default=1280, ge=1)
    batch_size: int = Field(default=1, ge=1)
    scaling: float = Field(default=0.25, gt=0.0)
    forward: Literal["auto", "merged", "sum", "unrounded"] = "auto"
    norms: bool = True
    blocks: int = Field(default=4, ge=1)

    def before(self, nearest: bool) -> LowRankOptions:
        """With ``auto`` settled for a solver that rounds to nearest, or for another one."""
        forward = "merged" if nearest else "unrounded"
        return self.model_copy(update={"forward": forward}) if self.forward == "auto" else self


@dataclass
class _Correction:
    """One layer: its float weight, how it will be rounded, its factors, and its rounded weight without them."""

    weight_OI: Tensor
    scheme: WeightScheme
    a_RI: Tensor
    b_OR: Tensor
    base_OI: Tensor

    def addition(self, scaling: float) -> Tensor:
        return scaling * (self.b_OR @ self.a_RI)


def correct_weights(
    block: nn.Module,
    schemes: Mapping[str, WeightScheme],
    windows: Windows,
    arguments_of: Callable[[int], Mapping[str, Any]],
    rules: Mapping[str, InputRule],
    options: LowRankOptions,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tune low-rank additions to a block's weights.

    Args:
        block: filled with float weights, as they are to be quantized; left as it was, but for tuned norms.
        schemes: of the layers to correct, by path. While tuning they are rounded to nearest, without clipping search.
        windows: the block's inputs and target outputs.
        arguments_of: the block's other arguments for a number of windows.
        rules: how the layers' inputs are rounded, by path.
        options: see ``LowRankOptions``.
        seed: of A and of the order of the windows.
        device: where the block lives.

    Returns:
        The merged weights by path, float32 [O, I], and the error of the rounded block before and after.

    Raises:
        NumericsError: the error is NaN or Inf.
    """
    windows = windows.near(device)
    modules = [block.get_submodule(path) for path in schemes]
    generator = torch.Generator().manual_seed(seed)
    layers = [
        _start(
            shown_weight(module).float().clone(), WeightScheme(s.bits, s.group_size, s.symmetric), options, generator
        )
        for module, s in zip(modules, schemes.values(), strict=True)
    ]
    factors = [factor for layer in layers for factor in (layer.a_RI, layer.b_OR)]
    size = min(options.batch_size, len(windows))
    fixed = fixed_windows(len(windows), options.held, size)
    order = window_batches(len(windows), size, seed, fixed if options.unseen else ())
    hooks = round_inputs(block, rules)
    try:
        with weights_with_gradients(block, modules, options, device):
            _show(modules, layers, options, merged=True)
            first = best = block_error(block, windows, fixed, arguments_of, options, device)
            tuned = factors + (_norm_parameters(block) if options.norms else [])
            optimizer = adamw([(tuned, options.rate)], device)
            for parameter in tuned[len(factors) :]:
                parameter.requires_grad_()
            kept = [value.detach().clone() for value in tuned]
            arguments = arguments_of(size)

            def one(input_BTC: Tensor, target_BTC: Tensor, left: Any) -> None:
                set_rates(optimizer, left)
                _show(modules, layers, options, merged=options.forward in ("auto", "merged"))
                block_loss(block, input_BTC, target_BTC, arguments, options).backward()
                for module, layer in zip(modules, layers, strict=True):
                    _pass_on(gradient_of(module), layer, options.scaling)
                optimizer.step()
                optimizer.zero_grad()

            run = replayed(one, block, device)
            for iteration in range(options.iterations):
                run(*windows.pick(next(order), device), 1 - iteration / options.iterations)
                if is_check(iteration, options.iterations, options.checks):
                    _show(modules, layers, options, merged=True)
                    error = block_error(block, windows, fixed, arguments_of, options, device)
                    if not math.isfinite(error):
                        raise NumericsError("low-rank correction met NaN or Inf; tune with precision float32.")
                    if error < best:
                        best, kept = error, [value.detach().clone() for value in tuned]
            for value, found in zip(tuned, kept, strict=True):
                value.requires_grad_(False).copy_(found)
    finally:
        for hook in hooks:
            hook.remove()
    merged = [layer.weight_OI + layer.addition(options.scaling) for layer in layers]
    return dict(zip(schemes, merged, strict=True)), {"error_before": first, "error_after": best}


def _norm_parameters(block: nn.Module) -> list[Tensor]:
    return [
        parameter for module in block.modules() if is_norm(module) for parameter in module.parameters(recurse=False)
    ]


def _start(weight_OI: Tensor, scheme: WeightScheme, options: LowRankOptions, generator: torch.Generator) -> _Correction:
    """A uniform within 1 / sqrt(I), B zero: the block starts as it is."""
    rows, columns = weight_OI.shape
    a_RI = (torch.rand(options.rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
    b_OR = torch.zeros(rows, options.rank)
    device = weight_OI.device
    return _Correction(weight_OI, scheme, a_RI.to(device), b_OR.to(device), rounded(weight_OI, scheme))


def _show(modules: Sequence[nn.Module], layers: Sequence[_Correction], options: LowRankOptions, merged: bool) -> None:
    for module, layer in zip(modules, layers, strict=True):
        addition_OI = layer.addition(options.scaling)
        if options.forward == "unrounded":
            value_OI = layer.weight_OI + addition_OI
        else:
            value_OI = rounded(layer.weight_OI + addition_OI, layer.scheme) if merged else layer.base_OI + addition_OI
        shown_weight(module).copy_(value_OI)


def _pass_on(gradient_OI: Tensor | None, layer: _Correction, scaling: float) -> None:
    """Gradients of the factors from that of the weight they add to."""
    if gradient_OI is None:
        layer.a_RI.grad = layer.b_OR.grad = None
        return
    gradient_OI = gradient_OI.float()
    layer.a_RI.grad = scaling * (layer.b_OR.T @ gradient_OI)
    layer.b_OR.grad = scaling * (gradient_OI @ layer.a_RI.T)
