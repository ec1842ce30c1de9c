"""Integer scales and the overflow bound against exact arithmetic on Python integers.

Shape legend: O outputs, I inputs, G groups, T tokens.
"""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError, NumericsError
from finescale.grid import (
    WeightScheme,
    contiguous_groups,
    fit_grid,
    integerized,
    number_of_groups,
    quantize_to_grid,
    with_integer_scales,
)
from finescale.grid.fit import refit_group, smallest_scale
from finescale.grid.integer_scale import (
    INT32_LIMIT,
    LARGEST_AMPLIFIER,
    LARGEST_INTEGER_SCALE,
    auto_amplifier,
    check_amplifier,
    group_absolute_sums,
    heuristic_amplifier,
    integer_scales,
    overflow_bound,
    prove_no_overflow,
    significand_bits,
)

PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
DTYPES = list(PRECISION)


def weight_of(rows=6, columns=40, seed=0, size=0.02):
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_integer(scale, amplifier, precision):
    """Nearest integer (ties to even), at least 1, then the nearest with so many significant bits."""
    value = max(1, round(Fraction(scale) * amplifier))
    step = 2 ** max(0, value.bit_length() - precision)
    return round(Fraction(value, step)) * step


scales = st.lists(st.floats(2.0**-30, 8, width=32), min_size=1, max_size=8)
powers = st.integers(0, 24).map(lambda exponent: 2**exponent)


def test_significant_bits_of_the_stored_types():
    assert {dtype: significand_bits(dtype) for dtype in DTYPES} == PRECISION


@settings(max_examples=150, deadline=None)
@given(scales, powers, st.sampled_from(DTYPES))
def test_integer_scales_equal_exact_arithmetic_and_are_stored_without_error(values, amplifier, dtype):
    scale_OG = torch.tensor([values])
    integer_OG = integer_scales(scale_OG, amplifier, dtype)
    assert integer_OG.dtype == torch.int32
    assert integer_OG.tolist() == [[slow_integer(v, amplifier, PRECISION[dtype]) for v in scale_OG[0].tolist()]]
    assert int(integer_OG.min()) >= 1
    ratio_OG = integer_OG.double() / amplifier
    assert torch.equal(ratio_OG.to(dtype).double(), ratio_OG), "S / amplifier must survive storage"


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (255.6, torch.bfloat16, 256),  # rounds up out of its binade
        (257, torch.bfloat16, 256),  # ties to even
        (259, torch.bfloat16, 260),
        (2047.5, torch.float16, 2048),
        (2049, torch.float16, 2048),
        (2051, torch.float16, 2052),
        (2049, torch.float32, 2049),
        (0.4, torch.float32, 1),
        (1e-20, torch.float32, 1),
    ],
)
def test_integer_scales_at_the_edges_of_precision(value, dtype, expected):
    assert integer_scales(torch.tensor([[value]]), 1, dtype).item() == expected


def test_a_scale_beyond_int32_is_refused():
    with pytest.raises(NumericsError, match="smaller amplifier"):
        integer_scales(torch.tensor([[200.0]]), LARGEST_AMPLIFIER, torch.float32)


@pytest.mark.parametrize(
    ("smallest", "amplifier"),
    # The table of the paper's heuristic, exact powers of two, and the guard where the published loop would give 1/2.
    [(0.5, 2), (0.0021, 512), (0.00098, 1024), (0.25, 4), (0.2500001, 4), (0.2499999, 8), (1.0, 1), (1.5, 1), (9, 1)],
)
def test_heuristic_amplifier(smallest, amplifier):
    assert heuristic_amplifier(torch.tensor([[smallest, max(3.0, smallest)]])) == amplifier


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(2.0**-23, 8, width=32), min_size=1, max_size=6))
def test_heuristic_amplifier_is_the_smallest_power_that_lifts(values):
    shifts = 0
    while min(values) * 2**shifts < 1:
        shifts += 1
    assert heuristic_amplifier(torch.tensor([values])) == 2**shifts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_zeros_do_not_choose_the_amplifier(dtype):
    weight_OI = weight_of()
    weight_OI[2, :8] = 0
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True), dtype)
    expected = heuristic_amplifier(grid.scale_OG[grid.scale_OG > smallest_scale(dtype)])
    assert with_integer_scales(grid, weight_OI, "heuristic").amplifier == expected < 2**14
    assert heuristic_amplifier(torch.full((1, 1), smallest_scale(dtype))) == 1
    automatic = with_integer_scales(grid, weight_OI, "auto")
    assert automatic.integer_scale_OG()[2, 0] == 1 and automatic.amplifier > expected


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
def test_scales_that_are_not_positive_numbers_are_refused(bad):
    with pytest.raises(NumericsError, match="positive and finite"):
        heuristic_amplifier(torch.tensor([[0.5, bad]]))


@pytest.mark.parametrize("amplifier", [0, -1, 3, 1000, 2**25])
def test_amplifiers_that_are_no_power_of_two_are_refused(amplifier):
    with pytest.raises(InputError, match="power of two"):
        check_amplifier(amplifier)
    weight_OI = weight_of()
    with pytest.raises(InputError, match="power of two"):
        with_integer_scales(fit_grid(weight_OI, WeightScheme(4, 8, True)), weight_OI, amplifier)


def fits(scale_OG, sums_OG, amplifier, dtype, activation_max):
    """Whether an amplifier keeps S in 16 bits and every output under 2**31, on Python integers."""
    rows = [[slow_integer(s, amplifier, PRECISION[dtype]) for s in row] for row in scale_OG.tolist()]
    bounds = [
        activation_max * sum(s * n for s, n in zip(row, sums, strict=True))
        for row, sums in zip(rows, sums_OG.tolist(), strict=True)
    ]
    return max(map(max, rows)) <= LARGEST_INTEGER_SCALE and max(bounds) < INT32_LIMIT


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(2.0**-20, 4, width=32), st.integers(0, 200_000)), min_size=2, max_size=6),
    st.sampled_from(DTYPES),
    st.sampled_from([127, 7]),
)
def test_auto_amplifier_is_the_largest_that_fits(pairs, dtype, activation_max):
    pairs = pairs[: len(pairs) // 2 * 2]
    scale_OG = torch.tensor([pair[0] for pair in pairs]).reshape(2, -1)
    sums_OG = torch.tensor([pair[1] for pair in pairs]).reshape(2, -1)
    amplifier = auto_amplifier(scale_OG, sums_OG, dtype, activation_max)
    check_amplifier(amplifier)
    assert fits(scale_OG, sums_OG, amplifier, dtype, activation_max)
    assert amplifier == LARGEST_AMPLIFIER or not fits(scale_OG, sums_OG, 2 * amplifier, dtype, activation_max)


def test_each_limit_of_the_auto_amplifier_binds():
    def auto(scale, absolute_sum, activation_max=127):
        return auto_amplifier(torch.tensor([[scale]]), torch.tensor([[absolute_sum]]), torch.float32, activation_max)

    assert auto(1e-4, 1) == LARGEST_AMPLIFIER
    assert auto(0.25, 1) == 2**16  # S = 2**14; 2**15 is over 16 bits
    assert auto(0.25, 2**14) == 2**12  # 127 * 2**10 * 2**14 < 2**31 < 127 * 2**11 * 2**14
    # activation_max * S * sum is exactly 2**31 at 2**10: not allowed.
    assert auto(1.0, 2**20, 2) == 2**9
    with pytest.raises(NumericsError, match="float scales"):
        auto(1.0, 2**31)
    # The output that is nearest to its limit decides, not the mean or the first.
    two = auto_amplifier(torch.tensor([[0.25], [0.25]]), torch.tensor([[1], [2**14]]), torch.float32)
    assert two == 2**12


@pytest.mark.parametrize("group_size", [-1, 8, 7])
@pytest.mark.parametrize("amplifier", [1024, 64, "heuristic", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids_with_integer_scales_give_the_integers_back(dtype, amplifier, group_size):
    weight_OI = weight_of()
    grid = fit_grid(weight_OI, WeightScheme(4, group_size, True, "mse"), dtype)
    whole = with_integer_scales(grid, weight_OI, amplifier)
    assert whole.amplifier == amplifier or isinstance(amplifier, str)
    integer_OG = whole.integer_scale_OG()
    assert torch.equal(integer_OG, integer_scales(grid.scale_OG, whole.amplifier, dtype))
    stored_OG = whole.scale_OG.to(dtype)
    assert torch.equal(stored_OG.double() * whole.amplifier, integer_OG.double())
    # Integer to start with: nothing moves a second time.
    assert torch.equal(integerized(whole, whole.amplifier).scale_OG, whole.scale_OG)
    if amplifier == "auto":
        codes_OI = quantize_to_grid(weight_OI, grid)
        sums_OG = group_absolute_sums(codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
        assert whole.amplifier == auto_amplifier(grid.scale_OG, sums_OG, dtype)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_bfloat16_scales_of_four_bits_stay_what_they_are(clip):
    # An S of 2**7 and more has as many bits as bfloat16: integer scales are the float ones then, for any solver.
    weight_OI = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    grid = fit_grid(weight_OI, WeightScheme(4, 128, True, clip), torch.bfloat16)
    whole = with_integer_scales(grid, weight_OI, "auto")
    assert int(whole.integer_scale_OG().min()) >= 2**7
    assert torch.equal(whole.scale_OG, grid.scale_OG)


def test_auto_uses_the_largest_activation_it_is_told():
    weight_OI = weight_of(4, 4096, size=1.0)
    grid = fit_grid(weight_OI, WeightScheme(4, 128, True))
    wide, narrow = (with_integer_scales(grid, weight_OI, "auto", largest).amplifier for largest in (127, 7))
    assert narrow > wide


def test_what_has_no_integer_scales_says_so():
    weight_OI = weight_of()
    grid = fit_grid(weight_OI, WeightScheme(4, 8, True))
    with pytest.raises(NumericsError, match="float scales"):
        grid.integer_scale_OG()
    with pytest.raises(NumericsError, match="not all integers"):
        type(grid)(**(vars(grid) | {"amplifier": 1024})).integer_scale_OG()
    asymmetric = fit_grid(weight_OI, WeightScheme(4, 8, False))
    with pytest.raises(NumericsError, match="symmetric"):
        with_integer_scales(asymmetric, weight_OI, 1024)


def test_a_refitted_group_keeps_the_amplifier():
    weight_OI = weight_of(6, 8)
    grid = with_integer_scales(fit_grid(weight_OI, WeightScheme(4, 8, True)), weight_OI, 1024)
    scale_O, zero_O = refit_group(grid, 3 * weight_OI)
    assert zero_O is None
    expected_OG = integer_scales(fit_grid(3 * weight_OI, grid.scheme).scale_OG, 1024, torch.float32)
    assert torch.equal(scale_O.double() * 1024, expected_OG[:, 0].double())


# --- the bound


@st.composite
def integer_layers(draw, widest=40):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, widest))
    bits, group_size = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([-1, 4, 7]))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8
    )
    groups = number_of_groups(columns, group_size)
    integer_OG = torch.randint(1, 300, (rows, groups), generator=generator, dtype=torch.int32)
    group_of_I = contiguous_groups(columns, group_size)
    if draw(st.booleans()):
        group_of_I = group_of_I[torch.randperm(columns, generator=generator)]
    return codes_OI, integer_OG, group_of_I


def accumulator(x_TI, codes_OI, integer_OG, group_of_I):
    """int64 [T, O]."""
    return x_TI.long() @ (codes_OI.long() * integer_OG.long()[:, group_of_I]).T


@settings(max_examples=60, deadline=None)
@given(integer_layers(), st.sampled_from([127, 31, 7]))
def test_the_bound_is_reached_by_the_worst_tokens_and_by_no_other(layer, largest):
    codes_OI, integer_OG, group_of_I = layer
    bound_O = overflow_bound(codes_OI, integer_OG, group_of_I, largest)
    worst_TI = largest * codes_OI.sign()
    reached_TO = accumulator(worst_TI, codes_OI, integer_OG, group_of_I)
    assert torch.equal(reached_TO.diagonal(), bound_O)
    assert torch.equal(accumulator(-worst_TI, codes_OI, integer_OG, group_of_I).diagonal(), -bound_O)
    random_TI = torch.randint(-largest, largest + 1, (30, codes_OI.shape[1]))
    everything_TO = accumulator(torch.cat([random_TI, worst_TI]), codes_OI, integer_OG, group_of_I)
    assert bool((everything_TO.abs() <= bound_O).all())
    assert prove_no_overflow("layer", codes_OI, integer_OG, group_of_I, largest) == int(bound_O.max())


@settings(max_examples=8, deadline=None)
@given(integer_layers(widest=6))
def test_the_bound_is_the_maximum_over_all_corners(layer):
    codes_OI, integer_OG, group_of_I = layer
    corners_TI = torch.tensor(list(itertools.product([-127, 0, 127], repeat=codes_OI.shape[1])))
    reached_TO = accumulator(corners_TI, codes_OI, integer_OG, group_of_I)
    assert torch.equal(reached_TO.amax(0), overflow_bound(codes_OI, integer_OG, group_of_I))


def test_partial_sums_never_pass_the_bound_in_any_order():
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-8, 8, (3, 24), generator=generator, dtype=torch.int8)
    integer_OG = torch.randint(1, 100, (3, 3), generator=generator, dtype=torch.int32)
    group_of_I = contiguous_groups(24, 8)
    bound_O = overflow_bound(codes_OI, integer_OG, group_of_I)
    terms_OI = 127 * codes_OI.sign().long() * codes_OI * integer_OG.long()[:, group_of_I]
    for _ in range(20):
        order_I = torch.randperm(24, generator=generator)
        assert bool((terms_OI[:, order_I].cumsum(1).abs() <= bound_O[:, None]).all())


def test_the_proof_ends_exactly_at_two_to_the_31():
    codes_OI, group_of_I = torch.ones(1, 2, dtype=torch.int8), torch.tensor([0, 1])
    largest_OG = torch.tensor([[2**30, 2**30 - 1]], dtype=torch.int32)
    assert prove_no_overflow("a", codes_OI, largest_OG, group_of_I, 1) == INT32_LIMIT - 1
    too_large_OG = torch.tensor([[2**30, 2**30]], dtype=torch.int32)
    with pytest.raises(NumericsError, match=r"^model\.q_proj: .* 1\.00 times 2\^31"):
        prove_no_overflow("model.q_proj", codes_OI, too_large_OG, group_of_I, 1)
    # Far beyond: nothing may wrap on the way to the verdict.
    with pytest.raises(NumericsError, match="times 2"):
        prove_no_overflow("b", torch.full((1, 9), -128).to(torch.int8), torch.full((1, 1), 2**31 - 1).int(),
                          torch.zeros(9).long())  # fmt: skip


def test_absolute_sums_count_the_lowest_code():
    codes_OI = torch.tensor([[-128, 127, 3], [0, -1, 0]], dtype=torch.int8)
    sums_OG = group_absolute_sums(codes_OI, torch.tensor([0, 1, 0]), 2)
    assert sums_OG.tolist() == [[131, 127], [0, 1]]
