"""What every format checks before it writes and after it reads.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finescale.errors import CheckpointError, InputError, NumericsError
from finescale.grid import Grid, QuantizedWeight, WeightScheme, number_of_groups

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SchemeKey = tuple[int, int, bool]


def scheme_key(scheme: WeightScheme) -> SchemeKey:
    """(bits, group size, symmetric): all that a file says of a scheme. How the range was clipped is not stored."""
    return scheme.bits, scheme.group_size, scheme.symmetric


def schemes_by_use(schemes: Mapping[str, WeightScheme]) -> dict[SchemeKey, list[str]]:
    """The layer names of each distinct scheme, the most used scheme first.

    Raises:
        InputError: there is no layer at all.
    """
    if not schemes:
        raise InputError("no layer is quantized, so there is nothing to write; check the recipe's overrides.")
    groups: dict[SchemeKey, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme_key(scheme), []).append(name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def only_linear(format_name: str, layer_class: str) -> None:
    """Refuse layers that are no `torch.nn.Linear` (GPT-2's Conv1D keeps its weight transposed)."""
    if layer_class != "Linear":
        raise InputError(
            f"{format_name} holds weights of Linear layers only, not of {layer_class}; "
            "leave these layers out or save with the format dense."
        )


def contiguous_only(format_name: str, grid: Grid) -> None:
    """Refuse groups of scattered columns, which most formats cannot describe."""
    if not grid.groups_are_contiguous:
        raise InputError(
            f"{format_name} holds groups of consecutive columns only; "
            "solve with static groups, without activation order, or save with the format gptq."
        )


def stored_scale(grid: Grid) -> Tensor:
    """The scales [O, G] in the type the file stores, without any change of value.

    Raises:
        NumericsError: a scale is not exactly representable in ``grid.scale_dtype``, or is not finite.
    """
    scale_OG = grid.scale_OG.to(grid.scale_dtype)
    if not torch.equal(scale_OG.to(grid.scale_OG.dtype), grid.scale_OG) or not bool(torch.isfinite(scale_OG).all()):
        raise NumericsError(f"some scales are not exact in {grid.scale_dtype}; fit the grid with this scale type.")
    return scale_OG


def check_codes(weight: QuantizedWeight) -> None:
    """Refuse codes outside of the range of their bits, which would spill into neighbours when packed."""
    scheme = weight.grid.scheme
    tensors = [weight.codes_OI] if weight.grid.zero_OG is None else [weight.codes_OI, weight.grid.zero_OG]
    for tensor in tensors:
        if tensor.numel() and (int(tensor.min()) < scheme.code_min or int(tensor.max()) > scheme.code_max):
            raise NumericsError(f"codes lie outside of [{scheme.code_min}, {scheme.code_max}]; the solver is at fault.")
    if (weight.grid.zero_OG is None) != scheme.symmetric:
        raise NumericsError("a symmetric layer has no zero points and an asymmetric one must have them.")


def require(tensors: Mapping[str, Tensor], names: Sequence[str], format_name: str) -> list[Tensor]:
    """The named tensors of one layer.

    Raises:
        CheckpointError: one is missing.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"a {format_name} layer lacks {', '.join(missing)} (it has {', '.join(sorted(tensors)) or 'nothing'}); "
            "the checkpoint is incomplete, download or quantize it again."
        )
    return [tensors[name] for name in names]


def expect_shape(tensor: Tensor, shape: Sequence[int], what: str) -> None:
    """Raise CheckpointError unless ``tensor`` has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"{what} has shape {list(tensor.shape)} where {list(shape)} is needed; "
            "the checkpoint is damaged or its config.json belongs to another one."
        )


def read_groups(index_I: Tensor, columns: int, groups: int, what: str) -> Tensor:
    """Check the group of each input column in a file and give it as int64 [I]. Raises CheckpointError for another shape
    or a group that is not there."""
    expect_shape(index_I, (columns,), what)
    index_I = index_I.to(torch.int64)
    if columns and (int(index_I.min()) < 0 or int(index_I.max()) >= groups):
        raise CheckpointError(f"{what} points outside of the {groups} groups; the checkpoint is damaged.")
    return index_I


def read_scale(scale_OG: Tensor, rows: int, columns: int, scheme: WeightScheme) -> Tensor:
    """Check the scales of a file and give them in float32 [O, G]. Raises CheckpointError for another shape or type, or
    a scale that is not finite."""
    expect_shape(scale_OG, (rows, number_of_groups(columns, scheme.group_size)), "the scale tensor")
    if scale_OG.dtype not in SCALE_DTYPES:
        raise CheckpointError(f"the scales are of type {scale_OG.dtype}; float16, bfloat16 or float32 is needed.")
    scale_OG = scale_OG.to(torch.float32)
    if not bool(torch.isfinite(scale_OG).all()):
        raise CheckpointError("some scales are not finite; the checkpoint is damaged, download or quantize it again.")
    return scale_OG
