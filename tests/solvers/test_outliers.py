"""Outlier-aware QuantEase against slow versions from the formulas, and what outliers promise."""

import pytest
import torch
from pydantic import ValidationError

from finescale.grid import fit_grid, quantize_to_grid
from finescale.solvers.outliers import first_support, largest, largest_eigenvalue, outlier_count
from finescale.solvers.quantease import is_relaxed
from tests.solvers.examples import Rounder, error_of, grid_of, layer, solve

SWEEPS = 8


def slow_support(score_OI, count, structured):
    if structured:
        chosen = sorted(range(score_OI.shape[1]), key=lambda column: -float(score_OI[:, column].sum()))[:count]
        mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
        mask_OI[:, chosen] = True
        return mask_OI
    order = sorted(range(score_OI.numel()), key=lambda index: -float(score_OI.flatten()[index]))[:count]
    mask = torch.zeros(score_OI.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view_as(score_OI)


def best_value(weight_OI, current_OI, hessian_II, column):
    """The minimizer of the squared error in one column, the others fixed."""
    others_OI = weight_OI - current_OI
    others_OI[:, column] = 0
    return weight_OI[:, column] + others_OI @ hessian_II[:, column] / hessian_II[column, column]


def slow_outliers(weight_OI, hessian_II, count, structured, kind, sweeps=SWEEPS, relax_every=3, bits=3, group=-1):
    """Algorithm 3 entry by entry. Returns V = Q + H and its support."""
    support_OI = slow_support(weight_OI.square(), count, structured)
    grid = fit_grid(weight_OI.masked_fill(support_OI, 0), grid_of(weight_OI, bits, group).scheme)
    rounder = Rounder(grid)
    addend_OI = torch.where(support_OI, weight_OI, 0)
    quantized_OI = weight_OI - addend_OI
    constant = 2 * float(torch.linalg.eigvalsh(hessian_II).max())
    for sweep in range(sweeps):
        relaxed = is_relaxed(sweep, sweeps, relax_every)
        for column in range(weight_OI.shape[1]):
            value_OI = quantized_OI + addend_OI
            beta_O = best_value(weight_OI, value_OI, hessian_II, column)
            free_O = support_OI[:, column] if kind == "coordinate" else torch.zeros_like(support_OI[:, 0])
            if kind == "coordinate":
                addend_OI[:, column] = 0
            beta_O = beta_O - addend_OI[:, column]
            nearest_O = rounder.value(rounder.codes(beta_O, int(grid.group_of_I[column])), int(grid.group_of_I[column]))
            quantized_OI[:, column] = torch.where(free_O, beta_O, nearest_O) if not relaxed else beta_O
        if relaxed or sweep == sweeps - 1:
            continue
        if kind == "gradient":
            gradient_OI = 2 * (quantized_OI + addend_OI - weight_OI) @ hessian_II
            moved_OI = addend_OI - gradient_OI / constant
            support_OI = slow_support(moved_OI.square(), count, structured)
            addend_OI = torch.where(support_OI, moved_OI, 0)
        else:
            cost_OI = torch.zeros_like(weight_OI)
            for column in range(weight_OI.shape[1]):
                beta_O = best_value(weight_OI, quantized_OI, hessian_II, column)
                group_index = int(grid.group_of_I[column])
                nearest_O = rounder.value(rounder.codes(beta_O, group_index), group_index)
                cost_OI[:, column] = hessian_II[column, column] * (beta_O - nearest_O).square()
            support_OI = slow_support(cost_OI, count, structured)
    return quantized_OI + addend_OI, support_OI


@pytest.mark.parametrize("kind", ["coordinate", "gradient"])
@pytest.mark.parametrize(("structured", "count"), [(False, 9), (True, 2)])
@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("relax_every", [0, 3])
def test_equals_the_slow_algorithm(kind, structured, count, group, relax_every):
    weight_OI, hessian_II = layer(7, 24, seed=count)
    expected_OI, support_OI = slow_outliers(
        weight_OI, hessian_II, count, structured, kind, relax_every=relax_every, group=group
    )
    options = {"sweeps": SWEEPS, "outliers": count, "structured": structured, "support": kind}
    options |= {"relax_every": relax_every, "block_size": 7}
    weight = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3, group), **options).weight
    torch.testing.assert_close(weight.dequantize().double(), expected_OI, rtol=1e-5, atol=1e-6)
    outside_OI = weight.outliers.dense() == 0
    assert bool(outside_OI[~support_OI].all())
    assert weight.outliers.structured is structured


@pytest.mark.parametrize("start", ["weight", "gptq"])
@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("kind", ["coordinate", "gradient"])
def test_outliers_lower_the_error_and_are_as_many_as_asked(start, structured, kind):
    weight_OI, hessian_II = layer(24, 60, seed=5)
    grid = grid_of(weight_OI)
    plain = solve("quantease", weight_OI, hessian_II, grid, start=start).weight
    errors = [error_of(weight_OI, plain.dequantize(), hessian_II)]
    for share in (0.05, 0.2):
        options = {"outliers": share, "structured": structured, "support": kind, "start": start}
        weight = solve("quantease", weight_OI, hessian_II, grid, **options).weight
        assert weight.outliers.count == round(share * 60) * 24 if structured else round(share * 60 * 24)
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert errors[0] > errors[1] > errors[2]


def test_all_weights_as_outliers_leave_no_error():
    weight_OI, hessian_II = layer()
    weight = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI), outliers=6 * 24, sweeps=2).weight
    torch.testing.assert_close(weight.dequantize().double(), weight_OI, rtol=1e-5, atol=1e-7)


def test_the_range_is_fitted_without_the_outliers():
    weight_OI, hessian_II = layer()
    weight_OI[2, 5] = 50.0
    weight = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI), outliers=1).weight
    assert float(weight.grid.scale_OG[2]) < 0.1
    assert weight.outliers.dense().nonzero().tolist() == [[2, 5]]
    assert abs(float(weight.dequantize()[2, 5]) - 50) < 1


@pytest.mark.parametrize("act_order", [False, True])
def test_act_order_and_groups_of_the_solving_order(act_order):
    weight_OI, hessian_II = layer(12, 24)
    options = {"act_order": act_order, "static_groups": False, "outliers": 10}
    weight = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3, 8), **options).weight
    plain = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3, 8), **(options | {"outliers": 0})).weight
    errors = [error_of(weight_OI, one.dequantize(), hessian_II) for one in (weight, plain)]
    assert errors[0] < errors[1] and weight.outliers.count == 10


def test_numbers_and_shares():
    assert outlier_count(0.01, (100, 50), False) == 50
    assert outlier_count(0.01, (100, 200), True) == 2
    assert outlier_count(3, (100, 50), True) == 3
    assert outlier_count(10_000, (10, 10), False) == 100
    assert outlier_count(0.0, (10, 10), False) == 0


def test_the_first_support_is_the_largest_weights():
    weight_OI, _ = layer()
    for structured, count in ((False, 7), (True, 3)):
        expected_OI = slow_support(weight_OI.square(), count, structured)
        assert torch.equal(first_support(weight_OI, count, structured), expected_OI)
    assert int(largest(weight_OI.T.square(), 5, False).sum()) == 5


def test_the_largest_eigenvalue():
    _, hessian_II = layer(columns=40)
    exact = float(torch.linalg.eigvalsh(hessian_II).max())
    assert float(largest_eigenvalue(hessian_II)) == pytest.approx(exact, rel=1e-3)
    assert float(largest_eigenvalue(torch.zeros(3, 3))) == 1.0


def test_dead_inputs_with_outliers():
    weight_OI, hessian_II = layer(dead=[0, 9])
    grid = grid_of(weight_OI)
    weight = solve("quantease", weight_OI, hessian_II, grid, outliers=5, start="gptq").weight
    assert torch.equal(weight.codes_OI[:, 0], quantize_to_grid(weight_OI, weight.grid)[:, 0])


@pytest.mark.parametrize("options", [{"outliers": 0.02, "start": "gptq"}, {"start": "spqr", "spqr_threshold": 0.3}, {}])
def test_outliers_of_8_bits_are_as_good(options):
    weight_OI, hessian_II = layer(32, 64, seed=6)
    name = "quantease" if options else "spqr"
    grid = grid_of(weight_OI, 3, 16 if options.get("start") != "gptq" else -1)
    wide, narrow = (solve(name, weight_OI, hessian_II, grid, outlier_bits=bits, **options).weight for bits in (16, 8))
    assert narrow.outliers.narrow and narrow.outliers.count == wide.outliers.count > 0
    errors = [error_of(weight_OI, weight.dequantize(), hessian_II) for weight in (wide, narrow)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_outliers_that_8_bits_do_not_hold_are_kept_in_16():
    weight_OI, hessian_II = layer(32, 64, seed=6)
    weight_OI[3, 5] = 1000.0
    found = solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3), outliers=5, outlier_bits=8)
    assert not found.weight.outliers.narrow and any("16 bits" in note for note in found.notes)
    with pytest.raises(ValidationError, match="8 bits"):
        solve("quantease", weight_OI, hessian_II, grid_of(weight_OI, 3), outliers=1, outlier_bits=8, structured=True)
