"""The benchmark for GPUs does on the CPU what it does there, only slowly."""

import pytest
import torch

from finescale.bench.gpu_solver import (
    SHAPES,
    algorithm_2_seconds,
    bench_gpu_solver,
    check_against_oracle,
    large_layer,
    model_seconds,
)
from finescale.grid import WeightScheme, fit_grid


def test_the_checks_pass_on_the_cpu():
    found = check_against_oracle("cpu", 16, 96)
    assert {check["solver"] for check in found} == {"gptq", "quantease"}
    assert all(check["passed"] and check["different"] <= 2 for check in found)


def test_a_small_shape():
    seen = []
    result = bench_gpu_solver("cpu", 3, 60, [(32, 64)], 16, seen.append)
    row = result["rows"][0]
    assert seen == [row] and row["rows_timed"] == 32 and row["shape"] == [32, 64]
    for key in ("quantease", "quantease_3xtf32", "gptq", "quantease_gptq10_3xtf32", "algorithm_2"):
        assert row[f"{key}_seconds"] > 0
    assert row["quantease_3xtf32_objective"] == pytest.approx(row["quantease_objective"], rel=1e-3)
    assert bench_gpu_solver("cpu", 1, -1, [(32, 64)])["skipped"] == [[32, 64]]


def test_the_layer_has_the_moments_it_says():
    weight_OI, hessian_II = large_layer(8, 64, "cpu")
    assert weight_OI.shape == (8, 64) and torch.equal(hessian_II, hessian_II.T)
    assert float(torch.linalg.eigvalsh(hessian_II.double()).min()) > 0
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    assert algorithm_2_seconds(weight_OI, hessian_II, grid, 64, "cpu") > 0


def test_whole_models_are_summed_over_their_layers():
    rows = [{"shape": [o, i], "quantease_seconds": 1.0} for o, i, _ in SHAPES["Llama-2-7B"].values()]
    assert model_seconds(rows) == {"Llama-2-7B": {"quantease_seconds": 32 * 7.0}}
    assert model_seconds(rows[:-1]) == {}
