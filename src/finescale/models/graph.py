"""How the layers of a block hang together, read off one forward pass: order of execution, shared inputs, norms.

No table of families is needed: two linears share their input when they are called with the same tensor, and a norm
feeds a linear when the tensor it returned is the one the linear was called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.errors import InputError
from finescale.models.experts import Expert
from finescale.models.skeleton import linear_modules


@dataclass(frozen=True)
class Step:
    """Linears of a block that are called with the same input, and the norm that makes this input, if one does."""

    linears: tuple[str, ...]
    norm: str | None = None


def trace_steps(block: nn.Module, hidden_BTI: Tensor, kwargs: Mapping[str, Any]) -> tuple[Step, ...]:
    """The linears of a block in order of execution, those with one input together.

    Args:
        block: filled with weights.
        hidden_BTI: a short input, float [batch, T, I].
        kwargs: what the model passes its blocks besides the hidden states.

    Raises:
        InputError: some linear is never called, so that it could not be calibrated.
    """
    linears = linear_modules(block)
    norms = {name: module for name, module in block.named_modules() if "norm" in type(module).__name__.lower()}
    kept: list[Tensor] = []  # keeps every tensor alive, so that an id is never reused
    made_by: dict[int, str] = {}
    called_with: dict[str, int] = {}
    handles = []

    def after_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            kept.append(output)
            made_by[id(output)] = name

        return hook

    def before_linear(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            called_with.setdefault(name, id(args[0]))

        return hook

    for name, module in norms.items():
        handles.append(module.register_forward_hook(after_norm(name)))
    for name, module in linears.items():
        handles.append(module.register_forward_pre_hook(before_linear(name)))
    try:
        with torch.no_grad():
            block(hidden_BTI, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    experts = {name: module for name, module in block.named_modules() if isinstance(module, Expert)}
    steps = _group(called_with, made_by, experts)
    uncalled = set(linears) - {name for step in steps for name in step.linears}
    if uncalled:
        raise InputError(f"{', '.join(sorted(uncalled))}: never called in a forward pass; the family is not supported.")
    return steps


def _group(called_with: dict[str, int], made_by: dict[int, str], experts: dict[str, Expert]) -> tuple[Step, ...]:
    """Linears by input, in order of the first call. Experts are grouped by structure: routing may leave some unused."""
    groups: dict[Any, list[str]] = {}
    for name, key in called_with.items():
        if not any(name.startswith(expert + ".") for expert in experts):
            groups.setdefault(key, []).append(name)
    steps = [Step(tuple(names), made_by.get(key)) for key, names in groups.items()]
    for expert, module in experts.items():
        names = module.names
        steps.append(Step((f"{expert}.{names.gate}", f"{expert}.{names.up}")))
        steps.append(Step((f"{expert}.{names.down}",)))
    return tuple(steps)
