"""QLLM's adaptive channel reassembly (arXiv 2310.08041): a threshold per layer input, found by the output's error.

Linears that share an input (queries, keys and values; gate and up; all experts of a layer) are reassembled alike. The
input of the attention's output projection is left alone, as published. What the runtime does is one gather with gains
next to the rounding of the input, see `finescale.grid.inputs.Gather`.
Shape legend: O outputs, I channels, J channels in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from finescale.calibration.statistics import InputRange, Moments
from finescale.grid import InputRule
from finescale.models.skeleton import replace_weight_OI, weight_OI_of
from finescale.transforms.probe import make_probe, rounded_weight
from finescale.transforms.reassembly import Distance, Reassembly, assemble, disassemble, merge_scores, prune, splits
from finescale.transforms.view import BlockView, Changes, TransformOptions

Mode = Literal["assembly", "disassembly", "pruning"]
_LEAST_STEPS = 100
_STEP = 0.5
"""The published walk: at least 100 thresholds from the largest channel maximum to the smallest, at most 0.5 apart."""


class QllmOptions(TransformOptions):
    """Options of the reassembly.

    ``max_expansion`` bounds the channels that splitting may add, as a share of the width (published scripts: 0.2, which
    recovers less where outliers are many; among the candidates the least error decides, so that a wide bound costs
    nothing).
    ``expansion`` sets the share instead of searching. ``candidates`` bounds how many numbers of extra channels are
    scored, next to none at all; 0 scores every one. ``mode`` and ``distance`` are for ablations. ``down`` also
    reassembles the input of the down projection. ``sequences`` of the calibration text judge the candidates.
    """

    max_expansion: float = Field(default=0.5, gt=0, le=1)
    expansion: float | None = Field(default=None, ge=0, le=1)
    candidates: int = Field(default=20, ge=0)
    mode: Mode = "assembly"
    distance: Distance = "exact"
    down: bool = True
    sequences: int = Field(default=4, ge=1)


@dataclass(frozen=True)
class Site:
    """One input: the linears that read it, and their leader, whose input is looked at."""

    name: str
    linears: tuple[str, ...]


def apply_qllm(view: BlockView, options: QllmOptions) -> Changes:
    """Search and apply a reassembly for each input of the block."""
    facts: dict[str, dict[str, Any]] = {}
    inputs: dict[str, InputRule] = {}
    # All are searched on the untouched block: a changed weight without its gather would spoil what comes after it.
    found = []
    wanted = sites(view, options.down)
    seen = statistics(view, wanted)
    for site in wanted:
        chosen, facts[site.name] = search(view, site, seen[site.name], options)
        if chosen is not None:
            found.append((site, chosen))
    for site, chosen in found:
        rule = InputRule(gather=chosen.gather())
        for path in site.linears:
            module = view.block.get_submodule(path)
            replace_weight_OI(module, chosen.weight(weight_OI_of(module)))
            inputs[path] = rule
    return Changes(facts, inputs)


@dataclass
class Seen:
    """Range and second moments of one input over the calibration text."""

    range: InputRange
    moments: Moments

    def add(self, x_TI: Tensor) -> None:
        self.range.add(x_TI)
        self.moments.add(x_TI)


def statistics(view: BlockView, wanted: Sequence[Site]) -> dict[str, Seen]:
    """What the calibration text puts into each site, found in one pass."""
    seen: dict[str, Seen] = {}
    handles = []
    for site in wanted:
        module = view.block.get_submodule(site.name)
        width = weight_OI_of(view.block.get_submodule(site.linears[0])).shape[1]
        empty = Moments(torch.zeros(width, width, device=view.device))
        note = seen[site.name] = Seen(InputRange.empty(width, view.device), empty)
        if site.name == site.linears[0]:
            handles.append(module.register_forward_pre_hook(lambda _, args, note=note: note.add(args[0])))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, note=note: note.add(output)))
    try:
        view.run_all()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def sites(view: BlockView, down: bool) -> list[Site]:
    """The inputs to reassemble: norms' outputs and, with ``down``, inputs of linears outside of the attention."""
    found: list[Site] = []
    fed: set[str] = set()
    for edge in view.edges:
        fed.update(edge.consumers)
        linears = tuple(path for path in edge.consumers if path in view.targets and path not in view.rearranged)
        if linears:
            found.append(Site(edge.norm, linears))
    for step in view.steps if down else ():
        linears = tuple(path for path in step.linears if path in view.targets and path not in view.rearranged)
        if linears and not fed.intersection(step.linears) and not view.in_attention(linears[0]):
            found.append(Site(linears[0], linears))
    return found


def search(view: BlockView, site: Site, seen: Seen, options: QllmOptions) -> tuple[Reassembly | None, dict[str, Any]]:
    """The reassembly of one input with the least output error, and what was found; None for no reassembly."""
    absmax_I = seen.range.absmax_I
    if float(absmax_I.max()) <= 0:
        return None, {"extra": 0, "reason": "no token came"}
    weights = {path: weight_OI_of(view.block.get_submodule(path)) for path in site.linears}
    stacked_OI = torch.cat(list(weights.values()))
    hessian_II = seen.moments.hessian().to(stacked_OI.dtype)
    score_II = merge_scores(hessian_II, stacked_OI, options.distance) if options.mode == "assembly" else None

    def build(theta: float) -> Reassembly:
        parts = disassemble(splits(absmax_I, theta))
        if options.mode == "disassembly":
            return parts
        return assemble(parts, score_II) if score_II is not None else prune(parts, hessian_II, stacked_OI)

    limit = options.max_expansion if options.expansion is None else options.expansion
    thetas = thresholds(absmax_I, int(limit * absmax_I.shape[0]))
    if options.expansion is not None:
        if not thetas:
            return None, {"extra": 0}
        chosen = build(thetas[-1][0])
        return chosen, {"extra": thetas[-1][1], "theta": thetas[-1][0], "width": chosen.width}
    if options.candidates and len(thetas) > options.candidates:
        picks = torch.linspace(0, len(thetas) - 1, options.candidates).round().long().tolist()
        thetas = [thetas[pick] for pick in dict.fromkeys(picks)]
    probe = make_probe(view, site.linears, options.sequences)
    plain = probe.error(*_rounded(view, weights, None))
    best: tuple[float, float, int, Reassembly | None] = (plain, float(absmax_I.max()), 0, None)
    for theta, extra in thetas:
        candidate = build(theta)
        error = probe.error(*_rounded(view, weights, candidate))
        if error < best[0]:
            best = (error, theta, extra, candidate)
    error, theta, extra, found = best
    return found, {
        "extra": extra,
        "theta": theta,
        "width": absmax_I.shape[0] if found is None else found.width,
        "error": error,
        "error_without": plain,
        "candidates": len(thetas),
    }


def thresholds(absmax_I: Tensor, most: int) -> list[tuple[float, int]]:
    """Thresholds walked down from the largest channel maximum that change the number of extra channels, with that
    number, up to ``most`` (QLLM, section 3.3, in the steps of the authors' code)."""
    absmax_I = absmax_I.cpu()  # a GPU would be asked for a number at each of up to thousands of steps
    high, low = float(absmax_I.max()), float(absmax_I.min())
    steps = max(_LEAST_STEPS, int(high / _STEP))
    found: list[tuple[float, int]] = []
    for step in range(1, steps):
        theta = high - step * (high - low) / steps
        extra = int((splits(absmax_I, theta) - 1).sum()) if theta > 0 else most + 1
        if extra > most:
            break
        if extra > (found[-1][1] if found else 0):
            found.append((theta, extra))
    return found


def _rounded(
    view: BlockView, weights: Mapping[str, Tensor], chosen: Reassembly | None
) -> tuple[dict[str, Tensor], dict[str, InputRule]]:
    gather = None if chosen is None else chosen.gather()
    rounded = {
        path: rounded_weight(weight_OI if chosen is None else chosen.weight(weight_OI), view.targets[path])
        for path, weight_OI in weights.items()
    }
    return rounded, {path: view.targets[path].rule(gather) for path in weights}
