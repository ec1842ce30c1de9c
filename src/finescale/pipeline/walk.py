"""Going through a model's blocks in order: replay what is done, and transform, correct, solve, tune and write the rest.

Blocks whose weights are corrected together are one group: all of them are filled and transformed, each fed with what
comes out of the transformed ones before it, then corrected by the output of the last, then solved one by one. Without
such a correction a group is one block, and one block's weights are in memory at a time.

Shape legend: B sequences, T tokens, I hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finescale.calibration.capture import BlockInputs
from finescale.calibration.spill import Batches as SpilledBatches
from finescale.errors import CheckpointError, NumericsError
from finescale.finite import all_finite
from finescale.formats.source import check_shard
from finescale.grid import InputRule, input_rule
from finescale.models import Step, linear_modules, trace_steps
from finescale.models.skeleton import checkpoint_key, fill_module, release_module, replace_weight_OI
from finescale.pipeline import journal as journals
from finescale.pipeline.block import Batches, Timer, propagate, quantize_block, quantize_inputs, rearrange_inputs
from finescale.pipeline.job import Job, Progress
from finescale.pipeline.output import Output, unpack_layer
from finescale.pipeline.plan import active_blocks
from finescale.pipeline.transform import Transformed, changed_tensors, install_changed, transform_block, unplanned
from finescale.pipeline.tune import (
    FloatStream,
    Tuning,
    blocks_together,
    correct_blocks,
    learning_options,
    tune_block,
    tuner_options,
    windows_of,
)
from finescale.transforms.rotation import Rotation
from finescale.transforms.view import Learning
from finescale.tuning import ReconstructionOptions, Windows

PHASES = ("load", "transform", "forward", "solve", "tune", "write")
Entry = dict[str, Any]
"""What the journal keeps of a finished block."""


@dataclass
class _Walk:
    """Where a run stands.

    Attributes:
        job, journal, output, inputs: see there.
        hidden: inputs of the next block, out of the quantized ones before it, float [B, T, I] per batch.
        stream: the float model's, for what learns from its outputs.
        rotation: of the hidden states.
        traced: linears by shared input, by the paths of a block's linears.
    """

    job: Job
    journal: journals.Journal
    output: Output
    inputs: BlockInputs
    stream: FloatStream | None
    rotation: Rotation | None
    traced: dict[tuple[str, ...], tuple[Step, ...]]

    @property
    def hidden(self) -> Any:
        return self.inputs.hidden

    def arguments(self, index: int) -> list[dict[str, Any]]:
        """A block's arguments besides the hidden states, by batch."""
        return [self.inputs.kwargs[x_BTI.shape[0]][index] for x_BTI in self.hidden]

    def arguments_of(self, index: int, count: int) -> dict[str, Any]:
        """The same for so many windows."""
        return self.inputs.kwargs[count][index]


@dataclass
class _Prepared:
    """A block that is transformed and not yet solved.

    Attributes:
        index: its number.
        module: filled.
        steps: its linears by shared input.
        changed: what the transforms made of it.
        stream: the float block's inputs and outputs; None when nothing learns.
        timer: seconds spent on it so far.
        facts: what is known for its journal entry.
    """

    index: int
    module: nn.Module
    steps: tuple[Step, ...]
    changed: Transformed
    stream: FloatStream | None
    timer: Timer
    facts: Entry


def work_through(
    job: Job, journal: journals.Journal, output: Output, inputs: BlockInputs, on_progress: Progress
) -> tuple[list[Entry], int | None]:
    """All blocks in turn; finished ones are only replayed. Returns journal entries and where work was resumed."""
    total, active = job.skeleton.block_count, active_blocks(job.skeleton, job.recipe)
    rotation = job.turned.rotation if job.turned else None
    stream = FloatStream([], list(inputs.hidden)) if learning_options(job.recipe) else None
    walk = _Walk(job, journal, output, inputs, stream, rotation, {})
    if rotation is not None:
        for number, x_BTI in enumerate(inputs.hidden):
            inputs.hidden[number] = rotation.apply(x_BTI)
    entries: list[Entry] = []
    resumed: int | None = None
    size = blocks_together(job.recipe)
    for start in range(0, active, size):
        group = range(start, min(start + size, active))
        done = [_finished_entry(walk, index) for index in group]
        if None not in done:
            for index, entry in zip(group, done, strict=True):
                assert entry is not None
                on_progress(f"replaying block {index + 1} of {total}", index, total)
                _replay(walk, index, entry, last=index + 1 == active)
                entries.append(entry)
            resumed = group.stop
        else:
            entries += _quantize_group(walk, group, active, on_progress)
    for index in range(active, total):  # they stay as they are
        if job.ranks.leads:
            output.write_block(index, [])
        job.skeleton.source.close()
        entries.append({"layers": [], "seconds": 0.0, "phases": {}})
    return entries, resumed


def _finished_entry(walk: _Walk, index: int) -> Entry | None:
    ranks = walk.job.ranks
    entry = walk.journal.block_done(index) if ranks.leads else None
    if entry is not None and not walk.output.shard(index).is_file():
        entry = None
    found: Entry | None = ranks.tell(entry)
    return found


def _fill(walk: _Walk, index: int, timer: Timer) -> nn.Module:
    """The block with its weights; the float model's hidden states move past it. Raises NumericsError for NaN or Inf in
    a weight, before anything is computed with it."""
    job = walk.job
    path = job.skeleton.block_path(index)
    block = timer.measure("load", fill_module, job.skeleton, path, job.device, job.compute_dtype)
    for name, parameter in block.named_parameters():
        if not all_finite(parameter):
            known = checkpoint_key(job.skeleton, f"{path}.{name}") or f"{path}.{name}"
            raise NumericsError(f"{known} holds NaN or Inf; repair or re-download the checkpoint.")
    if walk.stream is not None:
        timer.measure("forward", walk.stream.advance, block, walk.arguments(index), job.device)
    return block


def _replay(walk: _Walk, index: int, entry: Entry, last: bool) -> None:
    """Compute the outputs of a finished block again, as the next block's inputs."""
    timer = Timer()
    block = _fill(walk, index, timer)
    rules = _install(walk.job, walk.output, index, block, entry)
    rearranged = rearrange_inputs(block, rules)
    _move_on(walk, index, block, rules, entry, timer, last)
    _release(walk.job, block, rearranged)


def _quantize_group(walk: _Walk, group: range, active: int, on_progress: Progress) -> list[Entry]:
    """Transform, correct, solve, tune and write some consecutive blocks."""
    job, total = walk.job, walk.job.skeleton.block_count
    ahead = walk.hidden if len(group) == 1 else list(walk.hidden)
    prepared = []
    for index in group:
        on_progress(f"quantizing block {index + 1} of {total}", index, total)
        prepared.append(_prepare(walk, index, ahead))
        if index + 1 < group.stop:
            _propagate(walk, prepared[-1].index, prepared[-1].module, prepared[-1].changed.rules, ahead, Timer())
    del ahead
    options = tuner_options(job.recipe)
    single = prepared[0] if len(prepared) == 1 else None
    # The targets of a lone block are settled before it is corrected: they are what it put out till then.
    tunings = None if single is None else [(chosen, _windows(walk, single, chosen)) for chosen in options]
    if walk.stream is not None and job.recipe.tuning:
        _correct(walk, prepared, tunings or [(chosen, _group_windows(walk, prepared, chosen)) for chosen in options])
    entries = []
    while prepared:
        block = prepared.pop(0)  # its float outputs go with it
        tuning = None
        if job.recipe.tuning:
            parts = tunings or [(chosen, _windows(walk, block, chosen)) for chosen in options]
            tuning = _tuning(walk, [block.index], parts, block.changed.rules)
            del parts
        tunings = None
        entries.append(_solve(walk, block, tuning, last=block.index + 1 == active))
        del tuning  # or it would keep the block's inputs
    return entries


def _correct(
    walk: _Walk, prepared: Sequence[_Prepared], parts: Sequence[tuple[ReconstructionOptions, Windows]]
) -> None:
    """Change the weights of transformed blocks together, before they are solved, and note what changed besides them."""
    job = walk.job
    before = [unplanned(block.module, block.changed.plans) for block in prepared]
    facts = prepared[0].timer.measure(
        "tune", correct_blocks, [block.module for block in prepared], [block.changed.plans for block in prepared],
        [block.changed.rules for block in prepared], _tuning(walk, [block.index for block in prepared], parts, {}),
    )  # fmt: skip
    for block, values in zip(prepared, before, strict=True):
        found = changed_tensors(job.skeleton, block.module, block.index, values, job.scale_dtype)
        block.changed.tensors.update(found)
        block.facts["tuning"] = list(facts) if block.changed.plans else []


def _prepare(walk: _Walk, index: int, ahead: Any) -> _Prepared:
    """Fill and transform a block."""
    job, timer = walk.job, Timer()
    block = _fill(walk, index, timer)
    arguments = walk.arguments(index)
    names = tuple(linear_modules(block))
    if job.statistics is not None:
        walk.traced[names] = job.statistics.steps(index)
    elif names not in walk.traced:
        walk.traced[names] = trace_steps(block, ahead[0].to(job.device), arguments[0])
    batches = SpilledBatches(ahead, arguments)
    stream = learning = None
    if walk.stream is not None:
        stream = FloatStream(walk.stream.inputs, walk.stream.outputs)
        windows = partial(windows_of, block, stream, walk.rotation, batches, job.device)
        learning = Learning(windows, partial(walk.arguments_of, index), job.calibration.seed + index)
    changed = timer.measure(
        "transform", transform_block, job.skeleton, block, index, job.plan.blocks[index], walk.traced[names], batches,
        job.recipe.transforms, job.device, job.scale_dtype, walk.rotation, learning,
    )  # fmt: skip
    facts: Entry = {"transforms": changed.facts} if job.recipe.transforms else {}
    return _Prepared(index, block, walk.traced[names], changed, stream, timer, facts)


def _windows(walk: _Walk, block: _Prepared, options: ReconstructionOptions) -> Windows:
    """What a tuner of one block is fed and should come close to."""
    assert block.stream is not None
    batches = SpilledBatches(walk.hidden, walk.arguments(block.index))
    return windows_of(block.module, block.stream, walk.rotation, batches, walk.job.device, options)


def _group_windows(walk: _Walk, prepared: Sequence[_Prepared], options: ReconstructionOptions) -> Windows:
    """The inputs of the group's first block and the outputs of its last."""
    first, last = prepared[0].stream, prepared[-1].stream
    assert first is not None and last is not None
    batches = SpilledBatches(walk.hidden, walk.arguments(prepared[0].index))
    both = FloatStream(first.inputs, last.outputs)
    return windows_of(prepared[0].module, both, walk.rotation, batches, walk.job.device, options)


def _tuning(
    walk: _Walk,
    indices: Sequence[int],
    parts: Sequence[tuple[ReconstructionOptions, Windows]],
    rules: dict[str, InputRule],
) -> Tuning:
    def arguments_of(count: int) -> dict[str, Any]:
        if len(indices) == 1:
            return walk.arguments_of(indices[0], count)
        return {"arguments": [walk.arguments_of(index, count) for index in indices]}

    return Tuning(tuple(parts), arguments_of, rules, walk.job.calibration.seed + indices[0], walk.job.device)


def _solve(walk: _Walk, block: _Prepared, tuning: Tuning | None, last: bool) -> Entry:
    """Solve a block, tune it if asked, put the weights in place and write its shard. Returns its journal entry."""
    job, plans, timer = walk.job, block.changed.plans, block.timer
    batches: Batches = SpilledBatches(walk.hidden, walk.arguments(block.index))
    results = quantize_block(
        block.module, block.index, plans, block.steps, batches, job.recipe, job.fmt, job.scale_dtype, job.device,
        timer, job.ranks, job.statistics,
    )  # fmt: skip
    entry = block.facts
    if tuning is not None and results:
        results, facts = timer.measure("tune", tune_block, block.module, results, tuning, job.recipe, job.fmt)
        entry["tuning"] += facts
    order = {path: number for number, path in enumerate(plans)}
    results.sort(key=lambda result: order[result.plan.path])
    solved = [(result.plan, result.weight) for result in results]
    changed = block.changed
    if job.ranks.leads:
        timer.measure("write", walk.output.write_block, block.index, solved, changed.tensors, changed.rules)
    if job.recipe.transforms or job.recipe.tuning:
        entry["changed"] = sorted(changed.tensors)
    entry |= {"layers": [result.record | {"inputs": changed.rules[result.plan.path].describe()} for result in results]}
    del tuning, batches  # or they would keep the block's inputs beside its outputs
    block.stream = None
    _move_on(walk, block.index, block.module, changed.rules, entry, timer, last)
    _release(job, block.module, changed.hooks)
    phases = {phase: round(timer.seconds.get(phase, 0.0), 3) for phase in PHASES}
    entry |= {"seconds": round(sum(timer.seconds.values()), 3), "phases": phases}
    if job.ranks.leads:
        walk.journal.finish_block(block.index, entry)
    return entry


def _move_on(
    walk: _Walk, index: int, block: nn.Module, rules: dict[str, InputRule], entry: Entry, timer: Timer, last: bool
) -> None:
    """The quantized block's outputs become the next one's inputs; a replayed block must put out what it did."""
    if last or walk.job.statistics is not None:
        return
    if not walk.job.recipe.calibration.sequential:  # the next block is solved on what the original puts out
        walk.job.skeleton.source.close()  # or the mapped pages would hold what was written into the weights
        path = walk.job.skeleton.block_path(index)
        block = timer.measure("load", fill_module, walk.job.skeleton, path, walk.job.device, walk.job.compute_dtype)
        rules = {}
    _propagate(walk, index, block, rules, walk.hidden, timer)
    if walk.job.ranks.leads:
        _check_replay(entry, walk.hidden[0], index)


def _propagate(
    walk: _Walk, index: int, block: nn.Module, rules: dict[str, InputRule], hidden: Any, timer: Timer
) -> None:
    hooks = quantize_inputs(block, rules) if walk.job.recipe.calibration.quantized_activations else []
    path = walk.job.skeleton.block_path(index)
    timer.measure("forward", propagate, block, path, hidden, walk.arguments(index), walk.job.device)
    for hook in hooks:
        hook.remove()


def _release(job: Job, block: nn.Module, hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()
    release_module(block)
    job.skeleton.source.close()  # or the pages that were read stay mapped


def _check_replay(entry: Entry, first_BTI: Tensor, index: int) -> None:
    """Outputs of a replayed block must be those of the first run: else the rest would differ from an unbroken run."""
    digest = hashlib.sha256(first_BTI.float().cpu().numpy().tobytes()).hexdigest()
    if entry.setdefault("outputs", digest) != digest:
        raise CheckpointError(
            f"block {index} puts out other numbers than before the interruption (another machine or number of "
            "threads); start over with --fresh."
        )


def _install(job: Job, output: Output, index: int, block: torch.nn.Module, entry: Entry) -> dict[str, InputRule]:
    """Put the weights of a finished block, as its shard holds them, into the module. Returns its layers' inputs."""
    shard = output.shard(index)
    check_shard(shard)
    try:
        tensors = load_file(shard)
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is damaged ({error}); start over with --fresh.") from error
    rules = {}
    records = {record["name"]: record for record in entry["layers"]}
    for plan in job.plan.blocks[index].values():
        prefix = plan.name + "."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        replace_weight_OI(block.get_submodule(plan.path), unpack_layer(job.fmt, plan, own).to(job.device))
        rules[plan.path] = input_rule(records[plan.name]["inputs"], own, plan.name).to(job.device)
    if job.recipe.transforms or job.recipe.tuning:
        planned = {plan.name + ".weight" for plan in job.plan.blocks[index].values()}
        others = {key: tensor for key, tensor in tensors.items() if key not in planned}
        install_changed(job.skeleton, block, index, others)
    return rules
