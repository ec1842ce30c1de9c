"""Hashes of quantized weights that must never change unnoticed.

    python tests/golden/make.py            # says which hashes differ from hashes.json
    python tests/golden/make.py --write    # writes hashes.json; say in the commit why they changed

The problem is made of integers, without a random generator, and solved in float64. Codes that sit so near to a tie
that the order of a sum could tip them are refused: every case is solved again with a slightly disturbed Hessian, and
the hash must not change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]  # runs from a checkout, installed or not

from finescale.grid import (  # noqa: E402
    Grid,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    integerized,
    with_folded_scales,
    with_integer_scales,
)
from finescale.grid.integer_scale import auto_amplifier, group_absolute_sums  # noqa: E402
from finescale.solvers import find_solver  # noqa: E402

FILE = Path(__file__).with_name("hashes.json")
ROWS, COLUMNS, TOKENS = 7, 40, 96
DISTURBANCE = 1e-9

SCHEMES = {
    "w4-channel-asymmetric": WeightScheme(4, -1, False),
    "w3-channel-asymmetric": WeightScheme(3, -1, False),
    "w2-group16-asymmetric-mse": WeightScheme(2, 16, False, "mse"),
    "w4-group8-symmetric": WeightScheme(4, 8, True),
    "w4-group16-symmetric-mse": WeightScheme(4, 16, True, "mse"),
    "w8-group16-symmetric": WeightScheme(8, 16, True),
}
SOLVERS = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq-act-order": ("gptq", {"act_order": True, "block_size": 16}),
    "gptq-dynamic-groups": ("gptq", {"act_order": True, "static_groups": False}),
    "quantease": ("quantease", {}),
    "quantease-from-gptq": ("quantease", {"start": "gptq", "sweeps": 5, "relax_every": 0, "block_size": 16}),
    "quantease-outliers": ("quantease", {"start": "gptq", "sweeps": 5, "outliers": 9}),
    "quantease-columns": ("quantease", {"sweeps": 6, "outliers": 2, "structured": True}),
    "spqr": ("spqr", {"scale_rows": 4}),
    "quantease-act-order": ("quantease", {"act_order": True, "static_groups": False}),
}
INTEGER_SCALES = ("off", "before-auto", "before-1024", "before-heuristic", "after-1024", "after-auto", "folded")


def noise(count: int, seed: int) -> list[int]:
    """Integers in [-2**15, 2**15), from a linear congruential generator modulo 2**64."""
    state, values = seed, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append((state >> 48) - 2**15)
    return values


def problem() -> tuple[Tensor, Tensor]:
    """Weight [O, I], heavy-tailed, and Hessian [I, I] of correlated inputs, float64; the weight is exact in float32."""
    first, second = (torch.tensor(noise(ROWS * COLUMNS, seed)).reshape(ROWS, COLUMNS) >> 5 for seed in (1, 2))
    weight_OI = (first * second).double() / 2**24  # at most 2**20 in magnitude before the division
    x_TI = (torch.tensor(noise(TOKENS * COLUMNS, 3)).reshape(TOKENS, COLUMNS) >> 9).long()
    x_TI = 2 * x_TI + torch.roll(x_TI, 1, 1) + (x_TI[:, :4].sum(1, keepdim=True) >> 2)
    x_TI[:, ::9] *= 6
    return weight_OI, (x_TI.T @ x_TI).double() / 2**10


def quantize(solver: str, scheme: str, mode: str, disturbance: float = 0.0) -> QuantizedWeight:
    """One case; ``disturbance`` is the relative change of the Hessian."""
    weight_OI, hessian_II = problem()
    ripple_II = torch.tensor(noise(COLUMNS * COLUMNS, 4)).reshape(COLUMNS, COLUMNS).double() / 2**15
    hessian_II = hessian_II * (1 + disturbance * (ripple_II + ripple_II.T))
    grid = fit_grid(weight_OI, SCHEMES[scheme], torch.float16)
    when, _, amplifier = mode.partition("-")
    choice = int(amplifier) if amplifier.isdigit() else amplifier
    if when == "before":
        grid = with_integer_scales(grid, weight_OI, choice)
    elif when == "folded":
        grid = with_folded_scales(grid, weight_OI)
    name, options = SOLVERS[solver]
    entry = find_solver(name)
    weight = entry.solve(weight_OI, hessian_II, grid, entry.options(**options)).weight
    if when == "after":
        if choice == "auto":
            choice = _auto_after(weight.codes_OI, weight.grid)
        weight = QuantizedWeight(weight.codes_OI, integerized(weight.grid, choice))
    return weight


def _auto_after(codes_OI: Tensor, grid: Grid) -> int:
    sums_OG = group_absolute_sums(codes_OI, grid.group_of_I, grid.scale_OG.shape[1])
    return auto_amplifier(grid.scale_OG, sums_OG, grid.scale_dtype)


def fingerprint(solver: str, scheme: str, mode: str, disturbance: float = 0.0) -> str:
    """Hash of codes, scales and zero points, and the amplifier."""
    weight = quantize(solver, scheme, mode, disturbance)
    return f"{weight.sha256()} {weight.grid.amplifier or 'float'}"


def cases() -> list[tuple[str, str, str]]:
    """(solver, scheme, integer scales) for all that can go together."""
    return [
        (solver, scheme, mode)
        for solver in SOLVERS
        for scheme in SCHEMES
        for mode in INTEGER_SCALES
        if (mode == "off" or SCHEMES[scheme].symmetric) and _go_together(solver, scheme, mode)
    ]


def _go_together(solver: str, scheme: str, mode: str) -> bool:
    """Outliers go with float scales only, SpQR with asymmetric groups, folded scales with 4 bits and static groups."""
    name, options = SOLVERS[solver]
    if mode == "folded" and (SCHEMES[scheme].bits > 4 or not options.get("static_groups", True)):
        return False
    if not find_solver(name).options(**options).keeps_outliers:
        return True
    return mode == "off" and (name != "spqr" or scheme == "w2-group16-asymmetric-mse")


def main() -> None:
    hashes, shaky = {}, []
    for case in cases():
        name = " ".join(case)
        hashes[name] = fingerprint(*case)
        if any(fingerprint(*case, change) != hashes[name] for change in (DISTURBANCE, -DISTURBANCE)):
            shaky.append(name)
    if shaky:
        raise SystemExit("too near to a tie, change the problem: " + "; ".join(shaky))
    old = json.loads(FILE.read_text()) if FILE.is_file() else {}
    changed = [name for name in sorted(old.keys() | hashes.keys()) if old.get(name) != hashes.get(name)]
    print("\n".join(changed) or f"all {len(hashes)} hashes are as before")
    if "--write" in sys.argv[1:]:
        FILE.write_text(json.dumps(hashes, indent=1) + "\n")
    elif changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
