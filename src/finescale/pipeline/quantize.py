"""Running a recipe over a model, block by block: calibrate, solve, write, forget."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale._version import __version__
from finescale.calibration.capture import BlockInputs, capture_block_inputs
from finescale.calibration.data import BUILTIN, CalibrationData, calibration_windows, encode, open_tokenizer, read_text
from finescale.calibration.shared import SharedStatistics
from finescale.calibration.spill import SpilledTensors
from finescale.environment import launch
from finescale.errors import CheckpointError, InputError
from finescale.formats import registry
from finescale.formats.engines import engine_table
from finescale.formats.gguf import local_folder
from finescale.formats.source import SourceCheckpoint, open_checkpoint, read_json
from finescale.models import Skeleton, open_skeleton
from finescale.models.skeleton import check_tensors, unread_weights
from finescale.pipeline import journal as journals
from finescale.pipeline.facts import run_facts
from finescale.pipeline.job import Job, Progress
from finescale.pipeline.output import Output, input_scheme, is_plain
from finescale.pipeline.plan import (
    check_disk,
    check_memory,
    check_tensor_parallel,
    hidden_bytes,
    make_plan,
    memory_bytes,
    output_bytes,
    scattered_groups,
)
from finescale.pipeline.transform import prepare_transforms
from finescale.pipeline.tune import tuning_batches
from finescale.pipeline.walk import work_through
from finescale.ranks import join
from finescale.recipe import Recipe
from finescale.runtime.attention import check_kv_cache, quantize_kv_cache
from finescale.runtime.load import usable_device
from finescale.solvers import code_of

RTN_SAMPLES = 8
"""Windows used where nothing is learned from the text: they only serve the error report."""
LEARNING_COPIES = 6
"""Sets of hidden states where something learns: the quantized model's, the float model's before and after a block, each
rotated or not, and those ahead within a group of blocks."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    tokens_T: Tensor | None = None,
    statistics: SharedStatistics | None = None,
) -> Job:
    """Check everything that can be checked before the work.

    Started by torchrun, the processes share it: each prepares and runs the same job. ``tokens_T`` are the calibration
    text's, where another job on the same model has already encoded it; ``statistics`` those of the same windows, for a
    recipe with ``calibration.sequential: false``.

    Raises:
        InputError, CheckpointError: what cannot work, with the remedy.
    """
    fmt = registry.get(recipe.format)
    if tensor_parallel < 1:
        raise InputError(f"--tp is {tensor_parallel}; use the number of ranks, 1 or more.")
    ranks, target = join(usable_device(device), deterministic)
    if (ranks.count > 1 or spill) and (recipe.transforms or recipe.tuning):
        raise InputError(
            "several processes, and activations on disk, are for recipes without transforms and tuning; run this one "
            "in one process without --spill."
        )
    if statistics is not None and (ranks.count > 1 or recipe.calibration.sequential):
        raise InputError("shared statistics are for one process and for recipes with calibration.sequential false.")
    journals.check_free(out)
    source = resolve_model(model)
    journals.check_apart(out, source.path)
    skeleton = open_skeleton(source, allow_unknown_family)
    unread = unread_weights(skeleton, check_tensors(skeleton))
    turned = prepare_transforms(skeleton, recipe.transforms)
    if recipe.kv_cache is not None:
        check_kv_cache(skeleton.model)
    plan = make_plan(skeleton, recipe, fmt, allow_partial)
    if tensor_parallel > 1:
        check_tensor_parallel(plan, tensor_parallel)
    data, notes = _calibration(skeleton, recipe, calibration or BUILTIN, seed, tokens_T)
    batches = len(data.batches(recipe.calibration.batch_size))
    if batches < ranks.count:
        raise InputError(
            f"{batches} batches of text cannot be shared by {ranks.count} processes; use more --samples or a "
            "smaller calibration.batch_size."
        )
    if unread:
        notes += (
            f"by its config.json the model has no place for {len(unread)} weights of the checkpoint "
            f"({unread[0]}, ...): they are copied as they are",
        )
    scale_dtype = source.float_dtype()
    compute_dtype = torch.float32 if target.type == "cpu" else scale_dtype
    size = output_bytes(plan, scale_dtype, source.total_bytes(), source.float_dtype())
    spilled = hidden_bytes(skeleton, data.tokens_BT.numel(), compute_dtype) if spill else 0
    check_disk(out, size + spilled, Output(skeleton, fmt, out).shards())
    tokens = 0 if spill else data.tokens_BT.numel() // ranks.count
    memory = memory_bytes(skeleton, plan, tokens, compute_dtype, recipe.calibration.power)
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
    if own_code := code_of(recipe.solver.name):
        facts["solver_code"] = own_code
    return Job(
        skeleton, recipe, fmt, plan, data, out, target, compute_dtype, scale_dtype,
        journals.signature(facts), memory, size, plan.notes + notes + (turned.notes() if turned else ()), turned, ranks,
        spill, statistics,
    )  # fmt: skip


def _calibration(
    skeleton: Skeleton, recipe: Recipe, source: str, seed: int, tokens_T: Tensor | None
) -> tuple[CalibrationData, tuple[str, ...]]:
    """Windows as the recipe asks; what it does not ask for by name gives way to short texts and short models."""
    part = recipe.calibration
    asked = part.model_fields_set
    if tokens_T is None:
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
    learns = recipe.solver.entry().needs_hessian or recipe.transforms or recipe.tuning
    if "samples" not in asked and not learns:
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
    """The report of the complete run in the output folder.

    Raises:
        InputError: it had other settings.
        CheckpointError: a file of it is missing.
    """
    done = journals.finished_signature(job.out)
    if done is None:
        return None
    if done != job.signature:
        raise InputError(
            f"{job.out} holds the result of a run with other settings; use --fresh to replace it or another --out."
        )
    report = read_json(job.out / journals.REPORT, "")
    journals.check_files(job.out, report)
    return report | {"already_complete": True}


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
        entries, resumed = work_through(job, journal, output, inputs, on_progress)
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
    if job.recipe.transforms or job.recipe.tuning:
        outside = turned.names(job.skeleton) if turned else []
        report["changed_tensors"] = outside + [name for entry in entries for name in entry.get("changed", ())]
    journals.write_json(
        job.out / "run.json", run_facts(job.device, entries, started, time.perf_counter() - clock, resumed)
    )
    # The report carries the signature: written last, it marks the folder as complete.
    journals.write_json(job.out / journals.REPORT, report)
    return report


def _block_inputs(job: Job, journal: journals.Journal) -> BlockInputs:
    """Inputs of the first block for this process's batches, in memory or on disk."""
    if job.statistics is not None:  # nothing has to run through the blocks
        return BlockInputs([], {})
    batches = job.calibration.batches(job.recipe.calibration.batch_size)
    hidden = SpilledTensors(journal.folder / f"activations-{job.ranks.rank}") if job.spill else []
    return capture_block_inputs(
        job.skeleton,
        job.ranks.share(batches),
        job.device,
        job.compute_dtype,
        hidden,
        tuning_batches(job.recipe),
        _where_kept(job),
    )


def _where_kept(job: Job) -> torch.device:
    """Where activations wait for the next block: on the GPU while they take an eighth of its free memory at most."""
    cpu = torch.device("cpu")
    if job.device.type != "cuda" or job.spill:
        return cpu
    tokens = job.calibration.tokens_BT.numel() // job.ranks.count
    needed = tokens * job.skeleton.model.config.hidden_size * job.compute_dtype.itemsize
    needed *= LEARNING_COPIES if job.recipe.tuning or job.recipe.transforms else 1
    return job.device if needed * 8 <= torch.cuda.mem_get_info(job.device)[0] else cpu


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
            {layer.name: layer.scheme for layer in plan.layers} | dict.fromkeys(plan.skipped),
            activations,
            job.skeleton.family.model_type,
            {layer.name: layer.shape_OI for layer in plan.layers},
            scattered_groups(job.recipe),
            job.recipe.solver.options().keeps_outliers,
            not all(map(is_plain, records)),
            any(record["amplifier"] for record in records),
            job.recipe.kv_cache is not None,
        ),
    }
