"""vLLM's rotary embedding, stood in for by a class of the same members."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from finescale.runtime.vllm_rotary import RotaryIntoCache, fits, keep_table_wide, rotate_on_the_way

WIDTH = 8
SEEN = []


class Rotary(nn.Module):
    """As vLLM 0.20 has it: the kernel converts the table that it is given to float32."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.head_size, self.is_neox_style, self.use_flashinfer = WIDTH, True, False
        angle = torch.randn(16, WIDTH // 2)
        self.register_buffer("cos_sin_cache", torch.cat((angle.cos(), angle.sin()), -1).to(dtype))
        self._forward_method = self.forward_cuda
        self.tables = []

    def _match_cos_sin_cache_dtype(self, query):
        return self.cos_sin_cache

    def forward_cuda(self, positions, query, key=None):
        cos, sin = self.rotation(positions, self._match_cos_sin_cache_dtype(query))
        for x in (query, key):
            first, second = x.view(len(x), -1, WIDTH).chunk(2, -1)
            first, second = first.float(), second.float()
            x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1).view(x.shape))
        return query, key

    @staticmethod
    def rotation(positions, table):
        SEEN.append(table.dtype)
        cos, sin = table[positions].float()[:, None].chunk(2, -1)
        return cos, sin

    def forward(self, positions, query, key):
        return self._forward_method(positions, query, key)


def test_the_table_is_converted_once():
    torch.manual_seed(0)
    rotary = Rotary()
    tokens = [torch.randn(3, 2 * WIDTH).bfloat16() for _ in range(2)]
    want = rotary(torch.tensor([3, 9, 15]), *[x.clone() for x in tokens])
    keep_table_wide(rotary)
    SEEN.clear()
    got = rotary(torch.tensor([3, 9, 15]), *[x.clone() for x in tokens])
    assert [torch.float32] == SEEN
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    kept = rotary._forward_method
    keep_table_wide(rotary)  # layers share it
    assert rotary._forward_method is kept


class Narrow(Rotary):
    @staticmethod
    def rotation(positions, table):
        if table.dtype != torch.bfloat16:
            raise RuntimeError("query and table must have the same type")
        return Rotary.rotation(positions, table)


class Other(Rotary):
    @staticmethod
    def rotation(positions, table):
        cos, sin = Rotary.rotation(positions, table)
        return (cos if table.dtype == torch.bfloat16 else -cos), sin


class Native(Rotary):
    def __init__(self):
        super().__init__()
        self._forward_method = self.forward_native

    def forward_native(self, positions, query, key=None):
        return query, key


@pytest.mark.parametrize("make", [Native, lambda: Rotary(torch.float32), nn.Identity, lambda: None], ids=str)
def test_what_computes_otherwise_is_left_alone(make):
    rotary = make()
    before = getattr(rotary, "_forward_method", None)
    keep_table_wide(rotary)
    assert getattr(rotary, "_forward_method", None) == before


@pytest.mark.parametrize("kind", [Narrow, Other])
def test_another_result_is_not_taken(kind):
    rotary = kind()
    keep_table_wide(rotary)
    assert rotary._forward_method == rotary.forward_cuda


@pytest.fixture
def engine(monkeypatch):
    """Stand-ins of vLLM's forward context and of the kernel; what they were asked for."""
    found = SimpleNamespace(slots={}, calls=[], usual=[], metadata=None)
    context, kernel = ModuleType("vllm.forward_context"), ModuleType("rotate")
    context.get_forward_context = lambda: SimpleNamespace(slot_mapping=found.slots, attn_metadata=found.metadata)
    kernel.rotate_into_pages = lambda *arguments: found.calls.append(arguments)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    monkeypatch.setitem(sys.modules, "finescale.kernels.hopper.rotate", kernel)
    found.attention = SimpleNamespace(
        layer_name="layer", impl=SimpleNamespace(do_kv_cache_update=lambda *arguments: found.usual.append(arguments))
    )
    return found


def test_the_update_of_the_cache_rotates(engine):
    rotary = Rotary()
    stand_in = RotaryIntoCache(rotary, engine.attention)
    engine.slots = {"layer": torch.tensor([5, 7, -1])}
    positions, query, key = torch.arange(3), torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    before = query.clone()
    assert stand_in(positions, query, key)[0] is query and torch.equal(query, before)
    heads, cache = key.view(3, 2, WIDTH), torch.zeros(2, 4, 2, 2, WIDTH).bfloat16()
    engine.attention.impl.do_kv_cache_update(None, heads, heads, cache, engine.slots["layer"])
    (found,) = engine.calls
    assert found[0] is positions and found[2] is query and found[3] is heads and found[7] is engine.slots["layer"]
    assert torch.equal(found[1], rotary.cos_sin_cache.float()) and found[5].shape == (4, 2, 2, WIDTH)
    assert not engine.usual and "attention" not in dict(stand_in.named_modules())
    # Without a rotation before it, an update is the usual one.
    engine.attention.impl.do_kv_cache_update(None, heads, heads, cache, engine.slots["layer"])
    assert len(engine.usual) == 1 and len(engine.calls) == 1


@pytest.mark.parametrize("slots", [None, {}, {"other": torch.tensor([1])}, {"layer": None}, "traced"])
def test_without_a_cache_or_traced_it_rotates_at_once(engine, slots, monkeypatch):
    rotary = Rotary()
    if slots == "traced":
        slots = {"layer": torch.tensor([5, 7, -1])}
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    stand_in, engine.slots = RotaryIntoCache(rotary, engine.attention), slots
    tokens = [torch.randn(3, 16).bfloat16() for _ in range(2)]
    want = rotary(torch.arange(3), *[x.clone() for x in tokens])
    got = stand_in(torch.arange(3), *[x.clone() for x in tokens])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    engine.attention.impl.do_kv_cache_update(None, None, None, None, None)
    assert engine.usual and not engine.calls


def test_a_decoding_step_is_left_to_its_attention(engine):
    left = []
    decoding = SimpleNamespace(takes=lambda metadata, tokens: metadata == "decoding" and tokens == 3, leave=left.append)
    rotary = Rotary()
    stand_in = RotaryIntoCache(rotary, engine.attention, decoding)
    engine.slots = {"layer": torch.tensor([5, 7, -1])}
    positions, query, key = torch.arange(3), torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    for metadata in ({"layer": "decoding"}, {"layer": "prompts"}, {"other": "decoding"}, None):
        engine.metadata = metadata
        stand_in(positions, query, key)
        engine.attention.impl.do_kv_cache_update(
            None, key.view(3, 2, WIDTH), None, torch.zeros(2, 4), engine.slots["layer"]
        )
    (found,) = left
    assert found.positions_T is positions and found.slot_T is engine.slots["layer"] and len(engine.calls) == 3
    assert torch.equal(found.table_PD, rotary.cos_sin_cache.float()) and not engine.usual


def test_nothing_is_replaced_where_it_does_not_fit():
    rotary, attention = Rotary(), SimpleNamespace(impl=SimpleNamespace())
    assert not fits(rotary, attention) and not fits(None, None)
    parent = SimpleNamespace(rotary_emb=rotary, attn=attention)
    rotate_on_the_way(parent)
    assert parent.rotary_emb is rotary
