"""Rotary embedding, cache, attention of one token: plain torch against transformers, the GPU kernels against both."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from finescale.errors import InputError
from finescale.grid import ActivationScheme, fake_quantize_tokens, quantize_tokens
from finescale.kernels.attention import attend_token, dequantized, rotate_heads
from finescale.kernels.plain import rms_norm

GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
CASES = [  # query heads per head of keys, heads of keys, channels, sequences, slots, norm of heads, own tables
    (1, 4, 32, 2, 200, False, False),
    (4, 2, 64, 3, 300, True, True),
    (2, 2, 16, 1, 70, True, False),
    (1, 2, 128, 1, 1100, False, True),
    (8, 4, 128, 5, 520, True, True),
]


def make(group, kv_heads, width, batch, slots, normed, own, tokens=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    heads = group * kv_heads
    qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * width, generator=g).to(dtype)
    angle = torch.randn(batch if own else 1, tokens, width // 2, generator=g).repeat(1, 1, 2)
    gains = [torch.randn(width, generator=g).to(dtype) if normed else None for _ in range(2)]
    cache = [torch.randn(batch, kv_heads, slots, width, generator=g).to(dtype) for _ in range(2)]
    return [qkv, angle.cos().to(dtype), angle.sin().to(dtype), *gains, 1e-5, heads, kv_heads], cache


def expected_heads(facts):
    """Queries, keys, values [B, heads, T, D] by transformers' own functions."""
    qkv, cos, sin, q_gain, k_gain, epsilon, heads, kv_heads = facts
    split = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 2)
    query, key, value = split
    if q_gain is not None:
        query, key = rms_norm(query, q_gain, epsilon), rms_norm(key, k_gain, epsilon)
    rotated = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return *rotated, value.transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("start", [0, 7, "last"])
def test_rotate(case, start, device="cpu", dtype=torch.float32):
    facts, cache = make(*case, tokens=5, dtype=dtype)
    slots = case[4]
    start = slots - 3 if start == "last" else start  # two tokens find no room
    query, key, value = expected_heads(facts)
    want = [tensor.clone() for tensor in cache]
    count = min(5, slots - start)
    want[0][:, :, start : start + count], want[1][:, :, start : start + count] = key[:, :, :count], value[:, :, :count]
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in facts]
    cache = [tensor.to(device) for tensor in cache]
    got = rotate_heads(*there, *cache, torch.tensor(start, device=device))
    close(got.transpose(1, 2), query, dtype)
    close(cache[0], want[0], dtype)
    assert torch.equal(cache[1].cpu(), want[1])


def close(got, want, dtype):
    """A few roundings apart; a norm adds in another order, and a score that differs by a rounding moves all weights."""
    step = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=step, atol=step)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend(case, masked, device="cpu", dtype=torch.float32):
    slots = case[4]
    for length in (0, 1, 63, 64, slots - 1):
        facts, cache = make(*case, dtype=dtype, seed=length)
        valid = torch.rand(case[3], slots, generator=torch.Generator().manual_seed(length)) < 0.7 if masked else None
        if masked:
            valid[0] = False  # nothing but the token itself
        query, key, value = expected_heads(facts)
        keys, values = (tensor.clone() for tensor in cache)
        keys[:, :, length], values[:, :, length] = key[:, :, 0], value[:, :, 0]
        group = case[0]
        scores = (
            query.double()
            @ keys[:, :, : length + 1].repeat_interleave(group, 1).double().transpose(2, 3)
            * case[2] ** -0.5
        )
        if masked:
            counts = valid[:, : length + 1].clone()
            counts[:, length] = True
            scores = scores.masked_fill(~counts[:, None, None], float("-inf"))
        want = scores.softmax(-1) @ values[:, :, : length + 1].repeat_interleave(group, 1).double()
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in facts]
        there = [x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in there]
        cache = [tensor.to(device) for tensor in cache]
        valid = valid if valid is None else valid.to(device)
        for _ in range(2):  # the second time finds the same key there, and what the first left in the workspace
            got = attend_token(*there, *cache, torch.tensor(length, device=device), valid, case[2] ** -0.5)
            close(got, want.reshape(got.shape), dtype)
            close(cache[0], keys, dtype)
            assert torch.equal(cache[1].cpu(), values)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case, dtype):
    for start in (0, 7, "last"):
        test_rotate(case, start, "cuda", dtype)
    for masked in (False, True):
        test_attend(case, masked, "cuda", dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
def test_a_token_without_a_slot_is_not_a_number(device):
    facts, cache = make(*CASES[0])
    before = [tensor.clone() for tensor in cache]
    there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in facts]
    there = [x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in there]
    cache = [tensor.to(device) for tensor in cache]
    out = attend_token(*there, *cache, torch.tensor(200, device=device), None, 0.3)
    assert out.isnan().all() and all(torch.equal(a.cpu(), b) for a, b in zip(cache, before, strict=True))


def test_what_does_not_fit_is_refused():
    facts, cache = make(*CASES[0])
    slot = torch.tensor(0)
    with pytest.raises(InputError, match="do not fit a cache"):
        rotate_heads(*facts[:-2], 3, 4, *cache, slot)
    with pytest.raises(InputError, match="cos"):
        rotate_heads(facts[0], facts[1][:, :, 1:], *facts[2:], *cache, slot)
    with pytest.raises(InputError, match="one type"):
        rotate_heads(facts[0].double(), *facts[1:], *cache, slot)
    with pytest.raises(InputError, match="slot"):
        rotate_heads(*facts, *cache, torch.tensor(0.0))
    one = [x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in facts]
    with pytest.raises(InputError, match="valid"):
        attend_token(*one, *cache, slot, torch.ones(2, 3, dtype=torch.bool), 0.3)


def rounded(cache):
    """Codes of a cache, and the scales of its keys and values."""
    pairs = [quantize_tokens(tensor, ActivationScheme(8)) for tensor in cache]
    return [codes for codes, _ in pairs], [scale[..., 0].contiguous() for _, scale in pairs]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rounded_cache_is_a_cache_of_rounded_values(case, device="cpu", dtype=torch.float32):
    for length in (0, 64, case[4] - 1):
        facts, cache = make(*case, dtype=dtype, seed=length)
        (query, key, value), slots = expected_heads(facts), case[4]
        codes, scales = rounded(cache)
        tensors = [x for pair in zip(codes, scales, strict=True) for x in pair]
        keys, key_scale, values, value_scale = (tensor.to(device) for tensor in tensors)
        at = torch.tensor(length, device=device)
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in facts]
        one = [x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in there]
        got = attend_token(*one, keys, values, at, None, case[2] ** -0.5, key_scale, value_scale)
        want = []
        for tensor, new in ((cache[0], key), (cache[1], value)):
            tensor[:, :, length] = new[:, :, 0]
            want.append(fake_quantize_tokens(tensor[:, :, : length + 1].float(), ActivationScheme(8)).double())
        want = [tensor.repeat_interleave(case[0], 1) for tensor in want]
        scores = query.double() @ want[0].transpose(2, 3) * case[2] ** -0.5
        close(got, (scores.softmax(-1) @ want[1]).reshape(got.shape), dtype)
        # Several tokens, of which two find no room, and what was there before.
        facts, _ = make(*case, tokens=5, dtype=dtype, seed=length + 1)
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in facts]
        start = slots - 3
        rotate_heads(*there, keys, values, torch.tensor(start, device=device), key_scale, value_scale)
        new_codes, new_scales = rounded(expected_heads(facts)[1:])
        for codes, new, scale, new_scale in zip(
            (keys, values), new_codes, (key_scale, value_scale), new_scales, strict=True
        ):
            # What is rounded may differ by a rounding of its type, and codes by one then.
            there_BKSD, want_BKSD = dequantized(codes, scale, torch.float32), dequantized(new, new_scale, torch.float32)
            step = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
            code = 0.0 if dtype == torch.float32 else 1.01 * float(new_scale.max())
            torch.testing.assert_close(there_BKSD[:, :, start:].cpu(), want_BKSD[:, :, :3], rtol=step, atol=step + code)
            assert codes[:, :, start:].abs().amax(-1).eq(127).all()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_of_a_rounded_cache(case, dtype):
    test_a_rounded_cache_is_a_cache_of_rounded_values(case, "cuda", dtype)


def test_a_rounded_cache_needs_both_scales():
    facts, cache = make(*CASES[0])
    one = [x[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in facts]
    codes, scales = rounded(cache)
    for wrong in ((scales[0], None), (scales[0], scales[1][:, :, :-1]), (None, None)):
        with pytest.raises(InputError, match=r"a rounded cache|one type"):
            attend_token(*one, *codes, torch.tensor(3), None, 0.3, *wrong)
    with pytest.raises(InputError, match="a rounded cache"):
        attend_token(*one, *cache, torch.tensor(3), None, 0.3, *scales)
