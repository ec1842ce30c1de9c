"""Which modules a norm feeds, read off one forward pass of a block.

A scale put into the gain of a norm can be taken out again in everything that reads the norm's output: the linears, and
with experts the router too. No table of families is needed, see `finescale.models.graph`.
Shape legend: B sequences, T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.models.experts import Expert, UnfusedExperts


@dataclass(frozen=True)
class Edge:
    """A norm and all modules with a weight [O, I] (or [I, O] for Conv1D) that read its output, by path in the block."""

    norm: str
    consumers: tuple[str, ...]


def trace_edges(block: nn.Module, hidden_BTI: Tensor, kwargs: Mapping[str, Any]) -> tuple[Edge, ...]:
    """The norms of a block that feed linears, in order of execution.

    Args:
        block: filled with weights.
        hidden_BTI: a short input, float [B, T, I].
        kwargs: what the model passes its blocks besides the hidden states.
    """
    kept: list[Tensor] = []  # keeps every output alive, so that an address is never reused
    made_by: dict[int, str] = {}
    consumers: dict[str, list[str]] = {}

    def after_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            kept.append(output)
            made_by[output.data_ptr()] = name
            consumers.setdefault(name, [])

        return hook

    def before(name: str, paths: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            # Views (experts flatten batch and time) share the address of what they look at.
            norm = made_by.get(first.data_ptr()) if isinstance(first, Tensor) and first.numel() else None
            if norm is not None:
                consumers[norm] += [path for path in paths if path not in consumers[norm]]

        return hook

    handles = []
    for name, module in block.named_modules():
        if is_norm(module):
            handles.append(module.register_forward_hook(after_norm(name)))
        elif isinstance(module, UnfusedExperts):
            inside = tuple(
                f"{name}.{index}.{leaf}"
                for index, expert in enumerate(module)
                if isinstance(expert, Expert)
                for leaf in (expert.names.gate, expert.names.up)
            )
            handles.append(module.register_forward_pre_hook(before(name, inside), with_kwargs=True))
        elif _has_matrix(module):
            handles.append(module.register_forward_pre_hook(before(name, (name,)), with_kwargs=True))
    try:
        with torch.no_grad():
            block(hidden_BTI, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(Edge(norm, tuple(paths)) for norm, paths in consumers.items() if paths)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of any kind, by the name of its class."""
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2
