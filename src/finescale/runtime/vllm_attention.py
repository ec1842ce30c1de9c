"""Attention of decoding sequences in vLLM's CUDA graphs, on finescale's kernel for paged caches.

vLLM's FlashAttention works in tiles of many queries, and a decoding sequence has one: it reads keys and values at about
half of the memory's speed. What is not as in vLLM 0.20, or computes otherwise, is left alone.

Shape legend: T tokens, one of each sequence, C channels, K heads of keys and values, D channels of a head, P positions.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger("vllm.finescale")
ARGUMENTS = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")
"""Of an implementation's ``forward``."""
METADATA = ("max_query_len", "use_cascade", "num_actual_tokens", "seq_lens", "block_table")
"""What is read of a step's metadata."""


class Unrotated(NamedTuple):
    """What is left to do for queries and keys: positions and slots of the tokens, and the table of the rotation."""

    positions_T: Tensor
    table_PD: Tensor
    slot_T: Tensor


class PageAttention:
    """Stands in front of ``forward`` of an attention's implementation, which keeps all steps but decoding in graphs."""

    def __init__(self, attention: Any) -> None:
        self._usual = attention.impl.forward
        self._scaling: float = attention.impl.scale
        self._left: Unrotated | None = None
        attention.impl.forward = self.forward

    def takes(self, metadata: Any, tokens: int) -> bool:
        """Whether a step is one that it computes: it is being recorded, and each sequence has one token."""
        return (
            torch.cuda.is_current_stream_capturing()
            and all(hasattr(metadata, name) for name in METADATA)
            and metadata.max_query_len == 1
            and not metadata.use_cascade
            and metadata.num_actual_tokens == tokens == metadata.seq_lens.shape[0] == metadata.block_table.shape[0]
        )

    def leave(self, left: Unrotated) -> None:
        """The next call, which ``takes`` its step, rotates and updates the cache."""
        self._left = left

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *arguments: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of the implementation's own."""
        left, self._left = self._left, None
        if left is None and not self.takes(attn_metadata, query.shape[0]):
            usual: Tensor = self._usual(
                layer, query, key, value, kv_cache, attn_metadata, output, *arguments, **options
            )  # fmt: skip
            return usual
        from finescale.kernels.triton_page_attention import attend_pages

        keys, values = kv_cache.unbind(0)
        attend_pages(
            query.flatten(1), key, value, keys, values, attn_metadata.block_table, attn_metadata.seq_lens,
            output.flatten(1), self._scaling, left,
        )  # fmt: skip
        return output


def page_attention(attention: Any, dtype: torch.dtype) -> PageAttention | None:
    """Let decoding steps of this attention run on finescale's kernel; None where that would not be the same. It is one
    of vLLM's FlashAttention, with activations and cache in ``dtype``."""
    implementation: Any = attention.impl
    plain = (
        list(inspect.signature(implementation.forward).parameters)[: len(ARGUMENTS)] == list(ARGUMENTS)
        and all(
            hasattr(implementation, name) for name in ("alibi_slopes", "sliding_window", "logits_soft_cap", "scale")
        )
        and implementation.alibi_slopes is None
        and tuple(implementation.sliding_window or ()) == (-1, -1)
        and not implementation.logits_soft_cap
        and getattr(implementation, "sinks", None) is None
        and getattr(implementation, "dcp_world_size", 1) == 1
        and not getattr(implementation, "batch_invariant_enabled", False)
    )
    if not plain:
        return None
    from finescale.kernels import triton_page_attention
    from finescale.kernels.triton_softmax import WORKSPACES

    heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_size
    device = torch.device("cuda", torch.cuda.current_device())
    if not triton_page_attention.fits(heads, kv_heads, width) or not _attends(device, dtype, heads, kv_heads, width):
        return None
    WORKSPACES.reserve(device)
    return PageAttention(attention)


@functools.cache
def _attends(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Whether the kernel runs here and gives attention, up to roundings.

    It is compiled by this, for nothing may be compiled while a CUDA graph is recorded.
    """
    from finescale.kernels.triton_page_attention import attend_pages

    generator = torch.Generator(device).manual_seed(0)
    length, slots = 20, 16
    qkv = torch.randn(2, (heads + 2 * kv_heads) * width, generator=generator, device=device).to(dtype)
    cache = torch.randn(2, 5, slots, kv_heads, width, generator=generator, device=device).to(dtype)
    both = (cache[0], cache[1])
    query, key, value = qkv.split([heads * width, kv_heads * width, kv_heads * width], -1)
    key, value = (x.unflatten(-1, (kv_heads, width)) for x in (key, value))
    pages, lengths = torch.tensor([[3, 1], [4, 2]]).int().to(device), torch.tensor([length] * 2).int().to(device)
    last = (torch.tensor([1, 2]) * slots + length - 1 - slots).to(device)
    positions, table = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.ones(4, width, dtype=torch.float32, device=device),
    )
    table[:, width // 2 :] = 0.0  # by no angle
    rotated, found = torch.empty_like(query).contiguous(), torch.empty_like(query).contiguous()
    scaling = width**-0.5
    try:
        attend_pages(query, key, value, *both, pages, lengths, rotated, scaling, (positions, table, last))
        attend_pages(query, key, value, *both, pages, lengths, found, scaling)
    except Exception as error:  # whatever it is, vLLM's own way remains
        logger.warning("finescale: attention stays vLLM's own here: %s", error)
        return False
    keys, values = (
        x[pages.long()].flatten(1, 2)[:, :length].repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for x in cache
    )
    want = nn.functional.scaled_dot_product_attention(
        query.unflatten(-1, (heads, width))[:, :, None].float(), keys.float(), values.float(), scale=scaling
    ).flatten(1)
    close = [torch.allclose(out.float(), want, rtol=2.0**-5, atol=2.0**-5) for out in (rotated, found)]
    if not all(close):
        logger.warning("finescale: attention stays vLLM's own here: another result.")
    return all(close)
