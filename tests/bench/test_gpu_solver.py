"""The benchmark for GPUs does on the CPU what it does there, only slowly."""

import pytest
import torch

from finescale.bench import gpu_solver
from finescale.bench.gpu_solver import (
    SHAPES,
    WEIGHT,
    algorithm_2_seconds,
    bench_gpu_solver,
    check_against_oracle,
    compare_objectives,
    estimates,
    large_layer,
    model_seconds,
    row_objectives,
    time_shape,
    timed_rows,
)
from finescale.grid import WeightScheme, fit_grid
from finescale.solvers import find_solver


def test_the_checks_pass_on_the_cpu():
    found = check_against_oracle("cpu", 16, 96)
    assert {check["solver"] for check in found} == {"gptq", "quantease"}
    assert all(check["passed"] and check["different"] <= 2 for check in found)


def test_a_small_shape(monkeypatch):
    monkeypatch.setattr(gpu_solver, "MORE_ROWS", 512)
    seen = []
    result = bench_gpu_solver("cpu", 3, 60, [(32, 64)], 16, seen.append)
    row = result["rows"][0]
    assert seen == [result] and row["rows_timed"] == 32 and row["shape"] == [32, 64]
    for key in ("quantease", "quantease_2xfp16", WEIGHT, "gptq", "quantease_gptq10_2xfp16", "algorithm_2"):
        assert row[f"{key}_seconds"] > 0
    assert row["objective_over_gptq"] < 1 and row[f"{WEIGHT}_over_gptq"] > 0
    assert row["quantease_2xfp16_objective"] == pytest.approx(row["quantease_objective"], rel=2e-2)
    for objectives in (row["objectives"], row["objectives_of_more_rows"]):
        assert set(objectives) == {"2xfp16", "other_blocks"}
        assert all(found["over_float32"] == pytest.approx(1, rel=1e-2) for found in objectives.values())
    assert row["objectives"]["2xfp16"]["rows"] == 32 and row["objectives_of_more_rows"]["2xfp16"]["rows"] == 512
    assert row["speedup_over_algorithm_2_2xfp16"] == row["algorithm_2_seconds"] / row["quantease_2xfp16_seconds"]
    assert bench_gpu_solver("cpu", 1, -1, [(32, 64)])["skipped"] == [[32, 64]]


def test_inputs_beyond_the_factorization_start_from_the_weight(monkeypatch):
    monkeypatch.setattr(gpu_solver, "LARGEST_FACTOR", 32)
    row = time_shape(32, 64, 2, "cpu", 16)
    assert "gptq_seconds" not in row and "factorization_seconds" not in row and row["algorithm_2_seconds"] > 0
    assert row["quantease_2xfp16_objective"] == pytest.approx(row["quantease_objective"], rel=2e-2)


def test_parts_of_large_layers_are_equal_slabs():
    assert timed_rows(4096, 4096, 30, "float32") == 4096
    assert timed_rows(59392, 14848, 30, "float32") == -(-59392 // 8) and timed_rows(59392, 14848, 30, "2xfp16") == 59392
    assert timed_rows(14848, 59392, 30, "2xfp16") == 14848


def test_the_layer_has_the_moments_it_says():
    weight_OI, hessian_II = large_layer(8, 64, "cpu")
    assert weight_OI.shape == (8, 64) and torch.equal(hessian_II, hessian_II.T)
    assert float(torch.linalg.eigvalsh(hessian_II.double()).min()) > 0
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    assert algorithm_2_seconds(weight_OI, hessian_II, grid, 64, "cpu") > 0


def test_objectives_are_compared_row_by_row():
    exact_O, other_O = torch.tensor([1.0, 1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 1.0, 2.5, 3.9]).double()
    found = compare_objectives(exact_O, other_O)
    assert found["over_float32"] == pytest.approx(1.05) and found["rows_elsewhere"] == 0.5 and found["rows"] == 4
    assert found["noise"] == pytest.approx(float(torch.tensor([0.0, 0.0, 0.5, -0.1]).std()) * 2 / 8)


@pytest.mark.parametrize("kind", ["float32", "3xtf32", "3xfp16", "2xfp16"])
def test_objectives_equal_those_in_float64_up_to_the_noise_of_ties(kind):
    weight_OI, hessian_II = large_layer(256, 512, "cpu")
    grid, entry = fit_grid(weight_OI, WeightScheme(3, -1, False)), find_solver("quantease")
    exact = entry.solve(weight_OI.double(), hessian_II.double(), grid, entry.options(sweeps=8, products=kind)).weight
    found = entry.solve(weight_OI, hessian_II, grid, entry.options(sweeps=8, products=kind)).weight
    rows = [row_objectives(weight_OI, weight, hessian_II) for weight in (exact, found)]
    facts = compare_objectives(*rows)
    if kind == "2xfp16":  # a change that is rounded the other way moves others by 2^-12
        assert facts["rows_elsewhere"] < 0.4 and facts["noise"] < 2e-3
    else:
        assert facts["rows_elsewhere"] < 0.03 and facts["noise"] < 1e-4
    assert abs(facts["over_float32"] - 1) <= 1e-5 + 3 * facts["noise"]


def test_whole_models_are_summed_over_their_layers():
    rows = [{"shape": [o, i], "sweeps": 30, "quantease_seconds": 1.0} for o, i, _ in SHAPES["Llama-2-7B"].values()]
    found = model_seconds(rows)
    assert list(found) == ["Llama-2-7B"] and found["Llama-2-7B"]["quantease_seconds"] == 32 * 7.0
    assert found["Llama-2-7B"]["operations"] == 32 * 60 * (4 * 4096**3 + 2 * 11008 * 4096**2 + 4096 * 11008**2)
    sums = found["Llama-2-7B"]["arithmetic"]
    assert sums["quantease_seconds"] == "32 blocks x (4 x 1.000 + 2 x 1.000 + 1 x 1.000) s = 224 s"
    assert sums["operations"].startswith(
        "32 blocks x 2 x (4 x 4096 x 4096^2 + 2 x 11008 x 4096^2 + 1 x 4096 x 11008^2)"
    )
    assert model_seconds(rows[:-1]) == {}


def test_models_with_layers_that_were_not_timed_are_estimated_by_operations():
    rows = [{"shape": [o, i], "sweeps": 30, "quantease_seconds": 1.0, "quantease_2xfp16_seconds": 1.0}
            for o, i, _ in SHAPES["Llama-2-7B"].values()]  # fmt: skip
    found = estimates(rows)
    assert set(found) == set(SHAPES) - {"Llama-2-7B"}
    share = sum(count * o * i**2 for o, i, count in SHAPES["Falcon-180B"].values()) / (4096 * 11008**2)
    assert found["Falcon-180B"]["seconds"] == pytest.approx(80 * share)
    assert found["Falcon-180B"]["arithmetic"].startswith("3.47e+17 operations; 4096x11008 takes 1.000 s")
    assert estimates([]) == {}
