"""Attention whose keys and values are rounded as in a quantized cache, simulated in transformers' own attention.

Keys are rounded after their rotary embedding, per token and head; with ``queries`` the queries too, as QLLM (arXiv
2310.08041) does; with ``rotate`` queries and keys are first rotated by a Hadamard matrix, which keeps their products
and spreads outliers (QuaRot, arXiv 2404.00456).
Shape legend: B sequences, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finescale.errors import InputError
from finescale.grid import ActivationScheme, fake_quantize
from finescale.grid.hadamard import largest_rotation, rotate

NAME = "finescale-kv-cache"
_ATTRIBUTE = "finescale_kv_cache"


def rounded_attention(
    module: nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' scaled dot product attention on rounded keys and values; see its signature for the rest."""
    facts = getattr(module.config, _ATTRIBUTE)
    query_BHTD, key_BHTD, value_BHTD = round_cache(query_BHTD, key_BHTD, value_BHTD, facts)
    return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, mask, **kwargs)


def round_cache(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, facts: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention sees them.

    Args:
        query_BHTD, key_BHTD, value_BHTD: float [B, H, T, D].
        facts: ``bits``, ``symmetric``, ``queries``, ``rotate``.
    """
    scheme = ActivationScheme(facts["bits"], symmetric=facts["symmetric"])
    if facts["rotate"]:
        turn = largest_rotation(key_BHTD.shape[-1])
        query_BHTD, key_BHTD = rotate(query_BHTD, *turn), rotate(key_BHTD, *turn)
    if facts["queries"]:
        query_BHTD = _rounded(query_BHTD, scheme)
    return query_BHTD, _rounded(key_BHTD, scheme), _rounded(value_BHTD, scheme)


def _rounded(x_BHTD: Tensor, scheme: ActivationScheme) -> Tensor:
    """Rounded; gradients, where tuning wants them, pass straight through."""
    if not x_BHTD.requires_grad:
        return fake_quantize(x_BHTD, scheme)
    return x_BHTD + (fake_quantize(x_BHTD.detach(), scheme) - x_BHTD.detach())


def quantize_kv_cache(model: PreTrainedModel, facts: dict[str, Any]) -> None:
    """Let every attention of a model round its keys and values from now on.

    Raises:
        InputError: the family computes its attention in its own way.
    """
    check_kv_cache(model)
    AttentionInterface.register(NAME, rounded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
    setattr(model.config, _ATTRIBUTE, dict(facts))


def check_kv_cache(model: PreTrainedModel) -> None:
    """Raises InputError when the attention of this family cannot be exchanged."""
    # What is exchanged is transformers' scaled dot product: soft caps and sinks have no place in it.
    wanted = ("_supports_attention_backend", "_supports_sdpa")
    if not all(getattr(type(model), name, False) for name in wanted):
        raise InputError(
            f"{model.config.model_type} computes its attention in its own way, where the cache cannot be rounded; "
            "leave kv_cache out."
        )
