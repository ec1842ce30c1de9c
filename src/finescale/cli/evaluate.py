"""``finescale evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli.common import console, progress_bar, quiet_libraries, write_json_file


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder (quantized or not), a hub name or a .gguf file.")],
    text: Annotated[
        str, typer.Option(help="Plain text or jsonl file, hub data set, or builtin.")
    ] = "builtin:evaluation",
    windows: Annotated[int | None, typer.Option(help="How many windows (default: the whole text).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window (default: 2048 or the model's limit).")] = None,
    against: Annotated[str | None, typer.Option(help="The original model, for KL and top-1 agreement.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put the beginning-of-sequence token before each window.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    integer: Annotated[bool, typer.Option("--integer", help="Run the exact int32 product (integer scales).")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
) -> None:
    """Perplexity on a text; KL and top-1 agreement against the original."""
    quiet_libraries()
    import torch

    from finescale.api import evaluate as run_evaluation
    from finescale.errors import InputError
    from finescale.formats.gguf import local_folder
    from finescale.formats.source import open_checkpoint
    from finescale.report import comparison_table
    from finescale.runtime.load import load

    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype}; choose float32, bfloat16 or float16.")
    folder = local_folder(model)
    value: torch.dtype = getattr(torch, dtype)
    loaded = load(folder, value, device, "integer" if integer else "float")
    reference = load(against, value, device) if against else None
    longest = getattr(loaded.config, "max_position_embeddings", None) or 2048
    with progress_bar("windows") as update:
        result = run_evaluation(
            loaded,
            text,
            windows=windows,
            length=length or min(2048, longest),
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
    write_json_file(json_, {"model": model, "text": text, "template": None, **result.to_dict()})
