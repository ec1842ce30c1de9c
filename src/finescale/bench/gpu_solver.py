"""The solvers on a GPU at the layer shapes of large models, beside the paper's Algorithm 2 in straight torch.

Shape legend: O outputs, I inputs, T tokens, G groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.bench.solver import SEED, synthetic_layer
from finescale.grid import Grid, QuantizedWeight, WeightScheme, fit_grid
from finescale.solvers import descent, find_solver, squared_error
from finescale.solvers.factor import inverse_factor
from finescale.solvers.gptq import GptqOptions
from finescale.solvers.products import has_triton, tf32_products
from finescale.solvers.quantease import QuantEaseOptions

SHAPES: dict[str, dict[str, tuple[int, int, int]]] = {
    "Llama-2-7B": {"q/k/v/o": (4096, 4096, 4), "gate/up": (11008, 4096, 2), "down": (4096, 11008, 1)},
    "Llama-3-8B": {"q/o": (4096, 4096, 2), "k/v": (1024, 4096, 2), "gate/up": (14336, 4096, 2),
                   "down": (4096, 14336, 1)},
    "Llama-2-70B": {"q/o": (8192, 8192, 2), "k/v": (1024, 8192, 2), "gate/up": (28672, 8192, 2),
                    "down": (8192, 28672, 1)},
    "Falcon-180B": {"qkv": (15872, 14848, 1), "dense": (14848, 14848, 1), "up": (59392, 14848, 1),
                    "down": (14848, 59392, 1)},
}  # fmt: skip
"""Outputs, inputs and how many of each a block has."""
BLOCKS = {"Llama-2-7B": 32, "Llama-3-8B": 32, "Llama-2-70B": 80, "Falcon-180B": 80}
MOST_OPERATIONS = {"float32": 1.2e14, "2xfp16": 4e15}
"""A timed run of 30 sweeps has at most so many operations; of larger layers some rows are timed (rows are independent,
and large layers are solved in slabs of rows anyway)."""
KINDS = ("", "_2xfp16")
"""Products of the sweeps: float32, and float16 parts."""
WEIGHT = "quantease_weight_2xfp16"
"""The published start, the unquantized weight; all others start from GPTQ's solution as the recipe does."""
FEW_SWEEPS = (10,)
"""Sweeps from GPTQ's solution, which need no relaxation."""
FEW_OPERATIONS = 2e13
"""Up to here layers are solved once more in other blocks."""
WARM_OPERATIONS = 1e15
"""Up to here they are solved with two sweeps to warm up."""
ENOUGH_ROWS, MORE_ROWS = 4096, 32768
"""Layers of fewer rows than the first are solved with so many once more, to compare objectives: where rounding leads
one code of a row another way at a tie, the row ends in another local minimum, a percent better or worse, so that two
solvers of any precision differ by that over the root of the number of such rows."""
LARGEST_FACTOR = 65536
"""Inputs up to which the float64 factorization of GPTQ fits beside everything else into 80 GB: with 59392 H takes
14 GB, the factorization 28 and its copy in float32 14, with a weight of 14848 rows 7."""
CASES: tuple[tuple[str, int, int, bool, dict[str, Any]], ...] = (
    ("quantease", 3, -1, False, {}),
    ("quantease", 4, 64, True, {"start": "gptq", "relax_every": 0}),
    ("quantease", 3, -1, False, {"products": "3xtf32"}),
    ("quantease", 3, -1, False, {"products": "3xfp16"}),
    ("quantease", 3, -1, False, {"products": "2xfp16"}),
    ("quantease", 3, -1, False, {"products": "2xfp16", "outliers": 0.01, "start": "gptq"}),
    ("quantease", 4, 64, True, {"products": "2xfp16", "start": "gptq"}),
    ("quantease", 3, -1, False, {"outliers": 0.01, "start": "gptq"}),
    ("gptq", 3, 32, False, {}),
    ("gptq", 4, -1, True, {}),
)


def check_against_oracle(device: str, rows: int = 80, columns: int = 320) -> list[dict[str, Any]]:
    """Solve small layers on ``device`` in float32 and on the CPU in float64; codes must be equal except at ties.

    After several sweeps one tie may lead another way, so that the objectives must agree too, and single sweeps (where
    nothing has had time to spread) in all but one code of a thousand.
    """
    found = []
    for name, bits, group, symmetric, options in CASES:
        weight_OI, hessian_II = synthetic_layer(rows, columns)
        grid = fit_grid(weight_OI, WeightScheme(bits, group, symmetric))
        for sweeps in (1, 6) if name == "quantease" else (0,):
            entry = find_solver(name)
            chosen = entry.options(**options | ({"sweeps": sweeps} if sweeps else {}))
            exact = entry.solve(weight_OI.double(), hessian_II.double(), grid, chosen).weight
            there = Grid(grid.scheme, grid.scale_OG.to(device), None if grid.zero_OG is None else
                         grid.zero_OG.to(device), grid.group_of_I.to(device))  # fmt: skip
            fast = entry.solve(weight_OI.to(device), hessian_II.to(device), there, chosen).weight
            different = int((exact.codes_OI != fast.codes_OI.cpu()).sum())
            errors = [squared_error(weight_OI, w.dequantize().cpu(), hessian_II) for w in (exact, fast)]
            found.append(
                {
                    "solver": name, "bits": bits, "group_size": group, "sweeps": sweeps, "options": options,
                    "codes": weight_OI.numel(), "different": different, "objective_ratio": errors[1] / errors[0],
                    "passed": different <= weight_OI.numel() * (0.001 if sweeps < 2 else 0.05)
                    and abs(errors[1] / errors[0] - 1) < (1e-4 if sweeps < 2 else 1e-2),
                }
            )  # fmt: skip
    return found


def large_layer(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight [O, I] and the damped second moments of correlated inputs with a few loud ones, float32,
    made on the device."""
    generator = torch.Generator(device).manual_seed(SEED)
    weight_OI = 0.02 * torch.randn(rows, columns, generator=generator, device=device)
    weight_OI *= torch.empty_like(weight_OI).exponential_(generator=generator).sqrt_()
    hessian_II = torch.zeros(columns, columns, device=device)
    mix_RI = 0.3 * torch.randn(columns // 16 + 1, columns, generator=generator, device=device)
    loud_I = 0.2 + torch.rand(columns, generator=generator, device=device)
    loud_I[:: max(columns // 8, 1)] *= 10
    tokens = min(2 * columns, 16384)
    for start in range(0, tokens, 4096):
        count = min(4096, tokens - start)
        x_TI = torch.randn(count, columns, generator=generator, device=device)
        x_TI += torch.randn(count, mix_RI.shape[0], generator=generator, device=device) @ mix_RI
        x_TI *= loud_I
        with tf32_products(False):
            hessian_II.addmm_(x_TI.T, x_TI, alpha=1 / tokens)
    hessian_II.diagonal().add_(0.01 * float(hessian_II.diagonal().mean()))
    return weight_OI, hessian_II


def seconds_of(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall-clock seconds of one call, and its result."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def algorithm_2_seconds(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, columns: int, device: str) -> float:
    """Seconds of one sweep of the paper's Algorithm 2 in straight torch: one product P^ = Q N, then column by column
    beta_j = P_j - P^_j + sum_{k<j} (Q_old,k - Q_k) N_kj with one matrix-vector product each.

    Args:
        weight_OI: [O, I].
        hessian_II: [I, I].
        grid: per channel.
        columns: evenly spread columns that are timed, scaled up to all (a column's cost is linear in its number).
        device: where all this lies.
    """
    with tf32_products(False):
        diagonal_I = hessian_II.diagonal()
        normalized_II = hessian_II / diagonal_I[None, :]
        target_IO = (weight_OI @ normalized_II).T.contiguous()
        normalized_II.fill_diagonal_(0)
        current_IO = weight_OI.T.contiguous()
        change_IO = torch.zeros_like(current_IO)
        scale_O = grid.scale_OG[:, 0]
        zero_O = torch.zeros_like(scale_O) if grid.zero_OG is None else grid.zero_OG[:, 0].float()
        low, high = grid.scheme.code_min, grid.scheme.code_max
        normalized_II = normalized_II.T.contiguous()  # a step reads one contiguous row
        inputs = weight_OI.shape[1]
        picked = list(range(0, inputs, max(inputs // columns, 1)))

        def step(product_IO: Tensor, j: int) -> bool:
            beta_O = target_IO[j] - product_IO[j]
            if j:
                beta_O += normalized_II[j, :j] @ change_IO[:j]
            code_O = (beta_O / scale_O + zero_O).round().clamp(low, high)
            value_O = (code_O - zero_O) * scale_O
            change_IO[j] = current_IO[j] - value_O
            current_IO[j] = value_O
            return True

        product, product_IO = seconds_of(lambda: normalized_II @ current_IO, device)
        for j in picked[:8]:  # warm up
            step(product_IO, j)
        loop, _ = seconds_of(lambda: all(step(product_IO, j) for j in picked), device)
    return product + loop * inputs / len(picked)


def row_objectives(weight_OI: Tensor, found: QuantizedWeight, hessian_II: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of each row, float64 [O]; products in float32."""
    difference_OI = weight_OI - found.dequantize()
    with tf32_products(False):
        return ((difference_OI @ hessian_II) * difference_OI).sum(1, dtype=torch.float64)


def compare_objectives(exact_O: Tensor, other_O: Tensor) -> dict[str, float]:
    """How the sums over rows compare: ``over_float32``, its standard error ``noise`` (rows are independent), and the
    share of rows that ended elsewhere."""
    difference_O = other_O - exact_O
    total = float(exact_O.sum())
    return {
        "over_float32": 1 + float(difference_O.sum()) / total,
        "noise": float(difference_O.std()) * exact_O.shape[0] ** 0.5 / total,
        "rows_elsewhere": float((difference_O.abs() > 1e-4 * exact_O).double().mean()),
        "rows": exact_O.shape[0],
    }


def compare_products(columns: int, sweeps: int, device: str) -> dict[str, dict[str, float]]:
    """Objectives of ``MORE_ROWS`` rows, ``compare_objectives`` of each kind of products, and of float32 in other
    blocks."""
    weight_OI, hessian_II = large_layer(MORE_ROWS, columns, device)
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))

    def solved(kind: str) -> Tensor:
        entry = find_solver("quantease")
        options = entry.options.model_validate({"sweeps": sweeps, "products": kind, "start": "gptq"})
        solution = entry.solve(weight_OI, hessian_II, grid, options)
        return row_objectives(weight_OI, solution.weight, hessian_II)

    exact_O = solved("float32")
    others = {"other_blocks": _in_other_blocks(weight_OI, hessian_II, grid, sweeps)}
    others |= {kind[1:]: solved(kind[1:]) for kind in KINDS[1:]}
    return {name: compare_objectives(exact_O, other_O) for name, other_O in others.items()}


def _in_other_blocks(weight_OI: Tensor, hessian_II: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """The objectives in float32 with sums in another order: how far rounding alone moves them."""
    entry, before = find_solver("quantease"), descent.GPU_BLOCK
    try:
        descent.GPU_BLOCK = before // 2
        solution = entry.solve(weight_OI, hessian_II, grid, QuantEaseOptions(sweeps=sweeps, start="gptq"))
    finally:
        descent.GPU_BLOCK = before
    return row_objectives(weight_OI, solution.weight, hessian_II)


def operations(sweeps: int, rows: int, columns: int) -> float:
    """Of the sweeps over a layer."""
    return 2.0 * rows * columns * columns * sweeps


def timed_rows(rows: int, columns: int, sweeps: int, kind: str) -> int:
    """All rows, or the largest part of them that is one of equal slabs and within ``MOST_OPERATIONS``."""
    return -(-rows // max(math.ceil(operations(sweeps + 4, rows, columns) / MOST_OPERATIONS[kind]), 1))


def time_shape(rows: int, columns: int, sweeps: int, device: str, algorithm_2_columns: int) -> dict[str, Any]:
    """Seconds of one layer: gptq, quantease in float32 and with products of parts, and Algorithm 2.

    QuantEase starts from GPTQ's solution, whose time it includes; inputs beyond ``LARGEST_FACTOR`` from the weight.
    Float32 may be timed on fewer rows than the others; objectives are compared on those, and given per row.
    """
    timed = timed_rows(rows, columns, sweeps, "2xfp16")
    weight_OI, hessian_II = large_layer(timed, columns, device)
    grid = fit_grid(weight_OI, WeightScheme(3, -1, False))
    few = min(timed, timed_rows(rows, columns, sweeps, "float32"))
    row: dict[str, Any] = {"shape": [rows, columns], "rows_timed": timed, "rows_timed_float32": few, "sweeps": sweeps}
    start = "gptq" if columns <= LARGEST_FACTOR else "weight"
    parts = {"sweeps": sweeps, "products": "2xfp16"}
    runs: dict[str, tuple[str, int, dict[str, Any]]] = {
        "quantease": ("quantease", few, {"sweeps": sweeps, "start": start}),
        "quantease_2xfp16": ("quantease", timed, parts | {"start": start}),
    }
    fixed = 0.0
    if start == "gptq":
        factorize = partial(inverse_factor, hessian_II, GptqOptions().damping)
        if operations(sweeps, rows, columns) < WARM_OPERATIONS:
            factorize()
        fixed = row["factorization_seconds"] = seconds_of(factorize, device)[0]
        runs["gptq"] = ("gptq", timed, {})
        runs[WEIGHT] = ("quantease", timed, parts | {"start": "weight"})
        for count in FEW_SWEEPS:
            runs[f"quantease_gptq{count}_2xfp16"] = (
                "quantease", timed, parts | {"sweeps": count, "start": "gptq", "relax_every": 0}
            )  # fmt: skip
    objectives: dict[str, Tensor] = {}
    for label, (name, count, options) in runs.items():
        entry = find_solver(name)
        solve = partial(entry.solve, weight_OI[:count], hessian_II, grid.rows_slice(slice(count)))
        if operations(sweeps, rows, columns) < WARM_OPERATIONS:
            solve(entry.options(**options | ({"sweeps": 2} if "sweeps" in options else {})))
        seconds, solution = seconds_of(partial(solve, entry.options(**options)), device)
        shared = 0.0 if label == WEIGHT else min(fixed, seconds)  # once for the layer, however many rows it has
        row[f"{label}_seconds"] = shared + (seconds - shared) * rows / count
        objectives[label] = row_objectives(weight_OI[:count], solution.weight, hessian_II)
        row[f"{label}_objective"] = float(objectives[label].mean())
        del solution
    if algorithm_2_columns:
        one = algorithm_2_seconds(weight_OI, hessian_II, grid, min(algorithm_2_columns, columns), device)
        row["algorithm_2_seconds"] = one * sweeps * rows / timed
        row["algorithm_2_columns_timed"] = min(algorithm_2_columns, columns)
        for kind in KINDS:
            row[f"speedup_over_algorithm_2{kind}"] = row["algorithm_2_seconds"] / row[f"quantease{kind}_seconds"]
    others = {f"quantease{kind}": objectives[f"quantease{kind}"][:few] for kind in KINDS[1:]}
    if operations(sweeps, timed, columns) < FEW_OPERATIONS:
        others["other_blocks"] = _in_other_blocks(weight_OI, hessian_II, grid, sweeps)
    row["objectives"] = {
        name.removeprefix("quantease_"): compare_objectives(objectives["quantease"], other_O)
        for name, other_O in others.items()
    }
    if start == "gptq":
        for kind in KINDS:
            row[f"quantease{kind}_over_gptq"] = row[f"quantease{kind}_seconds"] / row["gptq_seconds"]
        row[f"{WEIGHT}_over_gptq"] = row[f"{WEIGHT}_seconds"] / row["gptq_seconds"]
        row["objective_over_gptq"] = row["quantease_2xfp16_objective"] / row["gptq_objective"]
    return row


def model_seconds(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Seconds of solving for whole models, where every shape was timed: blocks times the sum over a block's layers.

    ``arithmetic`` writes the sums out. Layers whose factorization is too large for GPTQ count with all sweeps from
    the weight in every row of QuantEase; with GPTQ itself such a model has no row.
    """
    by_shape = {tuple(row["shape"]): row for row in rows}
    result: dict[str, dict[str, Any]] = {}
    for model, layers in SHAPES.items():
        if not all((outputs, inputs) in by_shape for outputs, inputs, _ in layers.values()):
            continue
        few = [f"quantease_gptq{count}_2xfp16_seconds" for count in FEW_SWEEPS]
        found: dict[str, Any] = {"arithmetic": {}}
        published = f"{WEIGHT}_seconds"
        for label in [*(f"quantease{kind}_seconds" for kind in KINDS), published, *few, "gptq_seconds"]:
            instead = "quantease_2xfp16_seconds" if label in (published, *few) else ""
            parts = [(by_shape[o, i].get(label, by_shape[o, i].get(instead)), count) for o, i, count in layers.values()]
            if all(seconds is not None for seconds, _ in parts):
                found[label] = BLOCKS[model] * sum(seconds * count for seconds, count in parts if seconds is not None)
                terms = " + ".join(f"{count} x {seconds:.3f}" for seconds, count in parts)
                found["arithmetic"][label] = f"{BLOCKS[model]} blocks x ({terms}) s = {found[label]:.0f} s"
        sweeps = rows[0]["sweeps"]
        found["operations"] = BLOCKS[model] * sum(operations(sweeps, o, i) * count for o, i, count in layers.values())
        found["arithmetic"]["operations"] = (
            f"{BLOCKS[model]} blocks x 2 x ({' + '.join(f'{count} x {o} x {i}^2' for o, i, count in layers.values())}) "
            f"x {sweeps} sweeps = {found['operations']:.2e}"
        )
        result[model] = found
    return result


def estimates(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Seconds of 30 sweeps with float16 parts for models with layers that were not timed: their operations at the speed
    of the timed layer with most of them, whose ``arithmetic`` is written out."""
    if not rows:
        return {}
    sweeps = rows[0]["sweeps"]
    largest = max(rows, key=lambda row: operations(sweeps, *row["shape"]))
    seconds = largest["quantease_2xfp16_seconds"]
    speed = operations(sweeps, *largest["shape"]) / seconds
    shape = "x".join(map(str, largest["shape"]))
    found = {}
    for model, layers in SHAPES.items():
        if model not in model_seconds(rows):
            total = BLOCKS[model] * sum(
                count * operations(sweeps, outputs, inputs) for outputs, inputs, count in layers.values()
            )
            found[model] = {
                "seconds": total / speed,
                "arithmetic": f"{total:.2e} operations; {shape} takes {seconds:.3f} s for {speed * seconds:.2e}, "
                f"{speed:.2e} a second; {total:.2e} / {speed:.2e} = {total / speed:.0f} s",
            }
    return found


def bench_gpu_solver(
    device: str = "cuda",
    sweeps: int = 30,
    budget_seconds: float = 120.0,
    shapes: list[tuple[int, int]] | None = None,
    algorithm_2_columns: int = 512,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Check, then time all shapes, the smallest first, until the budget is used; ``on_row`` gets the result so far.

    Raises:
        AssertionError: the codes on the device are not the oracle's.
    """
    started = time.perf_counter()
    checks = check_against_oracle(device)
    failed = [check for check in checks if not check["passed"]]
    assert not failed, f"the device's codes differ from the float64 oracle: {failed}"
    wanted = shapes or list({(o, i) for layers in SHAPES.values() for o, i, _ in layers.values()})
    result: dict[str, Any] = {
        "benchmark": "solver_gpu",
        "seed": SEED,
        "device": device,
        "machine": machine_facts() | {"triton": has_triton()},
        "checks": checks,
        "rows": [],
        "skipped": [],
    }
    for outputs, inputs in sorted(wanted, key=lambda shape: shape[0] * shape[1] ** 2):
        if time.perf_counter() - started > budget_seconds:
            result["skipped"].append([outputs, inputs])
            continue
        row = time_shape(outputs, inputs, sweeps, device, algorithm_2_columns)
        if outputs < ENOUGH_ROWS:
            row["objectives_of_more_rows"] = compare_products(inputs, sweeps, device)
        result["rows"].append(row)
        result |= {"models": model_seconds(result["rows"]), "estimates": estimates(result["rows"])}
        result["seconds"] = time.perf_counter() - started
        if on_row is not None:
            on_row(result)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return result
