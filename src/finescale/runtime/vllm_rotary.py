"""Rotary embedding in vLLM's models: with less to do for each layer, and in one kernel with the cache.

What is not as in vLLM 0.20, or computes otherwise, is left alone.

Shape legend: T tokens, K heads of keys and values, D channels of a head, N pages of S slots.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from finescale.kernels.dispatch import has_hopper_kernels
from finescale.runtime.vllm_attention import PageAttention, Unrotated, page_attention

logger = logging.getLogger("vllm.finescale")
PAGED = ("FlashAttentionImpl",)
"""Attention of vLLM that reads keys and values from pages alone, [2, N, S, K, D] whatever their order in memory."""


def rotate_on_the_way(attention: Any) -> None:
    """Let rotary embedding and cache of an attention module be one kernel, or at least rotate with a table as it is
    read."""
    rotary: Any = getattr(attention, "rotary_emb", None)
    inner: Any = getattr(attention, "attn", None)
    keep_table_wide(rotary)
    if fits(rotary, inner) and same_in_pages(rotary, inner.num_heads, inner.num_kv_heads):
        attention.rotary_emb = RotaryIntoCache(rotary, inner, page_attention(inner, rotary.cos_sin_cache.dtype))


def fits(rotary: Any, attention: Any) -> bool:
    """Whether the kernel computes what these two of vLLM's modules do one after the other."""
    implementation: Any = getattr(attention, "impl", None)
    table = getattr(rotary, "cos_sin_cache", None)
    if type(implementation).__name__ not in PAGED or not hasattr(implementation, "do_kv_cache_update") or table is None:
        return False
    if not has_hopper_kernels(table.device):
        return False
    from finescale.kernels.hopper.rotate import fits as has_form

    return (
        getattr(type(rotary), "forward_cuda", None) is not None
        and rotary._forward_method.__qualname__ in ("RotaryEmbedding.forward_cuda", "keep_table_wide.<locals>.forward")
        and not rotary.use_flashinfer
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == attention.head_size == attention.head_size_v
        and has_form(attention.head_size, table.dtype)
        and implementation.kv_cache_dtype == "auto"
        and attention.kv_sharing_target_layer_name is None
        and attention.query_quant is None
        and not attention.calculate_kv_scales
        and str(attention.attn_type) in ("decoder", "AttentionType.DECODER")
    )


def same_in_pages(rotary: Any, heads: int, kv_heads: int) -> bool:
    """Whether the kernel runs here and rotates as vLLM's does, up to a rounding.

    It is compiled by this, for nothing may be compiled while a CUDA graph is recorded.
    """
    from finescale.kernels.hopper.rotate import rotate_into_pages

    table, width = rotary.cos_sin_cache, rotary.head_size
    generator = torch.Generator(table.device).manual_seed(0)
    channels = (heads + 2 * kv_heads) * width
    ours = torch.randn(2, channels, generator=generator, device=table.device).to(table.dtype)
    theirs = ours.clone()
    positions, slots = torch.arange(2, device=table.device), torch.tensor([3, 17]).to(table.device)
    cache = torch.zeros(2, 2, 16, kv_heads, width, dtype=table.dtype, device=table.device)
    (query, key, value), (their_query, their_key, _) = (
        x.split([heads * width, kv_heads * width, kv_heads * width], -1) for x in (ours, theirs)
    )
    key, value = (x.view(-1, kv_heads, width) for x in (key, value))
    try:
        rotate_into_pages(positions, table.float().contiguous(), query, key, value, cache[0], cache[1], slots)
        rotary.forward_cuda(positions, their_query, their_key)
    except Exception as error:  # whatever it is, vLLM's own way remains
        logger.warning("finescale: rotary embedding stays vLLM's own here: %s", error)
        return False
    stored = torch.stack((cache[:, 0, 3], cache[:, 1, 1]), 1)
    return torch.allclose(ours, theirs, rtol=2.0**-6, atol=2.0**-6) and torch.equal(stored, torch.stack((key, value)))


class RotaryIntoCache(nn.Module):
    """Stands where a rotary embedding stood: the cache's update, which follows it, rotates too.

    Args:
        rotary: that embedding; it serves steps without a cache.
        attention: vLLM's attention, whose update of the cache is replaced.
        decoding: finescale's kernel in front of that attention, which rotates and updates where it runs.
    """

    def __init__(self, rotary: Any, attention: Any, decoding: PageAttention | None = None) -> None:
        super().__init__()
        self.rotary = rotary
        self._attention = (attention,)  # not as a module of this one
        self._decoding = decoding
        self._table_PD = rotary.cos_sin_cache.float().contiguous()
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._usual = attention.impl.do_kv_cache_update
        attention.impl.do_kv_cache_update = self.update

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, which are rotated when the cache is updated, or at once if it will not be (or if torch
        traces: what it makes of this has no place for what waits)."""
        self._waiting = None
        if positions.dim() != 1 or torch.compiler.is_compiling() or not self._cache_follows():
            rotated: tuple[Tensor, Tensor] = self.rotary(positions, query, key)
            return rotated
        self._waiting = (positions, query)
        return query, key

    def _cache_follows(self) -> bool:
        from vllm.forward_context import get_forward_context

        slots = get_forward_context().slot_mapping
        return isinstance(slots, dict) and slots.get(self._attention[0].layer_name) is not None

    def _metadata(self) -> Any:
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        return metadata.get(self._attention[0].layer_name) if isinstance(metadata, dict) else None

    def update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """In the place of the attention's own ``do_kv_cache_update``."""
        if self._waiting is None:
            self._usual(layer, key, value, kv_cache, slot_mapping)
            return
        from finescale.kernels.hopper.rotate import rotate_into_pages

        (positions, query), self._waiting = self._waiting, None
        if self._decoding is not None and self._decoding.takes(self._metadata(), key.shape[0]):
            self._decoding.leave(Unrotated(positions, self._table_PD, slot_mapping))
            return
        keys_NSKD, values_NSKD = kv_cache.unbind(0)
        rotate_into_pages(positions, self._table_PD, query, key, value, keys_NSKD, values_NSKD, slot_mapping)


def keep_table_wide(rotary: Any) -> None:
    """Give vLLM's rotary kernel its table in float32, which is what it reads.

    vLLM keeps the table in the type of the activations and converts all of it in every layer of every step. The values
    stay those of the narrow table. What is not as in vLLM 0.20 is left alone, and so is what computes otherwise.
    """
    usual = getattr(type(rotary), "forward_cuda", None)
    table = getattr(rotary, "cos_sin_cache", None)
    if usual is None or table is None or table.dtype == torch.float32 or getattr(rotary, "use_flashinfer", True):
        return
    if (
        not hasattr(rotary, "_match_cos_sin_cache_dtype")
        or getattr(rotary, "_forward_method", None) != rotary.forward_cuda
    ):
        return
    instead = _WithTable(rotary, table.float())

    def forward(positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        rotated: tuple[Tensor, Tensor | None] = usual(instead, positions, query, key)
        return rotated

    if _same_rotation(rotary.forward_cuda, forward, rotary.head_size, table):
        rotary._forward_method = forward


class _WithTable:
    """A rotary embedding as its own method sees it, but for the table."""

    def __init__(self, rotary: Any, table: Tensor) -> None:
        self._rotary, self._table = rotary, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rotary, name)

    def _match_cos_sin_cache_dtype(self, query: Tensor) -> Tensor:
        return self._table


def _same_rotation(one: Any, other: Any, width: int, table: Tensor) -> bool:
    """Whether two ways to rotate give the same bits, for some tokens of two heads."""
    generator = torch.Generator(table.device).manual_seed(0)
    heads = torch.randn(8, 4 * width, generator=generator, device=table.device).to(table.dtype)
    positions = torch.arange(8, device=table.device) % table.shape[0]
    found = []
    for way in (one, other):
        both = heads.clone()
        query, key = both.split(2 * width, -1)
        try:
            found.append(torch.cat(way(positions, query, key), -1))
        except (AttributeError, TypeError, RuntimeError):
            return False
    return torch.equal(*found)
