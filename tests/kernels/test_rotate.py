"""Rotary embedding into a paged cache: the kernel thread by thread on a CPU, and on a Hopper GPU."""

import shutil

import pytest
import torch

from finescale.errors import InputError
from finescale.kernels.hopper import rotate
from finescale.kernels.hopper.rotate import rotate_into_pages
from tests.kernels import emulator

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]),
]
CASES = [  # tokens, heads, heads of keys, channels, tokens without a slot at the end
    (5, 8, 8, 64, 1),
    (3, 8, 2, 128, 0),
    (33, 32, 32, 128, 2),
    (4, 14, 2, 32, 0),
]
PAGES, SLOTS = 8, 16


def made(tokens, heads, kv_heads, width, without, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv_TC = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
    angle = torch.randn(64, width // 2, generator=generator)
    table = torch.cat((angle.cos(), angle.sin()), -1).to(dtype).float()
    positions = torch.randint(0, 64, (tokens,), generator=generator)
    slots = torch.randperm(PAGES * SLOTS, generator=generator)[: tokens - without]
    slots[0] = -1
    return qkv_TC, table, positions, slots


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where the kernel runs."""
    if request.param == "cpu":
        monkeypatch.setattr(rotate, "load_kernel", emulator.load_kernel)
        monkeypatch.setattr(rotate, "launch", emulator.launch)
        rotate._kernel.cache_clear()
        request.addfinalizer(rotate._kernel.cache_clear)
    return request.param


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotates_and_stores(case, dtype, heads_first, device):
    tokens, heads, kv_heads, width, _ = case
    qkv_TC, table, positions, slots = made(*case, dtype)
    shape = (2, PAGES, kv_heads, SLOTS, width) if heads_first else (2, PAGES, SLOTS, kv_heads, width)
    cache = torch.zeros(shape, dtype=dtype)
    cache = cache.transpose(2, 3) if heads_first else cache
    used = len(slots)
    want_THD, want_cache = qkv_TC.view(tokens, -1, width).clone(), cache.clone()
    first, second = want_THD[:used, : heads + kv_heads].float().chunk(2, -1)
    cos, sin = table[positions[:used]][:, None].chunk(2, -1)
    want_THD[:used, : heads + kv_heads] = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(
        dtype
    )
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want_cache[0, slot // SLOTS, slot % SLOTS] = want_THD[t, heads : heads + kv_heads]
            want_cache[1, slot // SLOTS, slot % SLOTS] = want_THD[t, heads + kv_heads :]
    qkv, there = qkv_TC.to(device), cache.to(device)
    query, key, value = qkv.split([heads * width, kv_heads * width, kv_heads * width], -1)
    key, value = key.view(-1, kv_heads, width), value.view(-1, kv_heads, width)
    rotate_into_pages(positions.to(device), table.to(device), query, key, value, *there.unbind(0), slots.to(device))
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    torch.testing.assert_close(qkv.cpu().view(want_THD.shape), want_THD, rtol=step, atol=step)
    torch.testing.assert_close(there.cpu(), want_cache, rtol=step, atol=step)
    assert torch.equal(qkv.cpu()[used:], qkv_TC[used:])


def test_refusals(device):
    qkv_TC, table, positions, slots = (x.to(device) for x in made(*CASES[0], torch.float16))
    query, key, value = (x.unflatten(-1, (8, 64)) for x in qkv_TC.split(512, -1))
    cache = torch.zeros(2, PAGES, SLOTS, 8, 64, dtype=torch.float16, device=device)
    for query_TC, some_table, some_cache, some_slots in (
        (query.flatten(1).float(), table, cache, slots),
        (query.flatten(1), table.half(), cache, slots),
        (query.flatten(1), table[:, :32].contiguous(), cache, slots),
        (query.flatten(1), table, cache[:, :, :, :4], slots),
        (query.flatten(1), table, cache, slots.repeat(3)),
        (qkv_TC[:, 4:516], table, cache, slots),
    ):
        with pytest.raises(InputError):
            rotate_into_pages(positions, some_table, query_TC, key, value, *some_cache.unbind(0), some_slots)
