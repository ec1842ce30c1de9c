"""Small layers and slow, textbook versions of the solvers, all in float64.

Shape legend: O outputs, I inputs, T tokens.
"""

import torch

from finescale.grid import WeightScheme, fit_grid, fit_group, integerized
from finescale.solvers import find_solver


def layer(rows=6, columns=24, seed=0, dead=(), tokens=None):
    """Weight [O, I] and Hessian [I, I] of correlated inputs, a few of them loud, those in ``dead`` always zero."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = 0.05 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens or 3 * columns, columns, generator=generator, dtype=torch.float64)
    x_TI = x_TI + x_TI @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x_TI[:, ::7] *= 4
    x_TI[:, list(dead)] = 0
    return weight_OI, x_TI.T @ x_TI / x_TI.shape[0]


def grid_of(weight_OI, bits=3, group_size=-1, symmetric=False, clip="minmax", amplifier=None):
    grid = fit_grid(weight_OI, WeightScheme(bits, group_size, symmetric, clip))
    return grid if amplifier is None else integerized(grid, amplifier)


def solve(name, weight_OI, hessian_II, grid, **options):
    entry = find_solver(name)
    return entry.solve(weight_OI, hessian_II, grid, entry.options(**options))


def error_of(weight_OI, value_OI, hessian_II):
    """tr((W - Q) H (W - Q)^T)."""
    difference_OI = weight_OI - value_OI.double()
    return float(torch.trace(difference_OI @ hessian_II @ difference_OI.T))


class Rounder:
    """Nearest codes of one column, from tables of scales and zeros that may change."""

    def __init__(self, grid):
        self.scheme, self.scale_OG = grid.scheme, grid.scale_OG.double().clone()
        self.zero_OG = torch.zeros_like(self.scale_OG) if grid.zero_OG is None else grid.zero_OG.double().clone()

    def codes(self, value_O, group):
        code_O = torch.round(value_O / self.scale_OG[:, group]) + self.zero_OG[:, group]
        # A shift by an integer before or after rounding differs only at ties.
        return code_O.clamp(self.scheme.code_min, self.scheme.code_max)

    def value(self, code_O, group):
        return (code_O - self.zero_OG[:, group]) * self.scale_OG[:, group]


def slow_gptq(weight_OI, hessian_II, grid, damping=0.01, order_I=None, refit=False):
    """GPTQ as published: round a column, spread its error with the inverse of H over the columns that are left, take
    the column out of the inverse by one step of Gaussian elimination.

    ``refit``: fit each group's scale to the compensated weights when its first column comes up; groups are those of
    ``grid.group_of_I``. Returns codes [O, I], scales and zeros.
    """
    columns = weight_OI.shape[1]
    weight_OI = weight_OI.clone()
    damped_II = hessian_II.clone()
    dead_I = damped_II.diagonal() == 0
    damped_II += torch.diag(damping * hessian_II.diagonal().mean() + dead_I.double())
    inverse_II = torch.linalg.inv(damped_II)
    rounder = Rounder(grid)
    codes_OI = torch.zeros_like(weight_OI)
    seen = set()
    left = list(range(columns)) if order_I is None else order_I.tolist()
    while left:
        column = left[0]
        group = int(grid.group_of_I[column])
        if refit and group not in seen:
            seen.add(group)
            scale_O, zero_O = fit_group(weight_OI[:, grid.group_of_I == group], grid.scheme, grid.scale_dtype)
            rounder.scale_OG[:, group] = scale_O.double()
            if zero_O is not None:
                rounder.zero_OG[:, group] = zero_O.double()
        codes_OI[:, column] = rounder.codes(weight_OI[:, column], group)
        value_O = rounder.value(codes_OI[:, column], group)
        error_O = (weight_OI[:, column] - value_O) / inverse_II[column, column]
        left.pop(0)
        for other in left:
            weight_OI[:, other] -= error_O * inverse_II[column, other]
        inverse_II = inverse_II - torch.outer(inverse_II[:, column], inverse_II[column]) / inverse_II[column, column]
    return codes_OI.to(torch.int8), rounder.scale_OG, rounder.zero_OG


def slow_quantease(weight_OI, hessian_II, grid, sweeps, relaxed=(), start_OI=None, order_I=None):
    """Cyclic coordinate descent from its formula, each column from scratch. Returns codes [O, I]."""
    rounder = Rounder(grid)
    current_OI = (weight_OI if start_OI is None else start_OI.double()).clone()
    codes_OI = torch.zeros_like(weight_OI)
    order = range(weight_OI.shape[1]) if order_I is None else order_I.tolist()
    for sweep in range(sweeps):
        for column in order:
            own = hessian_II[column, column]
            group = int(grid.group_of_I[column])
            beta_O = weight_OI[:, column]
            if own > 0:
                others_OI = weight_OI - current_OI
                others_OI[:, column] = 0
                beta_O = beta_O + others_OI @ hessian_II[:, column] / own
            codes_OI[:, column] = rounder.codes(beta_O, group)
            current_OI[:, column] = beta_O if sweep in relaxed else rounder.value(codes_OI[:, column], group)
    return codes_OI.to(torch.int8)
