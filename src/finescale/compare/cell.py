"""One cell of a comparison: quantize, evaluate, keep the numbers. What is there already is not done again."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finescale.calibration.data import open_tokenizer
from finescale.calibration.shared import collected
from finescale.compare.grid import Cell
from finescale.errors import FinescaleError
from finescale.evaluate.perplexity import evaluate_windows
from finescale.evaluate.reference import load_reference
from finescale.evaluate.tasks import find_tasks, run_task, task_file
from finescale.pipeline.job import Job
from finescale.pipeline.journal import signature, write_json
from finescale.pipeline.quantize import prepare, run
from finescale.recipe import Recipe
from finescale.runtime.load import load

RESULT = "cell.json"
BEGUN = "begun.json"
ORIGINAL = "original"


@dataclass(frozen=True)
class Shared:
    """What all cells have in common; plain values, so that it goes to other processes.

    Attributes:
        model: folder of the original.
        folder: of the comparison; ``shared`` in it holds the tokens and what is kept of the original.
        calibration: name of the calibration text.
        calibration_sha256, text_sha256: of the tokens.
        text: name of the evaluation text.
        bos: whether its windows begin with the beginning-of-sequence token.
        dtype: of the evaluation.
        seed: of the choice of calibration windows.
        tasks: zero-shot tasks, from jsonl files in ``task_data``.
        task_data: their folder.
        limit: questions of each.
        keep: keep the checkpoints of finished cells.
        reference: whether the original's head inputs are kept; else it runs again for every cell.
        fingerprint: of the original's files.
    """

    model: str
    folder: str
    calibration: str
    calibration_sha256: str
    text: str
    text_sha256: str
    bos: bool
    dtype: str
    seed: int
    tasks: tuple[str, ...]
    task_data: str | None
    limit: int | None
    keep: bool
    reference: bool
    fingerprint: Any

    @property
    def tokens_file(self) -> Path:
        return Path(self.folder) / "shared" / "tokens.safetensors"

    @property
    def reference_file(self) -> Path:
        return Path(self.folder) / "shared" / "reference.safetensors"


def cell_folder(folder: str | Path, key: str) -> Path:
    """Where a cell of a comparison lies."""
    return Path(folder) / "cells" / key


def statistics_place(folder: str | Path, job: Job) -> tuple[Path, str]:
    """Where the statistics that a job needs lie, and their signature."""
    facts = {
        "source": job.skeleton.source.fingerprint(),
        "calibration": job.calibration.facts(),
        "batch_size": job.recipe.calibration.batch_size,
        "device": job.device.type,
        "compute_dtype": str(job.compute_dtype),
    }
    own = signature(facts)
    return Path(folder) / "shared" / f"statistics-{own[:12]}", own


def cell_signature(shared: Shared, recipe: dict[str, Any] | None, device: str) -> str:
    """Hash of everything that decides a cell's numbers, the kind of device included."""
    facts = asdict(shared)
    for name in ("folder", "model", "keep", "reference", "calibration", "text", "task_data"):
        del facts[name]
    return signature(facts | {"recipe": recipe, "device": device.partition(":")[0]})


def finished(shared: Shared, key: str, recipe: dict[str, Any] | None, device: str) -> dict[str, Any] | None:
    """The cell's result if it was made in the same setting; a failed one counts as not made."""
    path = cell_folder(shared.folder, key) / RESULT
    if not path.is_file():
        return None
    found = _read(path)
    same = found.get("signature") == cell_signature(shared, recipe, device)
    return found if same and "error" not in found else None


def _read(path: Path) -> dict[str, Any]:
    """A result as the file has it: what was just made is no different from what is found."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_cell(shared: Shared, cell: Cell, device: str) -> dict[str, Any]:
    """Quantize and evaluate one recipe; an error that finescale explains becomes the cell's result."""
    recipe = cell.recipe.to_dict()
    known = finished(shared, cell.key, recipe, device)
    if known is not None:
        return known
    folder = cell_folder(shared.folder, cell.key)
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "key": cell.key,
        "label": cell.label,
        "recipe": recipe,
        "signature": cell_signature(shared, recipe, device),
    }
    # What an earlier comparison with other settings left here is replaced; what this one left is gone on with.
    begun = folder / BEGUN
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != facts["signature"]:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    write_json(begun, facts["signature"])
    start = time.perf_counter()
    try:
        facts |= _quantized(shared, cell.recipe, folder / "checkpoint", device)
        facts |= _evaluated(shared, folder / "checkpoint", device)
    except (FinescaleError, torch.OutOfMemoryError) as error:
        facts["error"] = next(iter(str(error).splitlines()), type(error).__name__)
    facts["seconds_in_all"] = time.perf_counter() - start
    write_json(folder / RESULT, facts)
    if not shared.keep:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return _read(folder / RESULT)


def run_original(shared: Shared, device: str, loaded: PreTrainedModel | None = None) -> dict[str, Any]:
    """The original's own row."""
    known = finished(shared, ORIGINAL, None, device)
    if known is not None:
        return known
    folder = cell_folder(shared.folder, ORIGINAL)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "key": ORIGINAL,
        "label": ORIGINAL,
        "recipe": None,
        "signature": cell_signature(shared, None, device),
        **_evaluated(shared, Path(shared.model), device, loaded),
    }
    write_json(folder / RESULT, facts)
    return _read(folder / RESULT)


def _quantized(shared: Shared, recipe: Recipe, out: Path, device: str) -> dict[str, Any]:
    tokens_T = load_file(shared.tokens_file)["calibration"]
    job = prepare(shared.model, recipe, out, shared.calibration, shared.seed, device, tokens_T=tokens_T)
    if not recipe.calibration.sequential:
        folder, own = statistics_place(shared.folder, job)
        job = replace(job, statistics=collected(folder, own))
    report = run(job)
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    layers = report["layers"]
    uses = [layer["overflow_use"] for layer in layers if layer["overflow_use"] is not None]
    return {
        "bits_per_weight": report["size"]["bits_per_weight"],
        "size_bytes": report["size"]["after_bytes"],
        "relative_error": sum(layer["relative_error"] for layer in layers) / len(layers),
        "overflow_use": max(uses, default=None),
        "fallbacks": len(report["fallbacks"]),
        "quantize_seconds": facts["seconds"],
        "peak_gpu_bytes": facts["peak_gpu_bytes"],
        "calibration": report["calibration"],
    }


def _evaluated(shared: Shared, path: Path, device: str, loaded: PreTrainedModel | None = None) -> dict[str, Any]:
    dtype: torch.dtype = getattr(torch, shared.dtype)
    model = loaded if loaded is not None else load(path, dtype, device)
    reference = None
    if path != Path(shared.model):
        kept = shared.reference and shared.reference_file.is_file()
        reference = load_reference(shared.reference_file, model.device) if kept else load(shared.model, dtype, device)
    start = time.perf_counter()
    windows_WT = load_file(shared.tokens_file)["windows"]
    result = evaluate_windows(model, windows_WT, reference, shared.bos).to_dict()
    del reference
    tokenizer = open_tokenizer(Path(shared.model))
    tasks = []
    for task in find_tasks(shared.tasks) if shared.tasks else []:
        file = task_file(task, Path(shared.task_data or ""))
        tasks.append(run_task(model, tokenizer, task, file, shared.limit, shared.bos).to_dict())
    return result | {"tasks": tasks, "evaluate_seconds": time.perf_counter() - start}
