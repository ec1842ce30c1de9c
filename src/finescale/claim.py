"""Claims finescale's checkpoints among the compressed-tensors files that transformers loads. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLAIMED = "compressed-tensors"


class ClaimingConfig:
    """Stands where transformers looks for the config class of compressed-tensors."""

    original: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """finescale's config for files with its key, else the one that transformers has."""
        if "finescale" not in config_dict:
            return cls.original.from_dict(config_dict, **kwargs)
        from finescale.runtime.transformers import FinescaleConfig

        return FinescaleConfig.from_dict(config_dict, **kwargs)


def register() -> None:
    """Claim finescale's checkpoints from now on; more than once is fine."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS

    if CONFIGS[_CLAIMED] is not ClaimingConfig:
        ClaimingConfig.original = CONFIGS[_CLAIMED]
        CONFIGS[_CLAIMED] = ClaimingConfig


def unregister() -> None:
    """Leave finescale's checkpoints to transformers' compressed-tensors again."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS

    if CONFIGS[_CLAIMED] is ClaimingConfig:
        CONFIGS[_CLAIMED] = ClaimingConfig.original


@contextmanager
def left_to_transformers() -> Iterator[None]:
    """Inside, finescale's checkpoints are loaded as if finescale were not there."""
    unregister()
    try:
        yield
    finally:
        register()
