"""Giving an existing float-scale checkpoint integer scales (Integer Scale, arXiv 2405.14597), without calibration.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finescale._version import __version__
from finescale.errors import InputError
from finescale.formats import registry
from finescale.formats.outliers import VALUES as OUTLIER_VALUES
from finescale.formats.registry import OWN_METHOD
from finescale.formats.source import INDEX_NAME, read_json
from finescale.grid import (
    ActivationScheme,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    integerized,
    quantize_to_grid,
    with_folded_scales,
)
from finescale.grid.fit import smallest_scale
from finescale.grid.folded import FOLDED_BITS
from finescale.grid.integer_scale import (
    INT32_LIMIT,
    Amplifier,
    auto_amplifier,
    check_amplifier,
    group_absolute_sums,
    heuristic_amplifier,
    prove_no_overflow,
)
from finescale.pipeline.journal import (
    REPORT,
    Journal,
    check_apart,
    check_files,
    check_free,
    clear_output,
    file_sha256,
    finished_signature,
    full_disk_explained,
    signature,
    write_json,
    write_shard,
)
from finescale.pipeline.output import small_files, stored_facts
from finescale.pipeline.plan import check_disk
from finescale.runtime.checkpoint import METADATA_VERSION, QuantizedCheckpoint, open_quantized

Progress = Callable[[str, int, int], None]
_FORMAT = registry.get("compressed-tensors")


def convert(
    path: str | Path,
    out: Path,
    amplifier: Amplifier = "auto",
    round_again: bool = False,
    fresh: bool = False,
    on_progress: Progress | None = None,
    folded: bool = False,
) -> dict[str, Any]:
    """Write a W4A8 checkpoint with integer scales from a checkpoint with float scales.

    Args:
        path: a symmetric compressed-tensors, GPTQ or AWQ checkpoint, of any tool.
        out: output folder.
        amplifier: a power of two (the paper's default is 1024), ``heuristic`` or ``auto``.
        round_again: give each weight the code nearest to its old value on the new scales; else the codes stay, as in
            the paper.
        fresh: replace what an earlier run wrote to ``out``.
        on_progress: called after each file.
        folded: scales become integers from 1 to 15 times one factor per output (`finescale.grid.folded`), without an
            amplifier.

    Returns:
        The report: one record per layer with amplifier, bound, weight error caused by the conversion.

    Raises:
        InputError: asymmetric weights, act-order groups, or an output folder in use.
        CheckpointError, NumericsError: a damaged source, or an amplifier that could overflow int32.
    """
    if isinstance(amplifier, int):
        check_amplifier(amplifier)
    if folded and amplifier != "auto":
        raise InputError("folded scales have no amplifier; leave --amplifier out.")
    quantized = open_quantized(path)
    schemes = _checked_schemes(quantized, folded)
    facts = {
        "finescale": __version__,
        "source": quantized.source.fingerprint(),
        "amplifier": amplifier,
        "round_again": round_again,
    }
    if folded:
        facts["folded"] = True
    journal = Journal(out, signature(facts))
    check_free(out)
    check_apart(out, quantized.source.path)
    if not fresh and (done := finished_signature(out)) is not None:
        if done != journal.signature:
            raise InputError(f"{out} holds an earlier result; use --fresh to replace it or another --out.")
        report = read_json(out / REPORT, "")
        check_files(out, report)
        return report | {"already_complete": True}
    copies = small_files(quantized.source.path)
    shards = sorted(set(quantized.source.files.values()))
    check_disk(out, quantized.source.total_bytes(), [out / name for name in shards])
    with journal.locked():
        if fresh:
            clear_output(out)
        files = [*shards, INDEX_NAME, "config.json", *(path.name for path in copies)]
        journal.begin(files)
        records = _write_shards(quantized, schemes, out, amplifier, round_again, folded, on_progress)
        for copy in copies:
            with full_disk_explained(out):
                shutil.copyfile(copy, out / copy.name)
        write_json(out / "config.json", _config(quantized, schemes, records))
        report = {
            "finescale": __version__,
            "signature": journal.signature,
            "converted_from": Path(path).name,
            "amplifier": amplifier,
            "round_again": round_again,
            "folded": folded,
            "layers": records,
            "files": {name: file_sha256(out / name) for name in files},
        }
        write_json(out / REPORT, report)
        journal.close()
    return report


def _write_shards(
    quantized: QuantizedCheckpoint,
    schemes: dict[str, WeightScheme],
    out: Path,
    amplifier: Amplifier,
    round_again: bool,
    folded: bool,
    on_progress: Progress | None,
) -> list[dict[str, Any]]:
    """All tensors, in files of the source's names, and their index. Returns the layers' records."""
    records: list[dict[str, Any]] = []
    weight_map: dict[str, str] = {}
    total = 0
    files = sorted(set(quantized.source.files.values()))
    for number, file in enumerate(files):
        if on_progress:
            on_progress(f"converting {file}", number, len(files))
        tensors = _convert_file(quantized, file, list(schemes), amplifier, round_again, folded, records)
        write_shard(out / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += (out / file).stat().st_size
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return records


def _inputs_of(quantized: QuantizedCheckpoint, name: str) -> InputRule:
    """What happens to the input of a layer; where nothing does, it will be rounded to 8 bits per token."""
    rule = quantized.inputs_of(name)
    return rule if rule.scheme is not None else replace(rule, scheme=ActivationScheme(8))


def _config(
    quantized: QuantizedCheckpoint, schemes: dict[str, WeightScheme], records: list[dict[str, Any]]
) -> dict[str, Any]:
    rules = {name: _inputs_of(quantized, name) for name in schemes}
    layers = {record["name"]: stored_facts(record) for record in records}
    for name, rule in rules.items():
        if not rule.is_plain:
            layers[name]["inputs"] = {key: rule.describe()[key] for key in ("gather", "rotation")}
    common = Counter(rule.scheme for rule in rules.values()).most_common(1)[0][0]
    metadata = {
        "version": METADATA_VERSION,
        "finescale": __version__,
        "recipe": "convert",
        "activations": {"bits": common.bits if common else 8},
        "kv_cache": quantized.metadata.get("kv_cache"),
        "layers": layers,
    }
    activations = {name: rule.scheme for name, rule in rules.items()}
    config = _FORMAT.quantization_config(schemes, activations, _ignored(quantized), metadata)
    assert config is not None
    if not all(rule.is_plain for rule in rules.values()):
        config["quant_method"] = OWN_METHOD
    return quantized.source.config | {"quantization_config": config}


def _checked_schemes(quantized: QuantizedCheckpoint, folded: bool) -> dict[str, WeightScheme]:
    schemes: dict[str, WeightScheme] = {}
    for name in quantized.layer_names():
        scheme = quantized.fmt.layer_scheme(quantized.config, name)
        assert scheme is not None
        if not scheme.symmetric:
            raise InputError(
                f"{name} is asymmetric; integer scales need symmetric weights, quantize the original instead."
            )
        inputs = _inputs_of(quantized, name).scheme
        if inputs is not None and not inputs.symmetric:
            raise InputError(
                f"{name} rounds its input with a zero point; integer scales need symmetric activations, quantize the "
                "original instead."
            )
        if folded and scheme.bits > FOLDED_BITS:
            raise InputError(f"{name} has {scheme.bits} bits; folded scales are for at most {FOLDED_BITS}.")
        if f"{name}.{OUTLIER_VALUES}" in quantized.source:
            raise InputError(f"{name} has outliers beside its grid; integer scales are for weights without them.")
        for suffix in ("g_idx", "weight_g_idx"):
            if f"{name}.{suffix}" in quantized.source:
                _check_order(name, quantized.source.read(f"{name}.{suffix}"), scheme)
        schemes[name] = scheme
    if not schemes:
        raise InputError(f"{quantized.source.name} holds no quantized layer to convert.")
    return schemes


def _check_order(name: str, group_of_I: Tensor, scheme: WeightScheme) -> None:
    if not torch.equal(group_of_I.to(torch.int64), contiguous_groups(group_of_I.shape[0], scheme.group_size)):
        raise InputError(
            f"{name} has groups in activation order, which compressed-tensors cannot hold; "
            "quantize the original instead."
        )


def _ignored(quantized: QuantizedCheckpoint) -> list[str]:
    """Two-dimensional weights that are not quantized; embeddings among them do no harm."""
    names = set(quantized.layer_names())
    keys = (key.removesuffix(".weight") for key in quantized.source if key.endswith(".weight"))
    return [name for name in keys if name not in names and len(quantized.source.shape(name + ".weight")) == 2]


def _convert_file(
    quantized: QuantizedCheckpoint,
    file: str,
    names: list[str],
    amplifier: Amplifier,
    round_again: bool,
    folded: bool,
    records: list[dict[str, Any]],
) -> dict[str, Tensor]:
    """The tensors of one output file: layers whose scales lie in the source file, and its other tensors as they are."""
    owned = {f"{name}.{suffix}" for name in names for suffix in quantized.fmt.suffixes if suffix != "bias"}
    tensors = {
        key: quantized.source.read(key)
        for key, home in quantized.source.files.items()
        if home == file and key not in owned
    }
    for name in names:
        scale = "weight_scale" if f"{name}.weight_scale" in quantized.source else "scales"
        if quantized.source.files[f"{name}.{scale}"] != file:
            continue
        activation_max = quantized.activation_max(name)
        weight, record = convert_layer(name, quantized.read(name), amplifier, round_again, activation_max, folded)
        records.append(record)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _FORMAT.pack(weight).items()}
    return tensors


def convert_layer(
    name: str,
    weight: QuantizedWeight,
    amplifier: Amplifier,
    round_again: bool,
    activation_max: int = 127,
    folded: bool = False,
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """One layer with integer scales and its record.

    Negative scales (some tools write them) change sign together with their codes; a code of -2**(bits-1) has no
    opposite and moves by one, which the record counts. Zero scales become the smallest step with codes of zero.
    """
    before_OI = weight.dequantize()
    weight, notes = _positive_scales(weight)
    chosen = 1 if folded else _choose(weight, amplifier, activation_max)
    while True:
        if folded:
            grid = with_folded_scales(weight.grid, before_OI, None if round_again else weight.codes_OI)
        else:
            grid = integerized(weight.grid, chosen)
        codes_OI = quantize_to_grid(before_OI, grid) if round_again else weight.codes_OI
        converted = QuantizedWeight(codes_OI, grid)
        integer_OG = grid.integer_scale_OG()
        if amplifier != "auto" or not round_again or chosen == 1:
            break
        sums_OG = group_absolute_sums(codes_OI, grid.group_of_I, integer_OG.shape[1])
        if int((activation_max * (integer_OG.to(torch.int64) * sums_OG).sum(1)).max()) < INT32_LIMIT:
            break
        chosen //= 2
    bound = prove_no_overflow(name, codes_OI, integer_OG, grid.group_of_I, activation_max)
    change_OI = converted.dequantize() - before_OI
    scheme = grid.scheme
    return converted, {
        "name": name,
        "shape": list(codes_OI.shape),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": True,
        "amplifier": chosen,
        "folded": folded,
        "bound": bound,
        "overflow_use": bound / INT32_LIMIT,
        "scale_min": float(integer_OG.min()),
        "scale_max": float(integer_OG.max()),
        "weight_mse": float(change_OI.double().square().mean()),
        "relative_error": float(change_OI.norm() / before_OI.norm().clamp(min=1e-30)) ** 2,
        "sha256": converted.sha256(),
        "notes": notes,
    }


def _choose(weight: QuantizedWeight, amplifier: Amplifier, activation_max: int) -> int:
    if isinstance(amplifier, int):
        return amplifier
    grid = weight.grid
    if amplifier == "heuristic":
        return heuristic_amplifier(grid.scale_OG)
    sums_OG = group_absolute_sums(weight.codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
    return auto_amplifier(grid.scale_OG, sums_OG, grid.scale_dtype, activation_max)


def _positive_scales(weight: QuantizedWeight) -> tuple[QuantizedWeight, list[str]]:
    grid = weight.grid
    notes: list[str] = []
    negative_OG, zero_OG = grid.scale_OG < 0, grid.scale_OG == 0
    if not bool(negative_OG.any()) and not bool(zero_OG.any()):
        return weight, notes
    codes_OI = weight.codes_OI.to(torch.int16)
    flip_OI = negative_OG[:, grid.group_of_I]
    flipped_OI = torch.where(flip_OI, -codes_OI, codes_OI)
    moved = int((flipped_OI > grid.scheme.code_max).sum())
    codes_OI = flipped_OI.clamp(max=grid.scheme.code_max).masked_fill(zero_OG[:, grid.group_of_I], 0).to(torch.int8)
    scale_OG = grid.scale_OG.abs().clamp(min=smallest_scale(grid.scale_dtype))
    if bool(negative_OG.any()):
        notes.append(f"{int(negative_OG.sum())} negative group scales changed sign, {moved} codes moved by one")
    if bool(zero_OG.any()):
        notes.append(f"{int(zero_OG.sum())} groups with a zero scale hold zeros")
    return QuantizedWeight(codes_OI, replace(grid, scale_OG=scale_OG)), notes
