"""Rewrites of a block that keep its function and make it easier to quantize."""

from finescale.transforms.registry import TRANSFORMS, TransformEntry, find_transform
from finescale.transforms.view import BlockView, Changes, Target, TransformOptions, some_of

__all__ = [
    "TRANSFORMS",
    "BlockView",
    "Changes",
    "Target",
    "TransformEntry",
    "TransformOptions",
    "find_transform",
    "some_of",
]
