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
from finescale.grid import ActivationScheme, quantize_tokens
from finescale.kernels.operators import EVERYWHERE, operator
from finescale.kernels.plain import rms_norm

WRITTEN = ("keys_BKSD", "values_BKSD", "key_scale_BKS", "value_scale_BKS")


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
    key_scale_BKS: Tensor | None = None,
    value_scale_BKS: Tensor | None = None,
) -> Tensor:
    return qkv_BTC.new_empty(qkv_BTC.shape[0], qkv_BTC.shape[1], heads, keys_BKSD.shape[3])


@operator("rotate_heads", _empty_rotate_heads, mutates=WRITTEN, devices=EVERYWHERE)
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
    key_scale_BKS: Tensor | None = None,
    value_scale_BKS: Tensor | None = None,
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
        key_scale_BKS, value_scale_BKS: float32, contiguous, of a cache of int8 codes, written: keys and values are
            rounded as `finescale.grid.quantize_tokens` rounds them, each token and head by its own scale. None for a
            cache in the type of ``qkv_BTC``.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    scales = (key_scale_BKS, value_scale_BKS)
    _check(qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, heads, kv_heads, keys_BKSD, values_BKSD, slot, *scales)
    if qkv_BTC.is_cuda:
        from finescale.kernels import triton_attention

        return triton_attention.rotate(
            qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, epsilon, heads, kv_heads, keys_BKSD, values_BKSD, slot,
            *scales,
        )  # fmt: skip
    query_BTHD, key_BTKD, value_BTKD = _rotated(qkv_BTC, cos_BTD, sin_BTD, q_gain_D, k_gain_D, epsilon, heads, kv_heads)
    place = int(slot) + torch.arange(qkv_BTC.shape[1])
    place = place[place < keys_BKSD.shape[2]]
    _put(keys_BKSD, key_scale_BKS, place, key_BTKD[:, : len(place)])
    _put(values_BKSD, value_scale_BKS, place, value_BTKD[:, : len(place)])
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
    key_scale_BKS: Tensor | None = None,
    value_scale_BKS: Tensor | None = None,
    settled: bool = False,
) -> Tensor:
    return qkv_BC.new_empty(qkv_BC.shape[0], heads * keys_BKSD.shape[3])


@operator("attend_token", _empty_attend_token, mutates=WRITTEN, devices=EVERYWHERE)
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
    key_scale_BKS: Tensor | None = None,
    value_scale_BKS: Tensor | None = None,
    settled: bool = False,
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
        key_scale_BKS, value_scale_BKS: see ``rotate_heads``; the token's own key and value count as rounded too.
        settled: the cache and the slot were written before the kernel in front of this one began, and may be read while
            it still runs.

    Raises:
        InputError: shapes, types or strides that do not fit together.
    """
    cache, scales = (keys_BKSD, values_BKSD, slot), (key_scale_BKS, value_scale_BKS)
    _check(qkv_BC[:, None], cos_BD[:, None], sin_BD[:, None], q_gain_D, k_gain_D, heads, kv_heads, *cache, *scales)
    batch, slots = qkv_BC.shape[0], keys_BKSD.shape[2]
    if valid_BS is not None and (
        tuple(valid_BS.shape) != (batch, slots) or valid_BS.dtype != torch.bool or not valid_BS.is_contiguous()
    ):
        raise InputError(f"valid slots must be contiguous bool [{batch}, {slots}].")
    if qkv_BC.is_cuda:
        from finescale.kernels import triton_attention

        return triton_attention.attend(
            qkv_BC, cos_BD, sin_BD, q_gain_D, k_gain_D, epsilon, heads, kv_heads, *cache, valid_BS, scaling,
            *scales, settled,
        )  # fmt: skip
    query_BTHD, key_BTKD, value_BTKD = _rotated(
        qkv_BC[:, None], cos_BD[:, None], sin_BD[:, None], q_gain_D, k_gain_D, epsilon, heads, kv_heads
    )
    length = int(slot)
    if length >= slots:
        return torch.full_like(qkv_BC[:, : heads * keys_BKSD.shape[3]], float("nan"))
    place = torch.tensor([length])
    _put(keys_BKSD, key_scale_BKS, place, key_BTKD)
    _put(values_BKSD, value_scale_BKS, place, value_BTKD)
    keys_BKSD = dequantized(keys_BKSD[:, :, : length + 1], key_scale_BKS, qkv_BC.dtype)
    values_BKSD = dequantized(values_BKSD[:, :, : length + 1], value_scale_BKS, qkv_BC.dtype)
    counts_BS = None
    if valid_BS is not None:
        counts_BS = valid_BS[:, : length + 1].clone()
        counts_BS[:, length] = True
        counts_BS = counts_BS[:, None, None]
    out_BHTD = torch.nn.functional.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        keys_BKSD.repeat_interleave(heads // kv_heads, 1),
        values_BKSD.repeat_interleave(heads // kv_heads, 1),
        attn_mask=counts_BS,
        scale=scaling,
    )
    return out_BHTD.reshape(batch, -1)


def reserve_workspaces(device: torch.device) -> None:
    """Of ``attend_token`` on a GPU; see `finescale.kernels.workspace`."""
    if device.type == "cuda":
        from finescale.kernels.triton_softmax import WORKSPACES

        WORKSPACES.reserve(device)


def dequantized(cache_BKSD: Tensor, scale_BKS: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values of a cache in ``dtype``; those of a cache without scales as they are. S may be less than that of
    the scales."""
    if scale_BKS is None:
        return cache_BKSD
    return (cache_BKSD.float() * scale_BKS[:, :, : cache_BKSD.shape[2], None]).to(dtype)


def _put(cache_BKSD: Tensor, scale_BKS: Tensor | None, place_T: Tensor, x_BTKD: Tensor) -> None:
    x_BKTD = x_BTKD.transpose(1, 2)
    if scale_BKS is None:
        cache_BKSD[:, :, place_T] = x_BKTD
        return
    codes_BKTD, scale_BKT1 = quantize_tokens(x_BKTD, ActivationScheme(8))
    cache_BKSD[:, :, place_T], scale_BKS[:, :, place_T] = codes_BKTD, scale_BKT1[..., 0]


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
    key_scale_BKS: Tensor | None,
    value_scale_BKS: Tensor | None,
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
    gains = [gain for gain in (q_gain_D, k_gain_D) if gain is not None]
    scales = [scale for scale in (key_scale_BKS, value_scale_BKS) if scale is not None]
    typed = [qkv_BTC, cos_BTD, sin_BTD, *gains, *([] if scales else [keys_BKSD, values_BKSD])]
    given = [*typed, keys_BKSD, values_BKSD, *scales]
    if any(t.dtype != qkv_BTC.dtype for t in typed) or any(
        t.device != qkv_BTC.device or not t.is_contiguous() for t in given
    ):
        raise InputError("activations, tables, gains and cache must be contiguous, of one type and on one device.")
    if scales and (
        len(scales) < 2
        or any(s.dtype != torch.float32 or s.shape != keys_BKSD.shape[:3] for s in scales)
        or any(t.dtype != torch.int8 for t in (keys_BKSD, values_BKSD))
    ):
        raise InputError(f"a rounded cache is int8 with scales of keys and values, float32 {[*keys_BKSD.shape[:3]]}.")
    if len(gains) == 1 or any(gain.shape != (width,) for gain in gains):
        raise InputError(f"gains of queries and keys must both be [{width}], or None.")
    if slot.numel() != 1 or slot.dtype != torch.int64 or slot.device != qkv_BTC.device:
        raise InputError("the slot must be one int64 number on the device of the activations.")
