"""finescale from Python: quantize, load, evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from finescale.calibration.data import encode, open_tokenizer, read_text
from finescale.errors import InputError
from finescale.evaluate.harness import check_installed, run_hub_tasks
from finescale.evaluate.perplexity import Evaluation, cut_windows, evaluate_windows
from finescale.evaluate.tasks import TaskResult, find_tasks, run_task, task_file
from finescale.formats.gguf import local_folder
from finescale.formats.source import open_checkpoint
from finescale.pipeline.job import Progress
from finescale.pipeline.quantize import prepare, run
from finescale.recipe import Recipe
from finescale.report import write_html
from finescale.runtime.load import load


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    out: str | Path,
    calibration: str | None = None,
    settings: tuple[str, ...] = (),
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    tensor_parallel: int = 1,
    allow_partial: bool = False,
    allow_unknown_family: bool = False,
    deterministic: bool = False,
    spill: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model into a folder and return the report (also ``out/report.json`` and ``out/report.html``).

    Args:
        model: a local folder, a hub name or a GGUF file.
        recipe: a name, a YAML file or a ``Recipe``.
        out: output folder; an unfinished run there with the same settings goes on.
        calibration: plain text or jsonl file, hub data set, or None for the text every Python carries.
        settings: ``key=value`` strings laid over the recipe.
        seed: of the choice of calibration windows.
        device: ``cpu`` or ``cuda``.
        fresh: replace what an earlier run wrote.
        tensor_parallel: refuse layers that cannot be cut over so many ranks.
        allow_partial: accept that less than 80 % of the block weights are quantized.
        allow_unknown_family: read an unknown model's blocks from its module graph.
        deterministic: the same bytes for any number of processes that torchrun starts.
        spill: keep activations on disk, not in memory.
        on_progress: ``(what, blocks done, blocks in all)``.

    Raises:
        FinescaleError: one sentence with the remedy.
    """
    chosen = recipe.with_settings(settings) if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
    job = prepare(
        model, chosen, Path(out), calibration, seed, device, tensor_parallel, allow_partial, allow_unknown_family,
        deterministic, spill,
    )  # fmt: skip
    report = run(job, fresh, on_progress)
    if not job.ranks.leads:
        return report
    write_report(Path(out), report)
    return report


def write_report(out: Path, report: dict[str, Any], comparisons: list[dict[str, Any]] | None = None) -> Path:
    """``out/report.html`` from a report and the ``run.json`` beside it; returns its path."""
    run_file = out / "run.json"
    facts = json.loads(run_file.read_text()) if run_file.is_file() else None
    path = out / "report.html"
    write_html(report, facts, path, comparisons)
    return path


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str,
    *,
    windows: int | None = None,
    length: int = 2048,
    against: str | Path | PreTrainedModel | None = None,
    tokenizer_from: str | Path | None = None,
    bos: bool = False,
    on_progress: Any = None,
) -> Evaluation:
    """Perplexity on a text, and KL and top-1 agreement when ``against`` names the original.

    Args:
        model: folder, hub name or loaded model.
        text: plain text or jsonl file, hub data set, or ``builtin``.
        windows: how many windows, None for the whole text.
        length: tokens of a window; at most the model's positions.
        against: the original model.
        tokenizer_from: folder of the tokenizer when ``model`` is already loaded.
        bos: put the beginning-of-sequence token before each window.
        on_progress: ``(windows done, windows in all)``.

    Raises:
        FinescaleError: one sentence with the remedy.
    """
    folder = tokenizer_from or (None if isinstance(model, PreTrainedModel) else model)
    if folder is None:
        raise InputError("give tokenizer_from, the folder of the tokenizer, with a loaded model.")
    tokenizer = open_tokenizer(open_checkpoint(local_folder(folder)).path)
    loaded = model if isinstance(model, PreTrainedModel) else load(model)
    longest = getattr(loaded.config, "max_position_embeddings", None)
    if longest and length > longest:
        raise InputError(f"--length {length} is longer than the model's {longest} positions; use at most {longest}.")
    if bos and tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no beginning-of-sequence token; leave --bos out.")
    windows_WT = cut_windows(
        encode(tokenizer, read_text(text)), windows, length, tokenizer.bos_token_id if bos else None
    )
    reference = against if isinstance(against, PreTrainedModel) or against is None else load(against)
    return evaluate_windows(loaded, windows_WT, reference, bos, on_progress)


def evaluate_tasks(
    model: str | Path | PreTrainedModel,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    tokenizer_from: str | Path | None = None,
    bos: bool = False,
    batch_tokens: int = 4096,
    on_progress: Any = None,
) -> list[TaskResult]:
    """Zero-shot tasks: accuracies with their standard errors.

    Args:
        model: folder, hub name or loaded model.
        tasks: of ``finescale.evaluate.tasks.TASKS``.
        data: folder of jsonl files; None asks lm-eval (the extra ``eval``), which downloads the questions.
        limit: first questions of each task; None for all.
        tokenizer_from: folder of the tokenizer when ``model`` is already loaded.
        bos: begin each sequence with the beginning-of-sequence token.
        batch_tokens: tokens of a batch.
        on_progress: ``(task, sequences done, sequences in all)``.

    Raises:
        FinescaleError: one sentence with the remedy; before any work for a missing file, task or lm-eval.
    """
    chosen = find_tasks(tasks)
    files = [] if data is None else [task_file(task, Path(data)) for task in chosen]
    if data is None:
        check_installed()
    folder = tokenizer_from or (None if isinstance(model, PreTrainedModel) else model)
    if folder is None:
        raise InputError("give tokenizer_from, the folder of the tokenizer, with a loaded model.")
    tokenizer = open_tokenizer(open_checkpoint(local_folder(folder)).path)
    loaded = model if isinstance(model, PreTrainedModel) else load(model)
    if data is None:
        return run_hub_tasks(loaded, tokenizer, chosen, limit, bos, max(1, batch_tokens // 256))
    return [
        run_task(loaded, tokenizer, task, path, limit, bos, batch_tokens, on_progress)
        for task, path in zip(chosen, files, strict=True)
    ]
