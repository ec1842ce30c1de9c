import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from finescale.calibration.statistics import Moments, collect_moments, matrix_power
from finescale.errors import NumericsError
from tests.helpers import assert_sentence

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=4), st.integers(0, 99))
def test_moments_are_the_mean_of_x_x_transposed(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(batch, length, 7, generator=generator) for batch, length in shapes]
    moments = Moments(torch.zeros(7, 7))
    for x_BTI in batches:
        moments.add(x_BTI)
    x_TI = torch.cat([x_BTI.reshape(-1, 7) for x_BTI in batches]).double()
    assert moments.tokens == x_TI.shape[0]
    assert torch.allclose(moments.hessian().double(), x_TI.T @ x_TI / x_TI.shape[0], rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_a_power_has_the_eigenvectors_of_the_moments(width, tokens, size, seed):
    """Fewer tokens than inputs too: some eigenvalues are zero. Square of the root and cube of the third root."""
    x_TI = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).double() * size
    hessian_II = (x_TI.T @ x_TI / tokens).float()
    for power, times in ((0.5, 2), (1 / 3, 3)):
        powered_II = matrix_power(hessian_II, power)
        assert powered_II.dtype == torch.float32 and torch.allclose(powered_II, powered_II.T, rtol=1e-5, atol=0)
        assert powered_II.diagonal().mean() == pytest.approx(float(hessian_II.diagonal().mean()), rel=1e-4)
        again_II = torch.linalg.matrix_power(powered_II.double(), times)
        again_II *= hessian_II.diagonal().double().mean() / again_II.diagonal().mean()
        assert torch.allclose(again_II.float(), hessian_II, rtol=1e-3, atol=1e-4 * float(hessian_II.diagonal().max()))


def test_the_first_power_is_the_matrix_itself_and_zeros_stay_zeros():
    hessian_II = torch.randn(3, 3)
    assert matrix_power(hessian_II, 1.0) is hessian_II
    assert torch.equal(matrix_power(torch.zeros(3, 3), 0.5), torch.zeros(3, 3))


def test_inputs_that_were_never_active_stay_so_in_a_power():
    x_TI = torch.randn(90, 24) @ torch.randn(24, 24)
    x_TI[:, [3, 10, 11]] = 0
    hessian_II = x_TI.T @ x_TI / 90
    powered_II = matrix_power(hessian_II, 0.5)
    assert torch.equal(powered_II == 0, hessian_II == 0)
    assert powered_II.diagonal().mean() == pytest.approx(float(hessian_II.diagonal().mean()), rel=1e-4)


def test_what_cannot_be_decomposed_is_refused(monkeypatch):
    def fails(_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(NumericsError, match="cannot be decomposed") as caught:
        matrix_power(torch.eye(3), 0.5)
    assert_sentence(str(caught.value))


def test_no_token_gives_zeros():
    assert torch.equal(Moments(torch.zeros(3, 3)).hessian(), torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_made_in_float32(dtype):
    """In half precision, 4096 equal terms would stop growing long before the end."""
    moments = Moments(torch.zeros(2, 2))
    for _ in range(4096):
        moments.add(torch.ones(1, 2, dtype=dtype))
    assert torch.equal(moments.hessian(), torch.ones(2, 2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), Conv1D(4, 6)

    def forward(self, hidden_states, shift):
        return self.second(torch.relu(self.first(hidden_states + shift)))


def test_statistics_are_those_of_each_layers_own_input():
    block, batches = Block(), [(torch.randn(2, 3, 5), {"shift": 1.0}), (torch.randn(1, 3, 5), {"shift": -2.0})]
    found = collect_moments(block, {"first": "a.first", "second": "a.second"}, batches, CPU)
    first = torch.cat([(x_BTI + kwargs["shift"]).reshape(-1, 5) for x_BTI, kwargs in batches]).double()
    with torch.no_grad():
        second = torch.relu(block.first(first.float())).double()
    for name, x_TI in (("first", first), ("second", second)):
        assert found[name].tokens == 9
        assert torch.allclose(found[name].hessian().double(), x_TI.T @ x_TI / 9, rtol=1e-5, atol=1e-6)
    assert not block.first._forward_pre_hooks and not block.second._forward_pre_hooks


def test_nan_in_an_input_names_the_layer_in_full():
    batches = [(torch.full((1, 2, 5), float("nan")), {"shift": 0.0})]
    with pytest.raises(NumericsError, match=r"model\.layers\.7\.first") as caught:
        collect_moments(Block(), {"first": "model.layers.7.first"}, batches, CPU)
    assert_sentence(str(caught.value))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_on_tensor_cores(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x_TI = torch.randn(10000, 512, generator=generator, device="cuda").to(dtype)
    x_TI[:, ::64] *= 30
    moments = Moments(torch.zeros(512, 512, device="cuda"))
    moments.add(x_TI)
    exact_II = x_TI.double().T @ x_TI.double()
    scale_I = exact_II.diagonal().sqrt()
    error_II = (moments.sum_II.double() - exact_II) / (scale_I[:, None] * scale_I[None, :])
    assert float(error_II.abs().max()) < 3e-5  # of what the two inputs' norms allow
    assert moments.tokens == 10000
