"""Proving that a saved checkpoint is what was computed.

Shape legend: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale.errors import CheckpointError, NumericsError
from finescale.formats.source import open_checkpoint
from finescale.grid import QuantizedWeight, fit_grid, quantize_tokens
from finescale.kernels import grouped_int32_product
from finescale.models import open_skeleton
from finescale.models.skeleton import read_tensor
from finescale.runtime.checkpoint import QuantizedCheckpoint, open_quantized

PROBE_TOKENS = 4


@dataclass(frozen=True)
class Verification:
    """What was proved.

    Attributes:
        layers: quantized layers read back.
        integer_layers: of these, layers whose int32 path was proved free of overflow and equal to int64.
        copied: tensors found equal, byte for byte, to the original's (None: no original given).
        worst_relative: largest relative weight error against the original (None: no original given).
        packed_again: layers whose tensors, packed again, are the file's bytes.
    """

    layers: int
    integer_layers: int
    packed_again: int
    copied: int | None
    worst_relative: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(path: str | Path, against: str | Path | None = None) -> Verification:
    """Reload a checkpoint and prove what can be proved of it.

    Every layer is unpacked and packed again (same bytes), compared with the run's report (same error-free record of bits,
    groups, amplifier, bound), and, with integer scales, its int32 accumulator is compared with int64 on random tokens
    and on the tokens that reach the bound. With ``against`` every tensor that was not quantized must equal the original's.

    Raises:
        CheckpointError, NumericsError: the first thing that does not hold.
    """
    quantized = open_quantized(path)
    report = _report(quantized)
    integer = packed = 0
    worst: float | None = None
    original = _Original(against) if against is not None else None
    names = quantized.layer_names()
    if not names:
        raise CheckpointError(f"{path} holds no quantized layer.")
    _check_complete(quantized, names, report)
    for name in names:
        weight = quantized.read(name)
        _check_codes(name, weight)
        packed += _packs_to_same_bytes(quantized, name, weight)
        if name in report:
            _check_record(name, weight, report[name])
        if weight.grid.amplifier is not None:
            _check_integer_path(name, weight, quantized.activations.code_max if quantized.activations else 127)
            integer += 1
        if original is not None:
            worst = max(worst or 0.0, original.relative_error(name, weight))
    copied = None if original is None else original.count_equal(quantized, set(names))
    return Verification(len(names), integer, packed, copied, worst)


def _report(quantized: QuantizedCheckpoint) -> dict[str, dict[str, Any]]:
    file = quantized.source.path / "report.json"
    if not file.is_file():
        return {}
    try:
        return {record["name"]: record for record in json.loads(file.read_text())["layers"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged; quantize again with --fresh.") from error


def _check_complete(quantized: QuantizedCheckpoint, names: list[str], report: dict[str, Any]) -> None:
    promised = set(quantized.metadata.get("layers", {})) | set(report)
    missing = promised - set(names)
    if missing:
        raise CheckpointError(
            f"{', '.join(sorted(missing)[:3])}: promised by the config or report but not in the files."
        )


def _check_codes(name: str, weight: QuantizedWeight) -> None:
    scheme = weight.grid.scheme
    if int(weight.codes_OI.min()) < scheme.code_min or int(weight.codes_OI.max()) > scheme.code_max:
        raise NumericsError(f"{name}: codes outside the range of {scheme.bits} bits; the file is damaged.")
    if not bool(torch.isfinite(weight.dequantize()).all()):
        raise NumericsError(f"{name}: dequantizes to NaN or Inf; the file is damaged.")


def _packs_to_same_bytes(quantized: QuantizedCheckpoint, name: str, weight: QuantizedWeight) -> bool:
    stored_dtype = quantized.source.dtype(f"{name}.{_scale_suffix(quantized, name)}")
    grid = weight.grid.__class__(**{**weight.grid.__dict__, "scale_dtype": stored_dtype})
    for suffix, tensor in quantized.fmt.pack(QuantizedWeight(weight.codes_OI, grid)).items():
        stored = quantized.source.read(f"{name}.{suffix}")
        if stored.dtype != tensor.dtype or not torch.equal(stored, tensor):
            raise CheckpointError(f"{name}.{suffix}: packing what was read gives other bytes; the file is damaged.")
    return True


def _scale_suffix(quantized: QuantizedCheckpoint, name: str) -> str:
    return next(s for s in ("weight_scale", "scales") if f"{name}.{s}" in quantized.source)


def _check_record(name: str, weight: QuantizedWeight, record: dict[str, Any]) -> None:
    scheme = weight.grid.scheme
    found = (scheme.bits, scheme.group_size, scheme.symmetric, weight.grid.amplifier, list(weight.codes_OI.shape))
    promised = tuple(record[key] for key in ("bits", "group_size", "symmetric", "amplifier", "shape"))
    if found != promised:
        raise CheckpointError(
            f"{name}: the file holds {found} where the report says {promised}; the folder was changed."
        )
    if "sha256" in record and record["sha256"] != weight.sha256():
        raise CheckpointError(f"{name}: codes or scales are not those that were computed; the file was changed.")


def adversarial_tokens(weight: QuantizedWeight, activation_max: int) -> Tensor:
    """int8 [2, I]: the tokens that drive the output channel with the largest bound to plus and minus that bound."""
    grid = weight.grid
    scale_OI = grid.integer_scale_OG().to(torch.int64)[:, grid.group_of_I]
    signed_OI = scale_OI * weight.codes_OI.to(torch.int64)
    worst = int(signed_OI.abs().sum(1).argmax())
    token_I = (activation_max * signed_OI[worst].sign()).to(torch.int8)
    return torch.stack([token_I, -token_I])


def _check_integer_path(name: str, weight: QuantizedWeight, activation_max: int) -> None:
    grid = weight.grid
    generator = torch.Generator().manual_seed(0)
    columns = weight.codes_OI.shape[1]
    random_TI = torch.randint(
        -activation_max, activation_max + 1, (PROBE_TOKENS, columns), generator=generator, dtype=torch.int8
    )
    x_TI = torch.cat([random_TI, adversarial_tokens(weight, activation_max)])
    integer_scale_OG = grid.integer_scale_OG()
    fast_TO = grouped_int32_product(x_TI, weight.codes_OI, integer_scale_OG, grid.scheme.group_size)
    wide_OI = integer_scale_OG.to(torch.int64)[:, grid.group_of_I] * weight.codes_OI.to(torch.int64)
    exact_TO = x_TI.to(torch.int64) @ wide_OI.T
    if not torch.equal(fast_TO.to(torch.int64), exact_TO):
        raise NumericsError(f"{name}: the int32 product differs from int64; the overflow proof does not hold.")


class _Original:
    """The full-precision checkpoint that a quantized one is compared with."""

    def __init__(self, path: str | Path) -> None:
        self.source = open_checkpoint(path)
        self.skeleton = open_skeleton(self.source, allow_unknown=True)

    def relative_error(self, name: str, weight: QuantizedWeight) -> float:
        """||Q - W|| / ||W||. Raises CheckpointError when it is no better than a grid of zeros."""
        value = self.source.read(name + ".weight") if name + ".weight" in self.source else None
        if value is None:
            value = read_tensor(self.skeleton, name + ".weight")
        if value is None:
            raise CheckpointError(f"{name} does not occur in {self.source.name}; it is another model.")
        original_OI = value.float()
        dense_OI = weight.dequantize()
        if original_OI.shape != dense_OI.shape:
            original_OI = original_OI.T
        error = float((dense_OI - original_OI).norm() / original_OI.norm().clamp(min=1e-30))
        if error >= 1.0:
            coarse = fit_grid(original_OI, weight.grid.scheme).scale_OG.max()
            raise CheckpointError(
                f"{name}: the weights are {error:.2f} of their norm away from the original's (largest step {coarse:.2g}); "
                f"{self.source.name} is another model or the file is damaged."
            )
        return error

    def count_equal(self, quantized: QuantizedCheckpoint, names: set[str]) -> int:
        count = 0
        for key in self.source.keys():
            if key.removesuffix(".weight") in names or key not in quantized.source:
                if key.removesuffix(".weight") not in names and not key.endswith((".gate_up_proj", ".down_proj")):
                    raise CheckpointError(f"{key} of the original is missing in {quantized.source.name}.")
                continue
            if not torch.equal(self.source.read(key), quantized.source.read(key)):
                raise CheckpointError(f"{key} differs from the original though it was not quantized.")
            count += 1
        return count


def float_and_integer_codes_agree(weight: QuantizedWeight, x_TI: Tensor, activations: Any) -> bool:
    """Whether the float path and the exact integer path start from the same codes and give outputs that differ only by
    float32 rounding of the sum, for float inputs [T, I]."""
    codes_TI, scale_T1 = quantize_tokens(x_TI, activations)
    float_TO = (codes_TI.double() * scale_T1.double()) @ weight.dequantize().double().T
    grid = weight.grid
    integer_TO = grouped_int32_product(codes_TI, weight.codes_OI, grid.integer_scale_OG(), grid.scheme.group_size)
    exact_TO = integer_TO.double() * scale_T1.double() / (grid.amplifier or 1)
    return bool(torch.allclose(float_TO, exact_TO, rtol=1e-12, atol=0.0))
