"""OmniQuant (arXiv 2308.13137): clipped ranges and equivalent scales, both learned on the block's output.

Learned weight clipping: the range of each group of weights is multiplied by sigmoid(u), one u for each end (one for
both when the scheme is symmetric), starting at 4, that is 0.98.

Learned equivalent transformation: x' = (x - shift) / s behind a norm, W' = W s, b' = b + W shift in everything that
reads it; x' = x / s between values and the attention's output. It starts from SmoothQuant's s. Shifts need biases to go
to.

Everything is tuned together by AdamW through the rounding of weights and inputs, gradients passing straight through the
rounding but not through the ranges: where a range comes from the largest element, its gradient goes there. At the end
scales and shifts are moved into norms and weights, which keeps what the block computes, and the solver gets the ranges.
Differences to the authors' code: s is tuned as its logarithm, rates fall linearly to zero, and the best of some
iterates is kept, or the block left as it is where none is better. There is no scale between queries and keys, which
only their own rounding would notice.

Shape legend: O outputs, I inputs, G groups, P columns of one group, B windows of a batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from finescale.errors import InputError, NumericsError
from finescale.models.edges import Edge
from finescale.models.links import Link
from finescale.models.skeleton import weight_OI_of
from finescale.transforms.scaling import divide_link, divide_norm, largest_weight, shift_norm
from finescale.transforms.smoothquant import smoothing_scale
from finescale.transforms.view import BlockView, Changes, Limits, TransformOptions
from finescale.tuning.moving import grouped
from finescale.tuning.nearest import ranges, rounded
from finescale.tuning.reconstruction import (
    Loss,
    ReconstructionOptions,
    block_error,
    block_loss,
    fixed_windows,
    is_check,
    reproducible,
    round_inputs,
    window_batches,
)
from finescale.tuning.replay import adamw, replayed, set_rates

_START = 4.0


class OmniQuantOptions(ReconstructionOptions, TransformOptions):
    """Options of OmniQuant, besides those of ``ReconstructionOptions``; defaults are the authors'.

    Attributes:
        clip: learn ranges.
        equivalence: learn scales and shifts.
        links: also between values and the attention's output; ``all`` between any linears whose channels correspond.
        alpha: of the scales' start (SmoothQuant); published 0.5, for W4A4 0.75.
        clip_rate: first step of AdamW on the ranges.
        scale_rate: on scales and shifts.
        iterations: steps per block (20 passes over 128 windows).
    """

    loss: Loss = "mse"
    clip: bool = True
    equivalence: bool = True
    links: Literal["none", "attention", "all"] = "attention"
    alpha: float = Field(default=0.5, ge=0, le=1)
    clip_rate: float = Field(default=1e-2, gt=0.0)
    scale_rate: float = Field(default=5e-3, gt=0.0)
    iterations: int = Field(default=2560, ge=1)
    batch_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> OmniQuantOptions:
        if not self.clip and not self.equivalence:
            raise ValueError("clip and equivalence are both false: nothing is left to learn")
        return self


@dataclass
class _EdgeScale:
    """What is learned of a norm's output: log s and shift, float [I]; the shift is None where it has no place to go."""

    edge: Edge
    log_I: Tensor
    shift_I: Tensor | None


@dataclass
class _LinkScale:
    """What is learned between two linears: log s of the producer's channels, float [O]."""

    link: Link
    log_O: Tensor


@dataclass
class _Learned:
    """All that is learned of a block; ``clips`` by path, the ends' u, float [O, G] each (one for both if symmetric)."""

    edges: list[_EdgeScale]
    links: list[_LinkScale]
    clips: dict[str, tuple[Tensor, ...]]

    def scales(self) -> list[Tensor]:
        shifts = [part.shift_I for part in self.edges if part.shift_I is not None]
        return [part.log_I for part in self.edges] + shifts + [part.log_O for part in self.links]

    def ends(self) -> list[Tensor]:
        return [end for ends in self.clips.values() for end in ends]


def apply_omniquant(view: BlockView, options: OmniQuantOptions) -> Changes:
    """Learn ranges, scales and shifts, and move scales and shifts into the block.

    Raises:
        InputError: activations have fixed scales, which no calibration could give before the scales are learned.
        NumericsError: the error is NaN or Inf.
    """
    assert view.learning is not None
    if any(t.activations is not None and not t.activations.dynamic for t in view.targets.values()):
        raise InputError("omniquant learns through scales per token; set activations.granularity token.")
    weights = {path: weight_OI_of(view.block.get_submodule(path)) for path in view.targets}
    learned = _start(view, weights, options)
    if not learned.scales() + learned.ends():
        return Changes()
    facts = _learn(view, learned, options)
    if facts["block"]["error_after"] >= facts["block"]["error_before"]:
        return Changes(facts)  # nothing better than the block as it is was found
    for edge_part in learned.edges:
        norm = view.block.get_submodule(edge_part.edge.norm)
        consumers = [view.block.get_submodule(path) for path in edge_part.edge.consumers]
        if edge_part.shift_I is not None:
            shift_norm(norm, consumers, edge_part.shift_I.detach(), view.stored)
        applied_I = divide_norm(norm, consumers, edge_part.log_I.detach().exp(), view.stored)
        facts[edge_part.edge.norm] = {"scale_min": float(applied_I.min()), "scale_max": float(applied_I.max())}
    for link_part in learned.links:
        divide_link(view.block, link_part.link, link_part.log_O.detach().exp())
    return Changes(facts, limits=_limits(view, learned))


def _start(view: BlockView, weights: Mapping[str, Tensor], options: OmniQuantOptions) -> _Learned:
    edges: list[_EdgeScale] = []
    links: list[_LinkScale] = []
    if options.equivalence:
        wanted = [edge for edge in view.edges if set(edge.consumers).isdisjoint(view.rearranged)]
        ranges = view.ranges(norms=[edge.norm for edge in wanted])
        for edge in wanted:
            consumers = [view.block.get_submodule(path) for path in edge.consumers]
            seen = ranges[edge.norm]
            scale_I = smoothing_scale(seen.absmax_I, largest_weight(consumers), options.alpha)
            homes = [view.block.get_submodule(edge.norm), *consumers]
            shifts = all(isinstance(module._parameters.get("bias"), nn.Parameter) for module in homes)
            shift_I = _working((seen.min_I + seen.max_I) / 2) if shifts else None
            edges.append(_EdgeScale(edge, _working(scale_I).log(), shift_I))
        links = [_LinkScale(link, _link_start(view, link, weights, options.alpha)) for link in _links(view, options)]
    clips = {}
    for path, target in view.targets.items() if options.clip else ():
        rows, columns = weights[path].shape
        size = columns if target.scheme.group_size == -1 else target.scheme.group_size
        ends = 1 if target.scheme.symmetric else 2
        start_OG = _working(weights[path]).new_full((rows, -(-columns // size)), _START)
        clips[path] = tuple(start_OG.clone() for _ in range(ends))
    return _Learned(edges, links, clips)


def _links(view: BlockView, options: OmniQuantOptions) -> list[Link]:
    """The links that get a scale; none into an input that an earlier transform rearranges."""
    if options.links == "none":
        return []
    kept = [link for link in view.links() if set(link.consumers).isdisjoint(view.rearranged)]
    return [link for link in kept if options.links == "all" or view.in_attention(link.consumers[0])]


def _link_start(view: BlockView, link: Link, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """SmoothQuant's scale by producer channel, over all inputs that come from it; log, float [O]."""
    consumers = [view.block.get_submodule(path) for path in link.consumers]
    absmax_I = view.ranges(linears=link.consumers[:1])[link.consumers[0]].absmax_I
    channel_I = link.channel_I.to(absmax_I.device)
    empty_O = absmax_I.new_zeros(weights[link.producer].shape[0])
    act_O, weight_O = (
        empty_O.scatter_reduce(0, channel_I, value_I.to(empty_O), "amax")
        for value_I in (absmax_I, largest_weight(consumers))
    )
    return _working(smoothing_scale(act_O, weight_O, alpha)).log()


def _working(value: Tensor) -> Tensor:
    """Float32, or float64 where the block is."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).clone()


def _learn(view: BlockView, learned: _Learned, options: OmniQuantOptions) -> dict[str, dict[str, Any]]:
    """Tune in place; returns the block's error before anything is learned and after."""
    assert view.learning is not None
    windows = view.learning.windows(options).near(view.device)
    arguments_of, device = view.learning.arguments_of, view.device
    originals = {name: _working(value) for name, value in view.block.named_parameters()}
    tuned = learned.scales() + learned.ends()
    for value in tuned:
        value.requires_grad_()
    optimizer = adamw([(learned.scales(), options.scale_rate), (learned.ends(), options.clip_rate)], device)
    size = min(options.batch_size, len(windows))
    fixed = fixed_windows(len(windows), options.held, size)
    order = window_batches(len(windows), size, view.learning.seed, fixed if options.unseen else ())
    hooks = round_inputs(view.block, {path: target.rule() for path, target in view.targets.items()})

    def as_it_is(values: Mapping[str, Tensor]) -> Any:
        return lambda x_BTI, **kwargs: functional_call(view.block, dict(values), (x_BTI,), kwargs)

    def error(parts: _Learned) -> float:
        with torch.no_grad():
            run = as_it_is(rendered(view, originals, parts))
        return block_error(run, windows, fixed, arguments_of, options, device)

    try:
        with reproducible(device):
            plain = error(_Learned([], [], dict.fromkeys(view.targets, ())))
            best = error(learned)
            kept = [value.detach().clone() for value in tuned]
            arguments = arguments_of(size)

            def one(input_BTI: Tensor, target_BTI: Tensor, left: Any) -> None:
                set_rates(optimizer, left)
                run = as_it_is(rendered(view, originals, learned))
                block_loss(run, input_BTI, target_BTI, arguments, options).backward()
                optimizer.step()
                optimizer.zero_grad()

            step = replayed(one, view.block, device)
            for iteration in range(options.iterations):
                step(*windows.pick(next(order), device), 1 - iteration / options.iterations)
                if is_check(iteration, options.iterations, options.checks):
                    now = error(learned)
                    if not math.isfinite(now):
                        raise NumericsError("omniquant met NaN or Inf; learn with precision float32.")
                    if now < best:
                        best, kept = now, [value.detach().clone() for value in tuned]
    finally:
        for hook in hooks:
            hook.remove()
    for value, found in zip(tuned, kept, strict=True):
        value.requires_grad_(False).copy_(found)
    return {"block": {"error_before": plain, "error_after": min(best, plain)}}


def rendered(view: BlockView, originals: Mapping[str, Tensor], learned: _Learned) -> dict[str, Tensor]:
    """Every parameter of the block with what is learned applied and the weights rounded, by name; differentiable."""
    values = dict(originals)

    def turned(path: str, value: Tensor) -> Tensor:
        return value.T if isinstance(view.block.get_submodule(path), Conv1D) else value

    def rewrite(path: str, weight_OI: Tensor) -> None:
        values[f"{path}.weight"] = turned(path, weight_OI)

    def weight(path: str) -> Tensor:
        return turned(path, values[f"{path}.weight"])

    for part in learned.edges:
        norm, scale_I = part.edge.norm, part.log_I.exp()
        if part.shift_I is not None:
            values[f"{norm}.bias"] = values[f"{norm}.bias"] - part.shift_I
        for path in part.edge.consumers:
            if part.shift_I is not None:
                values[f"{path}.bias"] = values[f"{path}.bias"] + weight(path) @ part.shift_I
            rewrite(path, weight(path) * scale_I)
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if name in values:
                values[name] = values[name] / scale_I
    for link_part in learned.links:
        producer, scale_O = link_part.link.producer, link_part.log_O.exp()
        rewrite(producer, weight(producer) / scale_O[:, None])
        if f"{producer}.bias" in values:
            values[f"{producer}.bias"] = values[f"{producer}.bias"] / scale_O
        for path in link_part.link.consumers:
            rewrite(path, weight(path) * scale_O[link_part.link.channel_I.to(scale_O.device)])
    for path, target in view.targets.items():
        rewrite(path, rounded(weight(path), target.scheme, learned.clips.get(path, ())))
    return values


def _limits(view: BlockView, learned: _Learned) -> dict[str, Limits]:
    """The learned ranges of the weights as they are now."""
    limits = {}
    for path, ends in learned.clips.items():
        weight_OI, scheme = weight_OI_of(view.block.get_submodule(path)), view.targets[path].scheme
        size = weight_OI.shape[1] if scheme.group_size == -1 else scheme.group_size
        low_OG, high_OG = ranges(grouped(weight_OI.float(), -(-weight_OI.shape[1] // size), size), scheme, ends)
        limits[path] = Limits(low_OG.float(), high_OG.float())
    return limits
