"""Attention to a paged cache: on a GPU, or anywhere in triton's interpreter (TRITON_INTERPRET=1)."""

import os
from importlib.util import find_spec

import pytest
import torch

from finescale.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs triton, and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from finescale.kernels.triton_page_attention import attend_pages, sharing  # noqa: E402
from finescale.kernels.triton_softmax import Tiles  # noqa: E402

SLOTS = 16
CASES = [  # heads, heads of keys, channels, lengths with the token itself
    (4, 4, 128, (1, 2, 33, 130)),
    (4, 4, 32, (64, 0, 65)),
    (8, 2, 64, (200, 16, 17, 1)),
    (3, 3, 16, (300,)),
]


def made(heads, kv_heads, width, lengths, dtype, heads_first=False):
    """Tokens, cache, pages in no order, and what attention to them is, in double precision."""
    g = torch.Generator().manual_seed(0)
    batch, most = len(lengths), max(lengths) // SLOTS + 2
    qkv_BC = torch.randn(batch, (heads + 2 * kv_heads) * width, generator=g).to(dtype)
    angle = torch.randn(512, width // 2, generator=g)
    table_PD = torch.cat((angle.cos(), angle.sin()), -1)
    pages_BM = torch.randperm(batch * most, generator=g).view(batch, most).int()
    shape = (2, batch * most, kv_heads, SLOTS, width) if heads_first else (2, batch * most, SLOTS, kv_heads, width)
    cache = torch.randn(shape, generator=g).to(dtype)
    return qkv_BC, table_PD, pages_BM, cache.transpose(2, 3) if heads_first else cache


def expected(qkv_BC, table_PD, pages_BM, cache, heads, kv_heads, width, lengths, positions):
    """Rotated heads, the cache with them, attention."""
    batch = len(lengths)
    qkv = qkv_BC.view(batch, -1, width).clone()
    first, second = qkv[:, : heads + kv_heads].float().chunk(2, -1)
    cos, sin = table_PD[positions][:, None].chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    qkv[:, : heads + kv_heads] = turned.to(qkv.dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
    want_cache, want = cache.clone(), torch.zeros(batch, heads, width, dtype=torch.double)
    for b, length in enumerate(lengths):
        keys, values = key[b][None], value[b][None]
        if length > 0:
            place = (pages_BM[b, (length - 1) // SLOTS], (length - 1) % SLOTS)
            want_cache[0][place], want_cache[1][place] = key[b], value[b]
            keys, values = (want_cache[i][pages_BM[b].long()].flatten(0, 1)[:length] for i in (0, 1))
        keys, values = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (keys, values))
        scores = torch.einsum("hd,nhd->hn", query[b].double(), keys) * width**-0.5
        want[b] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
    return query, key, value, want_cache, want.flatten(1)


@pytest.mark.parametrize(
    "tiles", [None, Tiles(16, 64, 4, 1, True), Tiles(16, 64, 4, 2), Tiles(32, 1, 2, 1, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attends(case, dtype, tiles, heads_first=False):
    heads, kv_heads, width, lengths = case
    qkv_BC, table_PD, pages_BM, cache = made(*case, dtype, heads_first)
    positions = torch.tensor([max(length - 1, 0) for length in lengths])
    query, key, value, want_cache, want = expected(
        qkv_BC, table_PD, pages_BM, cache, heads, kv_heads, width, lengths, positions
    )
    slots = [
        int(pages_BM[b, (n - 1) // SLOTS]) * SLOTS + (n - 1) % SLOTS if n > 0 else -1 for b, n in enumerate(lengths)
    ]
    facts = [x.to(DEVICE) for x in (pages_BM, torch.tensor(lengths).int())]
    rotary = [x.to(DEVICE) for x in (positions, table_PD, torch.tensor(slots))]
    raw = qkv_BC.to(DEVICE)
    split = raw.split([heads * width, kv_heads * width, kv_heads * width], -1)
    there, out = cache.to(DEVICE), torch.empty(len(lengths), heads * width, dtype=dtype, device=DEVICE)
    step = 2.0**-8 if dtype == torch.float16 else 2.0**-5
    own = [x.unflatten(-1, (kv_heads, width)) for x in split[1:]]
    for _ in range(2):  # the second time finds what the first left
        attend_pages(split[0], *own, *there.unbind(0), *facts, out, width**-0.5, rotary, tiles)
        torch.testing.assert_close(out.cpu().double(), want, rtol=step, atol=step)
        torch.testing.assert_close(there.cpu(), want_cache, rtol=step, atol=step)
    assert torch.equal(raw.cpu(), qkv_BC)
    # Rotated and stored already; a sequence without keys gives zeros.
    done = torch.cat((query, key, value), 1).flatten(1).to(DEVICE)
    split = done.split([heads * width, kv_heads * width, kv_heads * width], -1)
    own = [x.unflatten(-1, (kv_heads, width)) for x in split[1:]]
    attend_pages(split[0], *own, *want_cache.to(DEVICE).unbind(0), *facts, out, width**-0.5, None, tiles)
    want[torch.tensor(lengths) == 0] = 0.0
    torch.testing.assert_close(out.cpu().double(), want, rtol=step, atol=step)


def test_heads_may_come_first():
    test_attends(CASES[0], torch.float16, None, heads_first=True)


def test_parts_find_room():
    for pairs, capacity, group in (
        (1, 131072, 1),
        (32, 2304, 1),
        (512, 131072, 1),
        (4096, 131072, 8),
        (65536, 4096, 1),
    ):
        splits, least = sharing(pairs, capacity, group, 128, Tiles(32, 528, 4, 1, True))
        assert splits >= 1 and least in (32, 4096)
        assert splits == 1 or (pairs * splits * group * 130 <= 2**21 and pairs <= 2**14)
    assert sharing(4096, 2304, 1, 128, Tiles(32, 528, 4, 1, True))[0] == 1
    assert sharing(32, 2304, 1, 128, Tiles(32, 528, 4, 1, True)) == (17, 32)


def test_refusals():
    qkv_BC, table_PD, pages_BM, cache = (x.to(DEVICE) for x in made(*CASES[0], torch.float16))
    query, key, value = (x.unflatten(-1, (4, 128)) for x in qkv_BC.split(512, -1))
    lengths, out = torch.tensor([1, 2, 33, 130]).int().to(DEVICE), torch.empty_like(query.flatten(1))
    positions = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for q, some_cache, some_pages, some_lengths, some_out, rotary in (
        (query.flatten(1).float(), cache, pages_BM, lengths, out, None),
        (query.flatten(1), cache[:, :, :, :2], pages_BM, lengths, out, None),
        (query.flatten(1), cache, pages_BM[:2], lengths, out, None),
        (query.flatten(1), cache, pages_BM, lengths[:3], out, None),
        (query.flatten(1), cache, pages_BM, lengths, out[:, :100], None),
        (query.flatten(1), cache, pages_BM, lengths, out, (positions, table_PD.half(), positions)),
        (query.flatten(1), cache, pages_BM, lengths, out, (positions, table_PD, positions[:2])),
    ):
        with pytest.raises(InputError):
            attend_pages(q, key, value, *some_cache.unbind(0), some_pages, some_lengths, some_out, 1.0, rotary)
