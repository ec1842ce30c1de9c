"""AWQ (arXiv 2306.00978): scales that spare the weights of large activations, then clipped ranges, both by search.

    s = mean|x|^r, normalized by sqrt(max s * min s)      W' = W diag(s), x' = x / s      r in 0, 1/20, ..., 19/20

The r whose rounded weights disturb the module around them least is taken: the attention for queries, keys and values,
the MLP for its first layers, the layer itself otherwise. Scales go into the norm before, or into the linear before
where channels correspond (values -> attention output, up -> down projection, across a ReLU); under grouped queries a
value channel gets one scale for all heads it serves.
Shape legend: O outputs, I inputs, T tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from finescale.calibration.statistics import Moments
from finescale.grid import Gather, contiguous_groups, number_of_groups
from finescale.models.links import Link
from finescale.models.skeleton import weight_OI_of
from finescale.transforms.probe import Probe, make_probe, rounded_weight
from finescale.transforms.scaling import divide_link, divide_norm
from finescale.transforms.view import BlockView, Changes, Limits, Target, TransformOptions

_SMALLEST = 1e-4
_NOT_CLIPPED = ("q_proj", "k_proj", "query_key_value", "c_attn")


class AwqOptions(TransformOptions):
    """``steps`` ratios are tried and ``clip_steps`` ranges, down to ``1 - clip_depth`` of the largest weight;
    ``sequences`` of the calibration text judge the scales, ``clip_tokens`` tokens the ranges. ``links`` moves scales
    between linears too, not only out of norms."""

    steps: int = Field(default=20, ge=1)
    clip: bool = True
    clip_steps: int = Field(default=10, ge=1)
    clip_depth: float = Field(default=0.5, gt=0, lt=1)
    clip_tokens: int = Field(default=512, ge=1)
    sequences: int = Field(default=4, ge=1)
    links: bool = True


def activation_scale(mean_abs_I: Tensor, ratio: float) -> Tensor:
    """mean|x|^ratio, at least 1e-4, normalized so that the largest and the smallest are inverse, float [I]."""
    scale_I = mean_abs_I.double().pow(ratio).clamp(min=_SMALLEST)
    return (scale_I / (scale_I.max() * scale_I.min()).sqrt()).to(mean_abs_I.dtype)


def apply_awq(view: BlockView, options: AwqOptions) -> Changes:
    """Search and apply scales, then search clipped ranges."""
    facts = {}
    links = view.links() if options.links else ()
    norms = [edge.norm for edge in view.edges if any(path in view.targets for path in edge.consumers)]
    leaders = [path for link in links for path in _first_wanted(view, link)]
    ranges = view.ranges(norms, leaders)  # one scale leaves all other inputs as they are
    for edge in view.edges:
        wanted = [path for path in edge.consumers if path in view.targets]
        if wanted:
            mean_I = ranges[edge.norm].mean_abs_I
            probe = make_probe(view, wanted, options.sequences)
            ratio, scale_I = best_scale(probe, view, wanted, mean_I, None, options.steps)
            consumers = [view.block.get_submodule(path) for path in edge.consumers]
            divide_norm(view.block.get_submodule(edge.norm), consumers, scale_I, view.stored)
            facts[edge.norm] = {"ratio": ratio}
    for link in links:
        wanted = [path for path in link.consumers if path in view.targets]
        if wanted:
            mean_I = ranges[wanted[0]].mean_abs_I
            probe = make_probe(view, wanted, options.sequences)
            ratio, scale_I = best_scale(probe, view, wanted, mean_I, link, options.steps)
            scale_O = torch.ones(weight_OI_of(view.block.get_submodule(link.producer)).shape[0], dtype=scale_I.dtype)
            scale_O = scale_O.to(scale_I.device).index_copy(0, link.channel_I.to(scale_I.device), scale_I)
            divide_link(view.block, link, scale_O)
            facts[wanted[0]] = {"ratio": ratio}
    return Changes(facts, limits=_search_limits(view, options) if options.clip else {})


def _first_wanted(view: BlockView, link: Link) -> list[str]:
    return [path for path in link.consumers if path in view.targets][:1]


def best_scale(
    probe: Probe, view: BlockView, paths: Sequence[str], mean_abs_I: Tensor, link: Link | None, steps: int
) -> tuple[float, Tensor]:
    """The ratio, and its scale [I], whose rounded weights disturb the probed module least; ties go to the smaller.

    Args:
        probe: the module around the linears.
        view: the block.
        paths: linears that share the scaled input.
        mean_abs_I: mean magnitude of the input.
        link: the linear before, whose channels bind several inputs together; None after a norm.
        steps: number of ratios.
    """
    if link is not None:
        mean_abs_I = _bound_together(mean_abs_I, link.channel_I.to(mean_abs_I.device))
    best: tuple[float, float, Tensor] | None = None
    for step in range(steps):
        scale_I = activation_scale(mean_abs_I, step / steps)
        weights, rules = {}, {}
        for path in paths:
            target = view.targets[path]
            rounded_OI = rounded_weight(weight_OI_of(view.block.get_submodule(path)) * scale_I, target)
            if target.activations is None:
                weights[path] = rounded_OI / scale_I
            else:  # the input is rounded after it was divided
                identity_1I = torch.arange(scale_I.shape[0], device=scale_I.device)[None]
                gather = Gather(identity_1I, (1 / scale_I)[None])
                weights[path], rules[path] = rounded_OI, target.rule(gather)
        error = probe.error(weights, rules)
        if best is None or error < best[0]:
            best = (error, step / steps, scale_I)
    assert best is not None
    return best[1], best[2]


def _bound_together(mean_abs_I: Tensor, channel_I: Tensor) -> Tensor:
    """The mean over all inputs that come from one producer channel, at each of them, float [I]."""
    count_O = torch.zeros(int(channel_I.max()) + 1, dtype=mean_abs_I.dtype, device=mean_abs_I.device)
    # Sums in a fixed order on a GPU too, which index_add has not.
    total_O = count_O.index_put((channel_I,), mean_abs_I, accumulate=True)
    count_O = count_O.index_put((channel_I,), torch.ones_like(mean_abs_I), accumulate=True)
    return (total_O / count_O.clamp(min=1))[channel_I]


def _search_limits(view: BlockView, options: AwqOptions) -> Mapping[str, Limits]:
    """The range that each group covers, by path; queries and keys keep theirs."""
    limits: dict[str, Limits] = {}
    for step in view.steps:
        wanted = [path for path in step.linears if path in view.targets and path.rpartition(".")[2] not in _NOT_CLIPPED]
        if not wanted:
            continue
        moments = _sampled_moments(view, wanted[0], options)
        for path in wanted:
            weight_OI = weight_OI_of(view.block.get_submodule(path))
            limit_OG = clip_limits(
                weight_OI, moments.hessian(), view.targets[path], options.clip_steps, options.clip_depth
            )
            limits[path] = Limits(-limit_OG, limit_OG)
    return limits


def _sampled_moments(view: BlockView, path: str, options: AwqOptions) -> Moments:
    module = view.block.get_submodule(path)
    width = weight_OI_of(module).shape[1]
    moments = Moments(torch.zeros(width, width, device=view.device))

    def take(_: object, args: tuple[Tensor, ...]) -> None:
        x_TI = args[0].reshape(-1, width)
        stride = max(x_TI.shape[0] // options.clip_tokens, 1)
        moments.add(x_TI[::stride][: options.clip_tokens])

    handle = module.register_forward_pre_hook(take)
    try:
        view.run_some(options.sequences)
    finally:
        handle.remove()
    return moments


def clip_limits(weight_OI: Tensor, hessian_II: Tensor, target: Target, steps: int, depth: float) -> Tensor:
    """For each group the share of its largest weight, in steps from 1 down to 1 - depth, whose rounding changes the
    group's part of the output least (AWQ's search); float32 [O, G].

    Args:
        weight_OI: float [O, I].
        hessian_II: mean of x x^T over the sampled tokens.
        target: the weight's scheme.
        steps: number of ranges tried; the last is one step above 1 - depth.
        depth: see above.
    """
    weight_OI, columns = weight_OI.float(), weight_OI.shape[1]
    size = columns if target.scheme.group_size == -1 else target.scheme.group_size
    group_of_I = contiguous_groups(columns, target.scheme.group_size, weight_OI.device)
    groups = number_of_groups(columns, target.scheme.group_size)
    largest_OG = torch.stack([part_OI.abs().amax(1) for part_OI in weight_OI.split(size, dim=1)], 1)
    best_OG, least_OG = largest_OG.clone(), torch.full_like(largest_OG, torch.inf)
    for step in range(steps):
        limit_OG = largest_OG * (1 - depth * step / steps)
        limit_OI = limit_OG[:, group_of_I]
        change_OI = rounded_weight(weight_OI.clamp(-limit_OI, limit_OI), target) - weight_OI
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            change_Oi = change_OI[:, part]
            error_O = ((change_Oi @ hessian_II[part, part].float()) * change_Oi).sum(1)
            better_O = error_O < least_OG[:, group]
            least_OG[:, group] = torch.where(better_O, error_O, least_OG[:, group])
            best_OG[:, group] = torch.where(better_O, limit_OG[:, group], best_OG[:, group])
    return best_OG
