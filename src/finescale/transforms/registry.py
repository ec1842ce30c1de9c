"""The transforms there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finescale.errors import InputError
from finescale.models import Skeleton
from finescale.transforms.awq import AwqOptions, apply_awq
from finescale.transforms.fptq import FptqOptions, apply_fptq
from finescale.transforms.omniquant import OmniQuantOptions, apply_omniquant
from finescale.transforms.qllm import QllmOptions, apply_qllm
from finescale.transforms.quarot import QuarotOptions, apply_quarot, prepare_quarot
from finescale.transforms.rotation import Outside, Rotation
from finescale.transforms.smoothquant import SmoothQuantOptions, apply_smoothquant
from finescale.transforms.view import Transform, TransformOptions


@dataclass(frozen=True)
class TransformEntry:
    """A transform.

    Attributes:
        apply: the function.
        options: the class of its options.
        summary: one line for people.
        keeps_function: whether the block computes the same afterwards, but for rounding.
        last: whether it splits or merges inputs, so that no other transform can follow it.
        learned: whether it is learned from the block's output, by gradients.
        prepare: for a transform that rotates the residual stream, and so must come first: makes the rotation.
    """

    apply: Transform
    options: type[TransformOptions]
    summary: str
    keeps_function: bool = True
    last: bool = False
    learned: bool = False
    prepare: Callable[[Skeleton, Any], tuple[Rotation, Outside]] | None = None


TRANSFORMS: dict[str, TransformEntry] = {
    "awq": TransformEntry(apply_awq, AwqOptions, "searched scales and ranges (arXiv 2306.00978)"),
    "fptq": TransformEntry(apply_fptq, FptqOptions, "activations by range (arXiv 2308.15987)"),
    "omniquant": TransformEntry(
        apply_omniquant, OmniQuantOptions, "learned ranges and scales (arXiv 2308.13137)", learned=True
    ),
    "qllm": TransformEntry(
        apply_qllm, QllmOptions, "channels split and merged (arXiv 2310.08041)", keeps_function=False, last=True
    ),
    "quarot": TransformEntry(
        apply_quarot, QuarotOptions, "Hadamard rotations (arXiv 2404.00456)", prepare=prepare_quarot
    ),
    "smoothquant": TransformEntry(apply_smoothquant, SmoothQuantOptions, "scale per channel (arXiv 2211.10438)"),
}


def find_transform(name: str) -> TransformEntry:
    """The transform called ``name``; InputError names the choices."""
    if name not in TRANSFORMS:
        raise InputError(f"a transform is called {name!r}; choose one of {', '.join(sorted(TRANSFORMS))}.")
    return TRANSFORMS[name]
