"""The solvers on a GPU: codes against the float64 oracle, then seconds at the layer shapes of large models.

    python3 benchmarks/solver_gpu.py --out benchmarks/results

Needs torch, triton and pydantic; finescale itself need not be installed. Writes solver-gpu.json into --out (--name
gives another name). Layers of more than 1.2e14 operations (4e15 with products of parts) are timed on a part of their
rows and scaled up (``rows_timed``), since rows are independent, the factorization of H apart; Algorithm 2 is timed on
evenly spread columns of one sweep. QuantEase starts from GPTQ's solution, as its recipe does, and its time holds
GPTQ's. Objectives are means over the rows. With ``--tune`` the sweep kernel and the widths of a block are timed too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

from finescale.bench import gpu_solver
from finescale.solvers import descent

COLUMNS = (
    "algorithm_2", "gptq", "quantease", "quantease_2xfp16", "quantease_gptq10_2xfp16", "quantease_weight_2xfp16"
)  # fmt: skip

RATIOS = ("speedup_over_algorithm_2_2xfp16", "quantease_2xfp16_over_gptq", "quantease_weight_2xfp16_over_gptq")


def show(row: dict[str, Any]) -> None:
    shape = "x".join(map(str, row["shape"]))
    cells = [f"{row[f'{key}_seconds']:.4f}" if f"{key}_seconds" in row else "-" for key in COLUMNS]
    ratios = [f"{row[key]:.1f}" if key in row else "-" for key in RATIOS]
    base = row["quantease_objective"]
    errors = [f"{row[f'{key}_objective'] / base - 1:+.1e}" if f"{key}_objective" in row else "-" for key in COLUMNS[3:]]
    for found in (row["objectives"], row.get("objectives_of_more_rows", {})):
        for name, of in found.items():
            print(f"{shape:>12} {of['rows']:>6} rows, objective of {name} over float32's less 1: "
                  f"{of['over_float32'] - 1:+.1e} +- {of['noise']:.0e}, {of['rows_elsewhere']:.1%} of the rows ended "
                  "elsewhere")  # fmt: skip
    print(f"{shape:>12} {row['rows_timed']:>6} " + " ".join(f"{cell:>12}" for cell in [*cells, *ratios, *errors]))


def microseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Of one call out of many in a row."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


def tune(device: str) -> dict[str, Any]:
    """Microseconds of the sweep kernels by rows and of the products, and seconds of a layer by the width of a block."""
    from finescale.solvers import cuda_sweep, triton_sweep
    from finescale.solvers.products import Products

    found: dict[str, Any] = {"kernel": [], "products": [], "block": []}
    for rows in (1024, 4096, 11008, 16384):
        tensors = [torch.randn(128, rows, device=device) for _ in range(3)]
        scale_GO, group_B = torch.rand(1, rows, device=device) + 0.5, torch.zeros(128, dtype=torch.int32, device=device)
        inner_BB = torch.randn(128, 128, device=device) * 0.01
        after = (inner_BB, scale_GO, scale_GO.round(), group_B, None, -4.0, 3.0, False)
        entry = {"rows": rows, "triton": microseconds(partial(triton_sweep.quantease_batch, *tensors, *after))}
        parts = torch.empty(384, rows, dtype=torch.float16, device=device)
        for few_rows in (0, 1 << 30):  # programs of 8 and of 4 warps
            cuda_sweep.FEW_ROWS = few_rows
            label = f"cuda, {4 if few_rows else 8} warps"
            entry[label] = microseconds(cuda_sweep.quantease_batch(*tensors[:2], parts, *after))
        found["kernel"].append(entry)
        print("sweep kernel:", entry)
    cuda_sweep.FEW_ROWS = 132 * 32
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
        normalized_II = torch.randn(columns, columns, device=device) * 0.01
        beta_IO = torch.randn(columns, rows, device=device)
        for kind in ("float32", "3xtf32", "2xfp16"):
            products = Products(normalized_II, kind)
            entry = {"rows": rows, "columns": columns, "kind": kind}
            for depth, last in ((128, 1024), (512, columns), (1024, columns), (2048, columns)):
                changes = products.new_changes(depth, rows)
                products.write_changes(products.changes_of(changes, 0, 128), torch.randn(128, rows, device=device))
                add = products.adder(beta_IO, changes, 0, depth, 0, last)
                entry[f"{depth} into {last}"] = microseconds(add, 10)
            found["products"].append(entry)
            print("products:", entry)
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008)):
        for width in (128, 256, 512, 1024, 2048):
            descent.GPU_BLOCK = width
            row = gpu_solver.time_shape(rows, columns, 8, device, 0)
            found["block"].append(row | {"block": width})
            seconds = [f"{key} {row[f'{key}_seconds']:.4f} s" for key in COLUMNS[1:]]
            print(f"block {width:>5}, {rows}x{columns}, 8 sweeps:", ", ".join(seconds))
    descent.GPU_BLOCK = 1024
    return found


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs on different GPUs of one kind as one; a shape's last row counts, with an older row's Algorithm 2 where it
    was not timed again (and the number of rows that it was timed with)."""
    by_shape: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in (row for result in results for row in result["rows"]):
        by_shape[tuple(row["shape"])] = with_algorithm_2(row, by_shape.get(tuple(row["shape"]), {}))
    rows = sorted(by_shape.values(), key=lambda row: row["shape"][0] * row["shape"][1] ** 2)
    missing = [shape for result in results for shape in result["skipped"] if tuple(shape) not in by_shape]
    sums = {"rows": rows, "skipped": missing, "seconds": sum(result["seconds"] for result in results)}
    return results[0] | sums | {"models": gpu_solver.model_seconds(rows), "estimates": gpu_solver.estimates(rows)}


def with_algorithm_2(row: dict[str, Any], older: dict[str, Any]) -> dict[str, Any]:
    if "algorithm_2_seconds" in row or "algorithm_2_seconds" not in older:
        return row
    seconds = older["algorithm_2_seconds"]
    return row | {
        "algorithm_2_seconds": seconds,
        "algorithm_2_columns_timed": older["algorithm_2_columns_timed"],
        "algorithm_2_rows_timed": older.get("algorithm_2_rows_timed", older["rows_timed"]),
        **{f"speedup_over_algorithm_2{k}": seconds / row[f"quantease{k}_seconds"] for k in gpu_solver.KINDS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="solver-gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sweeps", type=int, default=30)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which no new shape is begun")
    parser.add_argument("--shape", action="append", help="OUTPUTSxINPUTS, may be repeated")
    parser.add_argument("--algorithm-2-columns", type=int, default=512, help="timed of Algorithm 2; 0 leaves it out")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--merge", type=Path, nargs="+", help="only puts the rows of these files together")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.merge:
        merged = merge([json.loads(path.read_text()) for path in arguments.merge if path.is_file()])
        (arguments.out / arguments.name).write_text(json.dumps(merged, indent=1) + "\n")
        return
    shapes = [(int(o), int(i)) for o, i in (shape.split("x") for shape in arguments.shape)] if arguments.shape else None
    print(f"{'shape':>12} {'rows':>6} " + " ".join(f"{key[-12:]:>12}" for key in
          ["algorithm_2", "gptq", "quantease", "q_2xfp16", "q_gptq10", "q_weight", "over alg 2", "over gptq",
           "weight/gptq", "obj 2xfp16", "obj gptq10", "obj weight"]))  # fmt: skip

    def on_row(result: dict[str, Any]) -> None:
        show(result["rows"][-1])
        (arguments.out / arguments.name).write_text(json.dumps(result, indent=1) + "\n")

    result = gpu_solver.bench_gpu_solver(
        arguments.device, arguments.sweeps, arguments.budget, shapes, arguments.algorithm_2_columns, on_row
    )
    for check in result["checks"]:
        print(f"check {check['solver']} {check['options']} {check['sweeps']} sweeps: {check['different']} of "
              f"{check['codes']} codes differ, objective ratio {check['objective_ratio']:.7f}")  # fmt: skip
    if arguments.tune:
        result["tune"] = tune(arguments.device)
    (arguments.out / arguments.name).write_text(json.dumps(result, indent=1) + "\n")
    for model, facts in result["models"].items():
        print(model, *(f"  {key}: {terms}" for key, terms in facts["arithmetic"].items()), sep="\n")
    print(f"skipped {result['skipped']}, {result['seconds']:.0f} s, peak GPU memory "
          f"{torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
