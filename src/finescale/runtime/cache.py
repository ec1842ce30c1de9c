"""A static cache whose keys and values are int8, each token and head with its own scale, for fused decoders.

Half the bytes of a 16-bit cache: what binds a step of many sequences is reading them. The rounding is that of
``kv_cache: {bits: 8}`` in recipes (`finescale.runtime.attention` simulates it in transformers' own attention).

Shape legend: B sequences, K heads of keys and values, S slots, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from finescale.errors import InputError


class RoundedLayer(StaticLayer):
    """One layer's int8 codes [B, K, S, D], and their scales, float32 [B, K, S]. Only a fused decoder fills it."""

    key_scale_BKS: Tensor
    value_scale_BKS: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for sequences and heads as those of the tensors, [B, K, anything, D]."""
        super().lazy_initialization(key_states.to(torch.int8), value_states.to(torch.int8))
        self.key_scale_BKS = torch.zeros(self.keys.shape[:3], dtype=torch.float32, device=self.keys.device)
        self.value_scale_BKS = torch.zeros_like(self.key_scale_BKS)
        torch._dynamo.mark_static_address(self.key_scale_BKS)
        torch._dynamo.mark_static_address(self.value_scale_BKS)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not here: attention outside of a fused decoder does not know of scales.

        Raises:
            InputError: always.
        """
        raise InputError("a rounded cache serves fused decoders (finescale.load on a GPU's kernels); use StaticCache.")


def rounded_cache(config: PreTrainedConfig, slots: int) -> StaticCache:
    """A cache for ``generate(past_key_values=...)`` and for a step's ``past_key_values``.

    Args:
        config: of the model; all its layers attend to every token.
        slots: tokens that find room.

    Raises:
        InputError: a layer of another kind, for example with a sliding window.
    """
    cache = StaticCache(config=config, max_cache_len=slots)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise InputError("a layer of this model does not attend to every token; its cache cannot be rounded.")
    cache.layers = [RoundedLayer(max_cache_len=slots) for _ in cache.layers]
    return cache


def scales_of(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Scales of keys and values; of a layer in the type of the activations None."""
    return (layer.key_scale_BKS, layer.value_scale_BKS) if isinstance(layer, RoundedLayer) else (None, None)
