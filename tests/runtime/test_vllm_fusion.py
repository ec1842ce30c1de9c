"""vLLM's rotary embedding, stood in for by a class of the same members."""

import pytest
import torch
from torch import nn

from finescale.runtime.vllm_fusion import keep_table_wide

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
