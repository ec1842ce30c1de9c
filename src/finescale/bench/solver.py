"""Seconds of the solvers on one layer, beside the plain column-by-column loop of the same algorithm.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.grid import Grid, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.recipe import Recipe
from finescale.solvers import relative_error
from finescale.solvers.quantease import is_relaxed

SEED = 0


def plain_quantease(
    weight_OI: Tensor, hessian_II: Tensor, grid: Grid, sweeps: int, columns: int | None = None, relax_every: int = 3
) -> QuantizedWeight:
    """QuantEase as its equations stand, one column after the other, in the type of the weight.

    Args:
        weight_OI: float [O, I].
        hessian_II: [I, I], no dead inputs.
        grid: fixed grid.
        sweeps: passes.
        columns: stop each sweep after so many columns (to time a part of it).
        relax_every: as in ``QuantEaseOptions``.
    """
    dtype = weight_OI.dtype
    # Columns are contiguous and H is symmetric, so that nothing is read with a stride: the loop at its best.
    hessian_II = hessian_II.to(dtype)
    current_IO = weight_OI.T.contiguous()
    target_IO = hessian_II @ current_IO
    scale_GO = grid.scale_OG.to(dtype).T.contiguous()
    zero_GO = None if grid.zero_OG is None else grid.zero_OG.to(dtype).T.contiguous()
    group_of_I = grid.group_of_I.tolist()
    diagonal_I = hessian_II.diagonal().tolist()
    for sweep in range(sweeps):
        relaxed = is_relaxed(sweep, sweeps, relax_every)
        for j in range(columns or weight_OI.shape[1]):
            product_O = hessian_II[j] @ current_IO
            beta_O = (target_IO[j] - product_O) / diagonal_I[j] + current_IO[j]
            if not relaxed:
                scale_O = scale_GO[group_of_I[j]]
                zero_O = 0 if zero_GO is None else zero_GO[group_of_I[j]]
                code_O = (beta_O / scale_O + zero_O).round().clamp(grid.scheme.code_min, grid.scheme.code_max)
                beta_O = (code_O - zero_O) * scale_O
            current_IO[j] = beta_O
    current_OI = current_IO.T
    return QuantizedWeight(quantize_to_grid(current_OI, grid), grid)


def synthetic_layer(rows: int, columns: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight [O, I] and the Hessian of correlated inputs with a few loud channels, float32."""
    generator = torch.Generator().manual_seed(SEED)
    weight_OI = 0.02 * torch.randn(rows, columns, generator=generator)
    weight_OI *= torch.empty(rows, columns).exponential_(generator=generator).sqrt()
    x_IT = torch.randn(columns, 2 * columns, generator=generator) * (0.2 + torch.rand(columns, 1, generator=generator))
    mix_IR = torch.randn(columns, columns // 16 + 1, generator=generator)
    x_IT += 0.3 * mix_IR @ torch.randn(mix_IR.shape[1], 2 * columns, generator=generator)
    x_IT[:: max(columns // 8, 1)] *= 10
    return weight_OI.to(device), (x_IT @ x_IT.T / x_IT.shape[1]).to(device)


def timed(work: Callable[[], Any], repeats: int = 1, device: str = "cpu") -> tuple[float, Any]:
    """Smallest of the repeats' seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def bench_solver(
    shapes: list[tuple[int, int]],
    sweeps: int = 30,
    bits: int = 3,
    repeats: int = 1,
    plain_columns: int | None = 64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time rtn, gptq and quantease, and the plain loop.

    Every column of the plain loop costs the same, so that by default ``plain_columns`` columns of one sweep are timed
    and multiplied; None runs all of it.
    """
    rows_out = []
    for rows, columns in shapes:
        weight_OI, hessian_II = synthetic_layer(rows, columns, device)
        grid = fit_grid(weight_OI, WeightScheme(bits, -1, False))
        row: dict[str, Any] = {"shape": [rows, columns], "sweeps": sweeps, "bits": bits}
        for name in ("rtn", "gptq", "quantease"):
            # With the options of the recipe of this name: what users run.
            chosen = (
                Recipe.named(name).with_settings((f"solver.sweeps={sweeps}",) if name == "quantease" else ()).solver
            )
            solve = partial(chosen.entry().solve, weight_OI, hessian_II, grid, chosen.options())
            seconds, solution = timed(solve, repeats, device)
            row[f"{name}_seconds"] = seconds
            row[f"{name}_error"] = relative_error(weight_OI, solution.weight.dequantize(), hessian_II)
        if plain_columns is None:
            row["plain_seconds"], _ = timed(partial(plain_quantease, weight_OI, hessian_II, grid, sweeps), 1, device)
            row["plain_extrapolated"] = False
        else:
            measured = min(plain_columns, columns)
            plain = partial(plain_quantease, weight_OI, hessian_II, grid, 1, measured)
            part, _ = timed(plain, max(repeats, 2), device)
            row["plain_seconds"] = part * sweeps * columns / measured
            row["plain_extrapolated"] = True
        row["speedup_over_plain"] = row["plain_seconds"] / row["quantease_seconds"]
        rows_out.append(row)
    return {"benchmark": "solver", "seed": SEED, "device": device, "machine": machine_facts(), "rows": rows_out}
