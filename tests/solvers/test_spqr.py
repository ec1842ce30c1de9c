"""SpQR against a slow version, weight by weight."""

import pytest
import torch
from pydantic import ValidationError

from finescale.errors import InputError, NumericsError
from finescale.grid.bilevel import quantize_scales
from finescale.solvers.factor import inverse_factor
from tests.solvers.examples import error_of, grid_of, layer, solve


def cost(value, diagonal, low, high, top):
    """(w - q)^2 / U_jj^2 of one weight on the min/max grid of a range."""
    step = (high - low) / (2 * top + 1)
    if step == 0:
        return (value / diagonal) ** 2
    zero = min(max(round(-top - 1 - low / step), -top - 1), top)
    code = min(max(round(value / step + zero), -top - 1), top)
    return ((value - (code - zero) * step) / diagonal) ** 2


def slow_likely(row, diagonals, threshold, top):
    """Weights of a group without which it would cost so much less."""

    def total(values, used):
        low, high = min(0.0, *values), max(0.0, *values)
        return sum(cost(values[k], diagonals[k], low, high, top) for k in used)

    if len(row) == 1:
        return [False]
    members = range(len(row))
    base, found = total(row, members), []
    for out in members:
        rest = list(row)
        rest[out] = (sum(row) - row[out]) / (len(row) - 1)
        found.append(base - total(rest, [k for k in members if k != out]) > threshold)
    return found


def slow_spqr(weight_OI, hessian_II, size, bits, threshold, damping, rows, scale_bits=3):
    upper_II, _ = inverse_factor(hessian_II, damping)
    inverse_II = upper_II.T @ upper_II
    weight_OI, top = weight_OI.clone(), 2 ** (bits - 1) - 1
    columns = weight_OI.shape[1]
    diagonal_I = upper_II.diagonal()
    limit = threshold * float((weight_OI.var(0, correction=0) / diagonal_I.square()).mean())
    value_OI, kept = torch.zeros_like(weight_OI), set()
    for j in range(columns):
        if j % size == 0:
            members = list(range(j, min(j + size, columns)))
            lows, scales = [], []
            for row in weight_OI[:, members].tolist():
                likely = slow_likely(row, diagonal_I[members].tolist(), limit, top)
                rest = [v for v, out in zip(row, likely, strict=True) if not out]
                rest = [v if not out else sum(rest) / max(len(rest), 1) for v, out in zip(row, likely, strict=True)]
                lows.append(min(0.0, *rest))
                scales.append((max(0.0, *rest) - lows[-1]) / (2**bits - 1))
            bilevel = quantize_scales(torch.tensor(scales), scale_bits, rows, torch.float32, 1e-38)
            scale_O = bilevel.scale_OG()[:, 0].double()
            zero_O = (-top - 1 - torch.tensor(lows).double() / scale_O).round().clamp(-top - 1, top)
        w_O = weight_OI[:, j].clone()
        q_O = ((w_O / scale_O + zero_O).round().clamp(-top - 1, top) - zero_O) * scale_O
        out_O = ((w_O - q_O) / diagonal_I[j]).square() > limit
        kept |= {(int(o), j) for o in out_O.nonzero()}
        value_OI[:, j] = torch.where(out_O, w_O, q_O)
        error_O = (w_O - value_OI[:, j]) / inverse_II[j, j]
        weight_OI[:, j + 1 :] -= torch.outer(error_O, inverse_II[j, j + 1 :])
        inverse_II = inverse_II - torch.outer(inverse_II[:, j], inverse_II[j]) / inverse_II[j, j]
    return value_OI, kept


@pytest.mark.parametrize(("size", "columns"), [(8, 24), (8, 27), (5, 21)])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("threshold", [0.05, 1e9])
def test_equals_the_slow_version(size, columns, bits, threshold):
    weight_OI, hessian_II = layer(10, columns, seed=bits)
    options = {"threshold": threshold, "damping": 0.1, "scale_rows": 4, "block_size": 16}
    weight = solve("spqr", weight_OI, hessian_II, grid_of(weight_OI, bits, size), **options).weight
    expected_OI, kept = slow_spqr(weight_OI, hessian_II, size, bits, threshold, 0.1, 4)
    torch.testing.assert_close(weight.dequantize().double(), expected_OI, rtol=1e-4, atol=1e-6)
    found = {tuple(index) for index in weight.outliers.dense().nonzero().tolist()}
    assert found <= kept and len(kept) == weight.outliers.count
    assert bool(kept) is (threshold < 1)


@pytest.mark.parametrize("scale_bits", [2, 4, 8])
def test_scales_of_other_bits_equal_the_slow_version(scale_bits):
    weight_OI, hessian_II = layer(10, 24, seed=scale_bits)
    options = {"threshold": 0.2, "damping": 0.1, "scale_rows": 4, "scale_bits": scale_bits}
    weight = solve("spqr", weight_OI, hessian_II, grid_of(weight_OI, 3, 8), **options).weight
    expected_OI, _ = slow_spqr(weight_OI, hessian_II, 8, 3, 0.2, 0.1, 4, scale_bits)
    torch.testing.assert_close(weight.dequantize().double(), expected_OI, rtol=1e-4, atol=1e-6)
    assert weight.grid.bilevel.bits == scale_bits


def test_a_lower_threshold_keeps_more_and_errs_less():
    weight_OI, hessian_II = layer(32, 64, seed=1)
    counts, errors = [], []
    for threshold in (1e9, 0.2, 0.05):
        weight = solve("spqr", weight_OI, hessian_II, grid_of(weight_OI, 3, 16), threshold=threshold).weight
        counts.append(weight.outliers.count)
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert counts[0] == 0 < counts[1] < counts[2]
    assert errors[0] > errors[1] > errors[2]


def test_what_cannot_be_is_refused():
    weight_OI, hessian_II = layer()
    for grid in (grid_of(weight_OI), grid_of(weight_OI, 4, 8, True)):
        with pytest.raises(InputError, match="asymmetric groups"):
            solve("spqr", weight_OI, hessian_II, grid)
    weight = solve("spqr", weight_OI, hessian_II, grid_of(weight_OI, 3, 8)).weight
    with pytest.raises(NumericsError, match="cannot be cut"):
        weight.grid.rows_slice(slice(0, 2))


@pytest.mark.parametrize("threshold", [0.05, 1e9])
def test_coordinate_descent_from_spqr_keeps_the_size_and_lowers_the_error(threshold):
    weight_OI, hessian_II = layer(32, 64, seed=1)
    grid = grid_of(weight_OI, 3, 16)
    first = solve("spqr", weight_OI, hessian_II, grid, threshold=threshold, damping=0.01).weight
    options = {"start": "spqr", "spqr_threshold": threshold, "relax_every": 0}
    weight = solve("quantease", weight_OI, hessian_II, grid, **options).weight
    assert weight.outliers.count == first.outliers.count and weight.stored_bits() == first.stored_bits()
    assert torch.equal(weight.grid.scale_OG, first.grid.scale_OG)
    errors = [error_of(weight_OI, one.dequantize(), hessian_II) for one in (weight, first)]
    assert errors[0] < 0.97 * errors[1]
    for bad in ({"outliers": 0.1}, {"structured": True}, {"act_order": True}, {"support": "gradient"}):
        with pytest.raises(ValidationError, match="brings its own outliers"):
            solve("quantease", weight_OI, hessian_II, grid, **options | bad)
    with pytest.raises(InputError, match="asymmetric groups"):
        solve("quantease", weight_OI, hessian_II, grid_of(weight_OI), **options)
