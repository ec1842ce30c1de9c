"""Perplexity by windows, and how far a quantized model strays from the original.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.evaluate.reference import Reference

Progress = Callable[[int, int], None]
"""``(windows done, windows in all)``."""
LARGEST_LOSS = 700.0
"""Nats per token from which on the perplexity stays e^700, near the end of what a float holds."""
_CHUNK = 256
"""Rows of logits turned to float64-safe log-probabilities at a time, to bound memory."""


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation with everything that decides the numbers.

    Attributes:
        perplexity: exp of the mean loss of all predicted tokens, in nats; every window predicts length - 1 tokens.
        tokens: predicted tokens.
        windows, length: number and size of the windows.
        bos: whether each window was preceded by the beginning-of-sequence token.
        dtype: type of the computation.
        text_sha256: hash of the evaluated tokens.
        kl: mean KL divergence of the original's next-token distribution from the model's, nats per token.
        top1: share of tokens at which both models agree on the likeliest next token.
        reference_perplexity: of the original on the same windows.
        window_losses: mean loss of each window, in nats: differences between two models on the same windows have a
            far smaller spread than the losses, and say how much of a difference in perplexity is chance.
    """

    perplexity: float
    tokens: int
    windows: int
    length: int
    bos: bool
    dtype: str
    text_sha256: str
    kl: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None
    window_losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut_windows(tokens_T: Tensor, windows: int | None, length: int, bos: int | None) -> Tensor:
    """Non-overlapping windows, int64 [windows, length]; the last incomplete one is dropped.

    With ``bos`` each window is that token followed by ``length - 1`` tokens of text.

    Raises:
        InputError: the text holds no whole window, or fewer than asked for, or a window would predict nothing.
    """
    least = 2 if bos is None else 3
    if length < least or (windows is not None and windows < 1):
        raise InputError(f"--windows must be at least 1 and --length at least {least}; choose larger ones.")
    step = length if bos is None else length - 1
    available = tokens_T.shape[0] // step
    if available < (windows or 1):
        raise InputError(
            f"the text holds {tokens_T.shape[0]} tokens, {windows} windows of {length} are asked for; "
            f"use --windows {available} or a shorter --length or more text."
            if available
            else f"the text holds {tokens_T.shape[0]} tokens, fewer than one window of {length}; "
            "use a shorter --length or more text."
        )
    count = windows or available
    cut_WT = tokens_T[: count * step].view(count, step)
    if bos is None:
        return cut_WT
    return torch.cat([torch.full((count, 1), bos, dtype=cut_WT.dtype), cut_WT], dim=1)


def evaluate_windows(
    model: PreTrainedModel,
    windows_WT: Tensor,
    reference: PreTrainedModel | Reference | None = None,
    bos: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on windows of tokens, with KL and top-1 agreement when a reference is given.

    Args:
        model: loaded model.
        windows_WT: int64 [windows, length].
        reference: the original model, or what was kept of it on the same windows.
        bos: recorded in the result.
        on_progress: called after each window.

    Raises:
        InputError: an original with another vocabulary.
        CheckpointError: tokens beyond the model's embeddings.
        NumericsError: the model or the original puts out NaN or Inf.
    """
    _check_vocabulary(model, windows_WT)
    loss = reference_loss = kl = agreed = 0.0
    predicted = 0
    losses = []
    sums: Tensor | None = None
    for number, tokens_T in enumerate(windows_WT):
        before = loss
        logits_TV = _logits(model, tokens_T)
        target_T = tokens_T[1:].to(logits_TV.device)
        reference_TV = None if reference is None else _reference_logits(reference, number, tokens_T)
        if reference_TV is not None and reference_TV.shape != logits_TV.shape:
            raise InputError(
                f"the original has {reference_TV.shape[-1]} tokens in its vocabulary and the model "
                f"{logits_TV.shape[-1]}; give the model that was quantized."
            )
        if sums is None:  # they stay on the device: one transfer per window
            sums = torch.zeros(4, dtype=torch.float64, device=logits_TV.device)
        for rows in _chunks(target_T.shape[0]):
            log_TV = logits_TV[rows].float().log_softmax(-1)
            sums[0] -= log_TV.gather(1, target_T[rows, None]).double().sum()
            if reference_TV is not None:
                other_TV = reference_TV[rows].float().log_softmax(-1)
                sums[1] -= other_TV.gather(1, target_T[rows, None]).double().sum()
                sums[2] += (other_TV.exp() * (other_TV - log_TV)).double().sum()
                sums[3] += (other_TV.argmax(-1) == log_TV.argmax(-1)).sum()
        loss, reference_loss, kl, agreed = sums.tolist()
        predicted += target_T.shape[0]
        losses.append((loss - before) / target_T.shape[0])
        if not math.isfinite(loss):
            raise NumericsError(
                f"the model puts out NaN or Inf in window {number + 1}; check the checkpoint with finescale verify."
            )
        if not math.isfinite(reference_loss + kl):
            raise NumericsError(f"the original puts out NaN or Inf in window {number + 1}; try --dtype float32.")
        if on_progress:
            on_progress(number + 1, windows_WT.shape[0])
    with_reference = reference is not None
    return Evaluation(
        perplexity=_exp(loss / predicted),
        tokens=predicted,
        windows=windows_WT.shape[0],
        length=windows_WT.shape[1],
        bos=bos,
        dtype=str(model.dtype).removeprefix("torch."),
        text_sha256=hashlib.sha256(windows_WT.contiguous().numpy().tobytes()).hexdigest(),
        kl=kl / predicted if with_reference else None,
        top1=agreed / predicted if with_reference else None,
        reference_perplexity=_exp(reference_loss / predicted) if with_reference else None,
        window_losses=tuple(losses),
    )


def _check_vocabulary(model: PreTrainedModel, windows_WT: Tensor) -> None:
    rows = int(model.get_input_embeddings().weight.shape[0])
    if int(windows_WT.max()) >= rows:
        raise CheckpointError(f"the tokenizer makes ids beyond the {rows} embeddings; it belongs to another model.")


def _logits(model: PreTrainedModel, tokens_T: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=tokens_T[None].to(model.device), use_cache=False)
    logits: Tensor = output.logits[0, :-1]
    return logits


def _reference_logits(reference: PreTrainedModel | Reference, number: int, tokens_T: Tensor) -> Tensor:
    return reference.logits(number) if isinstance(reference, Reference) else _logits(reference, tokens_T)


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _CHUNK):
        yield slice(start, min(start + _CHUNK, rows))


def _exp(mean_loss: float) -> float:
    """A number whatever the loss: JSON, tables and plots have no place for infinity."""
    return math.exp(min(mean_loss, LARGEST_LOSS))
