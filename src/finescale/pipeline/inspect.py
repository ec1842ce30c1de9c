"""What a quantized checkpoint holds, read from its tensors (not from what its config claims)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finescale.errors import InputError
from finescale.formats.source import read_json
from finescale.grid.integer_scale import INT32_LIMIT, prove_no_overflow
from finescale.kernels.dispatch import Choice, LayerFacts, choose_kernel, layer_facts
from finescale.runtime.checkpoint import QuantizedCheckpoint, open_quantized
from finescale.runtime.load import usable_device


def inspect_layers(folder: str | Path, device: str | None = None) -> list[dict[str, Any]]:
    """One record per quantized layer: ``name``, ``shape``, ``bits``, ``group_size``, ``symmetric``, ``amplifier``,
    ``folded`` (scales are integers up to 15 times one factor per output, the amplifier is 1), ``inputs`` (rounding,
    gather, rotation), ``overflow_use`` (largest B_j / 2^31, computed anew), ``relative_error`` (from the run's report,
    else None), ``scale_min``, ``scale_max``, ``kernel`` (which one runs) and ``kernel_why``.

    Args:
        folder: a quantized checkpoint.
        device: whose kernels are meant: cpu, cuda, or a compute capability such as 8.0; None for this machine.

    Raises:
        InputError: a device that is none.
        CheckpointError, NumericsError: damaged files, or a proof that does not hold.
    """
    quantized = open_quantized(folder)
    report = _records(quantized)
    choose = _chooser(device)
    return [_inspect(quantized, name, report.get(name, {}), choose) for name in quantized.layer_names()]


def _chooser(device: str | None) -> Callable[[LayerFacts], Choice]:
    """The choice of kernels of a device."""
    capability = re.fullmatch(r"(\d+)\.(\d)", device or "")
    if capability is not None:
        numbers = int(capability[1]), int(capability[2])
        return lambda layer: choose_kernel(layer, torch.device("cuda"), numbers)
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"--device is {device}; use cpu, cuda, or a compute capability such as 8.0.")
    here = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = usable_device(here)
    return lambda layer: choose_kernel(layer, target)


def _records(quantized: QuantizedCheckpoint) -> dict[str, dict[str, Any]]:
    file = quantized.source.path / "report.json"
    if not file.is_file():
        return {}
    return {record["name"]: record for record in read_json(file, "").get("layers", [])}


def _inspect(
    quantized: QuantizedCheckpoint, name: str, record: dict[str, Any], choose: Callable[[LayerFacts], Choice]
) -> dict[str, Any]:
    weight = quantized.read(name)
    grid = weight.grid
    scale_OG = grid.scale_OG if grid.amplifier is None else grid.integer_scale_OG()
    choice = choose(layer_facts(weight, quantized.inputs_of(name)))
    use = None
    if grid.amplifier is not None:
        maximum = quantized.activation_max(name)
        use = prove_no_overflow(name, weight.codes_OI, grid.integer_scale_OG(), grid.group_of_I, maximum) / INT32_LIMIT
    return {
        "name": name,
        "shape": list(weight.codes_OI.shape),
        "bits": grid.scheme.bits,
        "group_size": grid.scheme.group_size,
        "symmetric": grid.scheme.symmetric,
        "amplifier": grid.amplifier,
        "folded": grid.folded,
        "inputs": quantized.inputs_of(name).describe(),
        "overflow_use": use,
        "relative_error": record.get("relative_error"),
        "scale_min": float(scale_OG.min()),
        "scale_max": float(scale_OG.max()),
        "outliers": None if weight.outliers is None else weight.outliers.count,
        "bits_per_weight": weight.stored_bits() / max(weight.codes_OI.numel(), 1),
        "tokens": record.get("tokens"),
        "notes": record.get("notes", []),
        "kernel": choice.kernel,
        "kernel_why": choice.why,
    }
