"""GPTQ against the textbook algorithm."""

import pytest
import torch

from finescale.errors import NumericsError
from finescale.grid import contiguous_groups, integerized, quantize_to_grid
from finescale.solvers import gptq as module
from finescale.solvers.columns import column_order, regroup
from tests.solvers.examples import error_of, grid_of, layer, slow_gptq, solve


@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 7])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (3, True), (4, True), (8, False)])
def test_static_groups_equal_the_textbook(bits, symmetric, group_size, act_order, block_size):
    weight_OI, hessian_II = layer(seed=bits)
    grid = grid_of(weight_OI, bits, group_size, symmetric)
    solution = solve("gptq", weight_OI, hessian_II, grid, act_order=act_order, block_size=block_size)
    order_I = column_order(hessian_II, act_order)
    codes_OI, _, _ = slow_gptq(weight_OI, hessian_II, grid, order_I=order_I)
    assert torch.equal(solution.weight.codes_OI, codes_OI)
    assert torch.equal(solution.weight.grid.scale_OG, grid.scale_OG)
    assert torch.equal(solution.weight.grid.group_of_I, contiguous_groups(24, group_size))
    assert solution.damping == 0.01 and solution.notes == ()


@pytest.mark.parametrize("block_size", [3, 8, 128])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 7, -1])
def test_groups_fitted_on_the_way_equal_the_textbook(group_size, symmetric, act_order, block_size):
    weight_OI, hessian_II = layer(seed=3)
    grid = grid_of(weight_OI, 3, group_size, symmetric)
    options = {"act_order": act_order, "static_groups": False, "block_size": block_size}
    found = solve("gptq", weight_OI, hessian_II, grid, **options).weight
    order_I = column_order(hessian_II, act_order)
    grouped = regroup(grid, weight_OI, order_I)
    # The groups are consecutive in the order of solving.
    assert torch.equal(grouped.group_of_I[order_I], contiguous_groups(24, group_size))
    codes_OI, scale_OG, zero_OG = slow_gptq(weight_OI, hessian_II, grouped, order_I=order_I, refit=group_size != -1)
    assert torch.equal(found.codes_OI, codes_OI)
    assert torch.equal(found.grid.scale_OG.double(), scale_OG)
    assert symmetric or torch.equal(found.grid.zero_OG.double(), zero_OG)
    assert torch.equal(found.grid.group_of_I, grouped.group_of_I)
    if group_size != -1:
        assert not torch.equal(found.grid.scale_OG, grouped.scale_OG), "compensated weights must have other ranges"


@pytest.mark.parametrize("static_groups", [True, False])
def test_integer_scales_stay_integers(static_groups):
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI, 4, 8, True, amplifier=1024)
    found = solve("gptq", weight_OI, hessian_II, grid, static_groups=static_groups, act_order=True).weight
    assert found.grid.amplifier == 1024
    assert int(found.grid.integer_scale_OG().min()) >= 1
    assert torch.equal(integerized(found.grid, 1024).scale_OG, found.grid.scale_OG)


def test_act_order_is_by_falling_diagonal_and_stable():
    hessian_II = torch.diag(torch.tensor([1.0, 5.0, 1.0, 9.0]))
    assert column_order(hessian_II, True).tolist() == [3, 1, 0, 2]
    assert column_order(hessian_II, False).tolist() == [0, 1, 2, 3]


def test_error_is_below_that_of_rounding_to_nearest():
    weight_OI, hessian_II = layer(32, 64)
    grid = grid_of(weight_OI)
    errors = {name: error_of(weight_OI, solve(name, weight_OI, hessian_II, grid).weight.dequantize(), hessian_II)
              for name in ("rtn", "gptq")}  # fmt: skip
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_dead_inputs_are_rounded_to_nearest_and_do_not_disturb_the_rest():
    dead = [0, 9, 23]
    weight_OI, hessian_II = layer(dead=dead)
    grid = grid_of(weight_OI)
    solution = solve("gptq", weight_OI, hessian_II, grid, damping=0.0)
    assert solution.damping == 0 and solution.notes == (), "dead inputs alone are no reason to damp"
    codes_OI = solution.weight.codes_OI
    assert torch.equal(codes_OI[:, dead], quantize_to_grid(weight_OI, grid)[:, dead])
    live = [column for column in range(24) if column not in dead]
    small = type(grid)(**(vars(grid) | {"group_of_I": grid.group_of_I[live]}))
    alone_OI = solve("gptq", weight_OI[:, live], hessian_II[live][:, live], small, damping=0.0).weight.codes_OI
    assert torch.equal(codes_OI[:, live], alone_OI)


def test_a_layer_that_saw_only_zeros_is_rounded_to_nearest():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI)
    solution = solve("gptq", weight_OI, torch.zeros_like(hessian_II), grid)
    assert torch.equal(solution.weight.codes_OI, quantize_to_grid(weight_OI, grid))


def test_damping_grows_until_the_hessian_factorizes_and_is_recorded():
    weight_OI, _ = layer()
    grid = grid_of(weight_OI)
    rank_one = solve("gptq", weight_OI, torch.ones(24, 24).double(), grid, damping=0.0)
    assert rank_one.damping == pytest.approx(1e-6)
    assert rank_one.notes == ("damping raised from 0 to 1e-06",)
    # Smallest eigenvalue -2: a damping of 0.01, 0.1 or 1 times the mean diagonal (1) is not enough.
    indefinite_II = torch.eye(24).double()
    indefinite_II[0, 1] = indefinite_II[1, 0] = 3
    raised = solve("gptq", weight_OI, indefinite_II, grid)
    assert raised.damping == pytest.approx(10)
    assert raised.notes == ("damping raised from 0.01 to 10",)
    codes_OI, _, _ = slow_gptq(weight_OI, indefinite_II, grid, damping=raised.damping)
    assert torch.equal(raised.weight.codes_OI, codes_OI)


def test_a_hopeless_hessian_is_refused():
    weight_OI, hessian_II = layer()
    hessian_II[0, 1] = hessian_II[1, 0] = 1e9
    with pytest.raises(NumericsError, match="calibrate with more"):
        solve("gptq", weight_OI, hessian_II, grid_of(weight_OI))


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_rows_are_independent_whatever_the_slabs(monkeypatch, act_order, static_groups):
    weight_OI, hessian_II = layer(11)
    grid = grid_of(weight_OI, 3, 7)
    options = {"act_order": act_order, "static_groups": static_groups}
    whole = solve("gptq", weight_OI, hessian_II, grid, **options).weight
    rows = slice(3, 8)
    part = solve("gptq", weight_OI[rows], hessian_II, grid.rows_slice(rows), **options).weight
    assert torch.equal(part.codes_OI, whole.codes_OI[rows])
    monkeypatch.setattr(module, "rows_together", lambda device: 4)
    slabs = solve("gptq", weight_OI, hessian_II, grid, **options).weight
    assert slabs.sha256() == whole.sha256()


def test_inputs_are_left_alone():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI, 3, 8)
    before = weight_OI.clone(), hessian_II.clone(), grid.scale_OG.clone(), grid.zero_OG.clone()
    solve("gptq", weight_OI, hessian_II, grid, static_groups=False, act_order=True)
    after = weight_OI, hessian_II, grid.scale_OG, grid.zero_OG
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
