"""Loading a model for use: full-precision or quantized, by transformers' own module graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from finescale.errors import CheckpointError, InputError
from finescale.formats import compressed_tensors
from finescale.formats.gguf import local_folder
from finescale.formats.source import open_checkpoint
from finescale.grid import InputRule, QuantizedWeight
from finescale.kernels.dispatch import choose_kernel, has_hopper_kernels, layer_facts
from finescale.kernels.portable import PORTABLE, PortableProduct
from finescale.models import Skeleton, linear_modules, open_skeleton
from finescale.models.skeleton import fill_buffers, fill_parameters, possible_names, weight_OI_of
from finescale.runtime.attention import quantize_kv_cache
from finescale.runtime.checkpoint import QuantizedCheckpoint, open_quantized
from finescale.runtime.experts import PackedMixture, install_mixtures
from finescale.runtime.fused import fuse_on_kernels
from finescale.runtime.modules import Path as ComputePath
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.packed import PackedLinear
from finescale.runtime.portable import PortableLinear, join_same_inputs

Rounding = Literal["finescale", "compressed-tensors", "none"]
LoadPath = Literal["float", "integer", "kernel"]


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name. Raises InputError when there is none such, or not here."""
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device is {device}; use cpu or cuda.") from error
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {device}; use cpu or cuda.")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here; use --device cpu.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device is {device}; this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}.")
    return target


def load(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    path: LoadPath = "float",
    cache: bool = True,
    rounding: Rounding = "finescale",
    fuse: bool = True,
) -> PreTrainedModel:
    """A transformers model of a folder, hub name or GGUF file, with quantized layers where the checkpoint has them.

    Args:
        model: what to load.
        dtype: type of everything that is not quantized, and of the activations.
        device: where to.
        path: ``float`` multiplies dequantized weights; ``integer`` runs the exact int32 product where scales are
            integers, on the CPU by its int8 instructions where it has them; ``kernel`` runs the fastest kernel that the
            device has for each layer (`finescale.kernels.dispatch`), keeping only packed weights.
        cache: keep dequantized weights (only for ``float``).
        rounding: of the inputs of W4A8 layers; the others show what other engines make of the file:
            ``compressed-tensors`` what transformers does, ``none`` what engines do that run it as W4A16.
        fuse: where the fused kernels run the layers, also fuse the decoder around them (`finescale.runtime.fused`); on
            a CPU, multiply layers of one input as one.

    Raises:
        InputError, CheckpointError, NumericsError: a checkpoint that is missing, damaged or fails its proof.
    """
    model = local_folder(model)
    source = open_checkpoint(model)
    target = usable_device(device)
    skeleton = open_skeleton(source, allow_unknown=True)
    quantized = open_quantized(model) if source.config.get("quantization_config") else None
    if quantized is not None:
        install_quantized(skeleton, quantized, target, dtype, path, cache, rounding)
    _fill_rest(skeleton, target, dtype)
    loaded = skeleton.model
    loaded.config.use_cache = True
    if fuse:
        fuse_on_kernels(loaded)
        join_same_inputs(loaded)
    if (source.path / "generation_config.json").is_file():
        loaded.generation_config = _generation_config(source.path)
    return loaded


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # each wrong value raises what its own check raises
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
        raise CheckpointError(f"{folder}/generation_config.json is damaged ({reason}); repair or remove it.") from error


def install_quantized(
    skeleton: Skeleton,
    quantized: QuantizedCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
    path: LoadPath,
    cache: bool,
    rounding: Rounding,
) -> None:
    """Replace every layer that the checkpoint holds in quantized form, and its attention where the cache is rounded.
    Raises CheckpointError for a quantized layer that the model does not have, and as reading each of them does."""
    if quantized.metadata.get("kv_cache") and rounding == "finescale":
        quantize_kv_cache(skeleton.model, quantized.metadata["kv_cache"])
    names = set(quantized.layer_names())
    full_range = rounding == "compressed-tensors"
    places = quantized_places(skeleton, names)
    if path == "kernel" and rounding == "finescale" and has_hopper_kernels(device):
        left = install_mixtures(
            places,
            lambda name: (quantized.read(name), quantized.inputs_of(name)),
            lambda name: name + ".bias" in skeleton.source,
            device,
        )
        names -= {name for _, _, name in places} - {name for _, _, name in left}
        places = left
    # Unpacking and proving take a GPU no time, and a processor minutes.
    on_device = path == "kernel" and has_hopper_kernels(device) and quantized.fmt.name == compressed_tensors.NAME
    for block, path_in_block, name in places:
        weight = quantized.read(name, device if on_device else "cpu")
        inputs = quantized.inputs_of(name).to(device)
        _check_shape(name, weight, inputs, block.get_submodule(path_in_block))
        bias = skeleton.source.read(name + ".bias").to(device, dtype) if name + ".bias" in skeleton.source else None
        if rounding == "none":
            inputs = replace(inputs, scheme=None, fixed=None)
        layer = _layer(weight, bias, inputs, device, dtype, path, cache, full_range)
        parent, _, leaf = path_in_block.rpartition(".")
        setattr(block.get_submodule(parent), leaf, layer)
        names.discard(name)
    if names:
        raise CheckpointError(f"{', '.join(sorted(names)[:3])}: quantized tensors that the model has no layer for.")


def _check_shape(name: str, weight: QuantizedWeight, inputs: InputRule, module: nn.Module) -> None:
    """Raises CheckpointError for a layer of another size than the config says; a gather may change the inputs."""
    stored, wanted = tuple(weight.codes_OI.shape), tuple(weight_OI_of(module).shape)
    if stored[0] != wanted[0] or (inputs.gather is None and stored[1] != wanted[1]):
        raise CheckpointError(
            f"{name} is {stored} in the checkpoint and {wanted} by config.json; they do not belong together, "
            "quantize or download the model again."
        )


def quantized_places(skeleton: Skeleton, names: Collection[str]) -> list[tuple[nn.Module, str, str]]:
    """Where the quantized layers of a checkpoint belong: block, module path in it, and the layer's name in the file."""
    places = []
    for index, block in enumerate(skeleton.blocks):
        for path in linear_modules(block):
            possible = possible_names(skeleton, f"{skeleton.block_path(index)}.{path}")
            name = next((candidate for candidate in possible if candidate in names), None)
            if name is not None:
                places.append((block, path, name))
    return places


def _layer(
    weight: QuantizedWeight,
    bias: Tensor | None,
    inputs: InputRule,
    device: torch.device,
    dtype: torch.dtype,
    path: LoadPath,
    cache: bool,
    full_range: bool,
) -> QuantizedLinear | PackedLinear | PortableLinear:
    kernel = "float" if path == "float" else choose_kernel(layer_facts(weight, inputs), device).kernel
    if path == "kernel" and kernel in ("hopper", "hopper-folded"):
        return PackedLinear(weight, bias, inputs, device)
    if (path == "kernel" and kernel in PORTABLE) or kernel == "cpu-int8":
        return PortableLinear(weight, bias, inputs, device)
    symmetric = inputs.scheme is not None and inputs.scheme.symmetric
    integer = path == "integer" and weight.grid.amplifier is not None and symmetric
    compute: ComputePath = "integer" if integer else "float"
    layer = QuantizedLinear(weight, bias, inputs, compute, cache and not integer, full_range).to(device)
    if layer.dense_OI is not None:
        layer.dense_OI = layer.dense_OI.to(dtype)
    return layer


def _fill_rest(skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> None:
    model = skeleton.model
    tied = _tied_head(model)
    for prefix, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, PackedLinear, PackedMixture, PortableLinear, PortableProduct)):
            continue
        if module is tied and skeleton.source.config.get("tie_word_embeddings", True):
            continue
        fill_parameters(skeleton, prefix, module, device, dtype)
        fill_buffers(skeleton, prefix, module, device)
    if tied is not None and tied.weight.device.type == "meta":
        tied.weight = model.get_input_embeddings().weight


def _tied_head(model: PreTrainedModel) -> Any:
    """The output head when its weight is that of the input embeddings."""
    head = model.get_output_embeddings()
    return head if head is not None and getattr(model.config, "tie_word_embeddings", False) else None


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a loaded model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
