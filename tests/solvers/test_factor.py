"""The factor of the inverse Hessian: its definition, blocks, damping."""

import pytest
import torch

from finescale.errors import NumericsError
from finescale.solvers import factor
from finescale.solvers.factor import inverse_factor, inverse_factor_in_blocks_


def hessian(inputs: int, tokens: int) -> torch.Tensor:
    x_TI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(inputs), dtype=torch.float64)
    return x_TI.T @ x_TI / tokens


def test_it_is_the_factor_of_the_inverse():
    matrix_II = hessian(48, 200)
    upper_II, used = inverse_factor(matrix_II, 0.0)
    assert used == 0 and torch.equal(upper_II, upper_II.triu())
    torch.testing.assert_close(upper_II.T @ upper_II, torch.linalg.inv(matrix_II))


@pytest.mark.parametrize("block", [1, 7, 16, 48, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_make_the_same_factor(block, transposed):
    matrix_II = hessian(48, 200)
    expected_II, _ = inverse_factor(matrix_II, 0.0)
    found_II = matrix_II.T.clone(memory_format=torch.contiguous_format) if not transposed else matrix_II.clone().T
    assert inverse_factor_in_blocks_(found_II, block)
    torch.testing.assert_close(found_II, expected_II, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [7, 48])
def test_blocks_notice_what_has_no_factor(block):
    assert not inverse_factor_in_blocks_(-torch.eye(48, dtype=torch.float64), block)
    one_II = hessian(48, 200)
    one_II[3, 3] = -1
    assert not inverse_factor_in_blocks_(one_II, block)


def test_damping_rises_until_there_is_one_and_has_an_end():
    flat_II = torch.ones(8, 8)
    upper_II, used = inverse_factor(flat_II, 0.0)
    damped_II = flat_II.double() + used * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(upper_II.T @ upper_II, torch.linalg.inv(damped_II), rtol=1e-4, atol=1e-4)
    with pytest.raises(NumericsError, match="at any damping"):
        inverse_factor(torch.full((8, 8), float("nan")), 0.0)


@pytest.mark.gpu
def test_a_gpu_factorizes_wide_matrices_in_blocks(monkeypatch):
    matrix_II = hessian(1000, 3000).float()
    expected_II, _ = inverse_factor(matrix_II, 0.01)
    monkeypatch.setattr(factor, "BLOCKED_COLUMNS", 100)
    monkeypatch.setattr(factor, "BLOCK", 128)
    found_II, used = inverse_factor(matrix_II.cuda(), 0.01)
    assert used == 0.01
    torch.testing.assert_close(found_II.cpu(), expected_II, rtol=1e-9, atol=1e-11)
