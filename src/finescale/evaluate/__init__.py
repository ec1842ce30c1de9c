"""How good a model is: perplexity, KL to the original, agreement."""

import sys
from types import ModuleType
from typing import Any

from finescale.evaluate.perplexity import Evaluation, cut_windows, evaluate_windows

__all__ = ["Evaluation", "cut_windows", "evaluate_windows"]


class _Room(ModuleType):
    """Python binds this package to the name ``finescale.evaluate``, which is a function of the public interface too:
    calling the package calls that function, whichever was imported first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Evaluation:
        from finescale.api import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
