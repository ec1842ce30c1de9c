"""Which checkpoints finescale's vLLM plugin serves; known without vLLM, so that refusals come before it starts."""

from __future__ import annotations

from typing import Any

from finescale.formats.compressed_tensors import INT8, PACKED, layer_activations
from finescale.formats.registry import OWN_METHOD
from finescale.grid import ActivationScheme
from finescale.runtime.checkpoint import METADATA_VERSION


def claims(config: dict[str, Any]) -> bool:
    """Whether a quantization config is that of a checkpoint of finescale which vLLM alone would not compute as it says:
    it has integer scales or outliers, rearranges inputs, or rounds some to other than symmetric 8 bits per token."""
    layers = config.get("finescale", {}).get("layers", {})
    if not layers or config.get("quant_method") == OWN_METHOD:
        return bool(layers)
    if any(facts.get("amplifier") or facts.get("outliers") for facts in layers.values()):
        return True
    # Layers may differ: FPTQ rounds some inputs per token, others by a fixed range.
    inputs = [layer_activations(config, name) for name in layers] if config.get("format") == PACKED else []
    return any(scheme not in (None, ActivationScheme(8)) for scheme in inputs)


def refusal(config: dict[str, Any], family: str | None = None) -> str | None:
    """Why a claimed checkpoint cannot be served, in one sentence; None if it can.

    Args:
        config: the quantization config.
        family: ``model_type`` of the model, where it is known.
    """
    own = config["finescale"]
    if int(own.get("version", 0)) > METADATA_VERSION:
        return f"it was written by a newer finescale ({own.get('finescale')}); update finescale."
    if family == "bloom" and config.get("format") == PACKED:
        return (
            "vLLM's loader of BLOOM cannot read packed query_key_value tensors; use finescale.load or --format dense."
        )
    if config.get("format") not in (PACKED, INT8):
        return f"finescale's vLLM plugin serves {PACKED} and {INT8} files, not {config.get('format')}; quantize again."
    if own.get("kv_cache"):
        return "it rounds its key-value cache, which finescale's vLLM plugin does not do; use finescale.load."
    for name, facts in own["layers"].items():
        if facts.get("outliers"):
            return f"{name} has outliers, which finescale's vLLM plugin does not add; use finescale.load."
        if facts.get("amplifier") and not facts.get("bound"):
            return f"{name} has integer scales without the proof that int32 cannot overflow; quantize again."
    return None
