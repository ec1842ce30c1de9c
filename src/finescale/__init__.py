"""finescale: quantize large language models after training, and run them fast.

>>> import finescale
>>> report = finescale.quantize("model-folder", "w4a8-integer-scale", out="quantized")  # doctest: +SKIP
>>> model = finescale.load("quantized")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finescale._after_import import after_import
from finescale._version import __version__
from finescale.claim import register
from finescale.errors import CheckpointError, FinescaleError, InputError, NumericsError

if TYPE_CHECKING:
    from finescale.api import evaluate, quantize
    from finescale.recipe import Recipe
    from finescale.runtime.load import load

__all__ = [
    "CheckpointError",
    "FinescaleError",
    "InputError",
    "NumericsError",
    "Recipe",
    "__version__",
    "evaluate",
    "load",
    "quantize",
]

_LAZY = {
    "quantize": "finescale.api",
    "evaluate": "finescale.api",
    "load": "finescale.runtime.load",
    "Recipe": "finescale.recipe",
}


def __getattr__(name: str) -> Any:
    """Heavy parts are imported when first used, so that the command line starts at once."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'finescale' has no attribute {name!r}")


# transformers then loads finescale's checkpoints onto finescale's layers; nothing heavy is imported for it here.
after_import("transformers.quantizers.auto", register)
