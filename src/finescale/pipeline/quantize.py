"""Running a recipe over a model, block by block: calibrate, solve, write, forget."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finescale._version import __version__
from finescale.calibration.capture import BlockInputs, capture_block_inputs
from finescale.calibration.data import BUILTIN, CalibrationData, calibration_windows, encode, open_tokenizer, read_text
from finescale.calibration.spill import Batches as SpilledBatches
from finescale.calibration.spill import SpilledTensors
from finescale.environment import launch
from finescale.errors import CheckpointError, InputError
from finescale.formats import registry
from finescale.formats.engines import engine_table
from finescale.formats.gguf import local_folder
from finescale.formats.source import SourceCheckpoint, check_shard, open_checkpoint, read_json
from finescale.grid import InputRule, input_rule
from finescale.models import Skeleton, Step, linear_modules, open_skeleton, trace_steps
from finescale.models.skeleton import check_tensors, fill_module, release_module, replace_weight_OI
from finescale.pipeline import journal as journals
from finescale.pipeline.block import (
    Batches,
    Timer,
    propagate,
    quantize_block,
    quantize_inputs,
    rearrange_inputs,
)
from finescale.pipeline.facts import run_facts
from finescale.pipeline.output import Output, input_scheme, is_plain, unpack_layer
from finescale.pipeline.plan import (
    Plan,
    active_blocks,
    check_disk,
    check_memory,
    check_tensor_parallel,
    make_plan,
    memory_bytes,
    output_bytes,
    scattered_groups,
)
from finescale.pipeline.transform import Transformed, Turned, install_changed, prepare_transforms, transform_block
from finescale.pipeline.tune import FloatStream, Tuning, correct_block, tune_block, tuning_batches, windows_of
from finescale.ranks import ALONE, Ranks, join
from finescale.recipe import Recipe
from finescale.runtime.attention import check_kv_cache, quantize_kv_cache
from finescale.runtime.load import usable_device

Progress = Callable[[str, int, int], None]
"""``(what is being done, blocks done, blocks in all)``."""
RTN_SAMPLES = 8
"""Windows used by a solver that needs no statistics: they only serve the error report."""
PHASES = ("load", "transform", "forward", "solve", "tune", "write")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing has been computed or written yet."""

    skeleton: Skeleton
    recipe: Recipe
    fmt: registry.Format
    plan: Plan
    calibration: CalibrationData
    out: Path
    device: torch.device
    compute_dtype: torch.dtype
    scale_dtype: torch.dtype
    signature: str
    memory_bytes: int
    output_bytes: int
    notes: tuple[str, ...]
    turned: Turned | None = None
    ranks: Ranks = ALONE
    spill: bool = False


def resolve_model(model: str | Path) -> SourceCheckpoint:
    """Open a folder, a hub name or a GGUF file (unpacked once, in the cache).

    Raises:
        InputError, CheckpointError: see ``open_checkpoint``; and a model that is already quantized.
    """
    source = open_checkpoint(local_folder(model))
    if source.config.get("quantization_config"):
        raise InputError(f"{model} is already quantized; give the original model, or use finescale convert.")
    if source.float_dtype() not in _FLOATS:
        raise InputError(f"{model} is stored as {source.float_dtype()}; give it as float32, float16 or bfloat16.")
    return source


def prepare(
    model: str | Path,
    recipe: Recipe,
    out: Path,
    calibration: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    tensor_parallel: int = 1,
    allow_partial: bool = False,
    allow_unknown_family: bool = False,
    deterministic: bool = False,
    spill: bool = False,
) -> Job:
    """Check everything that can be checked before the work.

    Started by torchrun, the processes share it: each prepares and runs the same job.

    Raises:
        InputError, CheckpointError: what cannot work, with the remedy.
    """
    fmt = registry.get(recipe.format)
    ranks, target = join(usable_device(device), deterministic)
    if (ranks.count > 1 or spill) and (recipe.transforms or recipe.tuning):
        raise InputError(
            "several processes, and activations on disk, are for recipes without transforms and tuning; run this one "
            "in one process without --spill."
        )
    journals.check_free(out)
    source = resolve_model(model)
    skeleton = open_skeleton(source, allow_unknown_family)
    check_tensors(skeleton)
    turned = prepare_transforms(skeleton, recipe.transforms)
    if recipe.kv_cache is not None:
        check_kv_cache(skeleton.model)
    plan = make_plan(skeleton, recipe, fmt, allow_partial)
    if tensor_parallel > 1:
        check_tensor_parallel(plan, tensor_parallel)
    data, notes = _calibration(skeleton, recipe, calibration or BUILTIN, seed)
    scale_dtype = source.float_dtype()
    compute_dtype = torch.float32 if target.type == "cpu" else scale_dtype
    size = output_bytes(plan, scale_dtype, source.total_bytes(), source.float_dtype())
    check_disk(out, size)
    memory = memory_bytes(skeleton, plan, 0 if spill else data.tokens_BT.numel() // ranks.count, compute_dtype)
    check_memory(memory * launch().local_count)
    facts = {
        "finescale": __version__,
        "torch": torch.__version__,
        "source": source.fingerprint(),
        "recipe": recipe.to_dict(),
        "calibration": data.facts(),
        "device": target.type,
        "compute_dtype": str(compute_dtype),
    } | ({"deterministic": True} if deterministic else {})
    return Job(
        skeleton, recipe, fmt, plan, data, out, target, compute_dtype, scale_dtype,
        journals.signature(facts), memory, size, plan.notes + notes + (turned.notes() if turned else ()), turned, ranks,
        spill,
    )  # fmt: skip


def _calibration(skeleton: Skeleton, recipe: Recipe, source: str, seed: int) -> tuple[CalibrationData, tuple[str, ...]]:
    """Windows as the recipe asks; what it does not ask for by name gives way to short texts and short models."""
    part = recipe.calibration
    asked = part.model_fields_set
    tokens_T = encode(open_tokenizer(skeleton.source.path), read_text(source))
    notes = []
    longest = getattr(skeleton.model.config, "max_position_embeddings", None) or part.length
    length = part.length
    if length > longest:
        if "length" in asked:
            raise InputError(
                f"--length {length} is longer than the model's {longest} positions; use at most {longest}."
            )
        length = longest
    samples = part.samples
    if "samples" not in asked and not recipe.solver.entry().needs_hessian:
        samples = min(samples, RTN_SAMPLES)
    available = tokens_T.shape[0] // length
    if "samples" not in asked and 16 <= available < samples:
        notes.append(f"{source} holds {available} windows of {length} tokens, fewer than the usual {samples}")
        samples = available
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    if tokens_T.numel() and int(tokens_T.max()) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer makes ids beyond the {vocabulary} embeddings; it belongs to another model."
        )
    return calibration_windows(tokens_T, samples, length, seed, source), tuple(notes)


def run(job: Job, fresh: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Do the work, or what is left of it, and return the report.

    A finished run with the same settings returns its report at once; an unfinished one goes on after its last block.

    Of several processes only the first writes; the others return an empty report.

    Raises:
        InputError: the output folder belongs to another run.
        NumericsError: NaN or Inf, with the name of the layer.
    """
    on_progress = on_progress or (lambda *_: None)
    if not job.ranks.leads:
        if job.ranks.tell(None):
            _work(job, journals.Journal(job.out, job.signature), Output(job.skeleton, job.fmt, job.out), on_progress)
        return {}
    journal = journals.Journal(job.out, job.signature)
    if not fresh and not journal.folder.exists():
        report = _finished(job)
        if report is not None:
            job.ranks.tell(False)
            return report
    output = Output(job.skeleton, job.fmt, job.out)
    with journal.locked():
        if fresh:
            journals.clear_output(job.out)
        report = _finished(job)  # a run killed in its last moment, or one that ended while this one began
        job.ranks.tell(report is None)
        if report is None:
            journal.begin(output.file_names())
            report = _work(job, journal, output, on_progress)
        journal.close()
    return report


def _finished(job: Job) -> dict[str, Any] | None:
    """The report of the complete run in the output folder. Raises InputError when it had other settings."""
    done = journals.finished_signature(job.out)
    if done is None:
        return None
    if done != job.signature:
        raise InputError(
            f"{job.out} holds the result of a run with other settings; use --fresh to replace it or another --out."
        )
    return read_json(job.out / journals.REPORT, "") | {"already_complete": True}


def _work(job: Job, journal: journals.Journal, output: Output, on_progress: Progress) -> dict[str, Any]:
    started, clock = time.time(), time.perf_counter()
    total = job.skeleton.block_count
    with journals.full_disk_explained(job.out):
        on_progress("embedding the calibration text", 0, total)
        turned = job.turned
        if job.ranks.leads:
            output.write_rest(None if turned is None else lambda: turned.tensors(job.skeleton))
        if job.recipe.kv_cache is not None:
            quantize_kv_cache(job.skeleton.model, job.recipe.kv_cache.model_dump())
        inputs = _block_inputs(job, journal)
        job.skeleton.source.close()
        entries, resumed = _blocks(job, journal, output, inputs, on_progress)
        if not job.ranks.leads:
            return {}
        records = [record for entry in entries for record in entry["layers"]]
        on_progress("writing the index and the report", total, total)
        after, files = output.finish(
            job.plan, records, job.recipe.to_dict(), None if turned is None else turned.config_changes()
        )
    report = _report(job, records, after) | {"files": files}
    if job.recipe.tuning:
        report["tuning"] = [entry.get("tuning", []) for entry in entries]
    if job.recipe.transforms:
        report["transforms"] = [entry["transforms"] for entry in entries]
        outside = turned.names(job.skeleton) if turned else []
        report["changed_tensors"] = outside + [name for entry in entries for name in entry["changed"]]
    journals.write_json(
        job.out / "run.json", run_facts(job.device, entries, started, time.perf_counter() - clock, resumed)
    )
    # The report carries the signature: written last, it marks the folder as complete.
    journals.write_json(job.out / journals.REPORT, report)
    return report


def _block_inputs(job: Job, journal: journals.Journal) -> BlockInputs:
    """Inputs of the first block for this process's batches, in memory or on disk."""
    batches = job.calibration.batches(job.recipe.calibration.batch_size)
    if len(batches) < job.ranks.count:
        raise InputError(
            f"{len(batches)} batches of text cannot be shared by {job.ranks.count} processes; use more --samples or a "
            "smaller calibration.batch_size."
        )
    hidden = SpilledTensors(journal.folder / f"activations-{job.ranks.rank}") if job.spill else []
    return capture_block_inputs(
        job.skeleton, job.ranks.share(batches), job.device, job.compute_dtype, hidden, tuning_batches(job.recipe)
    )


def _blocks(
    job: Job, journal: journals.Journal, output: Output, inputs: BlockInputs, on_progress: Progress
) -> tuple[list[dict[str, Any]], int | None]:
    """All blocks in turn; finished ones are only replayed. Returns journal entries and where work was resumed."""
    skeleton, total, ranks = job.skeleton, job.skeleton.block_count, job.ranks
    active, hidden = active_blocks(skeleton, job.recipe), inputs.hidden
    sizes = [x_BTI.shape[0] for x_BTI in hidden]
    stream = FloatStream([], list(hidden)) if job.recipe.tuning else None
    rotation = job.turned.rotation if job.turned else None
    if rotation is not None:
        for number, x_BTI in enumerate(hidden):
            hidden[number] = rotation.apply(x_BTI)
    traced: dict[tuple[str, ...], tuple[Step, ...]] = {}
    entries: list[dict[str, Any]] = []
    resumed: int | None = None
    for index in range(total):
        if index >= active:  # it stays as it is
            if ranks.leads:
                output.write_block(index, [])
            skeleton.source.close()
            entries.append({"layers": [], "seconds": 0.0, "phases": {}})
            continue
        entry = journal.block_done(index) if ranks.leads else None
        if entry is not None and not output.shard(index).is_file():
            entry = None
        entry = ranks.tell(entry)
        on_progress(f"{'replaying' if entry else 'quantizing'} block {index + 1} of {total}", index, total)
        timer = Timer()
        path = skeleton.block_path(index)
        block = timer.measure("load", fill_module, skeleton, path, job.device, job.compute_dtype)
        arguments = [inputs.kwargs[size][index] for size in sizes]
        if stream is not None:
            timer.measure("forward", stream.advance, block, arguments, job.device)
        if entry is not None:
            rules = _install(job, output, index, block, entry)
            rearranged = rearrange_inputs(block, rules)
            resumed = index + 1
        else:
            names = tuple(linear_modules(block))
            if names not in traced:
                traced[names] = trace_steps(block, hidden[0].to(job.device), arguments[0])
            batches = SpilledBatches(hidden, arguments)
            changed = timer.measure(
                "transform", transform_block, skeleton, block, index, job.plan.blocks[index], traced[names], batches,
                job.recipe.transforms, job.device, job.scale_dtype, rotation,
            )  # fmt: skip
            rules, rearranged = changed.rules, changed.hooks
            tuning = None
            if stream is not None:
                parts = windows_of(job.recipe, block, stream, rotation, batches, job.device)
                seed = job.calibration.seed + index
                tuning = Tuning(parts, partial(_arguments, inputs, index), rules, seed, job.device)
                del parts
            entry = _quantize_and_write(job, output, index, block, traced[names], batches, changed, timer, tuning)
            del tuning  # or it would keep the block's inputs
            if job.recipe.transforms:
                entry |= {"transforms": changed.facts, "changed": sorted(changed.tensors)}
            del batches  # or it would keep the block's inputs beside its outputs
        if index + 1 < active:
            hooks = quantize_inputs(block, rules) if job.recipe.calibration.quantized_activations else []
            timer.measure("forward", propagate, block, path, hidden, arguments, job.device)
            for hook in hooks:
                hook.remove()
            if ranks.leads:
                _check_replay(entry, hidden[0], index)
        for hook in rearranged:
            hook.remove()
        release_module(block)
        skeleton.source.close()  # or the pages that were read stay mapped
        if "seconds" not in entry:
            phases = {phase: round(timer.seconds.get(phase, 0.0), 3) for phase in PHASES}
            entry |= {"seconds": round(sum(timer.seconds.values()), 3), "phases": phases}
            if ranks.leads:
                journal.finish_block(index, entry)
        entries.append(entry)
    return entries, resumed


def _arguments(inputs: BlockInputs, index: int, count: int) -> dict[str, Any]:
    """A block's arguments besides the hidden states, for so many windows."""
    return inputs.kwargs[count][index]


def _quantize_and_write(
    job: Job,
    output: Output,
    index: int,
    block: torch.nn.Module,
    steps: tuple[Step, ...],
    batches: Batches,
    changed: Transformed,
    timer: Timer,
    tuning: Tuning | None,
) -> dict[str, Any]:
    """Solve a block, tune it if asked, put the weights in place and write its shard. Returns its journal entry."""
    plans = changed.plans
    entry: dict[str, Any] = {}
    if tuning is not None and plans:
        entry["tuning"] = timer.measure("tune", correct_block, block, plans, tuning)
    results = quantize_block(
        block, index, plans, steps, batches, job.recipe, job.fmt, job.scale_dtype, job.device, timer, job.ranks
    )
    if tuning is not None and results:
        results, facts = timer.measure("tune", tune_block, block, results, tuning, job.recipe, job.fmt)
        entry["tuning"] += facts
    order = {path: number for number, path in enumerate(plans)}
    results.sort(key=lambda result: order[result.plan.path])
    solved = [(result.plan, result.weight) for result in results]
    if job.ranks.leads:
        timer.measure("write", output.write_block, index, solved, changed.tensors, changed.rules)
    records = [result.record | {"inputs": changed.rules[result.plan.path].describe()} for result in results]
    return entry | {"layers": records}


def _check_replay(entry: dict[str, Any], first_BTI: Tensor, index: int) -> None:
    """Outputs of a replayed block must be those of the first run: else the rest would differ from an unbroken run."""
    digest = hashlib.sha256(first_BTI.float().numpy().tobytes()).hexdigest()
    if entry.setdefault("outputs", digest) != digest:
        raise CheckpointError(
            f"block {index} puts out other numbers than before the interruption (another machine or number of "
            "threads); start over with --fresh."
        )


def _install(
    job: Job, output: Output, index: int, block: torch.nn.Module, entry: dict[str, Any]
) -> dict[str, InputRule]:
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
    if job.recipe.transforms:
        planned = {plan.name + ".weight" for plan in job.plan.blocks[index].values()}
        others = {key: tensor for key, tensor in tensors.items() if key not in planned}
        install_changed(job.skeleton, block, index, others)
    return rules


def _report(job: Job, records: list[dict[str, Any]], after: int) -> dict[str, Any]:
    plan, source = job.plan, job.skeleton.source
    fallbacks = list(job.notes)
    for record in records:
        fallbacks += [f"{record['name']}: {note}" for note in record["notes"]]
    weights = {layer.name: layer.shape_OI[0] * layer.shape_OI[1] for layer in plan.layers}
    stored_bits = sum(record["bits_per_weight"] * weights[record["name"]] for record in records)
    rounded = Counter(scheme for scheme in map(input_scheme, records) if scheme is not None)
    activations = rounded.most_common(1)[0][0] if rounded else None
    return {
        "finescale": __version__,
        "signature": job.signature,
        "model": {
            "name": Path(source.name).name or source.name,
            "family": job.skeleton.family.model_type,
            "parameters": plan.parameters,
            "block_parameters": plan.block_parameters,
            "quantized_parameters": plan.quantized_parameters,
            "quantized_share": plan.share,
        },
        "recipe": job.recipe.to_dict(),
        "recipe_name": job.recipe.name,
        "calibration": job.calibration.facts(),
        "size": {
            "before_bytes": source.total_bytes(),
            "after_bytes": after,
            "bits_per_weight": stored_bits / max(plan.quantized_parameters, 1),
        },
        "layers": records,
        "fallbacks": fallbacks,
        "engines": engine_table(
            job.fmt.name,
            {layer.name: layer.scheme for layer in plan.layers},
            activations,
            job.skeleton.family.model_type,
            {layer.name: layer.shape_OI for layer in plan.layers},
            scattered_groups(job.recipe),
            job.recipe.solver.options().keeps_outliers,
            not all(map(is_plain, records)),
        ),
    }
