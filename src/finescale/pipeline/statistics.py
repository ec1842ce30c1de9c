"""Collecting the statistics that many runs over one model share.

Shape legend: I inputs, B sequences, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finescale.calibration.capture import capture_block_inputs
from finescale.calibration.shared import DONE, SharedStatistics
from finescale.calibration.statistics import collect_moments
from finescale.models import Skeleton, Step, linear_modules, trace_steps
from finescale.models.skeleton import fill_module, release_module
from finescale.pipeline.block import propagate
from finescale.pipeline.journal import write_json, write_shard

Progress = Callable[[str, int, int], None]


def collect_statistics(
    skeleton: Skeleton,
    tokens_BT: Tensor,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    signature: str,
    on_progress: Progress | None = None,
) -> SharedStatistics:
    """Run text through the original block by block and keep the moments of every input of a linear.

    Args:
        skeleton: the model, nothing filled.
        tokens_BT: windows, int64 [B, T].
        batch_size: windows of a batch: float sums depend on it.
        device, dtype: of the computation.
        folder: where the files go.
        signature: of everything that decides them.
        on_progress: ``(what, blocks done, blocks in all)``.

    Raises:
        NumericsError: NaN or Inf, with the name of the layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = SharedStatistics(folder)
    inputs = capture_block_inputs(skeleton, list(tokens_BT.split(batch_size)), device, dtype)
    traced: dict[tuple[str, ...], tuple[Step, ...]] = {}
    for index in range(skeleton.block_count):
        if on_progress:
            on_progress("statistics of block", index, skeleton.block_count)
        path = skeleton.block_path(index)
        block = fill_module(skeleton, path, device, dtype)
        arguments = [inputs.kwargs[hidden.shape[0]][index] for hidden in inputs.hidden]
        names = tuple(linear_modules(block))
        if names not in traced:
            traced[names] = trace_steps(block, inputs.hidden[0].to(device), arguments[0])
        leaders = {step.linears[0]: f"{path}.{step.linears[0]}" for step in traced[names]}
        batches = list(zip(inputs.hidden, arguments, strict=True))
        moments = collect_moments(block, leaders, batches, device)
        facts = {
            "steps": [[list(step.linears), step.norm] for step in traced[names]],
            "tokens": {name: moment.tokens for name, moment in moments.items()},
        }
        sums = {name: moment.sum_II.cpu() for name, moment in moments.items()}
        write_shard(shared.file(index), sums, {"facts": json.dumps(facts)})
        del batches, moments
        propagate(block, path, inputs.hidden, arguments, device)
        release_module(block)
        skeleton.source.close()
    write_json(folder / DONE, signature)
    return shared
