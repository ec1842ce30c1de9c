"""SmoothQuant: its scale, that it keeps every family's function, and what it does to outliers."""

import pytest
import torch
from torch import nn

from finescale.transforms.scaling import divide_norm
from finescale.transforms.smoothquant import SmoothQuantOptions, apply_smoothquant, smoothing_scale
from tests.helpers import KINDS
from tests.transforms.blocks import assert_function_kept, make_view


def slow_scale(x_TI, weights, alpha):
    scale = []
    for channel in range(x_TI.shape[1]):
        act = max(abs(float(value)) for value in x_TI[:, channel])
        weight = max(abs(float(value)) for w in weights for value in w[:, channel])
        scale.append(max(act**alpha / weight ** (1 - alpha), 1e-5) if act and weight else 1.0)
    return torch.tensor(scale)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scale_is_the_papers(alpha):
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(9, 6, generator=generator) * torch.tensor([1, 50, 1e-3, 0, 2, 3.0])
    weights = [torch.randn(rows, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 0, 9.0]) for rows in (3, 4)]
    found_I = smoothing_scale(x_TI.abs().amax(0), torch.cat(weights).abs().amax(0), alpha)
    torch.testing.assert_close(found_I, slow_scale(x_TI, weights, alpha))


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_the_same(kind):
    assert_function_kept(kind, lambda view: apply_smoothquant(view, SmoothQuantOptions(alpha=0.7)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_coarse_gains_are_made_up_for_in_the_weights(stored):
    """The gain is rounded to the file's type, the weights take the scale that this gain truly divides by."""
    generator = torch.Generator().manual_seed(0)
    norm, linear = nn.RMSNorm(16).double(), nn.Linear(16, 5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16, generator=generator).to(stored))
        norm.weight[3] = 0
    x_TI = torch.randn(7, 16, generator=generator).double()
    expected = linear(norm(x_TI))
    scale_I = torch.rand(16, generator=generator).double() * 5 + 0.1
    divide_norm(norm, [linear], scale_I, stored)
    assert torch.equal(norm.weight.to(stored).double(), norm.weight)
    torch.testing.assert_close(linear(norm(x_TI)), expected, rtol=1e-12, atol=1e-12)


def test_full_strength_makes_all_channels_equally_large():
    view = make_view("llama")
    apply_smoothquant(view, SmoothQuantOptions(alpha=1.0))
    for edge in view.edges:
        absmax_I = view.ranges(norms=[edge.norm])[edge.norm].absmax_I
        torch.testing.assert_close(absmax_I, torch.ones_like(absmax_I), rtol=1e-4, atol=1e-4)
