"""The compressed-tensors checkpoint layouts `pack-quantized` and `int-quantized`, in both directions.

pack-quantized, per Linear of weight [O, I] with b bits and G groups:
    weight_packed      int32 [O, ceil(I*b/32)]   code + 2**(b-1), a bit stream along the inputs
    weight_scale       [O, G]
    weight_shape       int64 [2]                 (O, I)
    weight_zero_point  int32 [ceil(O*b/32), G]   zero + 2**(b-1), a bit stream along the outputs; asymmetric only
    weight_scale_*         scales that are quantized themselves: see `finescale.formats.bilevel`
    weight_outlier_*       what finescale adds to the weight: see `finescale.formats.outliers`
int-quantized: ``weight`` int8 [O, I] and, if asymmetric, ``weight_zero_point`` int8 [O, G], not packed.

The library's 3-bit packing changed between 0.17 (10 values a word) and 0.20 (a bit stream, which is what vLLM allocates
for): the bit stream is written, both are read.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats import bilevel, outliers
from finescale.formats.checks import (
    SchemeKey,
    check_codes,
    contiguous_only,
    expect_shape,
    only_linear,
    read_groups,
    read_scale,
    require,
    schemes_by_use,
    stored_scale,
)
from finescale.formats.names import matches, name_patterns
from finescale.grid import (
    ActivationScheme,
    Grid,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    number_of_groups,
)
from finescale.grid.packing import Layout, pack_rows, packed_words, to_signed, to_unsigned, unpack_rows

NAME = "compressed-tensors"
PACKED = "pack-quantized"
INT8 = "int-quantized"
PACKED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    *bilevel.SUFFIXES,
    *outliers.SUFFIXES,
)
INT8_SUFFIXES = ("weight", "weight_scale", "weight_zero_point", *bilevel.SUFFIXES, *outliers.SUFFIXES)


def check(
    scheme: WeightScheme,
    activations: ActivationScheme | None,
    shape_OI: tuple[int, int],
    layer_class: str = "Linear",
) -> None:
    """Refuse what neither layout can hold. Any shape is fine: a ragged last group is stored like the others (but see
    `finescale.formats.engines`: only finescale itself reads it).

    Raises:
        InputError: the layer is no Linear.
    """
    del scheme, activations, shape_OI
    only_linear(NAME, layer_class)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer in the pack-quantized layout, by suffix.

    Raises:
        InputError: the groups are not consecutive columns.
        NumericsError: scales or codes do not fit their types.
    """
    scheme, grid = weight.grid.scheme, weight.grid
    contiguous_only(NAME, grid)
    check_codes(weight)
    tensors = {
        "weight_packed": pack_rows(to_unsigned(weight.codes_OI, scheme.bits), scheme.bits),
        **_scale_tensors(grid),
        "weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
    }
    if grid.zero_OG is not None:
        zero_GO = to_unsigned(grid.zero_OG.t(), scheme.bits)
        tensors["weight_zero_point"] = pack_rows(zero_GO, scheme.bits).t().contiguous()
    return tensors | outliers.pack(weight.outliers, weight.grid)


def pack_int8(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer in the int-quantized layout (one byte a weight), by suffix; raises like `pack`."""
    contiguous_only(NAME, weight.grid)
    check_codes(weight)
    tensors = {"weight": weight.codes_OI.contiguous(), **_scale_tensors(weight.grid)}
    if weight.grid.zero_OG is not None:
        tensors["weight_zero_point"] = weight.grid.zero_OG.contiguous()
    return tensors | outliers.pack(weight.outliers, weight.grid)


def _scale_tensors(grid: Grid) -> dict[str, Tensor]:
    if grid.bilevel is not None:
        return bilevel.pack(grid.bilevel)
    return {"weight_scale": stored_scale(grid).contiguous()}


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None = None) -> QuantizedWeight:
    """Read one layer in either layout.

    Args:
        tensors: the layer's tensors by suffix.
        scheme: from `layer_scheme`.
        amplifier: of integer scales, from the `finescale` key; None when the file is another tool's.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape or type.
    """
    if "weight_packed" in tensors:
        codes_OI, layout = _unpack_codes(tensors, scheme)
    elif "weight" in tensors and tensors["weight"].dtype == torch.int8:
        codes_OI, layout = tensors["weight"], None
    else:
        raise CheckpointError(
            f"no quantized weight among {', '.join(sorted(tensors)) or 'no tensors'}; "
            "weight_packed (int32) or weight (int8) is needed: the checkpoint is incomplete or of another format."
        )
    rows, columns = codes_OI.shape
    groups = number_of_groups(columns, scheme.group_size)
    levels = bilevel.unpack(tensors, rows, groups) if bilevel.PACKED in tensors else None
    scale_OG = require(tensors, ["weight_scale"], NAME)[0] if levels is None else levels.base_QG
    if levels is None and scale_OG.numel() == 1 and groups == 1:  # one scale for the whole tensor
        scale_OG = scale_OG.reshape(1, 1).expand(rows, 1)
    zero_OG = None
    if not scheme.symmetric:
        (zero_OG,) = require(tensors, ["weight_zero_point"], NAME)
        if layout is not None:
            expect_shape(zero_OG, (packed_words(rows, scheme.bits, layout), groups), "weight_zero_point")
            zero_OG = to_signed(unpack_rows(zero_OG.t(), scheme.bits, rows, layout), scheme.bits).t().contiguous()
        expect_shape(zero_OG, (rows, groups), "weight_zero_point")
        zero_OG = zero_OG.to(torch.int8)
    group_of_I = contiguous_groups(columns, scheme.group_size, codes_OI.device)
    if "weight_g_idx" in tensors:  # act-order of old files
        group_of_I = read_groups(tensors["weight_g_idx"], columns, groups, "weight_g_idx")
    values_OG = levels.scale_OG() if levels is not None else read_scale(scale_OG, rows, columns, scheme)
    grid = Grid(scheme, values_OG, zero_OG, group_of_I, scale_OG.dtype, amplifier, levels)
    return QuantizedWeight(codes_OI, grid, outliers.unpack(tensors, rows, columns, grid))


def _unpack_codes(tensors: Mapping[str, Tensor], scheme: WeightScheme) -> tuple[Tensor, Layout]:
    packed, shape = require(tensors, ["weight_packed", "weight_shape"], NAME)
    expect_shape(shape, (2,), "weight_shape")
    rows, columns = (int(size) for size in shape.tolist())
    layout: Layout = "dense"
    if packed.shape[-1] != packed_words(columns, scheme.bits) and scheme.bits == 3:
        layout = "aligned"
    expect_shape(packed, (rows, packed_words(columns, scheme.bits, layout)), "weight_packed")
    if packed.dtype != torch.int32:
        raise CheckpointError(f"weight_packed is of type {packed.dtype} where int32 is needed; quantize again.")
    return to_signed(unpack_rows(packed, scheme.bits, columns, layout), scheme.bits), layout


def quantization_config(
    schemes: Mapping[str, WeightScheme],
    activations: ActivationScheme | Mapping[str, ActivationScheme | None] | None,
    ignore: Sequence[str],
    finescale: Mapping[str, Any] | None = None,
    layout: str = PACKED,
) -> dict[str, Any]:
    """The `quantization_config` of config.json: the standard keys only, since readers refuse unknown ones in a scheme.

    The most used scheme targets every Linear; each other scheme names its layers. `format` stands both at the top and
    in every group, for without the latter transformers guesses int-quantized as soon as activations are quantized.

    Args:
        schemes: scheme of each quantized layer, by name.
        activations: how inputs are quantized, or None; by layer name where layers differ.
        ignore: every Linear that is not quantized, and lm_head.
        finescale: placed under the extra top-level key `finescale`, which other readers ignore.
        layout: `pack-quantized` or `int-quantized`.
    """
    inputs_of = activations if isinstance(activations, Mapping) else dict.fromkeys(schemes, activations)
    used: dict[tuple[SchemeKey, ActivationScheme | None], list[str]] = {}
    for key, layers in schemes_by_use(schemes).items():
        for layer in layers:
            used.setdefault((key, inputs_of[layer]), []).append(layer)
    (most_used, _), *others = sorted(used.items(), key=lambda item: -len(item[1]))
    # Readers stop at the first target that matches and warn of those never reached, so the broad one comes last.
    targets = [(key, name_patterns(layers, [*schemes, *ignore])) for key, layers in others]
    groups = {
        f"group_{index}": {
            "targets": patterns,
            "weights": _weight_arguments(key[0]),
            "input_activations": _activation_arguments(key[1]),
            "output_activations": None,
            "format": layout,
        }
        for index, (key, patterns) in enumerate([*targets, (most_used, ["Linear"])])
    }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys(["lm_head", *ignore])),
        "kv_cache_scheme": None,
    }
    if finescale is not None:
        config["finescale"] = dict(finescale)
    return config


def _weight_arguments(key: SchemeKey) -> dict[str, Any]:
    bits, group_size, symmetric = key
    arguments: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    if group_size == -1:
        return arguments | {"strategy": "channel"}
    return arguments | {"strategy": "group", "group_size": group_size}


def _activation_arguments(activations: ActivationScheme | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": activations.symmetric,
        "strategy": activations.granularity,
        "dynamic": activations.dynamic,
    }


def layer_scheme(config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """The scheme of the Linear called ``name`` by a `quantization_config`, None if it is not quantized.

    Raises:
        CheckpointError: the scheme is of a kind finescale does not know (floating point, blocks, ...).
    """
    group = _group_of(config, name)
    weights = None if group is None else group.get("weights")
    if weights is None:
        return None
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if weights.get("type", "int") != "int" or strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(
            f"{name} has weights of type {weights.get('type')} by {strategy}; "
            "finescale reads integer weights by tensor, channel or group."
        )
    try:
        return WeightScheme(
            bits=int(weights.get("num_bits", 8)),
            group_size=int(group_size) if strategy == "group" else -1,
            symmetric=bool(weights.get("symmetric", True)),
        )
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} has a weight scheme that finescale does not know: {error}") from error


def activation_scheme(config: Mapping[str, Any]) -> ActivationScheme | None:
    """How the inputs of most quantized layers are rounded, None if they are not; `layer_activations` tells of each.

    Raises:
        CheckpointError: it is of a kind finescale does not know.
    """
    groups = [group for group in config.get("config_groups", {}).values() if group.get("weights") is not None]
    schemes = [_read_activations(group.get("input_activations")) for group in groups]
    broad = [scheme for scheme, group in zip(schemes, groups, strict=True) if "Linear" in group.get("targets", ())]
    return next((scheme for scheme in (*broad, *schemes) if scheme is not None), None)


def layer_activations(config: Mapping[str, Any], name: str) -> ActivationScheme | None:
    """How the input of the Linear called ``name`` is rounded, None if it is not; raises like `activation_scheme`."""
    group = _group_of(config, name)
    return None if group is None else _read_activations(group.get("input_activations"))


def _read_activations(arguments: Mapping[str, Any] | None) -> ActivationScheme | None:
    if not arguments:
        return None
    kind = arguments.get("type", "int")
    strategy: Any = arguments.get("strategy") or "token"
    dynamic = bool(arguments.get("dynamic", True))
    if kind != "int" or (strategy, dynamic) not in (("token", True), ("tensor", False)):
        raise CheckpointError(
            f"inputs are quantized as {kind} with strategy {strategy!r}, dynamic {dynamic}; "
            "finescale reads integers with one dynamic scale per token or one fixed scale per tensor."
        )
    try:
        bits, symmetric = int(arguments.get("num_bits", 8)), bool(arguments.get("symmetric", True))
        return ActivationScheme(bits, strategy, dynamic, symmetric)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"inputs are quantized in a way that finescale does not know: {error}") from error


def _group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The config group of a Linear: exact names first, then patterns, then the class, as the library orders them."""
    if any(matches(name, pattern) for pattern in config.get("ignore") or ()):
        return None
    targets = [(t, group) for group in config.get("config_groups", {}).values() for t in group.get("targets", ())]
    for target, group in targets:
        if target == name:
            return group
    for target, group in sorted(targets, key=lambda pair: pair[0]):
        if target.startswith("re:") and matches(name, target):
            return group
    return next((group for target, group in targets if target == "Linear"), None)
