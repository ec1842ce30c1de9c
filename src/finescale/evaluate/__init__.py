"""How good a model is: perplexity, KL to the original, agreement."""

from finescale.evaluate.perplexity import Evaluation, cut_windows, evaluate_windows

__all__ = ["Evaluation", "cut_windows", "evaluate_windows"]
