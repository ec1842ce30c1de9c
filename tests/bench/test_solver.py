"""The solver benchmark on a tiny layer, and the speed it exists to show."""

import json

import pytest
import torch

from finescale.bench.machine import machine_facts
from finescale.bench.solver import SEED, bench_solver, plain_quantease, synthetic_layer, timed
from finescale.grid import WeightScheme, fit_grid
from finescale.solvers import relative_error
from finescale.solvers.quantease import QuantEaseOptions, solve_quantease


@pytest.mark.parametrize("plain_columns", [8, None])
def test_a_tiny_run_tells_all_that_is_needed_to_repeat_it(plain_columns):
    result = json.loads(json.dumps(bench_solver([(16, 32), (8, 48)], sweeps=3, bits=3, plain_columns=plain_columns)))
    assert result["benchmark"] == "solver" and result["seed"] == SEED and result["device"] == "cpu"
    assert result["machine"] == json.loads(json.dumps(machine_facts()))
    assert {"processor", "threads", "gpu", "python", "torch", "finescale"} <= set(result["machine"])
    assert result["machine"]["torch"] == torch.__version__
    assert [row["shape"] for row in result["rows"]] == [[16, 32], [8, 48]]
    for row in result["rows"]:
        assert (row["sweeps"], row["bits"]) == (3, 3)
        assert row["plain_extrapolated"] is (plain_columns is not None)
        seconds = [row[f"{name}_seconds"] for name in ("rtn", "gptq", "quantease", "plain")]
        assert min(seconds) > 0
        assert row["speedup_over_plain"] == pytest.approx(row["plain_seconds"] / row["quantease_seconds"])
        assert 0 < row["quantease_error"] < row["gptq_error"] < row["rtn_error"] < 1


def test_the_layer_is_the_same_every_time():
    first, second = synthetic_layer(8, 32), synthetic_layer(8, 32)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    weight_OI, hessian_II = first
    assert weight_OI.shape == (8, 32) and hessian_II.shape == (32, 32)
    assert float(torch.linalg.eigvalsh(hessian_II.double())[0]) > 0


def test_the_plain_loop_stops_where_it_is_told():
    weight_OI, hessian_II = (tensor.double() for tensor in synthetic_layer(8, 32))
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    whole = plain_quantease(weight_OI, hessian_II, grid, 1)
    part = plain_quantease(weight_OI, hessian_II, grid, 1, columns=5)
    assert torch.equal(part.codes_OI[:, :5], whole.codes_OI[:, :5])
    assert not torch.equal(part.codes_OI, whole.codes_OI)


def test_the_baseline_and_the_solver_do_the_same_work():
    weight_OI, hessian_II = synthetic_layer(24, 96)
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    values = [
        plain_quantease(weight_OI.double(), hessian_II.double(), grid, 30).dequantize(),
        solve_quantease(weight_OI, hessian_II, grid, QuantEaseOptions()).weight.dequantize(),
    ]
    errors = [relative_error(weight_OI, value_OI, hessian_II) for value_OI in values]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_timed_repeats_and_keeps_the_fastest():
    calls = []
    seconds, result = timed(lambda: calls.append(0) or len(calls), repeats=3)
    assert len(calls) == result == 3 and seconds >= 0


@pytest.mark.slow
def test_thirty_sweeps_are_eight_times_faster_than_the_plain_loop():
    (row,) = bench_solver([(2048, 2048)], sweeps=30, plain_columns=32)["rows"]
    assert row["speedup_over_plain"] >= 8
    assert row["quantease_error"] < row["rtn_error"] / 2
