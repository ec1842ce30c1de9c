"""Which checkpoints finescale's vLLM plugin serves; known without vLLM, so that refusals come before it starts."""

from __future__ import annotations

from typing import Any

from finescale.formats.compressed_tensors import layer_activations
from finescale.grid import ActivationScheme


def claims(config: dict[str, Any]) -> bool:
    """Whether a quantization config is that of a checkpoint this plugin serves: integer scales in all its layers."""
    layers = config.get("finescale", {}).get("layers", {})
    return bool(layers) and all(facts.get("amplifier") for facts in layers.values())


def refusal(config: dict[str, Any], family: str | None = None) -> str | None:
    """Why a claimed checkpoint cannot be served, in one sentence; None if it can.

    Args:
        config: the quantization config.
        family: ``model_type`` of the model, where it is known.
    """
    if family == "bloom":
        return (
            "vLLM's loader of BLOOM cannot read packed query_key_value tensors; use finescale.load or --format dense."
        )
    if config.get("format") != "pack-quantized":
        return f"finescale's vLLM plugin serves pack-quantized files, not {config.get('format')}; quantize to 4 bits."
    if config["finescale"].get("kv_cache"):
        return "it rounds its key-value cache, which finescale's vLLM plugin does not do; use finescale.load."
    for name, facts in config["finescale"]["layers"].items():
        if layer_activations(config, name) != ActivationScheme(8):
            return f"{name} does not take 8-bit inputs with a scale per token, all that finescale's vLLM plugin serves."
        if facts.get("inputs"):
            return (
                f"{name} gathers or rotates its inputs, which finescale's vLLM plugin does not do; use finescale.load."
            )
        if facts.get("outliers"):
            return f"{name} has outliers, which finescale's vLLM plugin does not add; use finescale.load."
    return None
