"""QLLM's gather inside the kernel that rounds, against the gather and the rounding one after the other."""

import pytest
import torch

from finescale.errors import InputError
from finescale.grid import ActivationScheme, Gather
from finescale.grid import quantize_tokens as to_codes
from finescale.kernels import layout
from finescale.kernels.gather import apply, gather_table, quantize_gathered
from finescale.kernels.plain import before_rounding

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
)  # fmt: skip


def random_gather(inputs, channels, terms, seed=0):
    """Every channel from one to ``terms`` inputs; few from more than one."""
    generator = torch.Generator().manual_seed(seed)
    index_KJ = torch.randint(0, inputs, (terms, channels), generator=generator)
    gain_KJ = torch.rand(terms, channels, generator=generator) + 0.1
    for k in range(1, terms):
        gain_KJ[k] *= torch.rand(channels, generator=generator) < 0.1 / k
    return Gather(index_KJ, gain_KJ)


def exactly_normed(tokens, inputs, seed=0):
    """Rows whose mean is 0 and mean square 1 in any order of adding: every norm of them is exact."""
    generator = torch.Generator().manual_seed(seed)
    row_I = torch.zeros(inputs)
    row_I[: inputs // 8], row_I[inputs // 8 : inputs // 4] = 2, -2
    return torch.stack([row_I[torch.randperm(inputs, generator=generator)] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs, channels, terms", [(64, 64, 1), (100, 131, 4), (300, 257, 3)])
def test_the_table_is_the_gather(inputs, channels, terms, dtype):
    gather = random_gather(inputs, channels, terms)
    x_TI = torch.randn(5, inputs).to(dtype)
    assert torch.equal(apply(gather_table(gather), x_TI), gather.apply(x_TI))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, inputs, channels, terms", [(1, 64, 70, 2), (7, 1000, 1200, 4), (3, 4096, 4096, 2), (300, 1024, 900, 3)]
)
def test_equals_gather_then_rounding(tokens, inputs, channels, terms, dtype, device):
    torch.manual_seed(tokens)
    gather = random_gather(inputs, channels, terms)
    gather = Gather(gather.index_KJ.to(device), gather.gain_KJ.to(device))
    table = gather_table(gather)
    gain_I = torch.randn(inputs).to(device, dtype)
    residual_TI = torch.randint(-1, 2, (tokens, inputs)).to(device, dtype)
    for kind in ("plain", "rms", "layer"):
        normed = kind != "plain"
        # Where the norm leaves rows as they are, only its gain is left to be rounded.
        y_TI = (exactly_normed(tokens, inputs) if normed else torch.randn(tokens, inputs)).to(device, dtype)
        expected_TI = y_TI * gain_I if normed else y_TI
        other_TI = residual_TI.clone() if normed else None
        x_TI = y_TI if other_TI is None else y_TI - other_TI
        arguments = (gain_I, None, 0.0) if normed else (None, None, 0.0)
        if device == "cpu" and normed:  # torch's own norm, which is not always exact
            expected_TI = before_rounding(x_TI, kind, residual_TI.clone(), *arguments)
        codes_TJ, scale_T1 = to_codes(gather.apply(expected_TI), ActivationScheme(8))
        packed, scale_T, sum_T = quantize_gathered(x_TI, kind, other_TI, *arguments, *table.tensors())
        got_TJ = layout.unpack_tokens(packed, tokens, channels)
        if kind == "layer" and dtype == torch.float32 and device == "cuda":  # means of threads are not exact in the end
            torch.testing.assert_close(scale_T, scale_T1[:, 0], rtol=1e-6, atol=0)
            assert int((got_TJ.int() - codes_TJ.int()).abs().max()) <= 1
        else:
            assert torch.equal(scale_T, scale_T1[:, 0]), kind
            assert torch.equal(got_TJ, codes_TJ), kind
        assert torch.equal(sum_T, codes_TJ.sum(1, dtype=torch.int32)), kind
        padded_TJ = layout.unpack_tokens(packed, tokens, packed.shape[0] * 128)
        assert not padded_TJ[:, channels:].any(), kind  # what the product multiplies with weights of zero


def test_what_does_not_fit_is_refused():
    table = gather_table(random_gather(64, 64, 2))
    with pytest.raises(InputError, match="65536"):
        gather_table(Gather(torch.tensor([[70000]]), torch.ones(1, 1)))
    assert table.more_start_P.shape == (9,) and int(table.more_start_P[-1]) == table.more_gain_M.shape[0]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_a_packed_layer_with_a_gather_is_one_kernel_and_a_product():
    from finescale.grid import InputRule, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid, with_folded_scales
    from finescale.runtime.modules import QuantizedLinear
    from finescale.runtime.packed import PackedLinear

    generator = torch.Generator().manual_seed(0)
    weight_OJ = 0.02 * torch.randn(200, 640, generator=generator)
    grid = with_folded_scales(fit_grid(weight_OJ, WeightScheme(4, 64, True, "mse"), torch.float16), weight_OJ)
    weight = QuantizedWeight(quantize_to_grid(weight_OJ, grid), grid)
    inputs = InputRule(ActivationScheme(8), gather=random_gather(512, 640, 3))
    packed = PackedLinear(weight, None, inputs, torch.device("cuda"))
    assert packed.gather is not None
    exact = QuantizedLinear(weight, None, inputs.to(torch.device("cuda")), "integer").to("cuda")
    x_TI = torch.randn(33, 512, generator=generator).cuda()
    torch.testing.assert_close(packed(x_TI), exact(x_TI), rtol=1e-6, atol=1e-6)
