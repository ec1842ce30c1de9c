"""Proving that a saved checkpoint is what was computed.

Shape legend: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from finescale.errors import CheckpointError, NumericsError
from finescale.formats.source import SourceCheckpoint, open_checkpoint, read_json
from finescale.grid import QuantizedWeight
from finescale.grid.inputs import SUFFIXES as INPUT_SUFFIXES
from finescale.kernels import grouped_int32_product
from finescale.models import linear_modules, open_skeleton
from finescale.models.skeleton import layer_name, read_tensor
from finescale.pipeline.journal import file_sha256
from finescale.runtime.checkpoint import QuantizedCheckpoint, open_quantized

PROBE_TOKENS = 4
LEAST_COSINE = 0.25
"""Between a layer's weights before and after: those of unrelated layers have nearly 0, 2-bit ones 0.6 and more."""


@dataclass(frozen=True)
class Verification:
    """What was proved.

    Attributes:
        layers: quantized layers read back.
        integer_layers: of these, layers whose int32 path was proved free of overflow and equal to int64.
        folded_layers: of these, layers whose scales were proved to be integers from 1 to 15 times one factor per
            output, and whose codes times scales fit int8.
        packed_again: layers whose tensors, packed again, are the file's bytes (none in a dense checkpoint).
        shards: files whose SHA-256 is the one in the report.
        copied: tensors found equal, byte for byte, to the original's (None: no original given).
        worst_relative: largest relative weight error against the original (None: no original given).
    """

    layers: int
    integer_layers: int
    folded_layers: int
    packed_again: int
    shards: int
    copied: int | None
    worst_relative: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(path: str | Path, against: str | Path | None = None) -> Verification:
    """Reload a checkpoint and prove what can be proved of it.

    Every layer is unpacked and packed again (same bytes) and compared with the run's report (bits, groups, amplifier,
    hash of codes and scales). With integer scales its int32 accumulator is compared with int64 on random tokens and on
    the tokens that reach the bound. The files must have the hashes of the report. With ``against`` every tensor that
    was not quantized must equal the original's, and weights must lie as far from the original's as the report says, or
    near it where tuning moved them, unless a transform of the recipe changed them. A dense checkpoint holds neither
    codes nor scales: its weights must lie on a grid of the bits and groups in the report, but for as many as that names
    outliers.

    Raises:
        CheckpointError, NumericsError: the first thing that does not hold.
    """
    source = open_checkpoint(path)
    facts = _facts(source.path)
    report = {record["name"]: record for record in facts.get("layers", [])}
    if not source.config.get("quantization_config") and report:
        return _verify_dense(source, facts, report, against)
    quantized = open_quantized(path)
    integer = folded = packed = 0
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
            _check_integer_path(name, weight, quantized.activation_max(name))
            integer += 1
            folded += weight.grid.folded
        if original is not None and not facts.get("transforms"):
            error = original.relative_error(name, weight.dequantize(), _distance(facts, report.get(name, {})))
            worst = max(worst or 0.0, error)
    copied = None
    if original is not None:
        owned = {f"{name}.{suffix}" for name in names for suffix in (*quantized.fmt.suffixes, *INPUT_SUFFIXES)}
        owned |= set(facts.get("changed_tensors", ()))
        copied = original.count_equal(quantized.source, set(names), owned)
    return Verification(len(names), integer, folded, packed, _check_files(source.path, facts), copied, worst)


def _verify_dense(
    source: SourceCheckpoint, facts: dict[str, Any], report: dict[str, Any], against: str | Path | None
) -> Verification:
    original = _Original(against) if against is not None else None
    transposed = _Original(source.path).transposed
    worst: float | None = None
    for name, record in report.items():
        stored = source.read(name + ".weight").float()
        weight_OI = stored.T if name in transposed else stored
        _check_on_a_grid(name, weight_OI, record)
        if original is not None and not facts.get("transforms"):
            worst = max(worst or 0.0, original.relative_error(name, weight_OI))
    owned = {f"{name}.weight" for name in report} | set(facts.get("changed_tensors", ()))
    copied = None if original is None else original.count_equal(source, set(report), owned)
    return Verification(len(report), 0, 0, 0, _check_files(source.path, facts), copied, worst)


def _check_on_a_grid(name: str, weight_OI: Tensor, record: dict[str, Any]) -> None:
    if list(weight_OI.shape) != record["shape"] or not bool(torch.isfinite(weight_OI).all()):
        raise CheckpointError(f"{name}: not the finite {record['shape']} of the report; the file was changed.")
    columns = weight_OI.shape[1]
    size = columns if record["group_size"] == -1 else record["group_size"]
    beyond = 0  # values that do not fit on the grids, whichever they are
    for part_OI in weight_OI.split(size, dim=1):
        values_O = 1 + part_OI.sort(dim=1).values.diff(dim=1).ne(0).sum(1)
        beyond += int((values_O - 2 ** record["bits"]).clamp(min=0).sum())
    if beyond > (record.get("outliers") or 0):
        raise CheckpointError(
            f"{name}: more values in a group than {record['bits']} bits can tell apart; the file was changed."
        )


def _distance(facts: dict[str, Any], record: dict[str, Any]) -> float | None:
    """How far a layer was from the weight that it was made of, mean square, where that was the original's weight; None
    where it had been corrected or was a quantized one."""
    made_of_original = "recipe" in facts and not facts.get("transforms") and not facts.get("tuning")
    found = record.get("weight_mse") if made_of_original else None
    return float(found) if isinstance(found, int | float) else None


def _check_files(folder: Path, facts: dict[str, Any]) -> int:
    shards = {name: digest for name, digest in facts.get("files", {}).items() if name.endswith(".safetensors")}
    for name, digest in shards.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise CheckpointError(f"{name} is not the file that was written; it was changed, quantize again.")
    return len(shards)


def _is_record(record: Any) -> bool:
    keys = ("name", "shape", "bits", "group_size", "symmetric", "amplifier")
    return isinstance(record, dict) and all(key in record for key in keys)


def _facts(folder: Path) -> dict[str, Any]:
    """The run's report, empty when there is none, as beside checkpoints of other tools."""
    file = folder / "report.json"
    if not file.is_file():
        return {}
    facts = read_json(file, "")
    records, files = facts.get("layers"), facts.get("files", {})
    if (
        not isinstance(records, list)
        or not all(_is_record(record) for record in records)
        or not isinstance(files, dict)
    ):
        raise CheckpointError(f"{file} is damaged; quantize again with --fresh.")
    return facts


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
    for suffix, tensor in quantized.fmt.pack(replace(weight, grid=grid)).items():
        stored = quantized.source.read(f"{name}.{suffix}")
        if stored.dtype != tensor.dtype or not torch.equal(stored, tensor):
            raise CheckpointError(f"{name}.{suffix}: packing what was read gives other bytes; the file is damaged.")
    return True


def _scale_suffix(quantized: QuantizedCheckpoint, name: str) -> str:
    return next(s for s in ("weight_scale", "weight_scale_base", "scales") if f"{name}.{s}" in quantized.source)


def _check_record(name: str, weight: QuantizedWeight, record: dict[str, Any]) -> None:
    scheme = weight.grid.scheme
    found = (scheme.bits, scheme.group_size, scheme.symmetric, weight.grid.amplifier, list(weight.codes_OI.shape))
    promised = tuple(record[key] for key in ("bits", "group_size", "symmetric", "amplifier", "shape"))
    if found != promised:
        raise CheckpointError(
            f"{name}: the file holds {found} where the report says {promised}; the folder was changed."
        )
    if weight.grid.folded != bool(record.get("folded")):
        raise CheckpointError(
            f"{name}: config and report disagree whether its scales are folded; the folder was changed."
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
    if grid.channel_scale_O is not None:
        _check_folded(name, weight, wide_OI, grid.channel_scale_O)


def _check_folded(name: str, weight: QuantizedWeight, wide_OI: Tensor, channel_scale_O: Tensor) -> None:
    """code * S fits int8, and times the factor of the output it is the weight that any other reader gets."""
    if int(wide_OI.min()) < -128 or int(wide_OI.max()) > 127:
        raise NumericsError(f"{name}: codes times folded scales do not fit int8; quantize again.")
    if not torch.equal((wide_OI.double() * channel_scale_O.double()[:, None]).float(), weight.dequantize()):
        raise NumericsError(f"{name}: folded scales do not give the weights of the file; quantize again.")


DISTANCE_TOLERANCE = 0.01
"""Of the report's mean square: a GPU may have worked on weights that were rounded to the model's usual type."""


class _Original:
    """The checkpoint that a quantized one is compared with.

    ``transposed`` holds the names of the layers that keep their weight as [I, O] (GPT-2's Conv1D).
    """

    def __init__(self, path: str | Path) -> None:
        self.source = open_checkpoint(path)
        self.skeleton = open_skeleton(self.source, allow_unknown=True)
        self.transposed = {
            layer_name(self.skeleton, f"{self.skeleton.block_path(index)}.{path}")
            for index, block in enumerate(self.skeleton.blocks)
            for path, module in linear_modules(block).items()
            if isinstance(module, Conv1D)
        }

    def relative_error(self, name: str, dense_OI: Tensor, distance: float | None = None) -> float:
        """||Q - W|| / ||W||.

        It may exceed 1: solvers minimize the error of the outputs, not of the weights.

        Args:
            name: of the layer.
            dense_OI: its dequantized weight.
            distance: mean square of Q - W by the report; None where it does not say.

        Raises:
            CheckpointError: another distance than the report's; without one, as far away as zeros would be, and
                pointing elsewhere.
        """
        value = self.source.read(name + ".weight") if name + ".weight" in self.source else None
        if value is None:
            value = read_tensor(self.skeleton, name + ".weight")
        if value is None:
            raise CheckpointError(f"{name} does not occur in {self.source.name}; it is another model.")
        original_OI = value.float().T if name in self.transposed else value.float()
        if original_OI.shape != dense_OI.shape:
            raise CheckpointError(f"{name} has another shape in {self.source.name}; it is another model.")
        norm = original_OI.norm().clamp(min=1e-30)
        error = float((dense_OI - original_OI).norm() / norm)
        cosine = float((dense_OI * original_OI).sum() / norm / dense_OI.norm().clamp(min=1e-30))
        if distance is None:
            unrelated = error >= 1.0 and cosine < LEAST_COSINE
        else:
            mean_square = float((dense_OI - original_OI).double().square().mean())
            unrelated = abs(mean_square - distance) > DISTANCE_TOLERANCE * distance
        if unrelated:
            raise CheckpointError(
                f"{name}: the weights are {error:.2f} of their norm away from the original's; "
                f"{self.source.name} is another model or the file is damaged."
            )
        return error

    def count_equal(self, quantized: SourceCheckpoint, names: set[str], owned: set[str]) -> int:
        """How many tensors were not quantized; all of them must be the original's, byte for byte, and no other.

        Args:
            quantized: the tensors of the result.
            names: its quantized layers.
            owned: the tensors of these layers, and those that a transform changed.

        Raises:
            CheckpointError: a tensor is missing, differs, or is not the original's.
        """
        fused = {key for key in self.source if key.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
        count = 0
        for key in self.source:
            if key.removesuffix(".weight") in names or key in owned or (key in fused and key not in quantized):
                continue
            if key not in quantized:
                raise CheckpointError(f"{key} of the original is missing in {quantized.name}; quantize again.")
            if not _same_bytes(self.source.read(key), quantized.read(key)):
                raise CheckpointError(f"{key} differs from the original though it was not quantized.")
            count += 1
        for key in quantized:
            if key not in self.source and key not in owned and not (fused and ".experts." in key):
                raise CheckpointError(f"{key} is in {quantized.name} and not in the original; the file was changed.")
        return count


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
