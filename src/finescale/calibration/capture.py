"""What every block of a model is called with, found by one pass through the model with its blocks passed over.

Shape legend: B sequences of a batch, T tokens, I hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.models.skeleton import (
    Skeleton,
    fill_except_blocks,
    fill_module,
    release_except_blocks,
    release_module,
)


@dataclass(frozen=True)
class BlockInputs:
    """Hidden states before the first block, one [B, T, I] per batch, and each block's other arguments.

    Attributes:
        hidden: float tensors [B, T, I], one per batch, all on one device.
        kwargs: by number of sequences in a batch, each block's arguments besides the hidden states.
    """

    hidden: MutableSequence[Tensor]
    kwargs: dict[int, list[dict[str, Any]]]


class _Recorder:
    """Stands in for the forward of every block: notes the arguments and passes the hidden states on."""

    def __init__(self, blocks: nn.ModuleList, returns_tuple: bool) -> None:
        self.blocks = blocks
        self.returns_tuple = returns_tuple
        self.hidden: Tensor | None = None
        self.kwargs: list[dict[str, Any]] = []

    def forward_of(self, index: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                self.hidden = hidden_states
            self.kwargs.append(bind_arguments(self.blocks[index], args, kwargs))
            return (hidden_states, None) if self.returns_tuple else hidden_states

        return forward


def bind_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments after the hidden states, by name, merged with the keyword ones; caches are left out."""
    names = list(inspect.signature(type(block).forward).parameters)[2:]
    merged = dict(zip(names, args, strict=False)) | kwargs
    return {name: value for name, value in merged.items() if name not in ("past_key_values", "layer_past", "use_cache")}


def capture_block_inputs(
    skeleton: Skeleton,
    batches: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    hidden: MutableSequence[Tensor] | None = None,
    other_sizes: Sequence[int] = (),
    kept: torch.device | None = None,
) -> BlockInputs:
    """Run the model's embedding over all batches and note what each block would be called with.

    Args:
        skeleton: the model; its parts outside the blocks are filled, and released afterwards.
        batches: token ids, int64 [B, T].
        device: where to run.
        dtype: float type of the hidden states.
        hidden: where they go, empty; None for a new list.
        other_sizes: note the other arguments for batches of so many sequences too.
        kept: where the hidden states are kept; None for the CPU.
    """
    hidden = [] if hidden is None else hidden
    fill_except_blocks(skeleton, device, dtype)
    blocks = skeleton.blocks
    recorder = _Recorder(blocks, _returns_tuple(skeleton, device, dtype, batches[0][:1, :2]))
    originals = [block.forward for block in blocks]
    kwargs: dict[int, list[dict[str, Any]]] = {}
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder.forward_of(index)
        extra = [torch.cat(batches)[:size] for size in other_sizes]
        for tokens_BT in [*batches, *extra]:
            recorder.kwargs = []
            with torch.no_grad():
                skeleton.model.base_model(input_ids=tokens_BT.to(device), use_cache=False)
            assert recorder.hidden is not None
            hidden.append(recorder.hidden.to(kept or "cpu"))  # that of the extra batch is dropped below
            kwargs.setdefault(tokens_BT.shape[0], recorder.kwargs)
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.forward = original
        release_except_blocks(skeleton)
    return BlockInputs(hidden[: len(batches)], kwargs)


def _returns_tuple(skeleton: Skeleton, device: torch.device, dtype: torch.dtype, tokens_BT: Tensor) -> bool:
    """Whether the blocks return a tuple: seen on the first block, run for real on two tokens."""
    block = fill_module(skeleton, skeleton.block_path(0), device, dtype)
    seen: list[bool] = []

    class _StopError(Exception):
        pass

    original = block.forward

    def probe(*args: Any, **kwargs: Any) -> Any:
        seen.append(isinstance(original(*args, **kwargs), tuple))
        raise _StopError

    try:
        block.forward = probe
        with torch.no_grad():
            skeleton.model.base_model(input_ids=tokens_BT.to(device), use_cache=False)
    except _StopError:
        pass
    finally:
        block.forward = original
        release_module(block)
    return seen[0]


def run_block(block: nn.Module, hidden_BTI: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The block's output hidden states, float [B, T, I]."""
    with torch.no_grad():
        output = block(hidden_BTI, **kwargs)
    return output[0] if isinstance(output, tuple) else output
