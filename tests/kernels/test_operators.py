"""Operators defined without torch.library.custom_op: their schema, and what torch.compile makes of them."""

import pytest
import torch

from finescale.kernels.linear import quantize_tokens
from finescale.kernels.norms import add_rms_norm, silu_product


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 64, generator=generator), torch.randn(5, 64, generator=generator), torch.rand(64) + 0.5


def test_schemas_say_what_is_written():
    assert "Tensor(a2!)? residual_TI" in str(quantize_tokens._schema)
    assert "!" not in str(silu_product._schema)


def test_checked_by_torch():
    x_TW, residual_TW, gain_W = tokens()
    torch.library.opcheck(add_rms_norm, (x_TW, residual_TW.clone(), gain_W, 1e-5))
    torch.library.opcheck(silu_product, (x_TW,))
    torch.library.opcheck(quantize_tokens, (x_TW, "rms", residual_TW.clone(), gain_W, None, 1e-5))


@pytest.mark.parametrize("residual", [True, False])
def test_compiled_as_eager(residual):
    def block(x_TW, residual_TW, gain_W):
        y_TW = add_rms_norm(2 * x_TW, residual_TW, gain_W, 1e-5)
        return y_TW if residual_TW is None else y_TW + 3 * residual_TW

    x_TW, residual_TW, gain_W = tokens()
    mine, theirs = (residual_TW.clone(), residual_TW.clone()) if residual else (None, None)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x_TW, theirs, gain_W), block(x_TW, mine, gain_W), rtol=0, atol=0)
    if residual:
        assert not torch.equal(mine, residual_TW)
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


def test_a_gradient_is_not_given_silently():
    x_TW, _, _ = tokens()
    out_TF = silu_product(x_TW.requires_grad_())
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        out_TF.sum().backward()
