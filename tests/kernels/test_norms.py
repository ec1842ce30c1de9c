"""Norms, silu * up and rotary tables: against transformers' own modules, on a CPU and by the GPU's kernels."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from finescale.errors import InputError
from finescale.kernels.norms import add_rms_norm, rotary_tables, silu_product

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width", [(1, 64), (5, 100), (3, 4096), (70, 1000)])
def test_norm(device, dtype, tokens, width):
    torch.manual_seed(width)
    norm = LlamaRMSNorm(width, 1e-5).to(device, dtype)
    norm.weight.data.normal_()
    x, residual = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    added = residual + x
    step = 1e-6 if dtype == torch.float32 else 1e-2  # a rounding of the norm before its gain
    torch.testing.assert_close(add_rms_norm(x, None, norm.weight.data, 1e-5), norm(x), rtol=step, atol=step)
    got = add_rms_norm(x, residual, norm.weight.data, 1e-5)
    torch.testing.assert_close(got, norm(added), rtol=step, atol=step)
    assert torch.equal(residual, added)


@pytest.mark.parametrize("device", DEVICES)
def test_silu(device):
    both = torch.randn(7, 2 * 1500, device=device).bfloat16()
    want = torch.nn.functional.silu(both[:, :1500]) * both[:, 1500:]
    torch.testing.assert_close(silu_product(both), want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_rotary_tables(device):
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=2)).to(device)
    position = torch.tensor([0, 1, 77, 4095, 100_000], device=device)
    for dtype, step in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        want = rotary(torch.empty(1, dtype=dtype, device=device), position[None])
        for got, table in zip(rotary_tables(position, rotary.inv_freq, 1.0, dtype), want, strict=True):
            torch.testing.assert_close(got, table[0], rtol=step, atol=step)
    once, twice = (rotary_tables(position, rotary.inv_freq, factor, dtype)[0] for factor in (1.0, 2.0))
    assert torch.equal(twice, 2 * once)


def test_refused():
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match="gain"):
        add_rms_norm(x, None, torch.ones(9), 1e-5)
    with pytest.raises(InputError, match="residual"):
        add_rms_norm(x, torch.randn(3, 8), torch.ones(8), 1e-5)
    with pytest.raises(InputError, match="gate and up"):
        silu_product(torch.randn(2, 7))
    with pytest.raises(InputError, match="positions"):
        rotary_tables(torch.zeros(3), torch.ones(4), 1.0, torch.float32)
