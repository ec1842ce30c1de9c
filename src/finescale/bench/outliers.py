"""A model with activation outliers of known size that computes what it computed before.

In every norm that feeds linears the gain of a few channels is raised until they reach ``size`` times the largest other
channel, and what reads the norm lowers its weights there by as much: a test bed for methods against outliers, with a
known right answer.
Shape legend: I channels.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from finescale.calibration.capture import capture_block_inputs, run_block
from finescale.calibration.statistics import collect_ranges
from finescale.errors import InputError
from finescale.formats.source import open_checkpoint
from finescale.models import Skeleton, open_skeleton
from finescale.models.edges import trace_edges
from finescale.models.skeleton import checkpoint_key, fill_module, layer_name, release_module
from finescale.pipeline.journal import write_json, write_shard
from finescale.pipeline.output import small_files
from finescale.transforms.scaling import divide_norm

_PROMPT_TOKENS = 256


def plant_outliers(model: str | Path, out: Path, size: float, channels: int = 1, seed: int = 0) -> list[int]:
    """Write a copy of a model whose norms put out outliers.

    Args:
        model: folder of a full-precision model; its experts, if any, are written one by one.
        out: a new folder.
        size: the outliers' largest magnitude over that of all other channels, on a prompt of arbitrary tokens.
        channels: how many channels of the residual stream get it, the same in all blocks, as in real models.
        seed: of the choice of channels.

    Returns:
        The channels.

    Raises:
        InputError: a folder in use, or a size that does nothing.
    """
    if size <= 1 or channels < 1:
        raise InputError(f"outliers of size {size} in {channels} channels are none; give a size above 1.")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} holds files already; choose an empty or new folder.")
    source = open_checkpoint(model)
    skeleton = open_skeleton(source)
    width = int(skeleton.model.config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(width, generator=generator)[:channels].tolist())
    rest = [channel for channel in range(width) if channel not in chosen]
    tensors = {key: source.read(key) for key in source}
    device = torch.device("cpu")
    tokens_BT = torch.arange(_PROMPT_TOKENS)[None] % skeleton.model.get_input_embeddings().weight.shape[0]
    inputs = capture_block_inputs(skeleton, [tokens_BT], device, torch.float32)
    hidden_BTI = inputs.hidden[0]
    for index in range(skeleton.block_count):
        block = fill_module(skeleton, skeleton.block_path(index), device, torch.float32)
        kwargs = inputs.kwargs[1][index]
        edges = trace_edges(block, hidden_BTI, kwargs)
        ranges = collect_ranges(block, [edge.norm for edge in edges], (), [(hidden_BTI, kwargs)], device)
        hidden_BTI = run_block(block, hidden_BTI, kwargs)
        for edge in edges:
            absmax_I = ranges[edge.norm].absmax_I
            scale_I = torch.ones(width)
            scale_I[chosen] = (absmax_I[chosen] / (size * absmax_I[rest].max())).clamp(max=1.0)
            consumers = [block.get_submodule(path) for path in edge.consumers]
            divide_norm(block.get_submodule(edge.norm), consumers, scale_I, source.float_dtype())
        tensors |= _named(skeleton, index, dict(block.named_parameters()))
        release_module(block)
    for key in [key for key in tensors if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        del tensors[key]
    out.mkdir(parents=True, exist_ok=True)
    write_shard(out / "model.safetensors", {key: tensor.contiguous() for key, tensor in tensors.items()})
    for path in small_files(source.path):
        shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", source.config)
    return chosen


def _named(skeleton: Skeleton, index: int, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block's parameters by their names in the checkpoint, in their stored types."""
    tensors = {}
    for name, parameter in parameters.items():
        full = f"{skeleton.block_path(index)}.{name}"
        path, _, leaf = full.rpartition(".")
        key = checkpoint_key(skeleton, full) or f"{layer_name(skeleton, path)}.{leaf}"
        dtype = skeleton.source.dtype(key) if key in skeleton.source else skeleton.source.float_dtype()
        tensors[key] = parameter.data.to(dtype)
    return tensors
