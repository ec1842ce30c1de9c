"""The CPU's int8 products against the exact product, bit for bit."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.grid import ActivationScheme, contiguous_groups, quantize_tokens
from finescale.kernels import cpu_int8, grouped_int32_product, integer_scale_linear
from finescale.kernels.cpu_int8 import CpuWeight, cpu_linear, int8_product_is_exact, pack_weight

pytestmark = pytest.mark.skipif(not int8_product_is_exact(), reason="needs int8 instructions that add in 32 bits")


def layer(outputs, inputs, group_size, bits=4, largest=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes_OI = torch.randint(-half, half, (outputs, inputs), generator=generator, dtype=torch.int8)
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    scale_OG = torch.randint(1, largest + 1, (outputs, groups), generator=generator, dtype=torch.int32)
    return codes_OI, scale_OG


def both_ways(codes_OI, scale_OG, group_of_I):
    """The layer as packed, and, where there are both ways, each of them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_int8, "SMALL_LAYER", 0)
        weight = pack_weight(codes_OI, scale_OG, group_of_I)
    if weight.codes_OI is None or weight.digit_DOI is None:
        return [weight]
    return [
        pack_weight(codes_OI, scale_OG, group_of_I),
        weight,
        weight._replace(digit_DOI=None),
        CpuWeight(None, None, None, weight.digit_DOI),
    ]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 70), st.sampled_from([-1, 1, 8, 13, 32]),
    st.sampled_from([(2, 20), (4, 15), (4, 500), (4, 32767), (8, 15), (8, 500), (8, 60000)]), st.integers(0, 1000),
)  # fmt: skip
def test_sums_equal_the_reference(tokens, outputs, inputs, group_size, bits_and_largest, seed):
    codes_OI, scale_OG = layer(outputs, inputs, group_size, *bits_and_largest, seed)
    x_TI = torch.randint(-127, 128, (tokens, inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    x_TI = torch.cat([x_TI, 127 * codes_OI.sign(), -127 * codes_OI.sign()])  # the tokens that reach the bound
    expected_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, group_size)
    for weight in both_ways(codes_OI, scale_OG, contiguous_groups(inputs, group_size)):
        assert torch.equal(cpu_int8.product(x_TI, weight), expected_TO)


@pytest.mark.parametrize("tokens", [1, 8, 63, 128])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size"), [(576, 576, 64), (576, 192, 128), (576, 1536, 32), (1536, 576, 128)]
)
def test_bounds_at_the_shapes_of_smollm2(tokens, inputs, outputs, group_size):
    codes_OI, scale_OG = layer(outputs, inputs, group_size)
    codes_OI[: outputs // 2], codes_OI[outputs // 2 :] = -8, 7
    scale_OG[:] = min(32767, (2**31 - 1) // (127 * 8 * inputs))  # the largest that int32 allows everywhere
    x_TI = torch.full((tokens, inputs), 127, dtype=torch.int8)
    x_TI[::2] = -127
    expected_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, group_size)
    assert int(expected_TO.abs().max()) > 0.99 * 2**31 or scale_OG[0, 0] == 32767
    for weight in both_ways(codes_OI, scale_OG, contiguous_groups(inputs, group_size)):
        assert torch.equal(cpu_int8.product(x_TI, weight), expected_TO)


def test_scattered_groups():
    codes_OI, scale_OG = layer(7, 60, 16)
    group_of_I = torch.randperm(60, generator=torch.Generator().manual_seed(1)) % 4
    x_TI = torch.randint(-127, 128, (3, 60), dtype=torch.int8)
    expected_TO = x_TI.long() @ (codes_OI.long() * scale_OG.long()[:, group_of_I]).T
    for weight in both_ways(codes_OI, scale_OG, group_of_I):
        assert torch.equal(cpu_int8.product(x_TI, weight).long(), expected_TO)


def test_digits():
    wide_OI = torch.tensor([[0, 127, -128, 128, -129, 32639, -32896, 32640, 2**23, -(2**24), 2**30]], dtype=torch.int32)
    digit_DOI = cpu_int8._digits(wide_OI)
    places = 256 ** torch.arange(digit_DOI.shape[0])
    assert torch.equal((digit_DOI.long() * places[:, None, None]).sum(0), wide_OI.long())
    assert [cpu_int8._digits(wide_OI[:, :n]).shape[0] for n in (1, 3, 5, 7, 8)] == [1, 1, 2, 2, 3]


def test_folded_scales_and_one_group_keep_a_byte_a_weight():
    codes_OI, scale_OG = layer(8, 64, 16, largest=15)
    folded = pack_weight(codes_OI, scale_OG, contiguous_groups(64, 16))
    assert folded.codes_OI is None and folded.digit_DOI.shape == (1, 8, 64)
    codes_OI, scale_OG = layer(8, 64, -1)
    assert pack_weight(codes_OI, scale_OG, contiguous_groups(64, -1)).digit_DOI is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_a_layer_equals_the_reference(tokens, bits, dtype):
    codes_OI, scale_OG = layer(20, 100, 32)
    weight = pack_weight(codes_OI, scale_OG, contiguous_groups(100, 32))
    x_TI = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_TI[:1] = 0
    bias_O, own_O = torch.randn(20), torch.rand(20)
    codes_TI, x_scale_T1 = quantize_tokens(x_TI, ActivationScheme(bits))
    expected_TO = integer_scale_linear(codes_TI, x_scale_T1, codes_OI, scale_OG, 32, 64, own_O) + bias_O
    out_TO = cpu_linear(x_TI, weight, bias_O, own_O, 64, bits)
    assert out_TO.dtype == dtype and torch.equal(out_TO, expected_TO.to(dtype))
    plain_TO = integer_scale_linear(codes_TI, x_scale_T1, codes_OI, scale_OG, 32, 64)
    assert torch.equal(cpu_linear(x_TI, weight, amplifier=64, bits=bits), plain_TO.to(dtype))


def test_as_an_operator():
    codes_OI, scale_OG = layer(20, 100, 32)
    weight = pack_weight(codes_OI, scale_OG, contiguous_groups(100, 32))
    x_TI = torch.randn(3, 100)
    torch.library.opcheck(torch.ops.finescale.cpu_int8_linear.default, (x_TI, *weight, torch.rand(20), None, 64, 8))
    expected = cpu_linear(x_TI, weight)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: cpu_linear(x, weight), fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x_TI), expected) and compiled(torch.randn(7, 100)).shape == (7, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpu_linear(x_TI, weight), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_TI": torch.zeros(3, 99)}, "float .T, 100."),
        ({"x_TI": torch.zeros(100)}, "float .T, 100."),
        ({"x_TI": torch.zeros(3, 100, dtype=torch.int8)}, "float .T, 100."),
        ({"bias_O": torch.zeros(19)}, "bias"),
        ({"channel_scale_O": torch.zeros(20).double()}, "channel scale"),
        ({"weight": CpuWeight(None, None, None, None)}, "without weights"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    codes_OI, scale_OG = layer(20, 100, 32)
    usual = {"x_TI": torch.zeros(3, 100), "weight": pack_weight(codes_OI, scale_OG, contiguous_groups(100, 32))}
    with pytest.raises(InputError, match=words):
        cpu_linear(**(usual | changes))


def test_shapes_that_do_not_fit_are_not_packed():
    codes_OI, scale_OG = layer(20, 100, 32)
    with pytest.raises(InputError, match=r"\[O, I\]"):
        pack_weight(codes_OI, scale_OG, contiguous_groups(99, 32))


@pytest.mark.parametrize(
    ("instructions", "exact"), [("AVX2", False), pytest.param("AVX2_VNNI", True, marks=pytest.mark.slow)]
)
def test_processors_whose_products_saturate_are_found_out(instructions, exact):
    """oneDNN decides once, hence another process."""
    code = "from finescale.kernels.cpu_int8 import int8_product_is_exact; print(int8_product_is_exact())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(exact)
