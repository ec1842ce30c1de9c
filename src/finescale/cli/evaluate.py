"""``finescale evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finescale.cli import options
from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder (quantized or not), a hub name or a .gguf file.")],
    text: Annotated[
        str | None,
        typer.Option(help="Plain text or jsonl file, hub data set, or builtin (default: builtin, unless --tasks)."),
    ] = None,
    windows: options.EvaluationWindows = None,
    length: options.EvaluationLength = None,
    against: Annotated[str | None, typer.Option(help="The original model, for KL and top-1 agreement.")] = None,
    bos: options.Bos = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    integer: Annotated[bool, typer.Option("--integer", help="Run the exact int32 product (integer scales).")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks: lambada,hellaswag,piqa,arc_easy,arc_challenge,winogrande,...")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of the tasks' jsonl files (default: lm-eval downloads them).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task, the first ones.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch of questions.")] = 4096,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Perplexity on a text, KL and top-1 agreement against the original; accuracy on zero-shot tasks."""
    quiet_libraries()
    import torch

    from finescale.api import evaluate_tasks
    from finescale.errors import InputError
    from finescale.evaluate.harness import check_installed
    from finescale.evaluate.tasks import find_tasks, task_file
    from finescale.formats.gguf import local_folder
    from finescale.formats.source import open_checkpoint
    from finescale.report.tables import task_table
    from finescale.runtime.checkpoint import has_integer_scales
    from finescale.runtime.load import load

    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype}; choose float32, bfloat16 or float16.")
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
    if tasks is not None:
        for task in find_tasks(names):  # before the model is loaded
            if task_data is None:
                check_installed()
            else:
                task_file(task, task_data)
        if text is None and (windows, length, against) != (None, None, None):
            raise InputError("--windows, --length and --against belong to a text; with --tasks give --text too.")
    elif task_data is not None or limit is not None:
        raise InputError("--task-data and --limit belong to --tasks; name the tasks.")
    folder = local_folder(model)
    if integer and not has_integer_scales(open_checkpoint(folder)):
        raise InputError(f"--integer is for checkpoints with integer scales, and {model} has none; leave it out.")
    value: torch.dtype = getattr(torch, dtype)
    loaded = load(folder, value, device, "integer" if integer else "float")
    result: dict[str, Any] = {"model": model, "template": None}
    if text is not None or not names:
        result |= _perplexity(model, loaded, folder, text or "builtin:evaluation", windows, length, against, bos, value)
    if names:
        with progress_bar("questions") as update:
            found = evaluate_tasks(
                loaded,
                names,
                data=task_data,
                limit=limit,
                tokenizer_from=folder,
                bos=bos,
                batch_tokens=batch_tokens,
                on_progress=update,
            )
        result["tasks"] = [one.to_dict() for one in found]
        console.print(task_table(result["tasks"]))
        console.print(f"{'with' if bos else 'without'} BOS, {dtype}, no chat template, no examples (zero-shot).")
    write_json_file(json_, result)


def _perplexity(
    model: str,
    loaded: Any,
    folder: str | Path,
    text: str,
    windows: int | None,
    length: int | None,
    against: str | None,
    bos: bool,
    dtype: Any,
) -> dict[str, Any]:
    """Evaluate and print the table."""
    from finescale.api import evaluate as run_evaluation
    from finescale.formats.gguf import local_folder
    from finescale.formats.source import open_checkpoint
    from finescale.report import comparison_table
    from finescale.runtime.load import load

    reference = load(against, dtype, loaded.device) if against else None
    longest = getattr(loaded.config, "max_position_embeddings", None) or 2048
    with progress_bar("windows") as update:
        result = run_evaluation(
            loaded,
            text,
            windows=windows,
            length=min(2048, longest) if length is None else length,
            against=reference,
            tokenizer_from=folder,
            bos=bos,
            on_progress=lambda done, total: update("evaluating", done, total),
        )
    rows = [{"name": model, "perplexity": result.perplexity, "kl": result.kl, "top1": result.top1}]
    rows[0]["size_bytes"] = open_checkpoint(folder).total_bytes()
    if result.reference_perplexity is not None:
        size = open_checkpoint(local_folder(against or "")).total_bytes()
        rows.insert(
            0,
            {"name": "original", "perplexity": result.reference_perplexity, "kl": 0.0, "top1": 1.0, "size_bytes": size},
        )
    console.print(comparison_table(rows))
    console.print(
        f"{result.windows} windows of {result.length} tokens, {result.tokens} predicted, "
        f"{'with' if result.bos else 'without'} BOS, {result.dtype}, no chat template."
    )
    return {"text": text, **result.to_dict()}
