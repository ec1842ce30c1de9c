"""The GPTQ checkpoint layout, versions 1 and 2, in both directions.

Per Linear of weight [O, I] with b bits and G groups (everything lies transposed, inputs first):
    qweight  int32 [I*b/32, O]   code + 2**(b-1), a bit stream along the inputs
    qzeros   int32 [G, O*b/32]   zero + 2**(b-1), a bit stream along the outputs; version 1 stores one less
    scales   [G, O]
    g_idx    int32 [I]           group of each input column

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats.checks import (
    check_codes,
    expect_shape,
    only_linear,
    read_groups,
    read_scale,
    require,
    schemes_by_use,
    stored_scale,
)
from finescale.formats.names import name_patterns, names_in_block
from finescale.formats.outliers import no_outliers
from finescale.grid import (
    ActivationScheme,
    Grid,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    number_of_groups,
)
from finescale.grid.packing import pack_rows, packed_words, to_signed, to_unsigned, unpack_rows

NAME = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def check(
    scheme: WeightScheme,
    activations: ActivationScheme | None,
    shape_OI: tuple[int, int],
    layer_class: str = "Linear",
) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        InputError: activations are quantized, or a dimension does not fill whole words.
    """
    only_linear(NAME, layer_class)
    if scheme.bits == 6:
        raise InputError("readers of the gptq format know 2, 3, 4 and 8 bits, not 6; save with compressed-tensors.")
    if activations is not None:
        raise InputError(
            "the gptq format cannot say that activations are quantized; "
            "save with compressed-tensors, or leave activations out of the recipe."
        )
    for size, what in zip(shape_OI, ("outputs", "inputs"), strict=True):
        if size * scheme.bits % 32:
            raise InputError(
                f"the gptq format packs {scheme.bits}-bit values in whole 32-bit words, so a layer of {size} {what} "
                "does not fit; save with compressed-tensors or leave the layer out."
            )


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer in version 1 (`checkpoint_format` gptq), by suffix.

    Raises:
        InputError: the shape does not fit, or a zero point is the lowest code, which version 1 cannot store.
        NumericsError: scales or codes do not fit their types.
    """
    return _pack(weight, zero_offset=1)


def pack_v2(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer in version 2 (`checkpoint_format` gptq_v2), by suffix; raises like `pack`, except that
    every zero point can be stored."""
    return _pack(weight, zero_offset=0)


def _pack(weight: QuantizedWeight, zero_offset: int) -> dict[str, Tensor]:
    grid, bits = weight.grid, weight.grid.scheme.bits
    rows, columns = weight.codes_OI.shape
    check(grid.scheme, None, (rows, columns))
    check_codes(weight)
    no_outliers("gptq", weight)
    if grid.zero_OG is None:
        zero_GO = torch.full((grid.scale_OG.shape[1], rows), 1 << (bits - 1), device=grid.scale_OG.device)
    else:
        zero_GO = to_unsigned(grid.zero_OG.t(), bits).to(torch.int64)
    if zero_offset and bool((zero_GO < zero_offset).any()):
        # Stored as zero - 1 = -1 = 2**bits - 1; some readers add 1 to whole words, and the carry spoils the neighbour.
        raise InputError(
            "a zero point is the lowest code, which version 1 of the gptq format cannot store; save with gptq_v2 or "
            "compressed-tensors."
        )
    return {
        "qweight": pack_rows(to_unsigned(weight.codes_OI, bits), bits).t().contiguous(),
        "qzeros": pack_rows(zero_GO - zero_offset, bits),
        "scales": stored_scale(grid).t().contiguous(),
        "g_idx": grid.group_of_I.to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None = None) -> QuantizedWeight:
    """Read one layer of version 1.

    Args:
        tensors: the layer's tensors by suffix; `g_idx` may be absent.
        scheme: from `layer_scheme`.
        amplifier: of integer scales, None when unknown.

    Raises:
        CheckpointError: a tensor is missing or damaged, or a symmetric layer has zero points of its own.
    """
    return _unpack(tensors, scheme, amplifier, zero_offset=1)


def unpack_v2(tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None = None) -> QuantizedWeight:
    """Read one layer of version 2; arguments and errors as for `unpack`."""
    return _unpack(tensors, scheme, amplifier, zero_offset=0)


def _unpack(
    tensors: Mapping[str, Tensor], scheme: WeightScheme, amplifier: int | None, zero_offset: int
) -> QuantizedWeight:
    packed, zeros, scale_GO = require(tensors, ["qweight", "qzeros", "scales"], NAME)
    bits = scheme.bits
    if packed.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise CheckpointError("qweight and qzeros must be int32 words; this file is of another layout, quantize again.")
    if packed.dim() != 2 or packed.shape[0] * 32 % bits:
        raise CheckpointError(f"qweight of shape {list(packed.shape)} does not hold whole {bits}-bit values.")
    columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]
    groups = number_of_groups(columns, scheme.group_size)
    expect_shape(zeros, (groups, packed_words(rows, bits)), "qzeros")
    scale_OG = read_scale(scale_GO.t(), rows, columns, scheme)
    codes_OI = to_signed(unpack_rows(packed.t(), bits, columns), bits)
    # Version 1 wraps around: 2**bits - 1 means 0.
    zero_GO = (unpack_rows(zeros, bits, rows).to(torch.int16) + zero_offset) % (1 << bits)
    zero_OG = to_signed(zero_GO.t(), bits).contiguous()
    if scheme.symmetric and bool(zero_OG.any()):
        raise CheckpointError(
            f"the config says symmetric, yet zero points other than {1 << (bits - 1)} are stored; "
            "its checkpoint_format (gptq or gptq_v2) is probably wrong."
        )
    group_of_I = contiguous_groups(columns, scheme.group_size)
    if "g_idx" in tensors:
        group_of_I = read_groups(tensors["g_idx"], columns, groups, "g_idx")
    grid = Grid(scheme, scale_OG, None if scheme.symmetric else zero_OG, group_of_I, scale_GO.dtype, amplifier)
    return QuantizedWeight(codes_OI.contiguous(), grid)


def quantization_config(
    schemes: Mapping[str, WeightScheme],
    activations: ActivationScheme | None,
    ignore: Sequence[str],
    finescale: Mapping[str, Any] | None = None,
    checkpoint_format: str = "gptq",
    desc_act: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    The most used scheme is the base; other schemes are `dynamic` rules, as GPTQModel and vLLM read them.

    Args:
        schemes: scheme of each quantized layer, by name.
        activations: must be None.
        ignore: every Linear that is not quantized.
        finescale: placed under the extra top-level key `finescale`, which other readers ignore.
        checkpoint_format: `gptq` or `gptq_v2`.
        desc_act: True if the groups are not consecutive columns.

    Raises:
        InputError: activations are quantized.
    """
    if activations is not None:
        check(next(iter(schemes.values())), activations, (32, 32))
    (base, _), *others = schemes_by_use(schemes).items()
    bits, group_size, symmetric = base
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": True,
        "modules_in_block_to_quantize": [names_in_block(list(schemes), ignore)],
        "meta": {"quantizer": ["finescale"]},
    }
    if others:
        config["dynamic"] = {
            pattern.replace("re:", "+:", 1): {"bits": key[0], "group_size": key[1], "sym": key[2]}
            for key, layers in others
            for pattern in name_patterns(layers, [*schemes, *ignore])
        }
    if finescale is not None:
        config["finescale"] = dict(finescale)
    return config


def layer_scheme(config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """The scheme of the layer called ``name`` by a `quantization_config`, None where a `dynamic` rule leaves it out.

    The config does not list the quantized layers reliably: a layer is quantized if it has a `qweight`.

    Raises:
        CheckpointError: the config lacks a key or has a scheme finescale does not know.
    """
    values = {"bits": config.get("bits"), "group_size": config.get("group_size"), "sym": config.get("sym", True)}
    for rule, override in (config.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), name):
            if rule.startswith("-:") or override is False:
                return None
            values |= {key: override[key] for key in values if key in override}
            break
    try:
        return WeightScheme(int(values["bits"]), int(values["group_size"]), bool(values["sym"]))
    except (InputError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} has a gptq scheme {values} that finescale does not know.") from error
