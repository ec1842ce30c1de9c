"""What a change of some linears does to the output of the module around them, on a few captured calls.

Searches (AWQ's scales, QLLM's threshold) try many weights for the same inputs: the calls are captured once.
Shape legend: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finescale.grid import InputRule, QuantizedWeight, fit_grid, quantize_to_grid
from finescale.transforms.view import BlockView, Target


@dataclass(frozen=True)
class Probe:
    """Captured calls of a module inside a block, and what it put out.

    Attributes:
        module: the smallest module around some linears; a linear itself when there is only one.
        prefix: its path in the block, with a dot unless it is the block.
        calls: positional and keyword arguments.
        outputs: float tensors, one per call.
    """

    module: nn.Module
    prefix: str
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    outputs: tuple[Tensor, ...]

    def error(self, weights: Mapping[str, Tensor], rules: Mapping[str, InputRule]) -> float:
        """Mean squared change of the output when linears get other weights and inputs.

        Args:
            weights: float [O, J] by path in the block.
            rules: what happens to the inputs of linears, by path.
        """
        owners = {path: self._linear(path) for path in {*weights, *rules}}
        saved = {path: owners[path]._parameters["weight"] for path in weights}
        handles = [owners[path].register_forward_pre_hook(_hook(rule)) for path, rule in rules.items()]
        try:
            for path, weight_OJ in weights.items():
                value = weight_OJ.T if isinstance(owners[path], Conv1D) else weight_OJ
                owners[path]._parameters["weight"] = nn.Parameter(value, requires_grad=False)
            total, count = 0.0, 0
            for (args, kwargs), expected in zip(self.calls, self.outputs, strict=True):
                total += float((_first(self.module, args, kwargs) - expected).double().square().sum())
                count += expected.numel()
        finally:
            for path, parameter in saved.items():
                owners[path]._parameters["weight"] = parameter
            for handle in handles:
                handle.remove()
        return total / max(count, 1)

    def _linear(self, path: str) -> nn.Module:
        return self.module.get_submodule(path.removeprefix(self.prefix)) if path + "." != self.prefix else self.module


def _hook(rule: InputRule) -> Any:
    return lambda module, args: (rule.round(rule.rearrange(args[0])), *args[1:])


def _first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = module(*args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def common_module(paths: Sequence[str]) -> str:
    """Path of the smallest module that holds all of these; "" is the block."""
    return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")


def make_probe(view: BlockView, linears: Sequence[str], sequences: int) -> Probe:
    """Capture the calls of the module around some linears on the first sequences of the first batch.

    Args:
        view: the block.
        linears: paths that will be changed together.
        sequences: how many sequences to run.
    """
    path = common_module(linears)
    module = view.block.get_submodule(path) if path else view.block
    if isinstance(module, nn.ModuleList):  # experts have no output of their own
        path = path.rpartition(".")[0]
        module = view.block.get_submodule(path) if path else view.block
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        view.run_some(sequences)
    finally:
        handle.remove()
    outputs = tuple(_first(module, args, kwargs) for args, kwargs in calls)
    return Probe(module, path + "." if path else "", tuple(calls), outputs)


def rounded_weight(weight_OI: Tensor, target: Target) -> Tensor:
    """The weight rounded to nearest on the grid it will get, min/max range, in its own type."""
    grid = fit_grid(weight_OI, target.search_scheme(), torch.float32)
    return QuantizedWeight(quantize_to_grid(weight_OI.float(), grid), grid).dequantize().to(weight_OI.dtype)
