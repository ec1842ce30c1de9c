"""The exact product against int64 arithmetic.

Shape legend: T tokens, I inputs, O outputs, G groups.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from finescale.errors import InputError
from finescale.grid import (
    ActivationScheme,
    QuantizedWeight,
    WeightScheme,
    contiguous_groups,
    fit_grid,
    number_of_groups,
    quantize_to_grid,
    quantize_tokens,
    with_folded_scales,
    with_integer_scales,
)
from finescale.grid.integer_scale import overflow_bound
from finescale.kernels import grouped_int32_product, integer_scale_linear


def exact(x_TI, codes_OI, integer_OG, group_size):
    """int64 [T, O]."""
    scale_OI = integer_OG.long()[:, contiguous_groups(codes_OI.shape[1], group_size)]
    return x_TI.long() @ (codes_OI.long() * scale_OI).T


def random_layer(tokens, rows, columns, group_size, bits=4, seed=0, largest_scale=500):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    x_TI = torch.randint(-127, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    codes_OI = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    shape = (rows, number_of_groups(columns, group_size))
    return x_TI, codes_OI, torch.randint(1, largest_scale + 1, shape, generator=generator, dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 5), st.integers(1, 70), st.sampled_from([-1, 1, 8, 13, 100]),
    st.sampled_from([2, 3, 4, 8]), st.integers(0, 1000),
)  # fmt: skip
def test_the_accumulator_equals_int64(tokens, rows, columns, group_size, bits, seed):
    x_TI, codes_OI, integer_OG = random_layer(tokens, rows, columns, group_size, bits, seed)
    x_TI = torch.cat([x_TI, 127 * codes_OI.sign(), -127 * codes_OI.sign()])  # the tokens that reach the bound
    total_TO = grouped_int32_product(x_TI, codes_OI, integer_OG, group_size)
    assert total_TO.dtype == torch.int32 and total_TO.shape == (tokens + 2 * rows, rows)
    assert torch.equal(total_TO.long(), exact(x_TI, codes_OI, integer_OG, group_size))
    bound_O = overflow_bound(codes_OI, integer_OG, contiguous_groups(columns, group_size))
    assert torch.equal(total_TO[tokens : tokens + rows].diagonal().long(), bound_O)


@pytest.mark.parametrize("columns", [1031, 1032, 1033, 1040, 4099])
def test_long_groups_are_exact_on_both_sides_of_float32(columns):
    # All products 127 * -128 or one less: odd sums beyond 2^24, which float32 would round.
    x_TI = torch.full((3, columns), 127, dtype=torch.int8)
    x_TI[1, ::2] = 126
    x_TI[2, 0] = 1
    codes_OI = torch.full((2, columns), -128, dtype=torch.int8)
    codes_OI[1, 1::3] = 127
    integer_OG = torch.tensor([[3], [1]], dtype=torch.int32)
    total_TO = grouped_int32_product(x_TI, codes_OI, integer_OG, -1)
    assert torch.equal(total_TO.long(), exact(x_TI, codes_OI, integer_OG, -1))
    x_TI, codes_OI, integer_OG = random_layer(4, 3, columns, -1, 8, largest_scale=20)
    assert torch.equal(
        grouped_int32_product(x_TI, codes_OI, integer_OG, -1).long(), exact(x_TI, codes_OI, integer_OG, -1)
    )


def test_long_groups_inside_wider_layers():
    x_TI, codes_OI, integer_OG = random_layer(3, 2, 3 * 1100 + 7, 1100, 8, largest_scale=9)
    assert torch.equal(
        grouped_int32_product(x_TI, codes_OI, integer_OG, 1100).long(), exact(x_TI, codes_OI, integer_OG, 1100)
    )


def test_no_wrap_at_the_largest_bound_and_a_wrap_just_beyond():
    x_TI = torch.tensor([[1, 1, 0], [-1, -1, 0], [1, 1, 1]], dtype=torch.int8)
    codes_OI = torch.ones(1, 3, dtype=torch.int8)
    integer_OG = torch.tensor([[2**30, 2**30 - 1, 1]], dtype=torch.int32)
    total_TO = grouped_int32_product(x_TI, codes_OI, integer_OG, 1)
    assert total_TO.flatten().tolist() == [2**31 - 1, -(2**31) + 1, -(2**31)]


def test_the_float_result_is_one_conversion_and_one_product():
    x_TI, codes_OI, integer_OG = random_layer(5, 4, 300, 128)
    x_scale_T1 = torch.rand(5, 1) / 100
    out_TO = integer_scale_linear(x_TI, x_scale_T1, codes_OI, integer_OG, 128, 1024)
    total_TO = exact(x_TI, codes_OI, integer_OG, 128)
    assert out_TO.dtype == torch.float32
    assert torch.equal(out_TO, total_TO.float() * (x_scale_T1 / 1024))
    assert torch.allclose(out_TO.double(), total_TO.double() * x_scale_T1.double() / 1024, rtol=2e-7, atol=0)


@pytest.mark.parametrize("group_size", [-1, 32, 24])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_engine_that_reads_the_float_scales_gets_the_same_numbers(scale_dtype, bits, group_size):
    generator = torch.Generator().manual_seed(bits)
    weight_OI = 0.02 * torch.randn(12, 100, generator=generator)
    grid = fit_grid(weight_OI, WeightScheme(bits, group_size, True, "mse"), scale_dtype)
    grid = with_integer_scales(grid, weight_OI, "auto")
    weight = QuantizedWeight(quantize_to_grid(weight_OI, grid), grid)
    x_TI = torch.randn(6, 100, generator=generator)
    codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
    integer_OG = grid.integer_scale_OG()
    # In float64 both sides are exact: an integer below 2^31 over a power of two.
    float_TO = codes_TI.double() @ weight.dequantize().double().T
    total_TO = grouped_int32_product(codes_TI, weight.codes_OI, integer_OG, group_size)
    assert torch.equal(total_TO.double() / grid.amplifier, float_TO)
    out_TO = integer_scale_linear(codes_TI, scale_T1, weight.codes_OI, integer_OG, group_size, grid.amplifier)
    # One rounding of the sum to float32 and one of the product: two units in the last place, no more.
    assert torch.allclose(out_TO.double(), float_TO * scale_T1.double(), rtol=2.5e-7, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([-1, 8, 13]),
    st.sampled_from([2, 3, 4]),
)
def test_folded_weights_give_the_same_sums_in_one_int8_product(seed, rows, columns, group_size, bits):
    """What a kernel does: codes times scales first, in int8, then one product without groups."""
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    grid = fit_grid(weight_OI, WeightScheme(bits, group_size, True, "mse"), torch.float16)
    grid = with_folded_scales(grid, weight_OI)
    codes_OI, integer_OG = quantize_to_grid(weight_OI, grid), grid.integer_scale_OG()
    x_TI = torch.randint(-127, 128, (3, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    x_TI = torch.cat([x_TI, 127 * codes_OI.sign(), -127 * codes_OI.sign()])
    wide_OI = codes_OI.int() * integer_OG[:, grid.group_of_I]
    narrow_OI = wide_OI.to(torch.int8)
    assert torch.equal(narrow_OI.int(), wide_OI)
    total_TO = x_TI.long() @ narrow_OI.long().T
    bound = int(overflow_bound(codes_OI, integer_OG, grid.group_of_I).max())
    assert int(total_TO.abs().max()) == bound < 2**31
    assert torch.equal(grouped_int32_product(x_TI, codes_OI, integer_OG, group_size).long(), total_TO)
    x_scale_T1 = torch.rand(x_TI.shape[0], 1)
    out_TO = integer_scale_linear(x_TI, x_scale_T1, codes_OI, integer_OG, group_size, 1, grid.channel_scale_O)
    assert torch.equal(out_TO, total_TO.float() * x_scale_T1 * grid.channel_scale_O)
    exact_TO = (
        x_TI.double() @ (codes_OI.double() * grid.scale_OG.double()[:, grid.group_of_I]).T
    ) * x_scale_T1.double()
    torch.testing.assert_close(out_TO.double(), exact_TO, rtol=3e-7, atol=0)


def test_no_tokens():
    x_TI, codes_OI, integer_OG = random_layer(0, 4, 40, 8)
    assert integer_scale_linear(x_TI, torch.empty(0, 1), codes_OI, integer_OG, 8, 1024).shape == (0, 4)


# --- as a torch operator


def arguments():
    x_TI, codes_OI, integer_OG = random_layer(3, 5, 20, 8)
    return x_TI, torch.rand(3, 1), codes_OI, integer_OG, 8, 1024


def test_opcheck():
    torch.library.opcheck(integer_scale_linear, arguments())
    torch.library.opcheck(integer_scale_linear, (*arguments(), torch.rand(5)))
    assert torch.ops.finescale.integer_scale_linear.default is not None


def test_fake_tensors_have_the_real_shape_and_type():
    real = integer_scale_linear(*arguments())
    with FakeTensorMode() as mode:
        fake = integer_scale_linear(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments()))
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend):
    def layer(x_TI, codes_OI, integer_OG):
        codes_TI, scale_T1 = quantize_tokens(x_TI, ActivationScheme(8))
        return integer_scale_linear(codes_TI, scale_T1, codes_OI, integer_OG, 8, 1024) + 1

    torch._dynamo.reset()
    _, codes_OI, integer_OG = random_layer(3, 5, 20, 8)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 7):
        x_TI = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(tokens))
        assert torch.equal(compiled(x_TI, codes_OI, integer_OG), layer(x_TI, codes_OI, integer_OG))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.zeros(3, 21, dtype=torch.int8)}, "one I"),
        ({0: torch.zeros(20, dtype=torch.int8)}, "one I"),
        ({0: torch.zeros(3, 20)}, "int8 activations"),
        ({2: torch.zeros(5, 20, dtype=torch.int32)}, "int8 codes"),
        ({3: torch.ones(5, 3)}, "int32 scales"),
        ({3: torch.ones(5, 2, dtype=torch.int32)}, r"must be \[5, 3\]"),
        ({3: torch.ones(4, 3, dtype=torch.int32)}, r"must be \[5, 3\]"),
        ({4: -1}, r"must be \[5, 1\]"),
        ({4: 0}, "group_size is 0"),
        ({4: -8}, "group_size is -8"),
        ({1: torch.rand(3)}, "token scales"),
        ({1: torch.rand(1, 1)}, "token scales"),
        ({1: torch.rand(3, 1).double()}, "token scales"),
        ({5: 1000}, "power of two"),
        ({5: 0}, "power of two"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    values = list(arguments())
    for position, value in changes.items():
        values[position] = value
    with pytest.raises(InputError, match=words):
        integer_scale_linear(*values)


@pytest.mark.parametrize("channel_scale_O", [torch.rand(4), torch.rand(5, 1), torch.rand(5).double()])
def test_factors_that_do_not_fit_are_refused(channel_scale_O):
    with pytest.raises(InputError, match="channel scales"):
        integer_scale_linear(*arguments(), channel_scale_O)


def test_autocast_does_not_round_the_sums():
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randint(-127, 128, (3, 256), dtype=torch.int8, generator=generator)
    codes_OI = torch.randint(-8, 8, (5, 256), dtype=torch.int8, generator=generator)
    scale_OG = torch.randint(1, 400, (5, 4), dtype=torch.int32, generator=generator)
    expected_TO = grouped_int32_product(x_TI, codes_OI, scale_OG, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(grouped_int32_product(x_TI, codes_OI, scale_OG, 64), expected_TO)
