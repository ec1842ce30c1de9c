"""Speed of each cell's model in finescale, one after another and alone on the device.

Two numbers: tokens a second through one forward pass of a prompt, and of greedy generation for one user.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finescale.compare.cell import ORIGINAL, cell_folder
from finescale.compare.run import RESULT
from finescale.errors import FinescaleError
from finescale.pipeline.journal import write_json
from finescale.runtime.load import load

PROMPT = 512
NEW_TOKENS = 16
REPEATS = 5

Progress = Callable[[str, int, int], None]


def add_speeds(
    result: dict[str, Any], model: str | Path, out: Path, device: str, on_progress: Progress
) -> dict[str, Any]:
    """The comparison with ``speed`` in every row whose checkpoint is there; also in ``out/compare.json``."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    rows = []
    for number, row in enumerate(result["rows"]):
        folder = model if row["key"] == ORIGINAL else cell_folder(out, row["key"]) / "checkpoint"
        if "error" not in row and (row["key"] == ORIGINAL or (Path(folder) / "config.json").is_file()):
            on_progress(f"{row['key']}: timing", number, len(result["rows"]))
            try:
                row = row | {"speed": measure_speed(load(folder, dtype, device, "kernel"))}
            except FinescaleError as error:
                row = row | {"speed_error": str(error)}
        rows.append(row)
    result = result | {"rows": rows}
    write_json(out / RESULT, result)
    return result


def measure_speed(model: PreTrainedModel, prompt: int = PROMPT, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Medians of several runs after a warm-up.

    Returns:
        ``prompt_tokens_per_second``, ``generated_tokens_per_second``, their spread (slowest over fastest run),
        ``prompt``, ``new_tokens``, ``dtype``.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or 2048
    prompt = min(prompt, longest - new_tokens)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens_BT = torch.randint(0, vocabulary, (1, prompt), generator=generator).to(model.device)
    prefill = _times(lambda: _prefill(model, tokens_BT), model.device)
    decode = _times(lambda: _decode(model, tokens_BT, new_tokens), model.device)
    return {
        "prompt_tokens_per_second": prompt / statistics.median(prefill),
        "generated_tokens_per_second": new_tokens / statistics.median(decode),
        "prompt_spread": max(prefill) / min(prefill),
        "generated_spread": max(decode) / min(decode),
        "prompt": prompt,
        "new_tokens": new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _prefill(model: PreTrainedModel, tokens_BT: torch.Tensor) -> float:
    start = _now(model.device)
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False, logits_to_keep=1)
    return _now(model.device) - start


def _decode(model: PreTrainedModel, tokens_BT: torch.Tensor, new_tokens: int) -> float:
    """Seconds of the new tokens alone, after the prompt."""
    with torch.no_grad():
        output = model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)
        start = _now(model.device)
        for _ in range(new_tokens):
            following = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return _now(model.device) - start


def _times(run: Callable[[], float], device: torch.device) -> list[float]:
    run()
    return [run() for _ in range(REPEATS)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
