"""Scales fitted anew: the least error for the codes, stored types, and what the solver makes of it."""

from dataclasses import replace

import pytest
import torch

from finescale.errors import InputError, NumericsError
from finescale.grid import QuantizedWeight, quantize_to_grid
from finescale.recipe import Recipe
from finescale.solvers.refit import refit_scales
from tests.solvers.examples import error_of, grid_of, layer, solve


def nearest(weight_OI, grid):
    return QuantizedWeight(quantize_to_grid(weight_OI, grid), grid).dequantize().double()


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_group_gets_the_best_scale(symmetric):
    weight_OI, hessian_II = layer(seed=1)
    grid = grid_of(weight_OI, 3, symmetric=symmetric)
    fitted, value_OI = refit_scales(weight_OI, nearest(weight_OI, grid), hessian_II, grid)
    assert torch.equal(quantize_to_grid(value_OI, fitted), quantize_to_grid(weight_OI, grid))
    for row in range(weight_OI.shape[0]):
        code_I = value_OI[row] / fitted.scale_OG[row].double()
        best = (weight_OI[row] @ hessian_II @ code_I) / (code_I @ hessian_II @ code_I)
        assert float(fitted.scale_OG[row]) == pytest.approx(float(best), rel=1e-6)


def test_groups_one_after_the_other_never_raise_the_error():
    weight_OI, hessian_II = layer(seed=2)
    grid = grid_of(weight_OI, 3, 5)
    errors, value_OI = [], nearest(weight_OI, grid)
    for _ in range(30):
        errors.append(error_of(weight_OI, value_OI, hessian_II))
        grid, value_OI = refit_scales(weight_OI, value_OI, hessian_II, grid)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]
    # At the end all scales of a row solve its normal equations at once.
    groups = grid.scale_OG.shape[1]
    code_OI = value_OI / grid.scale_OG.double()[:, grid.group_of_I]
    for row in range(weight_OI.shape[0]):
        spread_GI = torch.stack([code_OI[row] * (grid.group_of_I == group) for group in range(groups)])
        best_G = torch.linalg.solve(spread_GI @ hessian_II @ spread_GI.T, spread_GI @ hessian_II @ weight_OI[row])
        torch.testing.assert_close(grid.scale_OG[row].double(), best_G, rtol=1e-3, atol=0)


def test_scales_are_what_is_stored_and_positive():
    weight_OI, hessian_II = layer(seed=3, dead=(0, 1, 2, 3, 4))
    half = replace(grid_of(weight_OI, 3, 5), scale_dtype=torch.float16)
    half = replace(half, scale_OG=half.scale_OG.half().float())
    fitted, _ = refit_scales(weight_OI, nearest(weight_OI, half), hessian_II, half)
    assert torch.equal(fitted.scale_OG, fitted.scale_OG.half().float())
    assert torch.equal(fitted.scale_OG[:, 0], half.scale_OG[:, 0])  # a group of dead inputs
    integer = grid_of(weight_OI, 3, 5, True, amplifier=1024)
    fitted, _ = refit_scales(weight_OI, nearest(weight_OI, integer), hessian_II, integer)
    assert torch.equal(fitted.scale_OG * 1024, (fitted.scale_OG * 1024).round()) and bool((fitted.scale_OG > 0).all())
    with pytest.raises(NumericsError, match=r"leave solver\.refits out"):
        refit_scales(weight_OI, weight_OI, hessian_II, replace(integer, folded=True))
    # A grid that is wrong by its sign keeps its scale: the best one would be negative.
    against_OI = nearest(-weight_OI, integer)
    assert bool((refit_scales(weight_OI, against_OI, hessian_II, integer)[0].scale_OG > 0).all())


@pytest.mark.parametrize(
    "options", [{}, {"act_order": True}, {"outliers": 0.05}, {"outliers": 0.05, "structured": True}]
)
@pytest.mark.parametrize("group", [-1, 6])
def test_the_solver_gains(group, options):
    weight_OI, hessian_II = layer(20, 60, seed=4)
    grid = grid_of(weight_OI, 3, group)
    errors = []
    for refits in (0, 1, 2):
        weight = solve("quantease", weight_OI, hessian_II, grid, sweeps=9, refits=refits, **options).weight
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert errors[2] <= errors[1] * 1.001 and errors[1] < 0.99 * errors[0]


def test_rows_are_independent():
    weight_OI, hessian_II = layer(11, seed=5)
    grid = grid_of(weight_OI, 3, 7)
    whole = solve("quantease", weight_OI, hessian_II, grid, refits=2).weight
    rows = slice(3, 8)
    part = solve("quantease", weight_OI[rows], hessian_II, grid.rows_slice(rows), refits=2).weight
    assert torch.equal(part.codes_OI, whole.codes_OI[rows])
    torch.testing.assert_close(part.grid.scale_OG, whole.grid.scale_OG[rows])


@pytest.mark.parametrize(
    "settings", ["integer_scale.mode=folded", "solver.start=spqr", "solver.support=gradient", "solver.refits=-1"]
)
def test_what_does_not_go_together_is_refused(settings):
    with pytest.raises(InputError):
        more = ("weights.symmetric=true", "weights.group_size=128", "activations.bits=8", settings)
        Recipe.named("quantease").with_settings(("solver.refits=1", *more))
