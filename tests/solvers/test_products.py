"""Split products are almost float32, and wide blocks change nothing but the order of sums."""

import pytest
import torch

from finescale.grid import WeightScheme, fit_grid
from finescale.solvers import find_solver, relative_error
from finescale.solvers.descent import descend
from finescale.solvers.products import Products, fp16_parts, tf32_parts, tf32_products
from finescale.solvers.quantease import normalize_columns_
from tests.solvers.examples import error_of, grid_of, layer, slow_quantease, solve

KINDS = ("float32", "3xtf32", "3xfp16", "2xfp16")


def test_parts_are_an_exact_sum_and_tf32():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-15, 5).repeat(50)
    high, low = tf32_parts(value)
    assert torch.equal(high.double() + low.double(), value.double())
    assert bool((low.abs() <= value.abs() * 2.0**-10).all())
    assert bool((high.view(torch.int32) & 0x1FFF == 0).all())


def test_fp16_parts():
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-15, 5).repeat(50)
    value.clamp_(-65000, 65000)
    high, low = fp16_parts(value)
    assert high.dtype == low.dtype == torch.float16
    allowed = (value.double().abs() * 2.0**-22).clamp(min=2.0**-25)
    assert bool(((high.double() + low.double() - value.double()).abs() <= allowed).all())


def test_fp16_parts_keep_to_their_magnitudes():
    normalized_II = torch.full((4, 4), 0.5)
    assert Products(normalized_II, "3xfp16").kind == "3xfp16"
    normalized_II[0, 1] = 1e5
    assert Products(normalized_II, "3xfp16").kind == "3xtf32"
    assert Products(normalized_II.double(), "3xfp16").kind == "float32"
    scale_GO = torch.tensor([[1e-3, 0.4, 3e-8, 1e-38], [1e-4, 0.6, 2e-8, 1e-38]])
    weight_IO = torch.tensor([[0.003, -1.0, 1e-7, 0.0], [0.001, 30000.0, 0.0, 0.0]])
    unit_O = Products(torch.zeros(2, 2), "3xfp16").unit_O(weight_IO, scale_GO)
    assert torch.equal(torch.frexp(unit_O).mantissa, torch.full((4,), 0.5))  # powers of two
    assert bool(((unit_O * weight_IO).abs() <= 2.0**14).all())
    assert 0.5 <= unit_O[0] * 1e-3 <= 1 and 0.5 <= unit_O[2] * 3e-8 <= 1


def test_split_products_are_as_precise_as_float32():
    generator = torch.Generator().manual_seed(1)
    normalized_II = torch.randn(300, 300, generator=generator)
    change_CO, beta_IO = torch.randn(40, 50, generator=generator), torch.randn(300, 50, generator=generator)
    change_CO = change_CO.half().float()  # as the sweeps of 2xfp16 make them
    exact_IO = beta_IO.double() + normalized_II[60:100].T.double() @ change_CO.double()
    errors = {}
    for kind in KINDS:
        found_IO = beta_IO.clone()
        products = Products(normalized_II, kind, 20)
        changes = products.new_changes(40, 50)
        for start, end in products.batches(0, 40):
            products.write_changes(products.changes_of(changes, start, end), change_CO[start:end])
        products.add_(found_IO, changes, 60, 100, 0, 120)
        products.add_(found_IO, changes, 60, 100, 120, 300)
        products.add_(found_IO, changes, 60, 100, 300, 300)
        errors[kind] = float((found_IO - exact_IO).norm() / exact_IO.norm())
        assert torch.equal(products.inner(20, 40), normalized_II[20:40, 20:40].T)
    assert errors["3xtf32"] < 4 * errors["float32"] < 4e-6
    assert errors["3xfp16"] < 4 * errors["float32"] and errors["2xfp16"] < 4 * errors["float32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [20, 60, 300])
def test_targets_from_scratch(kind, block):
    generator = torch.Generator().manual_seed(2)
    normalized_II = torch.randn(110, 110, generator=generator) * 0.1
    target_IO, current_IO = torch.randn(2, 110, 30, generator=generator)
    found_IO = torch.full_like(target_IO, torch.nan)
    Products(normalized_II, kind, 20).targets_(found_IO, target_IO, current_IO, block)
    exact_IO = target_IO.double() + normalized_II.T.double() @ (target_IO - current_IO).double()
    torch.testing.assert_close(found_IO.double(), exact_IO, rtol=0, atol=1e-4)


def test_the_setting_of_tf32_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), tf32_products(not before):
        assert torch.backends.cuda.matmul.allow_tf32 is (not before)
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 is before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [6, 12, 18, 60])
def test_blocks_of_several_batches_equal_the_plain_algorithm(block, kind):
    weight_OI, hessian_II = layer(9, 40, seed=block)
    grid = grid_of(weight_OI, 3, 8)
    current_IO = weight_OI.T.clone()
    products = Products(normalize_columns_(hessian_II.clone()), kind, 6)
    group_of_I = grid.group_of_I.tolist()
    descend(weight_OI.T.contiguous(), current_IO, products, grid, group_of_I, [False] * 12, block=block)
    expected_OI = slow_quantease(weight_OI, hessian_II, grid, 12)
    codes_OI = (current_IO.T / grid.scale_OG[:, grid.group_of_I]).round() + grid.zero_OG[:, grid.group_of_I]
    different = int((codes_OI.to(torch.int8) != expected_OI).sum())
    assert different <= (0.03 * weight_OI.numel() if kind == "2xfp16" else 0)  # whose changes are rounded


def test_the_objective_of_split_products():
    weight_OI, hessian_II = layer(40, 200, seed=2)
    grid = grid_of(weight_OI, 3)
    errors = []
    for products in KINDS:
        weight = solve("quantease", weight_OI.float(), hessian_II.float(), grid, products=products).weight
        errors.append(error_of(weight_OI, weight.dequantize(), hessian_II))
    assert errors[1:3] == [pytest.approx(errors[0], rel=1e-4)] * 2
    assert errors[3] == pytest.approx(errors[0], rel=1e-2)  # unrounded sweeps end elsewhere by 2^-12, as ties do


def test_values_follow_changes_that_are_float16_numbers():
    weight_OI, hessian_II = layer(30, 80, seed=4)
    weight_OI, hessian_II = weight_OI.float(), hessian_II.float()
    grid = grid_of(weight_OI, 3)
    products = Products(normalize_columns_(hessian_II.clone()), "2xfp16", 16)
    current_IO, group_of_I = weight_OI.T.clone(), grid.group_of_I.tolist()
    descend(weight_OI.T.contiguous(), current_IO, products, grid, group_of_I, [False, True, False])
    exact_IO = weight_OI.T.clone()
    descend(
        weight_OI.T.contiguous(),
        exact_IO,
        Products(normalize_columns_(hessian_II.clone()), "float32", 16),
        grid,
        group_of_I,
        [False, True, False],
    )
    steps_IO = current_IO / grid.scale_OG.T
    assert float((steps_IO - steps_IO.round()).abs().max()) < 0.01  # off the grid by little
    assert float(((current_IO - exact_IO) / grid.scale_OG.T).abs().gt(0.5).float().mean()) < 0.01
    for relaxed in (True, False):
        before_IO = current_IO.clone()
        descend(weight_OI.T.contiguous(), current_IO, products, grid, group_of_I, [relaxed])
        change_IO = (before_IO - current_IO) * products.unit_O(weight_OI.T, grid.scale_OG.T)
        assert float((change_IO - change_IO.half().float()).abs().max()) < 1e-2 * 2.0**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"outliers": 0.1}], ids=["relaxed", "outliers"])
@pytest.mark.parametrize("kind", ["3xfp16", "2xfp16"])
def test_values_that_float16_parts_do_not_hold_are_noticed(kind, options, dtype):
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(400, 64, generator=generator)
    x_TI[:, 5] = 1e-5 / 40**0.5 * x_TI[:, 8:48].sum(1)  # nearly dead: it should make up for 10^5 times as much
    weight_OI = torch.randn(16, 64, generator=generator).to(dtype)
    hessian_II = (x_TI.T @ x_TI / 400).to(dtype)
    grid, entry = fit_grid(weight_OI, WeightScheme(2, -1, False)), find_solver("quantease")
    assert Products(normalize_columns_(hessian_II.to(torch.float32, copy=True)), kind).kind == kind
    exact = entry.solve(weight_OI, hessian_II, grid, entry.options(sweeps=6, **options))
    found = entry.solve(weight_OI, hessian_II, grid, entry.options(sweeps=6, products=kind, **options))
    if kind == "3xfp16" and dtype == torch.float64:  # which is made in full
        assert found.notes == ()
    else:
        assert found.notes == (f"values beyond what {kind} holds: solved with 3xtf32",)
    errors = [relative_error(weight_OI, s.weight.dequantize().to(dtype), hessian_II) for s in (exact, found)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
    hessian_II.diagonal().add_(0.01 * float(hessian_II.diagonal().mean()))
    assert entry.solve(weight_OI, hessian_II, grid, entry.options(sweeps=6, products=kind, **options)).notes == ()
