"""Layers of a round in two processes against the same in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from finescale.errors import NumericsError
from finescale.grid import WeightScheme
from finescale.pipeline import layers, rounds
from finescale.pipeline.layers import initial_grid
from finescale.pipeline.plan import LayerPlan
from finescale.pipeline.rounds import _solve_again, solve_round
from finescale.ranks import Ranks
from finescale.recipe import Recipe

SHAPES = (((600, 64), (40, 64)), ((48, 64),), ((64, 160),))
"""Layers by input: several pieces of rows, and a wide one."""
RECIPES = {
    name: Recipe.named(base).with_settings(settings)
    for name, base, *settings in (
        ("plain", "quantease", "solver.sweeps=3"),
        ("symmetric", "gptq", "weights.symmetric=true"),
        ("scales that move", "quantease", "solver.sweeps=3", "solver.refits=1", "weights.group_size=32"),
        ("outliers", "quantease", "solver.sweeps=3", "solver.outliers=0.02", "solver.outlier_bits=8"),
        ("columns", "quantease", "solver.sweeps=3", "solver.outliers=2", "solver.structured=true"),
        ("spqr", "spqr"),
        ("roots", "quantease", "solver.sweeps=3", "calibration.power=0.5"),
        *(
            (
                f"integers {mode}",
                "gptq",
                "weights.symmetric=true",
                "weights.group_size=32",
                "activations.bits=8",
                f"integer_scale.mode={mode}",
            )
            for mode in ("before", "after", "folded")
        ),
        ("rounding", "rtn"),
    )
}


def steps_of(chosen: Recipe) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    scheme = WeightScheme(**chosen.weights.model_dump(include={"bits", "group_size", "symmetric"}))
    steps, moments = [], []
    for number, shapes in enumerate(SHAPES):
        weights = [torch.randn(shape, generator=generator) for shape in shapes]
        plans = [LayerPlan(f"{number}.{n}", f"{number}.{n}", shape, scheme) for n, shape in enumerate(shapes)]
        x_TI = torch.randn(2 * shapes[0][1], shapes[0][1], generator=generator)
        steps.append(list(zip(plans, weights, strict=True)))
        moments.append((x_TI.T @ x_TI / x_TI.shape[0], x_TI.shape[0]))
    return steps, moments


def solved(name: str, ranks: Ranks) -> list:
    steps, moments = steps_of(RECIPES[name])
    results = solve_round(steps, moments, RECIPES[name], torch.float16, 0, ranks)
    assert moments == [], "Hessians are let go of"
    return results


def compare(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in RECIPES:
        alone = solved(name, Ranks(deterministic=True))
        together = solved(name, Ranks(rank, 2, deterministic=True))
        assert [r.record for r in together] == [r.record for r in alone], name
        assert [r.weight.sha256() for r in together] == [r.record["sha256"] for r in alone], name
        assert all(
            torch.equal(a.weight.dequantize(), b.weight.dequantize()) for a, b in zip(alone, together, strict=True)
        )
        assert [a.weight.stored_bits() for a in alone] == [b.weight.stored_bits() for b in together]
        for one, other in zip(solved(name, Ranks()), solved(name, Ranks(rank, 2)), strict=True):
            assert abs(one.record["relative_error"] / other.record["relative_error"] - 1) < 0.02, name
    limit = max(r.record["bound"] for r in solved("integers before", Ranks())) // 2
    layers.INT32_LIMIT = limit  # as if it were so much smaller: amplifiers step down, and layers are solved again
    alone = solved("integers before", Ranks(deterministic=True))
    together = solved("integers before", Ranks(rank, 2, deterministic=True))
    assert [r.record for r in together] == [r.record for r in alone]
    assert max(r.record["bound"] for r in together) < limit
    for name in ("plain", "roots"):
        steps, moments = steps_of(RECIPES[name])
        moments[2] = (torch.full((160, 160), float("inf")), 320)  # only who solves that one notices
        with pytest.raises(NumericsError, match=r"^2\.0: the "):
            solve_round(steps, moments, RECIPES[name], torch.float16, 0, Ranks(rank, 2))
    plan, weight_OI = steps[2][0]
    grid = initial_grid(plan, weight_OI, RECIPES["plain"], torch.float16)
    nan_II = torch.full((160, 160), float("nan")) if rank == 1 else None
    with pytest.raises(NumericsError, match=r"^2\.0: the "):
        _solve_again((plan, weight_OI), nan_II, 1, RECIPES["plain"], Ranks(rank, 2), grid)
    dist.destroy_process_group()


def test_two_processes_solve_what_one_does(tmp_path):
    mp.start_processes(compare, (str(tmp_path),), nprocs=2, start_method="spawn")


def test_a_grid_of_the_whole_layer_is_made_once_for_all_pieces(monkeypatch):
    made = []
    monkeypatch.setattr(rounds, "initial_grid", lambda *given: made.append(given[1].shape[0]) or initial_grid(*given))
    solved("integers before", Ranks(deterministic=True))
    assert made == [600, 40, 48, 64]
    made.clear()
    solved("plain", Ranks(deterministic=True))
    assert made == [512, 88, 40, 48, 64], "others piece by piece"
