"""What bits cost, measured: each group of layers is quantized alone at each choice, and the KL divergence of the whole
model from the original is taken on text that the solver has not seen.

Layers that engines multiply as one (queries, keys and values; gate and up; all layers of all experts) are one unit and
get the same bits.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finescale._version import __version__
from finescale.calibration.capture import BlockInputs, capture_block_inputs, run_block
from finescale.calibration.data import BUILTIN, calibration_windows, encode, open_tokenizer, read_text
from finescale.calibration.statistics import Moments, collect_moments
from finescale.errors import InputError, NumericsError
from finescale.formats import registry
from finescale.models import Skeleton, open_skeleton, trace_steps
from finescale.models.skeleton import set_weight_OI, weight_OI_of
from finescale.pipeline.block import propagate
from finescale.pipeline.journal import signature
from finescale.pipeline.plan import LayerPlan, Plan, make_plan, stored_bits
from finescale.pipeline.quantize import resolve_model
from finescale.pipeline.rounds import solve_together
from finescale.recipe import Recipe
from finescale.runtime.load import load, usable_device

WINDOWS = 8
"""Windows of text on which the divergence is taken."""
BATCH_TOKENS = 4096
Scheme = tuple[int, int | None]
"""Bits, and the group size or None for the recipe's."""
_EXPERTS = re.compile(r"\.experts\.\d+\..*")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Option:
    """A unit at some bits and group size (None: the recipe's): stored bits in all, divergence of the whole model (nats
    per token), layers' mean relative output error."""

    bits: int
    group_size: int | None
    stored_bits: int
    kl: float
    relative_error: float


@dataclass(frozen=True)
class Unit:
    """Layers that get the same bits, and what each choice was measured to do."""

    layers: tuple[str, ...]
    parameters: int
    options: tuple[Option, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Unit:
        options = tuple(Option(**option) for option in values["options"])
        return cls(tuple(values["layers"]), values["parameters"], options)


@dataclass(frozen=True)
class Sensitivities:
    """All units of a model.

    Attributes:
        signature: hash of everything that decides the numbers.
        setting: what they were measured on.
        units: in order of the model.
    """

    signature: str
    setting: dict[str, Any]
    units: tuple[Unit, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sensitivities:
        return cls(values["signature"], values["setting"], tuple(map(Unit.from_dict, values["units"])))


@dataclass(frozen=True)
class Measurement:
    """A measurement that was checked and not yet made; ``size_range`` is the stored bits per weight of the smallest and
    of the largest choice everywhere, None where outliers make it known only afterwards."""

    skeleton: Skeleton
    plan: Plan
    recipe: Recipe
    choices: tuple[Scheme, ...]
    tokens_BT: Tensor
    judged_BT: Tensor
    device: torch.device
    signature: str
    setting: dict[str, Any]
    size_range: tuple[float, float] | None


def prepare_measurement(
    model: str | Path,
    recipe: Recipe,
    choices: Sequence[Scheme],
    calibration: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    windows: int = WINDOWS,
) -> Measurement:
    """Check everything that can be checked before the work.

    Args:
        model: folder, hub name or GGUF file.
        recipe: solver, groups and calibration; its bits, and groups, are replaced by each of ``choices``.
        choices: bits and group sizes.
        calibration: text; ``windows`` windows of it judge, ``calibration.samples`` others serve the solver.
        seed: of the choice of windows.
        device: where the whole original is held, in float32.
        windows: on which the divergence is taken.

    Raises:
        InputError: what cannot work.
    """
    if windows < 1:
        raise InputError(f"--windows is {windows}; at least 1 is needed.")
    if any(override.weights for override in recipe.overrides):
        raise InputError("bits are to be chosen for every layer, and the recipe's overrides set some; leave them out.")
    choices = tuple(sorted(set(choices), key=lambda scheme: (scheme[0], scheme[1] is not None, -(scheme[1] or 0))))
    if len(choices) < 2:
        raise InputError("choosing bits needs at least two numbers of bits to choose from; name more.")
    fmt = registry.get(recipe.format)
    source = resolve_model(model)
    skeleton = open_skeleton(source)
    # Every choice must be one that the solver and the format can do.
    plans = [make_plan(skeleton, recipe.with_settings(settings_of(scheme)), fmt) for scheme in choices]
    plan = make_plan(skeleton, recipe, fmt)
    name = calibration or BUILTIN
    part = recipe.calibration
    longest = getattr(skeleton.model.config, "max_position_embeddings", None) or part.length
    length = min(part.length, longest)
    tokens_T = encode(open_tokenizer(source.path), read_text(name))
    samples = part.samples
    if "samples" not in part.model_fields_set:  # as in a run, short texts give what they have
        samples = max(1, min(samples, tokens_T.shape[0] // length - windows))
    data = calibration_windows(tokens_T, samples + windows, length, seed, name)
    judging = torch.zeros(samples + windows, dtype=torch.bool)
    judging[torch.arange(windows) * (samples + windows) // windows] = True  # spread over the text
    setting = data.facts() | {
        "samples": samples,
        "windows": windows,
        "choices": [list(scheme) for scheme in choices],
        "device": device[:4],
    }
    left_out = {"name": "", "description": "", "tuning": [], "transforms": []}
    decisive = recipe.to_dict() | left_out
    del decisive["weights"]["bits"]
    facts = {
        "finescale": __version__,
        "torch": torch.__version__,
        "source": source.fingerprint(),
        "recipe": decisive,
        "setting": setting,
    }
    return Measurement(
        skeleton,
        plan,
        recipe,
        choices,
        data.tokens_BT[~judging],
        data.tokens_BT[judging],
        usable_device(device),
        signature(facts),
        setting,
        None if recipe.solver.options().keeps_outliers else _size_range(plans, source.float_dtype()),
    )


def _size_range(plans: Sequence[Plan], scale_dtype: torch.dtype) -> tuple[float, float]:
    """Least and most stored bits per weight: each layer at the plan that is the smallest, or the largest, for it."""
    by_layer = zip(*([stored_bits(layer, scale_dtype) for layer in plan.layers] for plan in plans), strict=True)
    sizes = [(min(own), max(own)) for own in by_layer]
    weights = plans[0].quantized_parameters
    return sum(least for least, _ in sizes) / weights, sum(most for _, most in sizes) / weights


def settings_of(scheme: Scheme) -> tuple[str, ...]:
    """A choice as settings of a recipe."""
    bits, group = scheme
    return (f"weights.bits={bits}", *(() if group is None else (f"weights.group_size={group}",)))


def measure(
    job: Measurement,
    on_progress: Progress | None = None,
    done: Sequence[Sequence[Unit]] = (),
    on_block: Callable[[list[list[Unit]]], None] | None = None,
) -> Sensitivities:
    """Quantize every unit alone at every choice and take the divergence.

    The solver runs on the statistics of the original's activations; transforms and tuning of the recipe are left out.

    Args:
        job: checked by ``prepare_measurement``.
        on_progress: ``(what, blocks done, blocks in all)``.
        done: units of the first blocks, from an interrupted measurement of the same job.
        on_block: called after each block with the units of all blocks so far.

    Raises:
        NumericsError: NaN or Inf, with the name of the layer.
    """
    skeleton, device = job.skeleton, job.device
    model = load(skeleton.source.path, torch.float32, device)
    blocks = model.get_submodule(skeleton.blocks_path)
    assert isinstance(blocks, nn.ModuleList)
    solving = _inputs(skeleton, job.tokens_BT, job.recipe.calibration.batch_size, device)
    size = max(1, BATCH_TOKENS // job.judged_BT.shape[1])
    judging = _inputs(skeleton, job.judged_BT, size, device)
    judge = _Judge(model, blocks, job.judged_BT, size, judging, device)
    units = [list(block) for block in done]
    for index, block in enumerate(blocks):
        if on_progress:
            on_progress("measuring block", index, len(blocks))
        if index == len(units):
            units.append(_units_of(job, index, block, solving, judge) if job.plan.blocks[index] else [])
            if on_block:
                on_block(units)
        for inputs in (solving, judging):
            arguments = [inputs.kwargs[hidden.shape[0]][index] for hidden in inputs.hidden]
            propagate(block, skeleton.block_path(index), inputs.hidden, arguments, device)
    return Sensitivities(job.signature, job.setting, tuple(unit for block in units for unit in block))


def _inputs(skeleton: Skeleton, tokens_BT: Tensor, size: int, device: torch.device) -> BlockInputs:
    return capture_block_inputs(skeleton, list(tokens_BT.split(size)), device, torch.float32)


def _units_of(job: Measurement, index: int, block: nn.Module, inputs: BlockInputs, judge: _Judge) -> list[Unit]:
    """The units of one block, measured."""
    plans = job.plan.blocks[index]
    arguments = [inputs.kwargs[hidden.shape[0]][index] for hidden in inputs.hidden]
    steps = [
        [path for path in step.linears if path in plans]
        for step in trace_steps(block, inputs.hidden[0].to(job.device), arguments[0])
        if any(path in plans for path in step.linears)
    ]
    leaders = {step[0]: plans[step[0]].name for step in steps}
    batches = list(zip(inputs.hidden, arguments, strict=True))
    moments = collect_moments(block, leaders, batches, job.device)
    together: dict[str, list[list[str]]] = {}
    for step in steps:
        together.setdefault(_EXPERTS.sub(".experts", step[0]), []).append(step)
    units = []
    for members in together.values():
        layers = [path for step in members for path in step]
        options = tuple(_option(job, index, block, members, moments, scheme, judge) for scheme in job.choices)
        count = sum(plans[path].shape_OI[0] * plans[path].shape_OI[1] for path in layers)
        units.append(Unit(tuple(plans[path].name for path in layers), count, options))
    return units


def _option(
    job: Measurement,
    index: int,
    block: nn.Module,
    members: Sequence[Sequence[str]],
    moments: dict[str, Moments],
    scheme: Scheme,
    judge: _Judge,
) -> Option:
    plans = job.plan.blocks[index]
    bits, group = scheme
    recipe = job.recipe.with_settings((*settings_of(scheme), "tuning=[]", "transforms=[]"))
    scale_dtype = job.skeleton.source.float_dtype()
    stored, errors, weights = 0.0, [], {}
    for step in members:
        layers: list[tuple[LayerPlan, Tensor]] = []
        for path in step:
            plan = plans[path]
            size = plan.scheme.group_size if group is None else -1 if group >= plan.shape_OI[1] else group
            plan = replace(plan, scheme=replace(plan.scheme, bits=bits, group_size=size))
            layers.append((plan, weight_OI_of(block.get_submodule(path))))
        moment = moments[step[0]]
        for result in solve_together(layers, moment.hessian(), moment.tokens, recipe, scale_dtype, index):
            rows, columns = result.plan.shape_OI
            stored += result.record["bits_per_weight"] * rows * columns
            errors.append(result.record["relative_error"])
            weights[result.plan.path] = result.weight.dequantize()
    with _installed(block, weights):
        kl = judge.divergence(index)
    if kl != kl:
        raise NumericsError(f"{plans[members[0][0]].name} at {bits} bits makes the model put out NaN.")
    return Option(bits, group, round(stored), max(0.0, kl), sum(errors) / len(errors))


@contextmanager
def _installed(block: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Weights [O, I] of some layers in place, and the old ones back afterwards."""
    modules = {path: block.get_submodule(path) for path in weights}
    before = {path: weight_OI_of(module).clone() for path, module in modules.items()}
    try:
        for path, module in modules.items():
            set_weight_OI(module, weights[path])
        yield
    finally:
        for path, module in modules.items():
            set_weight_OI(module, before[path])


class _Judge:
    """Divergence of the model from the original on the judging windows, from the inputs of any block on."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        tokens_BT: Tensor,
        size: int,
        inputs: BlockInputs,
        device: torch.device,
    ) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.inputs = inputs
        self.batches = list(tokens_BT.split(size))
        with torch.no_grad():
            arguments = inputs.kwargs[self.batches[0].shape[0]][0]
            self.returns_tuple = isinstance(blocks[0](inputs.hidden[0].to(device), **arguments), tuple)
            self.log_BTV = [
                model(input_ids=batch.to(device), use_cache=False).logits.float().log_softmax(-1)
                for batch in self.batches
            ]

    def divergence(self, first: int) -> float:
        """KL(original || model) in nats per token; the blocks before ``first`` are the original's."""
        total, count = 0.0, 0
        for tokens_BT, hidden_BTI, log_BTV in zip(self.batches, self.inputs.hidden, self.log_BTV, strict=True):
            hidden_BTI = hidden_BTI.to(self.device)
            for index in range(first, len(self.blocks)):
                hidden_BTI = run_block(self.blocks[index], hidden_BTI, self.inputs.kwargs[tokens_BT.shape[0]][index])
            logits_BTV = self._after_blocks(tokens_BT, hidden_BTI)
            for logits_TV, other_TV in zip(logits_BTV, log_BTV, strict=True):
                change_TV = other_TV - logits_TV.float().log_softmax(-1)
                total += float((other_TV.exp() * change_TV).double().sum())
                count += other_TV.shape[0]
        return total / count

    def _after_blocks(self, tokens_BT: Tensor, hidden_BTI: Tensor) -> Tensor:
        """The model's own way from the last block to the logits: its blocks are passed over for the moment."""
        forwards = [block.forward for block in self.blocks]
        try:
            output = (hidden_BTI, None) if self.returns_tuple else hidden_BTI
            for block in self.blocks:
                block.forward = lambda *args, **kwargs: output
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        finally:
            for block, forward in zip(self.blocks, forwards, strict=True):
                block.forward = forward
        return logits
