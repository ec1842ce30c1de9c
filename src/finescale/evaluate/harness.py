"""Zero-shot tasks from the hub, by lm-eval (the extra ``eval``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescale.errors import InputError
from finescale.evaluate.likelihood import longest_input
from finescale.evaluate.perplexity import LARGEST_LOSS
from finescale.evaluate.tasks import Task, TaskResult


def check_installed() -> None:
    """Raises InputError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError(
            "tasks from the hub need lm-eval: pip install 'finescale[eval]', or give --task-data DIR with jsonl files."
        )


def run_hub_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    limit: int | None = None,
    bos: bool = False,
    batch_size: int = 16,
    manager: Any = None,
) -> list[TaskResult]:
    """Run tasks by lm-eval, which downloads their questions.

    Args:
        model: loaded model.
        tokenizer: of the model.
        tasks: which.
        limit: first questions of each task; None for all.
        bos: begin each sequence with the beginning-of-sequence token.
        batch_size: sequences of a batch.
        manager: lm-eval's TaskManager, for task definitions of one's own.

    Raises:
        InputError: lm-eval is not installed, or the questions cannot be downloaded.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos)
    try:
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=[task.harness for task in tasks],
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    except Exception as error:  # the hub's client and lm-eval raise many types; each means the same to the user
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"lm-eval could not run the tasks ({reason}); offline, give --task-data DIR.") from error
    return [_result(task, found, model, bos) for task in tasks]


def _result(task: Task, found: Mapping[str, Any], model: PreTrainedModel, bos: bool) -> TaskResult:
    values = found["results"][task.harness]
    short = {"accuracy": "acc", "accuracy_norm": "acc_norm"}[task.metric]
    key = short if f"{short},none" in values else "acc"
    samples = sorted(found["samples"][task.harness], key=lambda sample: sample["doc_id"])
    right = "".join("1" if sample[key] else "0" for sample in samples)
    share = float(values[f"{key},none"])
    count = len(samples)
    error = (share * (1 - share) / (count - 1)) ** 0.5 if count > 1 else None
    return TaskResult(
        task=task.name,
        metric="accuracy" if key == "acc" else "accuracy_norm",
        value=share,
        standard_error=error,
        accuracy=float(values["acc,none"]),
        accuracy_norm=_optional(values.get("acc_norm,none")),
        perplexity=_optional(values.get("perplexity,none")),
        questions=count,
        available=int(found["n-samples"][task.harness]["original"]),
        source=f"lm-eval {task.harness} version {found['versions'].get(task.harness)}",
        template=None,
        bos=bos,
        dtype=str(model.dtype).removeprefix("torch."),
        length=longest_input(model),
        cut=None,
        right=right,
    )


def _optional(value: Any) -> float | None:
    """A number that JSON holds: a perplexity is cut off as our own are."""
    return min(float(value), math.exp(LARGEST_LOSS)) if isinstance(value, int | float) else None
