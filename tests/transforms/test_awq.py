"""AWQ: scale and clip search against loops, and every family's function."""

import pytest
import torch

from finescale.grid import ActivationScheme, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.transforms import Target
from finescale.transforms.awq import AwqOptions, activation_scale, apply_awq, best_scale, clip_limits
from finescale.transforms.probe import common_module, make_probe
from tests.helpers import KINDS
from tests.transforms.blocks import assert_function_kept, make_view


def rtn(weight_OI, scheme):
    grid = fit_grid(weight_OI, scheme)
    return QuantizedWeight(quantize_to_grid(weight_OI.float(), grid), grid).dequantize().to(weight_OI.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_computes_the_same(kind):
    options = AwqOptions(steps=4, clip=False, sequences=2)
    assert_function_kept(kind, lambda view: apply_awq(view, options))


def test_scale_is_normalized():
    scale_I = activation_scale(torch.tensor([0.01, 1.0, 30.0, 0.0]), 0.5)
    expected = torch.tensor([0.1, 1.0, 30**0.5, 1e-4])
    torch.testing.assert_close(scale_I, expected / (30**0.5 * 1e-4) ** 0.5)
    assert float(scale_I.max() * scale_I.min()) == pytest.approx(1.0)


@pytest.mark.parametrize("activations", [None, ActivationScheme(4)])
def test_best_scale_is_the_best_of_a_slow_search(activations):
    view = make_view("llama")
    scheme = WeightScheme(3, -1, False)
    view.targets["mlp.down_proj"] = Target(scheme, activations)
    down = view.block.mlp.down_proj
    x_TI = capture(view, down)
    mean_I = x_TI.abs().mean(0)
    reference_TO = x_TI @ down.weight.T
    errors = []
    for step in range(8):
        scale_I = activation_scale(mean_I, step / 8)
        weight_OI = rtn(down.weight * scale_I, scheme)
        inputs_TI = x_TI / scale_I
        if activations is not None:
            step_T1 = inputs_TI.abs().amax(1, keepdim=True) / 7
            inputs_TI = (inputs_TI / step_T1).round() * step_T1
        errors.append(float((inputs_TI @ weight_OI.T - reference_TO).square().mean()))
    probe = make_probe(view, ["mlp.down_proj"], 2)
    ratio, scale_I = best_scale(probe, view, ["mlp.down_proj"], mean_I, None, 8)
    assert ratio == errors.index(min(errors)) / 8
    torch.testing.assert_close(scale_I, activation_scale(mean_I, ratio))


def capture(view, module):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    view.run_some(2)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("group", [-1, 8, 5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_ranges_equal_the_loop(group, symmetric):
    generator = torch.Generator().manual_seed(2)
    weight_OI, x_TI = torch.randn(3, 16, generator=generator) ** 3, torch.randn(40, 16, generator=generator)
    scheme = WeightScheme(3, group, symmetric)
    found_OG = clip_limits(weight_OI, x_TI.T @ x_TI / 40, Target(scheme), 10, 0.5)
    size = 16 if group == -1 else group
    for row in range(3):
        for number, start in enumerate(range(0, 16, size)):
            part = slice(start, start + size)
            largest, errors = weight_OI[row, part].abs().max(), []
            for step in range(10):
                limit = largest * (1 - step / 20)
                clipped = weight_OI[row : row + 1, part].clamp(-limit, limit)
                change = rtn(clipped, WeightScheme(3, -1, symmetric)) - weight_OI[row, part]
                errors.append(float((x_TI[:, part] @ change[0]).square().mean()))
            best = largest * (1 - errors.index(min(errors)) / 20)
            assert float(found_OG[row, number]) == pytest.approx(float(best))


def test_limits_come_for_all_but_queries_and_keys():
    view = make_view("llama")
    changes = apply_awq(view, AwqOptions(steps=2, sequences=1, clip_steps=3))
    assert set(changes.limits) == set(view.targets) - {"self_attn.q_proj", "self_attn.k_proj"}
    assert set(changes.facts) == {"input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"}


def test_the_smallest_module_around_linears():
    assert common_module(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn"
    assert common_module(["mlp.down_proj"]) == "mlp.down_proj"
    assert common_module(["self_attention.query_key_value", "mlp.dense_h_to_4h"]) == ""
    view = make_view("mixtral")
    experts = [path for path in view.edges[-1].consumers if path in view.targets]
    assert make_probe(view, experts, 1).prefix == "mlp."
