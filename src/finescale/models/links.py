"""Which linear's outputs a later linear's inputs are proportional to, found by trying.

When channel j of ``up_proj`` is doubled, channel j of ``down_proj``'s input doubles: a scale can move from one to the
other. The same holds for values and the attention's output (each value channel serves several heads under grouped
queries), and across a ReLU, but not across other activations. Instead of a table of families each linear is scaled and
the inputs of the later ones are looked at.
Shape legend: B sequences, T tokens, I inputs of the consumer, O outputs of the producer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.models.graph import Step
from finescale.models.skeleton import weight_OI_of

_LEVELS = 128
_TOLERANCE = 1e-3
"""Of a measured ratio; the levels lie 1 / 128 apart."""
_TOKENS = 16


@dataclass(frozen=True)
class Link:
    """Input channel i of the consumers is proportional to output channel ``channel_I[i]`` of the producer.

    Attributes:
        producer: path of a linear.
        consumers: paths of linears with one input.
        channel_I: int64 [I].
    """

    producer: str
    consumers: tuple[str, ...]
    channel_I: Tensor


def trace_links(
    block: nn.Module, hidden_BTI: Tensor, kwargs: Mapping[str, Any], steps: Sequence[Step]
) -> tuple[Link, ...]:
    """The links between the linears of a block.

    Args:
        block: filled with weights.
        hidden_BTI: an input, float [B, T, I]; its first tokens are used.
        kwargs: what the model passes its blocks besides the hidden states.
        steps: linears by shared input, in order of execution.
    """
    open_steps = [step for step in steps if step.norm is None]
    producers = [path for step in steps for path in step.linears]
    plain = _leader_inputs(block, hidden_BTI, kwargs, open_steps, None)
    links = []
    for producer in producers:
        rows = weight_OI_of(block.get_submodule(producer)).shape[0]
        digits = [torch.arange(rows) % _LEVELS, torch.arange(rows) // _LEVELS]
        ratios: dict[str, list[Tensor | None]] = {step.linears[0]: [] for step in open_steps}
        for digit_O in digits:
            scale_O = 1 + digit_O.to(hidden_BTI.device, hidden_BTI.dtype) / _LEVELS
            scaled = _leader_inputs(block, hidden_BTI, kwargs, open_steps, (producer, scale_O))
            for leader, found in ratios.items():
                found.append(_ratio(plain.get(leader), scaled.get(leader)))
        for step in open_steps:
            channel_I = _decode(ratios[step.linears[0]], rows)
            if channel_I is not None and producer not in step.linears:
                links.append(Link(producer, step.linears, channel_I))
    return tuple(links)


def _leader_inputs(
    block: nn.Module,
    hidden_BTI: Tensor,
    kwargs: Mapping[str, Any],
    steps: Sequence[Step],
    scaled: tuple[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Inputs of the first linear of each step, float [tokens, I], with one linear's outputs scaled."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for step in steps:
        name = step.linears[0]
        module = block.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]})))
    if scaled is not None:
        path, scale_O = scaled
        handles.append(block.get_submodule(path).register_forward_hook(lambda _, args, output: output * scale_O))
    try:
        with torch.no_grad():
            block(hidden_BTI, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: x.reshape(-1, x.shape[-1]).clone() for name, x in inputs.items()}


def _ratio(plain_TI: Tensor | None, scaled_TI: Tensor | None) -> Tensor | None:
    """What each channel was multiplied by, float64 [I], NaN where it was zero all along (behind a ReLU); None when some
    channel was not multiplied by one number."""
    if plain_TI is None or scaled_TI is None or plain_TI.shape != scaled_TI.shape:
        return None
    plain_TI, scaled_TI = plain_TI.double(), scaled_TI.double()
    energy_I = plain_TI.square().sum(0)
    ratio_I = (plain_TI * scaled_TI).sum(0) / energy_I
    rest_I = (scaled_TI - plain_TI * ratio_I).square().sum(0)
    if bool((rest_I > _TOLERANCE**2 * energy_I).any()):  # a comparison with NaN is false
        return None
    return ratio_I


def _decode(ratios: Sequence[Tensor | None], rows: int) -> Tensor | None:
    """Producer channels from the two digits that each input channel's ratios spell."""
    low_I, high_I = ratios
    if low_I is None or high_I is None:
        return None
    seen_I = ~(low_I.isnan() | high_I.isnan())
    digits = [(ratio_I[seen_I] - 1) * _LEVELS for ratio_I in (low_I, high_I)]
    whole = [digit_i.round() for digit_i in digits]
    if any(bool(((a - b).abs() > 0.3).any()) for a, b in zip(digits, whole, strict=True)):
        return None
    channel_i = (whole[0] + whole[1] * _LEVELS).long()
    # All ratios 1: nothing follows this producer, unless it has one channel only.
    if channel_i.numel() == 0 or bool((channel_i < 0).any()) or bool((channel_i >= rows).any()):
        return None
    if rows > 1 and int(channel_i.max()) == 0:
        return None
    channel_I = torch.arange(seen_I.shape[0], device=seen_I.device)
    if not bool(seen_I.all()) and (seen_I.shape[0] != rows or not torch.equal(channel_I[seen_I], channel_i)):
        return None  # channels that were silent can only be guessed when all others map to themselves
    channel_I[seen_I] = channel_i
    return channel_I
