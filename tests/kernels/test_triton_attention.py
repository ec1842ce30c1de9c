"""Forms of attention of one token that the usual tiles do not take: on a GPU, or anywhere in triton's interpreter
(TRITON_INTERPRET=1)."""

import os
from importlib.util import find_spec

import pytest
import torch

from finescale.kernels.attention import attend_token

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
if find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs triton, and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from finescale.kernels.triton_attention import attend  # noqa: E402
from finescale.kernels.triton_softmax import Tiles  # noqa: E402

CASES = [  # query heads per head of keys, heads of keys, channels, sequences, slots
    (1, 4, 32, 2, 200),
    (1, 2, 128, 1, 700),
    (2, 2, 16, 1, 70),
]
FORMS = [Tiles(16, 64, 4, 1, True), Tiles(64, 8, 4, 1, True), Tiles(32, 16, 2, 1, True), Tiles(64, 64, 4, 2)]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tiles", FORMS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms(case, tiles, masked, rounded):
    group, kv_heads, width, batch, slots = case
    for length in (0, 63, slots - 1):
        g = torch.Generator().manual_seed(length)
        heads = group * kv_heads
        qkv_BC = torch.randn(batch, (heads + 2 * kv_heads) * width, generator=g)
        angle = torch.randn(1, width // 2, generator=g).repeat(1, 2)
        cache = [torch.randn(batch, kv_heads, slots, width, generator=g) for _ in range(2)]
        scales = [None, None]
        if rounded:
            cache = [(20 * x).round().clamp(-127, 127).to(torch.int8) for x in cache]
            scales = [torch.rand(batch, kv_heads, slots, generator=g) / 20 for _ in range(2)]
        valid = torch.rand(batch, slots, generator=g) < 0.7 if masked else None
        given = [
            qkv_BC,
            angle.cos(),
            angle.sin(),
            None,
            None,
            0.0,
            heads,
            kv_heads,
            *cache,
            torch.tensor(length),
            valid,
        ]
        there = [x.to(DEVICE, copy=True) if isinstance(x, torch.Tensor) else x for x in [*given, 0.3, *scales]]
        want = attend_token(*given, 0.3, *scales)
        for settled in (False, True):
            got = attend(*there, settled, tiles)
            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(there[8:10], cache, strict=True):
            step = 1 if rounded else 1e-5  # codes of a rotation that is rounded otherwise
            torch.testing.assert_close(mine.cpu().float(), theirs.float(), rtol=0, atol=step)
