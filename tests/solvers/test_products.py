"""Split products are almost float32, and wide blocks change nothing but the order of sums."""

import pytest
import torch

from finescale.solvers.descent import descend
from finescale.solvers.products import Products, tf32_parts, tf32_products
from finescale.solvers.quantease import normalize_columns_
from tests.solvers.examples import error_of, grid_of, layer, slow_quantease, solve


def test_parts_are_an_exact_sum_and_tf32():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-15, 5).repeat(50)
    high, low = tf32_parts(value)
    assert torch.equal(high.double() + low.double(), value.double())
    assert bool((low.abs() <= value.abs() * 2.0**-10).all())
    assert bool((high.view(torch.int32) & 0x1FFF == 0).all())


def test_split_products_are_as_precise_as_float32():
    generator = torch.Generator().manual_seed(1)
    normalized_II = torch.randn(300, 300, generator=generator)
    change_CO, beta_IO = torch.randn(40, 50, generator=generator), torch.randn(300, 50, generator=generator)
    exact_IO = beta_IO.double() + normalized_II[60:100].T.double() @ change_CO.double()
    errors = []
    for split in (False, True):
        found_IO = beta_IO.clone()
        products = Products(normalized_II, split)
        products.add_(found_IO, change_CO, 60, 100, 0, 120)
        products.add_(found_IO, change_CO, 60, 100, 120, 300)
        products.add_(found_IO, change_CO, 60, 100, 300, 300)
        errors.append(float((found_IO - exact_IO).norm() / exact_IO.norm()))
    assert errors[1] < 4 * errors[0] < 4e-6
    assert torch.equal(Products(normalized_II, True).inner(3, 9), normalized_II[3:9, 3:9].T)


def test_the_setting_of_tf32_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), tf32_products(not before):
        assert torch.backends.cuda.matmul.allow_tf32 is (not before)
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 is before


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("block", [6, 12, 18, 60])
def test_blocks_of_several_batches_equal_the_plain_algorithm(block, split):
    weight_OI, hessian_II = layer(9, 40, seed=block)
    grid = grid_of(weight_OI, 3, 8)
    current_IO = weight_OI.T.clone()
    products = Products(normalize_columns_(hessian_II.clone()), split)
    group_of_I = grid.group_of_I.tolist()
    descend(weight_OI.T.contiguous(), current_IO, products, grid, group_of_I, [False] * 12, 6, block=block)
    expected_OI = slow_quantease(weight_OI, hessian_II, grid, 12)
    codes_OI = (current_IO.T / grid.scale_OG[:, grid.group_of_I]).round() + grid.zero_OG[:, grid.group_of_I]
    assert torch.equal(codes_OI.to(torch.int8), expected_OI)


def test_the_objective_of_split_products():
    weight_OI, hessian_II = layer(40, 200, seed=2)
    grid = grid_of(weight_OI, 3)
    errors = []
    for products in ("float32", "3xtf32"):
        weight = solve("quantease", weight_OI.float(), hessian_II.float(), grid, products=products).weight
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
