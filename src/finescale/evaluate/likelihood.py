"""Log-likelihoods of continuations, batched: what multiple-choice tasks are scored by.

Shape legend: B sequences, T tokens, V vocabulary, N predicted tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescale.errors import InputError, NumericsError

Progress = Callable[[int, int], None]
"""``(sequences done, sequences in all)``."""
_ROWS = 1024
"""Rows of logits turned to log-probabilities at a time, to bound memory."""


@dataclass(frozen=True)
class Request:
    """How likely is ``continuation`` after ``context``?"""

    context: str
    continuation: str


@dataclass(frozen=True)
class Score:
    """Answer to a request.

    Attributes:
        log_likelihood: of all tokens of the continuation, in nats.
        greedy: whether each of these tokens is the model's first choice.
        tokens: of the continuation.
        cut: tokens of the context that did not fit the model and were left out at its beginning.
    """

    log_likelihood: float
    greedy: bool
    tokens: int
    cut: int = 0


@dataclass(frozen=True)
class _Encoded:
    """``inputs`` go through the model; its last ``len(targets)`` outputs predict ``targets``."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    cut: int


def longest_input(model: PreTrainedModel) -> int:
    """Most tokens that a model takes; 2048 where its config names no limit."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def encode_request(tokenizer: PreTrainedTokenizerBase, request: Request, bos: int | None, longest: int) -> _Encoded:
    """Tokens of a request. Context and continuation are encoded as one text, so that their boundary is as in running
    text; blanks at the end of the context belong to the continuation.

    Args:
        tokenizer: of the model.
        request: what to encode; with neither context nor ``bos`` its first token is not predicted, but given.
        bos: token to begin with, or None.
        longest: most tokens that the model takes.

    Raises:
        InputError: the continuation is empty, or longer than the model takes.
    """
    context = request.context.rstrip()
    tail = request.context[len(context) :] + request.continuation
    whole = _ids(tokenizer, context + tail)
    before = [] if bos is None else [bos]
    start = len(_ids(tokenizer, context)) if context else 0
    start = max(start, 0 if before else 1)
    targets = whole[start:]
    if not targets:
        raise InputError(f"the continuation {request.continuation!r} has no token of its own; check the task's file.")
    if len(targets) > longest:
        raise InputError(f"a continuation has {len(targets)} tokens and the model takes {longest}; leave the task out.")
    inputs = [*before, *whole][:-1]
    cut = max(0, len(inputs) - longest)
    return _Encoded(tuple(inputs[cut:]), tuple(targets), cut)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def score_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    bos: bool = False,
    batch_tokens: int = 4096,
    on_progress: Progress | None = None,
) -> list[Score]:
    """Scores in the order of the requests.

    Sequences are sorted by length and batched up to ``batch_tokens`` tokens, padding included; requests whose inputs
    are equal (answers of one token to one question) share a sequence. Padding stands behind the text, where causal
    attention does not see it.

    Args:
        model: causal language model on any device.
        tokenizer: of the model.
        requests: what to score.
        bos: begin each sequence with the beginning-of-sequence token.
        batch_tokens: tokens of a batch; a longer sequence is a batch of its own.
        on_progress: called after each batch.

    Raises:
        InputError: see ``encode_request``; or ``bos`` without such a token.
        NumericsError: the model puts out NaN.
    """
    if bos and tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no beginning-of-sequence token; leave --bos out.")
    first = tokenizer.bos_token_id if bos else None
    longest = longest_input(model)
    encoded = [encode_request(tokenizer, request, first, longest) for request in requests]
    users: dict[tuple[int, ...], list[int]] = {}
    for number, entry in enumerate(encoded):
        users.setdefault(entry.inputs, []).append(number)
    scores: list[Score | None] = [None] * len(requests)
    done = 0
    for batch in _batches(sorted(users, key=len, reverse=True), batch_tokens):
        numbers = [number for inputs in batch for number in users[inputs]]
        rows = [row for row, inputs in enumerate(batch) for _ in users[inputs]]
        found = _score_batch(_logits(model, batch), rows, [encoded[number] for number in numbers])
        for number, score in zip(numbers, found, strict=True):
            scores[number] = score
        done += len(batch)
        if on_progress:
            on_progress(done, len(users))
    return [score for score in scores if score is not None]


def _batches(sequences: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive sequences, the longest first, as many as fit."""
    start = 0
    while start < len(sequences):
        count = max(1, tokens // max(1, len(sequences[start])))
        yield list(sequences[start : start + count])
        start += count


def _logits(model: PreTrainedModel, batch: Sequence[tuple[int, ...]]) -> Tensor:
    width = len(batch[0])
    tokens_BT = torch.tensor([[*inputs, *[0] * (width - len(inputs))] for inputs in batch], dtype=torch.int64)
    with torch.no_grad():
        logits_BTV: Tensor = model(input_ids=tokens_BT.to(model.device), use_cache=False).logits
    return logits_BTV


def _score_batch(logits_BTV: Tensor, rows: Sequence[int], entries: Sequence[_Encoded]) -> list[Score]:
    """Scores of the requests of a batch, with one transfer from the device for all of them.

    Args:
        logits_BTV: outputs of the batch.
        rows: sequence of each request.
        entries: the requests.
    """
    device = logits_BTV.device
    places = [
        (row, len(entry.inputs) - len(entry.targets) + number, target)
        for row, entry in zip(rows, entries, strict=True)
        for number, target in enumerate(entry.targets)
    ]
    values = []
    for start in range(0, len(places), _ROWS):
        row_N, time_N, target_N = torch.tensor(places[start : start + _ROWS], device=device).T
        log_NV = logits_BTV[row_N, time_N].float().log_softmax(-1)
        first_N = log_NV.argmax(-1) == target_N
        values.append(torch.stack([log_NV.gather(1, target_N[:, None])[:, 0].double(), first_N.double()]))
    value_N, greedy_N = torch.cat(values, dim=1).cpu()
    if bool(value_N.isnan().any()):
        raise NumericsError("the model puts out NaN on a task; check the checkpoint with finescale verify.")
    scores, start = [], 0
    for entry in entries:
        own = slice(start, start + len(entry.targets))
        scores.append(Score(float(value_N[own].sum()), bool(greedy_N[own].all()), len(entry.targets), entry.cut))
        start = own.stop
    return scores
