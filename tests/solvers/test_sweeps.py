"""The kernels against the loops: on a GPU, or anywhere in triton's interpreter (TRITON_INTERPRET=1)."""

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from finescale.solvers import cuda_sweep, descent, gptq, quantease, triton_sweep
from tests.solvers.examples import error_of, grid_of, layer, solve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(params=["triton", "cuda"])
def on_chip(monkeypatch, request):
    if request.param == "cuda" and not cuda_sweep.supported(torch.device(DEVICE)):
        pytest.skip("the CUDA kernel needs a Hopper GPU")
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_sweep, "ROWS", 16)  # the interpreter takes its time for each program
    monkeypatch.setattr(quantease, "descend", partial(descent.descend, kernel=request.param))
    monkeypatch.setattr(gptq, "_solve_slab", partial(gptq._solve_slab, on_chip=True))


def moved(grid):
    zero_OG = None if grid.zero_OG is None else grid.zero_OG.to(DEVICE)
    tensors = {"scale_OG": grid.scale_OG.to(DEVICE), "zero_OG": zero_OG, "group_of_I": grid.group_of_I.to(DEVICE)}
    return type(grid)(**(vars(grid) | tensors))


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(3, -1, False), (4, 32, True), (2, 16, False)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", {}),
        ("gptq", {"act_order": True}),
        ("quantease", {"sweeps": 6}),
        ("quantease", {"sweeps": 6, "start": "gptq", "act_order": True}),
        ("quantease", {"sweeps": 5, "products": "3xtf32"}),
        ("quantease", {"sweeps": 5, "products": "3xfp16"}),
        ("quantease", {"sweeps": 5, "products": "2xfp16"}),
        ("quantease", {"sweeps": 5, "products": "2xfp16", "outliers": 0.02, "start": "gptq"}),
        ("quantease", {"sweeps": 5, "outliers": 0.02, "start": "gptq"}),
        ("quantease", {"sweeps": 5, "outliers": 0.02, "structured": True}),
        ("quantease", {"sweeps": 5, "outliers": 0.02, "products": "3xfp16"}),
    ],
)
def test_equals_the_loops_in_float64(on_chip, name, options, bits, group, symmetric):
    weight_OI, hessian_II = layer(21, 150, seed=3)
    grid = grid_of(weight_OI, bits, group, symmetric)
    options = options | {"block_size": 32}
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(quantease, "descend", descent.descend)
        plain.setattr(gptq, "_solve_slab", gptq._solve_slab.func)
        expected = solve(name, weight_OI, hessian_II, grid, **options).weight
    found = solve(name, weight_OI.float().to(DEVICE), hessian_II.float().to(DEVICE), moved(grid), **options).weight
    different = int((found.codes_OI.cpu() != expected.codes_OI).sum())
    ties = options.get("products") == "2xfp16"  # a change that is rounded the other way moves others by 2^-12
    assert different <= (0.005 * weight_OI.numel() if ties else 0)
    errors = [error_of(weight_OI, weight.dequantize().cpu(), hessian_II) for weight in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3 if ties else 1e-5)
