"""QuantEase with lazy batches against the plain cyclic algorithm, and the properties that its theory promises."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.bench.solver import plain_quantease
from finescale.grid import contiguous_groups, dequantize, quantize_to_grid
from finescale.solvers import quantease as module
from finescale.solvers.columns import column_order, regroup, row_slabs
from finescale.solvers.products import Products
from finescale.solvers.quantease import is_relaxed
from tests.solvers.examples import error_of, grid_of, layer, slow_quantease, solve


def published(sweeps, relax_every):
    return {sweep for sweep in range(sweeps) if is_relaxed(sweep, sweeps, relax_every)}


@pytest.mark.parametrize("block_size", [1, 5, 8, 128])
@pytest.mark.parametrize(("sweeps", "relax_every"), [(1, 3), (3, 3), (12, 0), (12, 3), (30, 3)])
def test_lazy_batches_equal_the_plain_algorithm(sweeps, relax_every, block_size):
    weight_OI, hessian_II = layer(8, 21, seed=sweeps)
    grid = grid_of(weight_OI, 3, 8)
    options = {"sweeps": sweeps, "relax_every": relax_every, "block_size": block_size}
    codes_OI = solve("quantease", weight_OI, hessian_II, grid, **options).weight.codes_OI
    expected_OI = slow_quantease(weight_OI, hessian_II, grid, sweeps, published(sweeps, relax_every))
    assert torch.equal(codes_OI, expected_OI)
    plain = plain_quantease(weight_OI, hessian_II, grid, sweeps, relax_every=relax_every)
    assert torch.equal(codes_OI, plain.codes_OI)


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 7])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_all_schemes_and_starts_equal_the_plain_algorithm(bits, symmetric, group_size, act_order, start):
    weight_OI, hessian_II = layer(seed=10 + bits)
    grid = grid_of(weight_OI, bits, group_size, symmetric)
    common = {"act_order": act_order, "block_size": 9}
    found = solve("quantease", weight_OI, hessian_II, grid, sweeps=8, start=start, **common).weight
    start_OI = solve("gptq", weight_OI, hessian_II, grid, **common).weight.dequantize() if start == "gptq" else None
    order_I = column_order(hessian_II, act_order)
    expected_OI = slow_quantease(weight_OI, hessian_II, grid, 8, {1, 4}, start_OI, order_I)
    assert torch.equal(found.codes_OI, expected_OI)
    assert torch.equal(found.grid.scale_OG, grid.scale_OG)


def test_act_order_is_the_plain_algorithm_on_the_permuted_problem():
    weight_OI, hessian_II = layer(8, 24)
    grid = grid_of(weight_OI, 3, 8)
    order_I = column_order(hessian_II, True)
    assert order_I.tolist() != list(range(24))
    codes_OI = solve("quantease", weight_OI, hessian_II, grid, act_order=True).weight.codes_OI
    permuted = type(grid)(**(vars(grid) | {"group_of_I": grid.group_of_I[order_I]}))
    plain = plain_quantease(weight_OI[:, order_I], hessian_II[order_I][:, order_I], permuted, 30)
    assert torch.equal(codes_OI[:, order_I], plain.codes_OI)


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("group_size", [8, 7, -1])
def test_groups_of_the_solving_order(group_size, start):
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI, 3, group_size)
    options = {"sweeps": 6, "act_order": True, "static_groups": False, "start": start}
    found = solve("quantease", weight_OI, hessian_II, grid, **options).weight
    order_I = column_order(hessian_II, True)
    grouped = regroup(grid, weight_OI, order_I)
    assert torch.equal(found.grid.group_of_I[order_I], contiguous_groups(24, group_size))
    assert torch.equal(found.grid.scale_OG, grouped.scale_OG)
    start_OI = None
    if start == "gptq":
        start_OI = solve("gptq", weight_OI, hessian_II, grouped, act_order=True).weight.dequantize()
    expected_OI = slow_quantease(weight_OI, hessian_II, grouped, 6, {1, 4}, start_OI, order_I)
    assert torch.equal(found.codes_OI, expected_OI)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(1, 22), st.sampled_from([-1, 2, 5]), st.sampled_from([2, 3, 4]),
    st.sampled_from([0, 1, 2, 3]), st.integers(1, 7), st.integers(0, 500),
)  # fmt: skip
def test_any_small_problem_equals_the_plain_algorithm(
    rows, columns, block_size, group_size, bits, relax_every, sweeps, seed
):
    weight_OI, hessian_II = layer(rows, columns, seed)
    grid = grid_of(weight_OI, bits, group_size)
    options = {"sweeps": sweeps, "relax_every": relax_every, "block_size": block_size}
    codes_OI = solve("quantease", weight_OI, hessian_II, grid, **options).weight.codes_OI
    assert torch.equal(codes_OI, slow_quantease(weight_OI, hessian_II, grid, sweeps, published(sweeps, relax_every)))


def test_damping_is_added_to_the_diagonal_and_recorded():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI)
    solution = solve("quantease", weight_OI, hessian_II, grid, damping=0.3, sweeps=5)
    damped_II = hessian_II + 0.3 * hessian_II.diagonal().mean() * torch.eye(24)
    assert torch.equal(solution.weight.codes_OI, slow_quantease(weight_OI, damped_II, grid, 5, {1}))
    assert solution.damping == 0.3
    assert solve("quantease", weight_OI, hessian_II, grid).damping == 0
    started = solve("quantease", weight_OI, hessian_II, grid, start="gptq", gptq_damping=0.05)
    assert started.damping == 0.05
    raised = solve("quantease", weight_OI, torch.ones(24, 24).double(), grid, start="gptq", gptq_damping=0.0)
    assert raised.notes == ("damping raised from 0 to 1e-06",)


# --- what the theory promises


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_error_never_rises_from_sweep_to_sweep_without_relaxation(bits, start):
    weight_OI, hessian_II = layer(10, 40, seed=5)
    grid = grid_of(weight_OI, bits, 16)
    errors = []
    if start == "gptq":
        errors.append(error_of(weight_OI, solve("gptq", weight_OI, hessian_II, grid).weight.dequantize(), hessian_II))
    for sweeps in range(1, 14):
        weight = solve("quantease", weight_OI, hessian_II, grid, sweeps=sweeps, relax_every=0, start=start).weight
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


@pytest.mark.parametrize("relax_every", [0, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_converged_solution_is_a_minimum_in_every_coordinate(symmetric, relax_every):
    weight_OI, hessian_II = layer(3, 9, seed=2)
    grid = grid_of(weight_OI, 2, 4, symmetric)
    codes_OI = solve("quantease", weight_OI, hessian_II, grid, sweeps=60, relax_every=relax_every).weight.codes_OI
    best = error_of(weight_OI, dequantize(codes_OI, grid), hessian_II)
    for row, column, code in itertools.product(range(3), range(9), range(-2, 2)):
        other_OI = codes_OI.clone()
        other_OI[row, column] = code
        assert error_of(weight_OI, dequantize(other_OI, grid), hessian_II) >= best * (1 - 1e-6)


def test_solvers_rank_as_published():
    weight_OI, hessian_II = layer(32, 96, seed=1)
    grid = grid_of(weight_OI)
    settings_of = {
        "rtn": ("rtn", {}),
        "gptq": ("gptq", {}),
        "few sweeps from gptq": ("quantease", {"sweeps": 3, "relax_every": 0, "start": "gptq"}),
        "30 sweeps with relaxation": ("quantease", {}),
    }
    errors = [
        error_of(weight_OI, solve(name, weight_OI, hessian_II, grid, **options).weight.dequantize(), hessian_II)
        for name, options in settings_of.values()
    ]
    assert errors == sorted(errors, reverse=True)
    without = solve("quantease", weight_OI, hessian_II, grid, relax_every=0).weight.dequantize()
    assert errors[-1] < error_of(weight_OI, without, hessian_II)


def test_refining_gptq_goes_for_the_original_weights():
    # Published code took the GPTQ result itself as the target, which changes nothing at all.
    weight_OI, hessian_II = layer(16, 48)
    grid = grid_of(weight_OI)
    gptq = solve("gptq", weight_OI, hessian_II, grid).weight
    refined = solve("quantease", weight_OI, hessian_II, grid, sweeps=1, relax_every=0, start="gptq").weight
    assert not torch.equal(refined.codes_OI, gptq.codes_OI)
    errors = [error_of(weight_OI, weight.dequantize(), hessian_II) for weight in (gptq, refined)]
    assert errors[1] < 0.98 * errors[0]


def test_a_diagonal_hessian_leaves_nothing_to_compensate():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI)
    diagonal_II = torch.diag(hessian_II.diagonal())
    expected_OI = quantize_to_grid(weight_OI, grid)
    assert torch.equal(solve("quantease", weight_OI, diagonal_II, grid).weight.codes_OI, expected_OI)
    assert torch.equal(solve("gptq", weight_OI, diagonal_II, grid).weight.codes_OI, expected_OI)


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_are_rounded_to_nearest_and_do_not_disturb_the_rest(act_order, start):
    dead = [0, 9, 23]
    weight_OI, hessian_II = layer(dead=dead)
    grid = grid_of(weight_OI)
    options = {"act_order": act_order, "start": start, "gptq_damping": 0.0}
    codes_OI = solve("quantease", weight_OI, hessian_II, grid, **options).weight.codes_OI
    assert torch.equal(codes_OI[:, dead], quantize_to_grid(weight_OI, grid)[:, dead])
    live = [column for column in range(24) if column not in dead]
    small = type(grid)(**(vars(grid) | {"group_of_I": grid.group_of_I[live]}))
    alone_OI = solve("quantease", weight_OI[:, live], hessian_II[live][:, live], small, **options).weight.codes_OI
    assert torch.equal(codes_OI[:, live], alone_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_that_is_almost_dead_does_no_harm(dtype):
    weight_OI, hessian_II = layer(dead=[4])
    grid = grid_of(weight_OI)
    expected_OI = solve("quantease", weight_OI.to(dtype), hessian_II.to(dtype), grid, sweeps=4).weight.codes_OI
    hessian_II[4, 4] = float(torch.finfo(dtype).tiny) / 64  # 1 / H_jj is infinite
    hessian_II[4, 5] = hessian_II[5, 4] = 1e-30
    codes_OI = solve("quantease", weight_OI.to(dtype), hessian_II.to(dtype), grid, sweeps=4).weight.codes_OI
    assert torch.equal(codes_OI, expected_OI)


@pytest.mark.parametrize(("start", "sweeps", "expected"), [("weight", 15, 0), ("weight", 16, 1), ("gptq", 31, 3)])
def test_running_targets_are_made_anew_against_drift(monkeypatch, start, sweeps, expected):
    """Every fifteenth sweep, and at the beginning unless the weight itself is the start."""
    calls = []
    original = Products.targets_
    monkeypatch.setattr(Products, "targets_", lambda self, *args: (calls.append(1), original(self, *args)))
    weight_OI, hessian_II = layer(8, 24)
    solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3, 8), sweeps=sweeps, start=start)
    assert len(calls) == expected


# --- the schedule


def test_the_schedule_is_the_published_one():
    assert published(30, 3) == {1, 4, 7, 10, 13, 16, 19, 22, 25}
    assert published(100, 3) == {1, 4, 7, 10, 13, 16, 19, 22, 25}
    assert published(5, 3) == {1}, "the last sweep, number 4, must end on the grid"
    assert published(2, 3) == set() and published(1, 3) == set()
    assert published(30, 0) == set()
    assert published(6, 1) == {0, 1, 2, 3, 4}
    assert published(8, 2) == {1, 3, 5}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10))
def test_the_last_sweep_is_never_relaxed(sweeps, relax_every):
    assert not is_relaxed(sweeps - 1, sweeps, relax_every)
    assert not any(is_relaxed(sweep, sweeps, relax_every) for sweep in range(26, sweeps))


# --- rows and slabs


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_independent_whatever_the_slabs(monkeypatch, act_order, start):
    weight_OI, hessian_II = layer(11)
    grid = grid_of(weight_OI, 3, 7)
    options = {"act_order": act_order, "start": start}
    whole = solve("quantease", weight_OI, hessian_II, grid, **options).weight
    rows = slice(3, 8)
    part = solve("quantease", weight_OI[rows], hessian_II, grid.rows_slice(rows), **options).weight
    assert torch.equal(part.codes_OI, whole.codes_OI[rows])
    monkeypatch.setattr(module, "rows_together", lambda device: 4)
    assert solve("quantease", weight_OI, hessian_II, grid, **options).weight.sha256() == whole.sha256()


def test_slabs_cover_all_rows_once():
    assert [(s.start, s.stop) for s in row_slabs(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert [(s.start, s.stop) for s in row_slabs(8, 4)] == [(0, 4), (4, 8)]
    assert [(s.start, s.stop) for s in row_slabs(3)] == [(0, 3)]


def test_inputs_and_the_number_of_threads_are_left_alone():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI, 3, 8)
    before = weight_OI.clone(), hessian_II.clone(), grid.scale_OG.clone(), grid.zero_OG.clone()
    threads = torch.get_num_threads()
    solve("quantease", weight_OI, hessian_II, grid, start="gptq", damping=0.1)
    after = weight_OI, hessian_II, grid.scale_OG, grid.zero_OG
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.get_num_threads() == threads
