"""Quantized modules and loading models made of them."""

from finescale.runtime.load import load
from finescale.runtime.modules import QuantizedLinear

__all__ = ["QuantizedLinear", "load"]
