"""Blocks of tiny models in float64 as transforms see them."""

import torch

from finescale.calibration.capture import bind_arguments
from finescale.grid import WeightScheme
from finescale.models.edges import trace_edges
from finescale.models.experts import unfuse_experts
from finescale.models.families import find_family
from finescale.models.graph import trace_steps
from finescale.models.skeleton import find_blocks
from finescale.transforms import BlockView, Target
from tests.helpers import make_model, some_tokens


def float64_model(kind, seed=0, **changes):
    """A tiny model in float64, its experts taken apart with their weights."""
    model = make_model(kind, torch.float64, seed, **changes)
    family = find_family({"model_type": model.config.model_type})
    if family.experts is not None:
        fused = {name: dict(module.named_parameters()) for name, module in model.named_modules()}
        unfuse_experts(model, family.experts)
        for name, module in model.named_modules():
            if type(module).__name__ == "UnfusedExperts":
                gate_up, down = fused[name]["gate_up_proj"], fused[name]["down_proj"]
                for index, expert in enumerate(module):
                    half = gate_up.shape[1] // 2
                    parts = {
                        family.experts.gate: gate_up[index, :half],
                        family.experts.up: gate_up[index, half:],
                        family.experts.down: down[index],
                    }
                    for leaf, value in parts.items():
                        linear = torch.nn.Linear(value.shape[1], value.shape[0], bias=False, dtype=torch.float64)
                        linear.weight.data.copy_(value.data)
                        setattr(expert, leaf, linear)
    return model.requires_grad_(False)


def block_inputs(model, index=0, batches=2):
    """The hidden states and keyword arguments of a block, a few batches of tokens."""
    _, blocks = find_blocks(model)
    block, seen = blocks[index], []
    original = block.forward

    def record(hidden_BTI, *args, **kwargs):
        seen.append((hidden_BTI, bind_arguments(block, args, kwargs)))
        return original(hidden_BTI, *args, **kwargs)

    block.forward = record
    with torch.no_grad():
        for seed in range(batches):
            model(input_ids=some_tokens(seed=seed), use_cache=False)
    del block.forward
    return block, seen


def make_view(kind, model=None, index=0, stored=torch.float64, **changes):
    """A block of a tiny model and its inputs."""
    block, batches = block_inputs(model or float64_model(kind, **changes), index)
    hidden_BTI, kwargs = batches[0]
    edges = trace_edges(block, hidden_BTI, kwargs)
    steps = trace_steps(block, hidden_BTI, kwargs)
    targets = {path: Target(WeightScheme(), None) for step in steps for path in step.linears}
    return BlockView(block, index, targets, edges, steps, batches, torch.device("cpu"), stored)


def output(block, hidden_BTI, kwargs):
    with torch.no_grad():
        result = block(hidden_BTI, **kwargs)
    return result[0] if isinstance(result, tuple) else result


def assert_function_kept(kind, apply, **changes):
    """Transforming every block changes weights and leaves the model's logits, to 1e-5 relative and better."""
    model = float64_model(kind, **changes)
    tokens_BT = some_tokens(seed=9)
    with torch.no_grad():
        expected = model(input_ids=tokens_BT, use_cache=False).logits
    before = [parameter.clone() for parameter in model.parameters()]
    for index in range(len(find_blocks(model)[1])):
        apply(make_view(kind, model, index))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        found = model(input_ids=tokens_BT, use_cache=False).logits
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5 * 1e-4, error  # float64: far below what is asked for
