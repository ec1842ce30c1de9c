"""Zero-shot tasks from local jsonl files, scored as lm-eval scores them.

A task file has one JSON object a line, of one of three kinds:

* ``{"query", "choices", "gold"}``: which choice is likeliest after the query;
* ``{"context_options", "continuation", "gold"}``: after which context the continuation is likeliest (WinoGrande);
* ``{"context", "continuation"}``: is the continuation the model's first choice, token by token (LAMBADA).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescale.errors import InputError
from finescale.evaluate.likelihood import Request, Score, longest_input, score_requests
from finescale.evaluate.perplexity import LARGEST_LOSS
from finescale.formats.source import read_utf8

Progress = Callable[[str, int, int], None]
"""``(task, sequences done, sequences in all)``."""


@dataclass(frozen=True)
class Task:
    """How a task's lines become prompts, and its usual metric.

    Attributes:
        name: as the command line has it.
        harness: lm-eval's name.
        files: names that its file may have, without ``.jsonl``.
        ending: what follows the query in the prompt.
        metric: the usual one; ``accuracy_norm`` divides log-likelihoods by the length of the choice in characters.
    """

    name: str
    harness: str
    files: tuple[str, ...]
    ending: str = ""
    metric: str = "accuracy"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lambada", "lambada_openai", ("lambada", "lambada_openai")),
        Task("hellaswag", "hellaswag", ("hellaswag",), metric="accuracy_norm"),
        Task("piqa", "piqa", ("piqa",), "Answer:", "accuracy_norm"),
        Task("arc_easy", "arc_easy", ("arc_easy",), "\nAnswer:", "accuracy_norm"),
        Task("arc_challenge", "arc_challenge", ("arc_challenge",), "\nAnswer:", "accuracy_norm"),
        Task("winogrande", "winogrande", ("winogrande",)),
        Task("boolq", "boolq", ("boolq",), "\nAnswer:"),
        Task("openbookqa", "openbookqa", ("openbookqa", "openbook_qa"), metric="accuracy_norm"),
    )
}


@dataclass(frozen=True)
class Question:
    """Requests of one line of a task's file.

    Attributes:
        requests: one per choice.
        gold: number of the right choice; None where the single continuation must be the model's first choice.
        lengths: of the choices in characters.
    """

    requests: tuple[Request, ...]
    gold: int | None
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class TaskResult:
    """Result of a task with everything that decides the numbers.

    Attributes:
        task: its name.
        metric: the usual one of the two; ``value`` and ``standard_error`` are of it.
        value, standard_error: share of right answers, and its standard error sqrt(p (1 - p) / (n - 1)).
        accuracy, accuracy_norm: by log-likelihood, and by log-likelihood per character (None for LAMBADA).
        perplexity: of LAMBADA's last words, None for the others.
        questions: how many were asked; of ``available``.
        source: file name and hash, or the hub.
        template, bos, dtype: chat template (none), beginning-of-sequence token, type of the computation.
        length, cut: most tokens that the model takes, and how many requests lost the beginning of their context to it.
        right: for each question in the order of the file, 1 if answered right by ``metric``, else 0, as one string:
            two models that answered the same questions are compared question by question.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    accuracy: float
    accuracy_norm: float | None
    perplexity: float | None
    questions: int
    available: int
    source: str
    template: None
    bos: bool
    dtype: str
    length: int
    cut: int | None
    right: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name. Raises InputError with the choices."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        word = f"no task {', '.join(unknown)}" if unknown else "--tasks names none"
        raise InputError(f"{word}; choose of {', '.join(TASKS)}.")
    return [TASKS[name] for name in dict.fromkeys(names)]


def task_file(task: Task, folder: Path) -> Path:
    """The task's file in a folder. Raises InputError when it is not there."""
    for name in task.files:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            return path
    names = " or ".join(f"{name}.jsonl" for name in task.files)
    raise InputError(f"--task-data {folder} has no {names}; add it or leave {task.name} out of --tasks.")


def read_questions(task: Task, path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        InputError: a line that is no such object, with its number.
    """
    questions = []
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            questions.append(question_of(task, json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path.name}, line {number}: this is no question of {task.name}; each line needs query, choices and "
                "gold, or context_options, continuation and gold, or context and continuation."
            ) from error
    if not questions:
        raise InputError(f"{path} holds no question; check the file.")
    return questions


def question_of(task: Task, row: dict[str, Any]) -> Question:
    """The prompts of one line. Raises KeyError, TypeError or IndexError for what is none."""
    if "context_options" in row:
        contexts, choices = row["context_options"], [row["continuation"]] * len(row["context_options"])
    elif "choices" in row:
        contexts, choices = [row["query"] + task.ending] * len(row["choices"]), row["choices"]
    else:
        contexts, choices = [row["context"]], [row["continuation"]]
    requests = tuple(Request(c, f" {choice}") for c, choice in zip(contexts, choices, strict=True))
    gold = None if "context" in row else int(row["gold"])
    if gold is not None and not 0 <= gold < len(requests):
        raise IndexError(gold)
    return Question(requests, gold, tuple(map(len, choices)))


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    path: Path,
    limit: int | None = None,
    bos: bool = False,
    batch_tokens: int = 4096,
    on_progress: Progress | None = None,
) -> TaskResult:
    """Ask the first ``limit`` questions of a file, or all of them.

    Raises:
        InputError: a file or line that cannot be used.
        NumericsError: the model puts out NaN.
    """
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1; leave it out for all questions.")
    everything = read_questions(task, path)
    questions = everything[:limit]
    requests = [request for question in questions for request in question.requests]
    scores = score_requests(
        model,
        tokenizer,
        requests,
        bos,
        batch_tokens,
        (lambda done, total: on_progress(task.name, done, total)) if on_progress else None,
    )
    answers = []
    start = 0
    for question in questions:
        answers.append((question, scores[start : start + len(question.requests)]))
        start += len(question.requests)
    by_sum = [_right(question, own, False) for question, own in answers]
    choices = all(question.gold is not None for question in questions)
    by_length = [_right(question, own, True) for question, own in answers] if choices else None
    right = by_length if by_length is not None and task.metric == "accuracy_norm" else by_sum
    losses = [-score.log_likelihood for score in scores]
    return TaskResult(
        task=task.name,
        metric=task.metric,
        value=_share(right),
        standard_error=standard_error(right),
        accuracy=_share(by_sum),
        accuracy_norm=None if by_length is None else _share(by_length),
        perplexity=None if choices else math.exp(min(LARGEST_LOSS, sum(losses) / len(losses))),
        questions=len(questions),
        available=len(everything),
        source=f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}",
        template=None,
        bos=bos,
        dtype=str(model.dtype).removeprefix("torch."),
        length=longest_input(model),
        cut=sum(score.cut > 0 for score in scores),
        right="".join("1" if each else "0" for each in right),
    )


def _right(question: Question, scores: Sequence[Score], by_length: bool) -> bool:
    if question.gold is None:
        return scores[0].greedy
    values = [
        score.log_likelihood / (max(1, length) if by_length else 1)
        for score, length in zip(scores, question.lengths, strict=True)
    ]
    return values.index(max(values)) == question.gold


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def standard_error(right: Sequence[bool]) -> float | None:
    """Of a share of right answers; None of a single one."""
    count, share = len(right), _share(right)
    return None if count < 2 else math.sqrt(share * (1 - share) / (count - 1))


def paired_change(right: str, base: str) -> tuple[float, float | None]:
    """Change in accuracy against another model on the same questions, and the standard error of that change.

    Most answers are the same, so that the error is far below that of each accuracy.

    Args:
        right, base: ``TaskResult.right`` of both.

    Raises:
        ValueError: they answered different numbers of questions.
    """
    if len(right) != len(base) or not right:
        raise ValueError("both models must have answered the same questions")
    steps = [int(own) - int(other) for own, other in zip(right, base, strict=True)]
    mean, count = sum(steps) / len(steps), len(steps)
    if count < 2:
        return mean, None
    variance = sum((step - mean) ** 2 for step in steps) / (count - 1)
    return mean, math.sqrt(variance / count)
