"""Checkpoints on disk: stateless functions from tensors to tensors, one file per layout."""

from finescale.formats.registry import FORMATS, Format, activation_scheme, detect, get

__all__ = ["FORMATS", "Format", "activation_scheme", "detect", "get"]
