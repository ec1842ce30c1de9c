"""Learned rounding of one block: below its start, near the best there is, and the same every time."""

import itertools

import pytest
import torch
from torch import nn

from finescale.errors import NumericsError
from finescale.grid import ActivationScheme, InputRule, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid
from finescale.tuning import RoundingOptions, TuningLayer, Windows, tune_rounding
from finescale.tuning.reconstruction import block_loss, fixed_windows, window_batches

CPU = torch.device("cpu")


class Mlp(nn.Module):
    """A small block that returns a tuple, as some do."""

    def __init__(self, width=16, hidden=24):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.requires_grad_(False)

    def forward(self, x_BTC, gain=1.0):
        return (x_BTC + gain * self.down(torch.tanh(self.up(x_BTC))),)


def setup(bits=3, group=8, count=8, symmetric=True):
    """A block with rounded weights, its layers, and windows with the float block's outputs."""
    block = Mlp()
    generator = torch.Generator().manual_seed(2)
    mix_CC = torch.randn(16, 16, generator=generator)
    inputs = [torch.randn(4, 10, 16, generator=generator) @ mix_CC for _ in range(count // 4)]
    targets = [block(x_BTC)[0] for x_BTC in inputs]
    layers = []
    for path in ("up", "down"):
        linear = block.get_submodule(path)
        grid = fit_grid(linear.weight, WeightScheme(bits, group, symmetric))
        weight = QuantizedWeight(quantize_to_grid(linear.weight, grid), grid)
        layers.append(TuningLayer(path, weight, linear.weight.clone()))
        linear.weight.data.copy_(weight.dequantize())
    return block, layers, Windows(inputs, targets)


def tuned(block, layers, windows, rules=None, seed=0, **options):
    defaults = {"iterations": 40, "batch_size": 2, "precision": "float32"}
    chosen = RoundingOptions(**(defaults | options))
    return tune_rounding(block, layers, windows, lambda count: {"gain": 1.0}, rules or {}, chosen, seed, CPU)


def error_of(block, layers, weights, windows):
    for layer, weight in zip(layers, weights, strict=True):
        block.get_submodule(layer.path).weight.data.copy_(weight.dequantize())
    total = 0.0
    for x_BTC, y_BTC in zip(windows.inputs, windows.targets, strict=True):
        out = block(x_BTC)
        total += float(((out[0] if isinstance(out, tuple) else out) - y_BTC).square().mean())
    return total / len(windows.inputs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, False)])
def test_the_error_falls(bits, symmetric, precision):
    block, layers, windows = setup(bits, symmetric=symmetric)
    before = error_of(block, layers, [layer.weight for layer in layers], windows)
    weights, facts = tuned(block, layers, windows, loss="mse", precision=precision, held=8)
    after = error_of(block, layers, weights, windows)
    assert after < 0.7 * before
    rough = 0.05 if precision == "bfloat16" else 1e-5
    assert facts["error_before"] == pytest.approx(before, rel=rough)
    assert facts["error_after"] == pytest.approx(after, rel=rough)


def test_near_the_best_of_all_roundings():
    """One row of eight weights, each rounded down or up: 256 candidates."""
    block = nn.Linear(8, 1, bias=False).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    mix_CC = torch.randn(8, 8, generator=generator)
    inputs = [torch.randn(4, 32, 8, generator=generator) @ mix_CC]
    block.weight.data.copy_(torch.randn(1, 8, generator=generator))
    windows = Windows(inputs, [block(inputs[0])])
    grid = fit_grid(block.weight, WeightScheme(3, -1, True))
    start = QuantizedWeight(quantize_to_grid(block.weight, grid), grid)
    layers = [TuningLayer("", start, block.weight.clone())]
    options = RoundingOptions(iterations=200, batch_size=4, precision="float32", scale_rate=0, loss="mse", checks=50)
    weights, _ = tune_rounding(block, layers, windows, lambda _: {}, {}, options, 0, CPU)
    low_OI = (layers[0].target_OI / grid.scale_OG).floor().clamp(-4, 3)
    errors = []
    for ups in itertools.product((0, 1), repeat=8):
        codes_OI = (low_OI + torch.tensor([ups])).clamp(-4, 3).to(torch.int8)
        errors.append(error_of(block, layers, [QuantizedWeight(codes_OI, grid)], windows))
    found = error_of(block, layers, weights, windows)
    assert found < error_of(block, layers, [start], windows)
    assert found <= sorted(errors)[5]


def test_a_good_start_is_never_made_worse():
    block, layers, windows = setup()
    weights, facts = tuned(block, layers, windows, rate=5.0, bound=4.0, iterations=4, held=8, loss="mse")
    assert facts["error_after"] <= facts["error_before"]
    assert error_of(block, layers, weights, windows) <= error_of(block, layers, [x.weight for x in layers], windows)


def test_the_same_seed_gives_the_same_codes():
    found = [[weight.sha256() for weight in tuned(*setup(), seed=seed)[0]] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_the_block_is_left_as_it_was():
    block, layers, windows = setup()
    block.half()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    rules = {"up": InputRule(ActivationScheme(8))}
    tuned(block, layers, windows, rules=rules, iterations=3)
    after = block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not block.up._forward_pre_hooks


def test_rounded_inputs_are_tuned_for():
    """Tuned with rounded inputs, a block is better on rounded inputs than one tuned without."""
    rules = {path: InputRule(ActivationScheme(4)) for path in ("up", "down")}
    errors = []
    for chosen in (rules, {}):
        block, layers, windows = setup(4, count=16)
        weights, _ = tuned(block, layers, windows, rules=chosen, iterations=100, loss="mse", held=16)
        for path in rules:
            block.get_submodule(path).register_forward_pre_hook(lambda _, args, rule=rules[path]: rule.round(args[0]))
        errors.append(error_of(block, layers, weights, windows))
    assert errors[0] < errors[1]


def test_relative_errors_do_not_let_one_token_rule():
    block, layers, windows = setup(2)
    windows.targets[0][0, 0] *= 1000  # out of reach: its squared error drowns all others
    errors = {}
    for loss in ("mse", "relative"):
        weights, _ = tuned(block, layers, windows, loss=loss, iterations=60, held=8)
        usual = Windows(windows.inputs[1:], windows.targets[1:])
        errors[loss] = error_of(block, layers, weights, usual)
    assert errors["relative"] < errors["mse"]


@pytest.mark.parametrize("first", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["mse", "relative", "balanced"])
def test_losses_are_those_of_their_definitions(loss, first):
    output_BTC, target_BTC = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    target_BTC[0, 0] *= 100
    each, whole, size = [], 0.0, 0.0
    for y_C, t_C in zip(output_BTC.reshape(-1, 4), target_BTC.reshape(-1, 4), strict=True):
        error = sum((float(y) - float(t)) ** 2 for y, t in zip(y_C, t_C, strict=True))
        of_token = sum(float(t) ** 2 for t in t_C)
        each.append(error / of_token)
        whole, size = whole + error, size + of_token
    relative = sum(each) / len(each)
    if first:  # two windows of three tokens
        relative = first * (each[0] + each[3]) / 2 + (1 - first) * (each[1] + each[2] + each[4] + each[5]) / 4
    expected = {"mse": whole / output_BTC.numel(), "relative": relative, "balanced": (relative + whole / size) / 2}
    options = RoundingOptions(loss=loss, first=first, precision="float32")
    found = block_loss(lambda x_BTC: x_BTC, output_BTC, target_BTC, {}, options)
    assert float(found) == pytest.approx(expected[loss], rel=1e-5)


def test_windows_that_judge_are_not_learned_from_if_asked():
    fixed = fixed_windows(8, 4, 2)
    judges = {number for numbers in fixed for number in numbers}
    order = window_batches(8, 2, 0, fixed)
    learned = {number for _ in range(6) for number in next(order)}
    assert learned == set(range(8)) - judges
    order = window_batches(4, 2, 0, fixed_windows(4, 4, 2))  # nothing would remain
    assert {number for _ in range(2) for number in next(order)} == set(range(4))
    found = []
    for unseen in (False, True):
        block, layers, windows = setup()
        weights, _ = tuned(block, layers, windows, held=4, unseen=unseen)
        found.append([weight.sha256() for weight in weights])
    assert found[0] != found[1]


def test_nan_is_named():
    block, layers, windows = setup()
    windows.targets[0][0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        tuned(block, layers, windows, iterations=4, held=8)
    assert not block.up.weight.requires_grad


@pytest.mark.gpu
def test_on_a_gpu_the_error_falls_too():
    block, layers, windows = setup(3)
    block.cuda()
    moved = [TuningLayer(x.path, QuantizedWeight(x.weight.codes_OI.cuda(), _on_gpu(x.weight.grid)), x.target_OI.cuda())
             for x in layers]  # fmt: skip
    chosen = RoundingOptions(iterations=40)
    weights, facts = tune_rounding(block, moved, windows, lambda _: {}, {}, chosen, 0, torch.device("cuda"))
    assert facts["error_after"] < facts["error_before"]
    assert weights[0].codes_OI.is_cuda


def _on_gpu(grid):
    from dataclasses import replace

    zero_OG = None if grid.zero_OG is None else grid.zero_OG.cuda()
    return replace(grid, scale_OG=grid.scale_OG.cuda(), zero_OG=zero_OG, group_of_I=grid.group_of_I.cuda())
