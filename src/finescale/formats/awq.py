"""The AWQ checkpoint layout "GEMM" (4 bits), in both directions.

Per Linear of weight [O, I] and G groups (everything lies transposed, inputs first):
    qweight  int32 [I, O/8]   code + 8, along the outputs; nibble k of a word holds output (0, 2, 4, 6, 1, 3, 5, 7)[k]
    qzeros   int32 [G, O/8]   zero + 8, in the same order
    scales   [G, O]
A symmetric layer is stored with all zero points 8.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats.checks import (
    check_codes,
    contiguous_only,
    expect_shape,
    only_linear,
    read_scale,
    require,
    schemes_by_use,
    stored_scale,
)
from finescale.formats.outliers import no_outliers
from finescale.grid import (
    ActivationScheme,
    Grid,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    number_of_groups,
)
from finescale.grid.packing import pack_rows, to_signed, to_unsigned, unpack_rows

NAME = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(_ORDER.index(position) for position in range(8))


def check(
    scheme: WeightScheme,
    activations: ActivationScheme | None,
    shape_OI: tuple[int, int],
    layer_class: str = "Linear",
) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        InputError: other than 4 bits, quantized activations, outputs that do not fill words, a ragged last group.
    """
    only_linear(NAME, layer_class)
    if activations is not None:
        raise InputError(
            "the awq format cannot say that activations are quantized; "
            "save with compressed-tensors, or leave activations out of the recipe."
        )
    if scheme.bits != 4:
        raise InputError(f"the awq format holds 4-bit weights, not {scheme.bits}-bit ones; save with another format.")
    rows, columns = shape_OI
    if rows % 8:
        raise InputError(
            f"the awq format packs 8 outputs in a word, so a layer of {rows} outputs does not fit; "
            "save with compressed-tensors or leave the layer out."
        )
    if scheme.group_size != -1 and columns % scheme.group_size:
        raise InputError(
            f"the awq format needs groups of equal size, but {columns} inputs are not a multiple of "
            f"{scheme.group_size}; choose a group size that divides, or save with compressed-tensors."
        )


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix.

    Raises:
        InputError: bits, shape or groups do not fit.
        NumericsError: scales or codes do not fit their types.
    """
    grid = weight.grid
    rows, columns = weight.codes_OI.shape
    check(grid.scheme, None, (rows, columns))
    contiguous_only(NAME, grid)
    check_codes(weight)
    no_outliers("awq", weight)
    zero_OG = torch.zeros_like(grid.scale_OG, dtype=torch.int8) if grid.zero_OG is None else grid.zero_OG
    return {
        "qweight": _pack_outputs(weight.codes_OI),
        "qzeros": _pack_outputs(zero_OG),
        "scales": stored_scale(grid).t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None = None) -> QuantizedWeight:
    """Read one layer.

    Args:
        tensors: the layer's tensors by suffix.
        scheme: from `layer_scheme`.
        amplifier: of integer scales, None when unknown.

    Raises:
        CheckpointError: a tensor is missing or damaged, or a symmetric layer has zero points of its own.
    """
    packed, scale_GO = require(tensors, ["qweight", "scales"], NAME)
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise CheckpointError(
            "qweight must be a matrix of int32 words; this file is of another layout, quantize again."
        )
    columns, rows = packed.shape[0], packed.shape[1] * 8
    scale_OG = read_scale(scale_GO.t(), rows, columns, scheme)
    zero_OG = None
    if "qzeros" in tensors:
        expect_shape(tensors["qzeros"], (number_of_groups(columns, scheme.group_size), packed.shape[1]), "qzeros")
        zero_OG = _unpack_outputs(tensors["qzeros"])
    elif not scheme.symmetric:
        require(tensors, ["qzeros"], NAME)
    if scheme.symmetric and zero_OG is not None:
        if bool(zero_OG.any()):
            raise CheckpointError("the config says that there are no zero points, yet some other than 8 are stored.")
        zero_OG = None
    group_of_I = contiguous_groups(columns, scheme.group_size)
    grid = Grid(scheme, scale_OG, zero_OG, group_of_I, scale_GO.dtype, amplifier)
    return QuantizedWeight(_unpack_outputs(packed), grid)


def _pack_outputs(codes_OX: Tensor) -> Tensor:
    """int32 [X, O/8] of signed 4-bit values [O, X]."""
    by_word = to_unsigned(codes_OX.t(), 4).unflatten(-1, (-1, 8))
    return pack_rows(by_word[..., list(_ORDER)].flatten(-2), 4)


def _unpack_outputs(words_XO: Tensor) -> Tensor:
    """Signed int8 [O, X] of words [X, O/8]."""
    by_word = unpack_rows(words_XO, 4, words_XO.shape[1] * 8).unflatten(-1, (-1, 8))
    return to_signed(by_word[..., list(_INVERSE)].flatten(-2).t().contiguous(), 4)


def quantization_config(
    schemes: Mapping[str, WeightScheme],
    activations: ActivationScheme | None,
    ignore: Sequence[str],
    finescale: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    `zero_point` is always true: zero points are always stored, and the numbers of a symmetric layer come out the same.

    Args:
        schemes: scheme of each quantized layer, by name; one scheme for all.
        activations: must be None.
        ignore: every Linear that is not quantized (readers match these as substrings of layer names).
        finescale: placed under the extra top-level key `finescale`, which other readers ignore.

    Raises:
        InputError: more than one scheme, or quantized activations.
    """
    groups = schemes_by_use(schemes)
    if len(groups) > 1:
        raise InputError(
            f"the awq format holds one scheme for the whole model, but there are {len(groups)}; "
            "remove the overrides from the recipe or save with compressed-tensors."
        )
    (_, group_size, _) = next(iter(groups))
    check(next(iter(schemes.values())), activations, (8, max(group_size, 1)))
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(dict.fromkeys(["lm_head", *ignore])),
    }
    if finescale is not None:
        config["finescale"] = dict(finescale)
    return config


def layer_scheme(config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """The scheme of the layer called ``name`` by a `quantization_config`, None if it is not quantized.

    Raises:
        CheckpointError: the config lacks a key or has a scheme finescale does not know.
    """
    if any(entry in name for entry in config.get("modules_to_not_convert") or ()):
        return None
    try:
        bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
        # finescale writes the zero points of symmetric layers too, and remembers that they are all 8.
        ours = config.get("finescale", {}).get("layers", {}).get(name, {})
        symmetric = bool(ours.get("symmetric", not config.get("zero_point", True)))
        return WeightScheme(int(bits), int(group_size), symmetric)
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} has an awq scheme that finescale does not know: {error}") from error
