"""What holds for every solver, the registry, and the measure of error."""

import math

import pytest
import torch
from pydantic import ValidationError

from finescale.errors import InputError, NumericsError
from finescale.grid import quantize_to_grid
from finescale.solvers import SOLVERS, find_solver, relative_error, squared_error
from finescale.solvers.columns import ColumnRounder
from tests.solvers.examples import error_of, grid_of, layer, solve

VARIANTS = [
    ("rtn", {}),
    ("gptq", {}),
    ("gptq", {"act_order": True, "static_groups": False}),
    ("quantease", {"relax_every": 0}),
    ("quantease", {}),
    ("quantease", {"start": "gptq", "act_order": True}),
]


def test_registry():
    assert {"rtn", "gptq", "quantease"} <= set(SOLVERS)
    for name, entry in SOLVERS.items():
        assert find_solver(name) is entry and entry.summary
        entry.options()
    assert not SOLVERS["rtn"].needs_hessian and SOLVERS["gptq"].needs_hessian and SOLVERS["quantease"].needs_hessian
    with pytest.raises(InputError, match=r"'annealing'; choose one of .*gptq.*quantease.*rtn"):
        find_solver("annealing")


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_options_are_strict_and_immutable(name):
    options = find_solver(name).options
    with pytest.raises(ValidationError, match="dampening"):
        options(dampening=0.1)
    with pytest.raises(ValidationError):
        options().damping = 1


@pytest.mark.parametrize(
    ("name", "values"),
    [("gptq", {"damping": -0.1}), ("gptq", {"block_size": 0}), ("quantease", {"sweeps": 0}),
     ("quantease", {"relax_every": -1}), ("quantease", {"start": "zero"}), ("quantease", {"block_size": 0}),
     ("quantease", {"damping": -1}), ("quantease", {"gptq_damping": -1})],
)  # fmt: skip
def test_option_values_that_cannot_work_are_refused(name, values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        find_solver(name).options(**values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_codes_lie_on_the_grid_and_come_in_the_original_order(name, options, bits, symmetric):
    weight_OI, hessian_II = layer(5, 20)
    weight_OI[:, 3] *= 5  # one column that stands out, so that a wrong order shows
    weight = solve(
        name, weight_OI.float(), hessian_II.float(), grid_of(weight_OI, bits, 8, symmetric), **options
    ).weight
    assert weight.codes_OI.dtype == torch.int8 and weight.codes_OI.shape == (5, 20)
    assert weight.codes_OI.is_contiguous()
    assert int(weight.codes_OI.min()) >= -(2 ** (bits - 1)) and int(weight.codes_OI.max()) < 2 ** (bits - 1)
    value_OI = weight.dequantize().double()
    if bits == 8:
        assert float(torch.corrcoef(torch.stack([value_OI.flatten(), weight_OI.flatten()]))[0, 1]) > 0.98


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_same_inputs_give_the_same_bytes(name, options):
    weight_OI, hessian_II = layer(12, 40)
    weight_OI, hessian_II = weight_OI.float(), hessian_II.float()
    grid = grid_of(weight_OI, 3, 16)
    first, second = (solve(name, weight_OI, hessian_II, grid, **options).weight.sha256() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_float32_is_as_good_as_float64(name, options):
    weight_OI, hessian_II = layer(48, 160, seed=4)
    weight_OI, hessian_II = weight_OI.float(), hessian_II.float()
    grid = grid_of(weight_OI, 4, 32)
    single = solve(name, weight_OI, hessian_II, grid, **options).weight.dequantize()
    double = solve(name, weight_OI.double(), hessian_II.double(), grid, **options).weight.dequantize()
    errors = [error_of(weight_OI.double(), value_OI, hessian_II.double()) for value_OI in (single, double)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_sixteen_bit_weights_are_solved_as_float32(name, options, dtype):
    weight_OI, hessian_II = layer(6, 24)
    weight_OI, hessian_II = weight_OI.to(dtype), hessian_II.float()
    grid = grid_of(weight_OI, 4, 8)
    narrow, wide = (solve(name, w_OI, hessian_II, grid, **options).weight for w_OI in (weight_OI, weight_OI.float()))
    assert narrow.sha256() == wide.sha256()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_nan_and_inf_are_refused(name, bad):
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI)
    broken_OI = weight_OI.clone()
    broken_OI[1, 2] = bad
    with pytest.raises(NumericsError, match="weight holds NaN or Inf"):
        solve(name, broken_OI, hessian_II, grid)
    if find_solver(name).needs_hessian:
        hessian_II[3, 4] = bad
        with pytest.raises(NumericsError, match="statistics hold NaN or Inf"):
            solve(name, weight_OI, hessian_II, grid)


@pytest.mark.parametrize("name", [name for name, entry in SOLVERS.items() if entry.needs_hessian])
def test_a_hessian_of_another_layer_is_refused(name):
    weight_OI, hessian_II = layer()
    with pytest.raises(NumericsError, match=r"must be \[I, I\]"):
        solve(name, weight_OI, hessian_II[:-1, :-1], grid_of(weight_OI))


def test_rtn_is_rounding_to_nearest():
    weight_OI, hessian_II = layer()
    grid = grid_of(weight_OI, 4, 7, True)
    solution = solve("rtn", weight_OI.float(), hessian_II, grid)
    assert torch.equal(solution.weight.codes_OI, quantize_to_grid(weight_OI.float(), grid))
    assert solution.weight.grid is grid and solution.damping == 0 and solution.notes == ()


def test_errors_are_those_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x_IT = torch.randn(12, 50, generator=generator)
    weight_OI, other_OI = torch.randn(2, 5, 12, generator=generator)
    squared = float(((weight_OI - other_OI) @ x_IT).double().square().sum())
    assert squared_error(weight_OI, other_OI, x_IT @ x_IT.T) == pytest.approx(squared, rel=1e-5)
    reference = float((weight_OI @ x_IT).double().square().sum())
    assert relative_error(weight_OI, other_OI, x_IT @ x_IT.T) == pytest.approx(squared / reference, rel=1e-5)
    assert relative_error(weight_OI, other_OI, torch.zeros(12, 12)) == 0
    assert relative_error(weight_OI, torch.zeros_like(weight_OI), x_IT @ x_IT.T) == pytest.approx(1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_column_rounder_agrees_with_the_grid(symmetric):
    weight_OI, _ = layer(40, 12)
    grid = grid_of(weight_OI, 4, 5, symmetric)
    rounder = ColumnRounder(grid, torch.float64)
    codes_OI = quantize_to_grid(weight_OI, grid)
    for column, group in enumerate(grid.group_of_I.tolist()):
        zero_O = 0 if symmetric else grid.zero_OG[:, group].double()
        out_O = torch.empty(40, dtype=torch.float64)
        relative_O = rounder.codes(weight_OI[:, column], group, out_O)
        assert torch.equal(relative_O + zero_O, codes_OI[:, column].double())
        expected_O = (codes_OI[:, column].double() - zero_O) * grid.scale_OG[:, group].double()
        assert torch.equal(rounder.nearest(weight_OI[:, column], group, out_O), expected_O)
