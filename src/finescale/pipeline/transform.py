"""Transforming one block before it is solved, and proving that its function is the same.

Shape legend: B sequences, T tokens, I hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from finescale.calibration.capture import run_block
from finescale.calibration.statistics import collect_ranges
from finescale.errors import InputError, NumericsError
from finescale.grid import InputRule, static_range
from finescale.models import Skeleton, Step
from finescale.models.edges import trace_edges
from finescale.models.skeleton import checkpoint_key, layer_name, weight_OI_of
from finescale.pipeline.block import Batches, rearrange_inputs
from finescale.pipeline.plan import LayerPlan
from finescale.recipe import TransformPart
from finescale.transforms import BlockView, Target, some_of
from finescale.transforms.rotation import Outside, Rotation, outside_names, rotated_outside
from finescale.transforms.view import Learning, Limits

PRESERVED = {torch.float64: 1e-8, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}
"""Largest relative change of a block's output that rounding in its type explains."""
CHECKED_SEQUENCES = 2
LOOSELY_KEPT = 0.5
"""The largest change by a transform that trades exactness away, as merging channels does: more is a defect."""


@dataclass(frozen=True)
class Transformed:
    """A block ready to be solved.

    Attributes:
        plans: its layers, with the widths and activations that the transforms chose.
        rules: what happens to the input of each layer, by module path; static ranges are calibrated.
        hooks: what rearranges inputs in the block meanwhile; to be removed when the block is released.
        tensors: tensors besides the quantized weights that are no longer the source's, by name in the checkpoint, as
            they are to be stored.
        facts: what each transform reports of this block.
    """

    plans: dict[str, LayerPlan]
    rules: dict[str, InputRule]
    hooks: list[Any]
    tensors: dict[str, Tensor]
    facts: list[dict[str, Any]]


def transform_block(
    skeleton: Skeleton,
    block: nn.Module,
    index: int,
    plans: Mapping[str, LayerPlan],
    steps: Sequence[Step],
    batches: Batches,
    parts: Sequence[TransformPart],
    device: torch.device,
    stored: torch.dtype,
    rotation: Rotation | None = None,
    learning: Learning | None = None,
) -> Transformed:
    """Apply the recipe's transforms to a block, in order, and settle what happens to the inputs of its layers.

    Args:
        skeleton: for the names of tensors in the checkpoint.
        block: filled with full-precision weights; changed in place.
        index: its number.
        plans: the layers to be quantized, by module path.
        steps: linears by shared input.
        batches: the block's inputs.
        parts: the transforms.
        device: where the block lives.
        stored: float type of the checkpoint.
        rotation: of the residual stream, in which the batches are already.
        learning: windows for transforms that learn.

    Raises:
        NumericsError: a transform changed the block's function.
    """
    before = unplanned(block, plans)
    rules = {path: InputRule(plan.activations) for path, plan in plans.items()}
    hooks: list[Any] = []
    limits: dict[str, Limits] = {}
    facts = []
    for part in parts:
        x_BTI, kwargs = some_of(batches[0], CHECKED_SEQUENCES, device)
        turns = rotation if part.entry().prepare is not None else None
        before_BTI = x_BTI if turns is None else turns.undo(x_BTI)
        expected_BTI = run_block(block, before_BTI, kwargs)
        expected_BTI = expected_BTI if turns is None else turns.apply(expected_BTI)
        edges = trace_edges(block, before_BTI, kwargs)
        targets = {path: Target(plan.scheme, rules[path].scheme) for path, plan in plans.items()}
        rearranged = {path for path, rule in rules.items() if not rule.is_plain}
        view = BlockView(block, index, targets, edges, steps, batches, device, stored, rearranged, turns, learning)
        changes = part.entry().apply(view, part.options_model())
        hooks += rearrange_inputs(block, changes.inputs)
        for path, rule in changes.inputs.items():
            limits.pop(path, None)  # they were of other columns
            rules[path] = replace(rules[path], gather=rule.gather, rotation=rule.rotation)
        for path, scheme in changes.activations.items():
            rules[path] = replace(rules[path], scheme=scheme)
        limits |= changes.limits
        tolerance = PRESERVED[expected_BTI.dtype] if part.entry().keeps_function else LOOSELY_KEPT
        _check_same(f"{part.name} on block {index}", expected_BTI, run_block(block, x_BTI, kwargs), tolerance)
        facts.append({"transform": part.name, "layers": changes.facts})
    tensors = changed_tensors(skeleton, block, index, before, stored) if parts else {}
    rules |= _static_rules(block, rules, steps, batches, device)
    return Transformed(_settled(block, plans, rules, limits), rules, hooks, tensors, facts)


def _settled(
    block: nn.Module, plans: Mapping[str, LayerPlan], rules: Mapping[str, InputRule], limits: Mapping[str, Limits]
) -> dict[str, LayerPlan]:
    """Plans with the shapes that the weights have now and the rounding that was chosen."""
    settled = {}
    for path, plan in plans.items():
        rows, columns = weight_OI_of(block.get_submodule(path)).shape
        scheme = replace(plan.scheme, clip="minmax") if path in limits else plan.scheme
        settled[path] = replace(
            plan, shape_OI=(rows, columns), scheme=scheme, activations=rules[path].scheme, limits=limits.get(path)
        )
    return settled


def _static_rules(
    block: nn.Module, rules: Mapping[str, InputRule], steps: Sequence[Step], batches: Batches, device: torch.device
) -> dict[str, InputRule]:
    """The rules of a static scheme with their ranges: what the inputs reach on the calibration text."""
    leaders: dict[str, str] = {}
    for step in steps:
        static = [path for path in step.linears if path in rules and _is_static(rules[path])]
        leaders |= dict.fromkeys(static, static[0] if static else "")
    if not leaders:
        return {}
    ranges = collect_ranges(block, (), dict.fromkeys(leaders.values()), batches, device)
    found = {}
    for path, leader in leaders.items():
        rule, seen = rules[path], ranges[leader]
        assert rule.scheme is not None
        fixed = static_range(float(seen.min_I.min()), float(seen.max_I.max()), rule.scheme)
        found[path] = replace(rule, fixed=fixed)
    return found


def _is_static(rule: InputRule) -> bool:
    return rule.scheme is not None and not rule.scheme.dynamic


def _is_planned(parameter: str, plans: Mapping[str, LayerPlan]) -> bool:
    path, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and path in plans


def _check_same(what: str, expected: Tensor, found: Tensor, tolerance: float) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise NumericsError(
            f"{what} changes what the block computes (by {error:.1e}); this model is not built the way the transform "
            "expects, leave it out."
        )


def unplanned(block: nn.Module, plans: Mapping[str, LayerPlan]) -> dict[str, Tensor]:
    """Copies of all parameters of a block besides the weights that will be quantized, by name."""
    return {name: value.detach().clone() for name, value in block.named_parameters() if not _is_planned(name, plans)}


def changed_tensors(
    skeleton: Skeleton, block: nn.Module, index: int, before: Mapping[str, Tensor], stored: torch.dtype
) -> dict[str, Tensor]:
    """Parameters that differ from ``before``, rounded to the stored type in the block too: what comes after must see
    what the file holds."""
    tensors = {}
    for name, parameter in block.named_parameters():
        if name not in before or torch.equal(parameter, before[name]):
            continue
        full = f"{skeleton.block_path(index)}.{name}"
        path, _, leaf = full.rpartition(".")
        key = checkpoint_key(skeleton, full) or f"{layer_name(skeleton, path)}.{leaf}"
        dtype = skeleton.source.dtype(key) if key in skeleton.source else stored
        value = parameter.data.to(dtype)
        parameter.data.copy_(value)
        tensors[key] = value.cpu()
    return tensors


def install_changed(skeleton: Skeleton, block: nn.Module, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of a finished block's shard, besides quantized weights, into the module."""
    for name, parameter in block.named_parameters():
        full = f"{skeleton.block_path(index)}.{name}"
        path, _, leaf = full.rpartition(".")
        key = checkpoint_key(skeleton, full) or f"{layer_name(skeleton, path)}.{leaf}"
        if key in tensors and tensors[key].shape == parameter.shape and tensors[key].is_floating_point():
            parameter.data.copy_(tensors[key])


@dataclass(frozen=True)
class Turned:
    """A model whose residual stream is rotated: by what, and where its embeddings and head are."""

    rotation: Rotation
    outside: Outside

    def tensors(self, skeleton: Skeleton) -> dict[str, Tensor]:
        """What stands outside of the blocks, rotated, by name in the checkpoint."""
        return rotated_outside(skeleton, self.outside, self.rotation)

    def names(self, skeleton: Skeleton) -> list[str]:
        """Names of these tensors."""
        return outside_names(skeleton, self.outside)

    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        note = "quarot: the output head is stored apart from the embeddings, to which it was tied"
        return (note,) if self.outside.tied else ()

    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that change."""
        return {"tie_word_embeddings": False} if self.outside.tied else {}


def prepare_transforms(skeleton: Skeleton, parts: Sequence[TransformPart]) -> Turned | None:
    """The rotation of the residual stream, if a transform wants one.

    Raises:
        InputError: a transform cannot work on this model, seen from its structure alone.
    """
    if parts and not any("norm" in type(module).__name__.lower() for module in skeleton.blocks[0].modules()):
        raise InputError("the blocks hold no norm that a transform could use; leave transforms out.")
    prepare = parts[0].entry().prepare if parts else None
    return Turned(*prepare(skeleton, parts[0].options_model())) if prepare else None
