"""The transforms there are. A new one is a file beside this one and a line here."""

from __future__ import annotations

from dataclasses import dataclass

from finescale.errors import InputError
from finescale.transforms.awq import AwqOptions, apply_awq
from finescale.transforms.fptq import FptqOptions, apply_fptq
from finescale.transforms.smoothquant import SmoothQuantOptions, apply_smoothquant
from finescale.transforms.view import Transform, TransformOptions


@dataclass(frozen=True)
class TransformEntry:
    """A transform and the class of its options."""

    apply: Transform
    options: type[TransformOptions]
    summary: str


TRANSFORMS: dict[str, TransformEntry] = {
    "awq": TransformEntry(apply_awq, AwqOptions, "searched scales and ranges (arXiv 2306.00978)"),
    "fptq": TransformEntry(apply_fptq, FptqOptions, "activations by range (arXiv 2308.15987)"),
    "smoothquant": TransformEntry(apply_smoothquant, SmoothQuantOptions, "scale per channel (arXiv 2211.10438)"),
}


def find_transform(name: str) -> TransformEntry:
    """The transform called ``name``; InputError names the choices."""
    if name not in TRANSFORMS:
        raise InputError(f"a transform is called {name!r}; choose one of {', '.join(sorted(TRANSFORMS))}.")
    return TRANSFORMS[name]
