"""The checkpoint formats by name, and which one a config.json speaks of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats import awq, compressed_tensors, dense, gptq
from finescale.formats.names import matches
from finescale.grid import ActivationScheme, QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class Format:
    """The functions of one format; all of them are stateless.

    Attributes:
        name: as in `--set format=...`.
        purpose: one line for people.
        suffixes: tensor names a layer may have in a file, after the layer's own name and a dot.
        check: ``(scheme, activations, shape_OI, layer_class="Linear") -> None``; InputError for what does not fit.
        pack: ``QuantizedWeight -> {suffix: tensor}``.
        unpack: ``({suffix: tensor}, scheme, amplifier=None) -> QuantizedWeight``.
        quantization_config: ``(schemes, activations, ignore, finescale=None) -> dict``, or None for dense.
        layer_scheme: ``(quantization_config, layer name) -> WeightScheme``, or None for a layer left alone.
    """

    name: str
    purpose: str
    suffixes: tuple[str, ...]
    check: Callable[..., None]
    pack: Callable[..., dict[str, Tensor]]
    unpack: Callable[..., QuantizedWeight]
    quantization_config: Callable[..., dict[str, Any] | None]
    layer_scheme: Callable[[Mapping[str, Any], str], WeightScheme | None]


def _not_quantized(config: Mapping[str, Any], name: str) -> WeightScheme | None:
    return None


OWN_METHOD = "finescale"
"""``quant_method`` of checkpoints in the compressed-tensors layout whose inputs must be rearranged before the product
(QLLM's gather, an online rotation): other engines must refuse them, for they would compute something else."""

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "compressed-tensors",
            "packed integers (pack-quantized); read by finescale, vLLM, SGLang and transformers",
            compressed_tensors.PACKED_SUFFIXES,
            compressed_tensors.check,
            compressed_tensors.pack,
            compressed_tensors.unpack,
            compressed_tensors.quantization_config,
            compressed_tensors.layer_scheme,
        ),
        Format(
            "int-quantized",
            "one byte a weight; what vLLM needs to multiply 8-bit weights by 8-bit activations as integers",
            compressed_tensors.INT8_SUFFIXES,
            compressed_tensors.check,
            compressed_tensors.pack_int8,
            compressed_tensors.unpack,
            partial(compressed_tensors.quantization_config, layout=compressed_tensors.INT8),
            compressed_tensors.layer_scheme,
        ),
        Format(
            "gptq",
            "GPTQ version 1: 2, 3, 4 and 8 bits without activations, the widest support",
            gptq.SUFFIXES,
            gptq.check,
            gptq.pack,
            gptq.unpack,
            gptq.quantization_config,
            gptq.layer_scheme,
        ),
        Format(
            "gptq_v2",
            "GPTQ version 2: as version 1, with every zero point",
            gptq.SUFFIXES,
            gptq.check,
            gptq.pack_v2,
            gptq.unpack_v2,
            partial(gptq.quantization_config, checkpoint_format="gptq_v2"),
            gptq.layer_scheme,
        ),
        Format(
            "awq",
            "AWQ GEMM: 4 bits without activations",
            awq.SUFFIXES,
            awq.check,
            awq.pack,
            awq.unpack,
            awq.quantization_config,
            awq.layer_scheme,
        ),
        Format(
            "dense",
            "dequantized weights: loads everywhere, no gain in size",
            dense.SUFFIXES,
            dense.check,
            dense.pack,
            dense.unpack,
            dense.quantization_config,
            _not_quantized,
        ),
    )
}


def get(name: str) -> Format:
    """The format of this name.

    Raises:
        InputError: there is none.
    """
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def detect(config: Mapping[str, Any]) -> str:
    """The name of the format that a config.json (or its `quantization_config` alone) speaks of.

    Raises:
        CheckpointError: the model is not quantized, or in a way that finescale does not read.
    """
    quantization = config.get("quantization_config", config)
    if not isinstance(quantization, Mapping) or not quantization.get("quant_method"):
        raise CheckpointError("config.json has no quantization_config with a quant_method: the model is not quantized.")
    method = str(quantization["quant_method"]).lower()
    if method in ("compressed-tensors", OWN_METHOD):
        return _detect_compressed_tensors(quantization)
    if method == "gptq":
        version = quantization.get("checkpoint_format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"finescale reads the gptq checkpoint formats gptq and gptq_v2, not {version!r}.")
        return str(version)
    if method == "awq":
        version = str(quantization.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(f"finescale reads the awq version gemm, not {version!r}.")
        if not _are_patterns(quantization.get("modules_to_not_convert")):
            raise CheckpointError("modules_to_not_convert in the quantization_config of config.json is damaged.")
        return "awq"
    raise CheckpointError(
        f"finescale does not read models quantized by {method!r}; it reads compressed-tensors, gptq and awq."
    )


def _detect_compressed_tensors(quantization: Mapping[str, Any]) -> str:
    groups = quantization.get("config_groups")
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        raise CheckpointError("the quantization_config of config.json has no config_groups; the file is damaged.")
    top = quantization.get("format") or ""
    parts = (isinstance(top, str), _are_patterns(quantization.get("ignore")), *map(_is_group, groups.values()))
    if not all(parts):
        raise CheckpointError("the parts of the quantization_config of config.json are damaged; quantize again.")
    layouts = {group.get("format") or top for group in groups.values() if group.get("weights") is not None}
    unknown = layouts - {compressed_tensors.PACKED, compressed_tensors.INT8, "naive-quantized"}
    if unknown or not layouts:
        raise CheckpointError(
            f"finescale reads the compressed-tensors formats pack-quantized and int-quantized, "
            f"not {', '.join(sorted(map(repr, unknown))) or 'a file without quantized weights'}."
        )
    if any(group.get("output_activations") for group in groups.values()):
        raise CheckpointError(
            "finescale rounds inputs of layers, and this checkpoint says that outputs are rounded too."
        )
    if _rotates_at_run_time(quantization.get("transform_config")):
        raise CheckpointError(
            "this checkpoint rotates activations at run time (transform_config), which finescale does in files of its "
            "own only; use vLLM, or quantize the original by a recipe such as quarot-w4a8."
        )
    # Both layouts are read by the same function, so a mixture needs no name of its own.
    return "compressed-tensors" if compressed_tensors.PACKED in layouts else "int-quantized"


def _rotates_at_run_time(transforms: Any) -> bool:
    """Whether a `transform_config` asks for more than rotations that the weights already hold."""
    if not transforms:
        return False
    try:
        places = [apply["location"] for scheme in transforms["config_groups"].values() for apply in scheme["apply"]]
    except (AttributeError, KeyError, TypeError):
        return True  # of another kind than is known
    return any(place not in ("weight_input", "weight_output") for place in places)


def _is_group(group: Mapping[str, Any]) -> bool:
    """Whether each part of a config group is of its kind; what the parts say is looked at where they are used."""
    parts = (group.get("weights"), group.get("input_activations"))
    kinds = all(isinstance(part or {}, Mapping) for part in parts) and isinstance(group.get("format") or "", str)
    return kinds and _are_patterns(group.get("targets"))


def _are_patterns(value: Any) -> bool:
    """Whether these are names and regular expressions (``re:...``), or nothing."""
    if not isinstance(value or [], list) or not all(isinstance(pattern, str) for pattern in value or []):
        return False
    try:
        for pattern in value or []:
            matches("", pattern)
    except re.error:
        return False
    return True


def activation_scheme(config: Mapping[str, Any]) -> ActivationScheme | None:
    """How a checkpoint of this config.json (or its `quantization_config` alone) rounds inputs, None if it does not.

    Raises:
        CheckpointError: in a way that finescale does not know.
    """
    quantization = config.get("quantization_config", config)
    return compressed_tensors.activation_scheme(quantization)


def layer_activations(config: Mapping[str, Any], name: str) -> ActivationScheme | None:
    """How a checkpoint rounds the input of one layer, None if it does not; raises like `activation_scheme`."""
    quantization = config.get("quantization_config", config)
    return compressed_tensors.layer_activations(quantization, name)
