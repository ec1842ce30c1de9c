"""What the Hopper kernels compute, thread by thread on a CPU (emulator.h), against the exact product."""

import shutil

import pytest
import torch

from finescale.grid import ActivationScheme
from finescale.grid import quantize_tokens as to_codes
from finescale.kernels import layout
from finescale.kernels.gather import gather_table
from finescale.kernels.hopper import gemm, quantize
from finescale.kernels.hopper.gemm import Variant
from finescale.kernels.plain import before_rounding
from finescale.kernels.reference import grouped_int32_product
from tests.kernels import emulator
from tests.kernels.test_gather import exactly_normed, random_gather

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


PRODUCTS = [
    (Variant(16, 1, 1, True, 0), 21, 136, 384, 3),
    (Variant(16, 1, 1, True, 0, cluster=2), 21, 136, 384, 4),
    (Variant(8, 1, 2, False, 0), 5, 100, 256, 4),
]
MORE_PRODUCTS = [
    (Variant(16, 2, 1, True, 0), 30, 300, 384, 2),
    (Variant(16, 2, 1, False, 0, cluster=2), 40, 136, 256, 4),
    (Variant(32, 1, 1, True, 0, cluster=4), 27, 70, 640, 8),
    (Variant(16, 1, 1, False, 0, float_scales=True), 21, 136, 384, 3),
]


@pytest.mark.parametrize(
    "variant, tokens, outputs, inputs, multiprocessors",
    [*PRODUCTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_PRODUCTS)],
    ids=str,
)
def test_equals_the_exact_product(variant, tokens, outputs, inputs, multiprocessors, monkeypatch):
    emulator.emulate(monkeypatch, multiprocessors)
    torch.manual_seed(0)
    size = 128 // variant.groups
    codes_OI = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scale_OG = torch.randint(1, 16, (outputs, inputs // size), dtype=torch.int32)
    bits_OG = scale_OG.bfloat16().view(torch.int16).int() if variant.float_scales else scale_OG
    x_TI = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    x_scale_T, bias_O, own_O = torch.rand(tokens) + 0.5, torch.randn(outputs), torch.rand(outputs)
    packed, packed_x = layout.pack_weight(codes_OI, bits_OG, size), layout.pack_tokens(x_TI)
    sums_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, size)
    expected_TO = (sums_TO.float() * (x_scale_T[:, None] / 1024) * own_O + bias_O).bfloat16()
    for emulator.seed in range(2):
        out_TO = gemm.run(
            packed_x, x_scale_T, x_TI.sum(1, dtype=torch.int32), packed, tokens, outputs, 1024, bias_O, torch.bfloat16,
            variant.folded, variant, own_O,
        )  # fmt: skip
        assert torch.equal(out_TO, expected_TO), (out_TO != expected_TO).nonzero()[:10]


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("rms", torch.bfloat16),
        *(
            pytest.param(kind, dtype, marks=pytest.mark.slow)
            for kind in ("plain", "layer", "silu", "rms")
            for dtype in (torch.bfloat16, torch.float32)
            if (kind, dtype) != ("rms", torch.bfloat16)
        ),
    ],
)
@pytest.mark.parametrize("tokens, inputs", [(2, 72), (9, 264), (9, 1032), (7, 77)])
def test_quantizers(kind, tokens, inputs, dtype, monkeypatch):
    """Two multiprocessors: bulk copies bring nine tokens, to one or two warps; seven (odd width) and two are loaded."""
    emulator.emulate(monkeypatch, 2)
    torch.manual_seed(0)
    norm = kind in ("rms", "layer")
    y_TI = exactly_normed(tokens, inputs) if norm and inputs % 8 == 0 else torch.randn(tokens, inputs)
    y_TI = y_TI.to(dtype)
    residual_TI = torch.randint(-1, 2, (tokens, inputs)).to(dtype) if norm else None
    x_TI = y_TI if residual_TI is None else y_TI - residual_TI
    gain_I = torch.randn(inputs).to(dtype) if norm else None
    if kind == "silu":
        x_TI = torch.cat([y_TI, torch.randn(tokens, inputs).to(dtype)], 1)
    added_TI = None if residual_TI is None else residual_TI.clone()
    expected_TI = before_rounding(x_TI, kind, None if residual_TI is None else residual_TI.clone(), gain_I, None, 0.0)
    codes_TI, scale_T1 = to_codes(expected_TI, ActivationScheme(8))
    packed, scale_T, sum_T = quantize.run(x_TI, kind, added_TI, gain_I, None, 0.0)
    got_TI = layout.unpack_tokens(packed, tokens, inputs)
    assert torch.equal(sum_T, got_TI.sum(1, dtype=torch.int32))
    assert added_TI is None or torch.equal(added_TI, residual_TI + x_TI)
    if kind == "plain" or (norm and inputs % 8 == 0 and dtype == torch.bfloat16):
        assert torch.equal(scale_T, scale_T1[:, 0]) and torch.equal(got_TI, codes_TI)
    else:  # sums in another order, or another exponential
        torch.testing.assert_close(scale_T, scale_T1[:, 0], rtol=0.01, atol=0)
        assert int((got_TI.int() - codes_TI.int()).abs().max()) <= 1


@pytest.mark.parametrize("tokens, inputs", [(9, 1032), (7, 77)])
def test_variances_far_from_zero(tokens, inputs, monkeypatch):
    """Means a thousand times the distances from them, and one value a thousand times the others, a thread's first."""
    emulator.emulate(monkeypatch, 2)
    torch.manual_seed(0)
    x_TI = torch.randn(tokens, inputs)
    x_TI[::2] += 1000
    x_TI[1::2, 8] = 1000
    y_TI = torch.nn.functional.layer_norm(x_TI.double(), (inputs,), eps=1e-5)
    packed, scale_T, _ = quantize.run(x_TI, "layer", None, torch.ones(inputs), None, 1e-5)
    torch.testing.assert_close(scale_T.double(), y_TI.abs().amax(1) / 127, rtol=2e-4, atol=0)
    error_TI = layout.unpack_tokens(packed, tokens, inputs) * scale_T[:, None] - y_TI
    assert (error_TI.abs() <= 0.51 * scale_T[:, None]).all()


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 7), pytest.param(torch.float16, 10, marks=pytest.mark.slow)])
def test_every_quotient_is_rounded_as_by_a_division(dtype, bits, monkeypatch):
    """Tokens of each significand of the largest value (of float16, those whose scale is exact, and others), values of
    every significand or some, among them half of the largest."""
    emulator.emulate(monkeypatch, 2)
    of_largest_T = torch.arange(2**bits) / 2**bits + 1
    if bits == 10:
        of_largest_T = torch.cat([of_largest_T[::97], torch.arange(9, 16) * 127 / 1024])
    powers = 2.0 ** torch.arange(0, -10, -1)
    value_I = ((torch.arange(2**bits) / 2**bits + 1)[:: 1 if bits == 7 else 13] * powers[:, None]).flatten()
    x_TI = torch.where(value_I <= of_largest_T[:, None], value_I, of_largest_T[:, None] / 2)
    x_TI = torch.cat([of_largest_T[:, None], of_largest_T[:, None] / 2, x_TI], 1)
    x_TI = torch.nn.functional.pad(x_TI, (0, -x_TI.shape[1] % 8)).to(dtype)
    assert torch.equal(x_TI[:, 0].float(), of_largest_T)
    codes_TI, scale_T1 = to_codes(x_TI, ActivationScheme(8))
    packed, scale_T, _ = quantize.run(x_TI)
    assert torch.equal(scale_T, scale_T1[:, 0])
    assert torch.equal(layout.unpack_tokens(packed, *x_TI.shape), codes_TI)


@pytest.mark.slow
@pytest.mark.parametrize("tokens, inputs, channels", [(3, 72, 90), (9, 264, 200), (9, 1032, 1100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "rms"])
def test_gathers(kind, tokens, inputs, channels, dtype, monkeypatch):
    emulator.emulate(monkeypatch, 2)
    gather = random_gather(inputs, channels, 3)
    y_TI = (torch.randn(tokens, inputs) if kind == "plain" else exactly_normed(tokens, inputs)).to(dtype)
    residual_TI = None if kind == "plain" else torch.randint(-1, 2, (tokens, inputs)).to(dtype)
    gain_I = None if kind == "plain" else torch.randn(inputs).to(dtype)
    x_TI = y_TI if residual_TI is None else y_TI - residual_TI
    expected_TJ = gather.apply(y_TI if gain_I is None else y_TI * gain_I)
    codes_TJ, scale_T1 = to_codes(expected_TJ, ActivationScheme(8))
    table = gather_table(gather)
    packed, scale_T, sum_T = quantize.run(x_TI, kind, residual_TI, gain_I, None, 0.0, gather=table)
    assert torch.equal(layout.unpack_tokens(packed, tokens, channels), codes_TJ)
    assert torch.equal(scale_T, scale_T1[:, 0]) and torch.equal(sum_T, codes_TJ.sum(1, dtype=torch.int32))
    assert residual_TI is None or torch.equal(residual_TI, y_TI)
