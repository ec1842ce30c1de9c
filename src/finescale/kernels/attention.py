"""What stands between the products of a decoder block's attention, as torch custom ops for any device.

On a GPU they are one Triton kernel each (`kernels.triton_attention`), elsewhere plain torch. They work under
torch.compile and in CUDA graphs.

Shape legend: B sequences, T tokens, C channels of all heads (queries, then keys, then values), H heads of queries, K
heads of keys and values, D channels of a head, S slots of a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.kernels.operators import EVERYWHERE, operator
from finescale.kernels.plain import rms_norm


def _empty_rotate_heads(
    qkv_BTC: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    epsilon: float,
    heads: int,
    kv_heads: int,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    slot: Tensor,
) -> Tensor:
    return qkv_BTC.new_empty(qkv_BTC.shape[0], qkv_BTC.shape[1], heads, keys_BKSD.shape[3])


@operator("rotate_heads", _empty_rotate_heads, mutates=("keys_BKSD", "values_BKSD"), devices=EVERYWHERE)
def rotate_heads(
    qkv_BTC: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    epsilon: float,
    heads: int,
    kv_heads: int,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    slot: Tensor,
) -> Tensor:
    """Rotated queries [B, T, H, D]; rotated keys and the values go into the cache, from ``slot`` on.

    Args:
        qkv_BTC: float, contiguous.
        cos_BTD, sin_BTD: rotary tables in the type of ``qkv_BTC``, contiguous, for each sequence or for all [1, T, D].
        q_gain_D, k_gain_D: of an RMS norm of each head before the rotation, or None.
        epsilon: of that norm.
        heads, kv_heads: H, K.
        keys_BKSD, values_BKSD: the cache, contiguous, written.
        slot: int64, one number on the device: where the first token goes. Tokens beyond S are dropped.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    _check(qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, heads, kv_heads, keys_BKSD, values_BKSD, slot)
    if qkv_BTC.is_cuda:
        from finescale.kernels import triton_attention

        return triton_attention.rotate(
            qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, epsilon, heads, kv_heads, keys_BKSD, values_BKSD, slot
        )
    query_BTHD, key_BTKD, value_BTKD = _rotated(qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, epsilon, heads, kv_heads)
    place = int(slot) + torch.arange(qkv_BTC.shape[1])
    place = place[place < keys_BKSD.shape[2]]
    keys_BKSD[:, :, place] = key_BTKD[:, : len(place)].transpose(1, 2)
    values_BKSD[:, :, place] = value_BTKD[:, : len(place)].transpose(1, 2)
    return query_BTHD


def _empty_attend_token(
    qkv_BC: Tensor,
    cos_BD: Tensor,
    sin_BD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    epsilon: float,
    heads: int,
    kv_heads: int,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    slot: Tensor,
    valid_BS: Tensor | None,
    scaling: float,
) -> Tensor:
    return qkv_BC.new_empty(qkv_BC.shape[0], heads * keys_BKSD.shape[3])


@operator("attend_token", _empty_attend_token, mutates=("keys_BKSD", "values_BKSD"), devices=EVERYWHERE)
def attend_token(
    qkv_BC: Tensor,
    cos_BD: Tensor,
    sin_BD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    epsilon: float,
    heads: int,
    kv_heads: int,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    slot: Tensor,
    valid_BS: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of one token a sequence to the cache and itself, [B, H * D]; its key and value go into the cache.

    Args:
        qkv_BC: float, contiguous.
        cos_BD, sin_BD: rotary tables of the token, for each sequence or for all [1, D].
        q_gain_D, k_gain_D, epsilon, heads, kv_heads, keys_BKSD, values_BKSD: see ``rotate_heads``.
        slot: int64, one number on the device: tokens in the cache, and where this one goes. A token that finds no room
            gives NaN.
        valid_BS: bool, contiguous: which slots count (left padding does not), or None for all.
        scaling: what scores are multiplied by.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    cache = (keys_BKSD, values_BKSD, slot)
    _check(qkv_BC[:, None], cos_BD[:, None], sin_BD[:, None], q_gain_D, k_gain_D, heads, kv_heads, *cache)
    batch, slots = qkv_BC.shape[0], keys_BKSD.shape[2]
    if valid_BS is not None and (
        tuple(valid_BS.shape) != (batch, slots) or valid_BS.dtype != torch.bool or not valid_BS.is_contiguous()
    ):
        raise InputError(f"valid slots must be contiguous bool [{batch}, {slots}].")
    if qkv_BC.is_cuda:
        from finescale.kernels import triton_attention

        return triton_attention.attend(
            qkv_BC, cos_BD, sin_BD, q_gain_D, k_gain_D, epsilon, heads, kv_heads, *cache, valid_BS, scaling
        )
    query_BTHD, key_BTKD, value_BTKD = _rotated(
        qkv_BC[:, None], cos_BD[:, None], sin_BD[:, None], q_gain_D, k_gain_D, epsilon, heads, kv_heads
    )
    length = int(slot)
    if length >= slots:
        return torch.full_like(qkv_BC[:, : heads * keys_BKSD.shape[3]], float("nan"))
    keys_BKSD[:, :, length], values_BKSD[:, :, length] = key_BTKD[:, 0], value_BTKD[:, 0]
    counts_BS = None
    if valid_BS is not None:
        counts_BS = valid_BS[:, : length + 1].clone()
        counts_BS[:, length] = True
        counts_BS = counts_BS[:, None, None]
    out_BHTD = torch.nn.functional.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        keys_BKSD[:, :, : length + 1].repeat_interleave(heads // kv_heads, 1),
        values_BKSD[:, :, : length + 1].repeat_interleave(heads // kv_heads, 1),
        attn_mask=counts_BS,
        scale=scaling,
    )
    return out_BHTD.reshape(batch, -1)


def _rotated(
    qkv_BTC: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    epsilon: float,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, D], keys and values [B, T, K, D] in plain torch."""
    parts = qkv_BTC.view(*qkv_BTC.shape[:2], heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 2)
    query_BTHD, key_BTKD, value_BTKD = parts
    if q_gain_D is not None and k_gain_D is not None:
        query_BTHD, key_BTKD = rms_norm(query_BTHD, q_gain_D, epsilon), rms_norm(key_BTKD, k_gain_D, epsilon)
    cos, sin = cos_BTD[:, :, None], sin_BTD[:, :, None]
    return _rotate(query_BTHD, cos, sin), _rotate(key_BTKD, cos, sin), value_BTKD


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _check(
    qkv_BTC: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    q_gain_D: Tensor | None,
    k_gain_D: Tensor | None,
    heads: int,
    kv_heads: int,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    slot: Tensor,
) -> None:
    if qkv_BTC.dim() != 3 or keys_BKSD.dim() != 4 or keys_BKSD.shape != values_BKSD.shape:
        raise InputError("queries, keys and values must be [B, T, C], keys and values of the cache [B, K, S, D] alike.")
    batch, tokens, channels = qkv_BTC.shape
    width = keys_BKSD.shape[3]
    if keys_BKSD.shape[:2] != (batch, kv_heads) or channels != (heads + 2 * kv_heads) * width or heads % kv_heads:
        raise InputError(
            f"{channels} channels of {batch} sequences do not fit a cache {tuple(keys_BKSD.shape)} and {heads} heads."
        )
    for name, table in (("cos", cos_BTD), ("sin", sin_BTD)):
        if table.shape[0] not in (1, batch) or tuple(table.shape[1:]) != (tokens, width):
            raise InputError(f"{name} {tuple(table.shape)} must be [1 or {batch}, {tokens}, {width}].")
    given = [t for t in (qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, keys_BKSD, values_BKSD) if t is not None]
    if any(t.dtype != qkv_BTC.dtype or t.device != qkv_BTC.device or not t.is_contiguous() for t in given):
        raise InputError("activations, tables, gains and cache must be contiguous, of one type and on one device.")
    if (q_gain_D is None) != (k_gain_D is None) or any(g is not None and g.shape != (width,) for g in given[3:-2]):
        raise InputError(f"gains of queries and keys must both be [{width}], or None.")
    if slot.numel() != 1 or slot.dtype != torch.int64 or slot.device != qkv_BTC.device:
        raise InputError("the slot must be one int64 number on the device of the activations.")
