"""The exceptions that finescale raises on purpose.

Every message is one sentence that says what is wrong and what to do about it. The command line prints it without a
traceback and exits with code 1; anything that is not a `FinescaleError` is a defect of finescale itself.
"""

from __future__ import annotations


class FinescaleError(Exception):
    """Base of all errors that finescale raises on purpose; its message is one sentence with the remedy."""


class InputError(FinescaleError):
    """What the user gave cannot work: a path, a recipe key, a shape, a value."""


class CheckpointError(FinescaleError):
    """A file on disk is damaged, incomplete, or was written by another version."""


class NumericsError(FinescaleError):
    """A number that must not occur: NaN or infinity, or a proof (such as the overflow bound) that does not hold."""
