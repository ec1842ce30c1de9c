"""Kernels of mixtures of experts against exact ones, bit for bit. Run on a GPU machine with `pytest -m gpu`."""

import functools

import pytest
import torch

from finescale.errors import InputError
from finescale.kernels import experts as moe
from finescale.kernels import layout, linear  # noqa: F401  (registers the ops)
from finescale.kernels.hopper import grouped
from finescale.kernels.jit import compile_all
from finescale.kernels.reference import grouped_int32_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
OPS = torch.ops.finescale


def routed_by(kind, tokens, choices, experts):
    """Experts of tokens: random ones, all the same, only few of them, or some that are none."""
    if kind == "one":
        return torch.full((tokens, choices), experts // 2, device="cuda")
    if kind == "few":
        return torch.randint(0, max(1, experts // 4), (tokens, choices), device="cuda") * 4 % experts
    chosen = torch.rand(tokens, experts, device="cuda").topk(choices).indices
    if kind == "some":
        chosen[torch.rand(tokens, choices, device="cuda") < 0.3] = -1
        chosen[torch.rand(tokens, choices, device="cuda") < 0.1] = experts
    return chosen


def places(chosen, experts):
    """The same order in torch."""
    flat = chosen.flatten().tolist()
    row_end, position, first = [], [-1] * len(flat), 0
    for expert in range(experts):
        own = [i for i, e in enumerate(flat) if e == expert]
        for row, index in enumerate(own):
            position[index] = first + row
        row_end.append(first + len(own))
        first = -(-row_end[-1] // 8) * 8
    return torch.tensor(position).view(chosen.shape).int().cuda(), torch.tensor(row_end).int().cuda()


@pytest.mark.parametrize("kind", ["random", "one", "few", "some"])
@pytest.mark.parametrize(
    "tokens, choices, experts",
    [(1, 2, 8), (1, 1, 1), (7, 8, 128), (64, 2, 8), (300, 8, 60), (1000, 4, 1024), (5000, 2, 8)],
)
def test_routes(kind, tokens, choices, experts):
    torch.manual_seed(tokens)
    chosen = routed_by(kind, tokens, choices, experts)
    expected = places(chosen, experts)
    for dtype in (torch.int64, torch.int32):
        position, row_end = moe.route_tokens(chosen.to(dtype), experts)
        assert torch.equal(position, expected[0]) and torch.equal(row_end, expected[1])
    assert int(row_end[-1]) <= moe.routed_rows(tokens, choices, experts)


def test_no_tokens():
    gate_up, down = random_layer(2 * 64, 128, 4, 64, False), random_layer(128, 64, 4, 64, False)
    x, chosen = torch.randn(0, 128, device="cuda").bfloat16(), torch.zeros(0, 2, dtype=torch.int64, device="cuda")
    assert moe.w4a8_experts(x, chosen, chosen.float(), gate_up[0], down[0]).shape == (0, 128)


@pytest.mark.parametrize("tokens, choices, experts, inputs", [(1, 2, 8, 4096), (33, 8, 128, 2048), (50, 2, 5, 777)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizes_as_for_one_weight(tokens, choices, experts, inputs, dtype):
    torch.manual_seed(0)
    chosen = routed_by("some", tokens, choices, experts)
    position, _ = moe.route_tokens(chosen, experts)
    held = position >= 0
    x = torch.randn(tokens, inputs, device="cuda").to(dtype)
    of_token = torch.arange(tokens, device="cuda")[:, None].expand(tokens, choices)[held]
    rows = moe.routed_rows(tokens, choices, experts)
    both = torch.randn(rows, 2 * inputs, device="cuda").to(dtype)
    for kind, source, one in (("plain", x, x), ("silu", both, both)):
        codes, scale, total = moe.quantize_routed(source, position, kind, experts)
        expected = OPS.quantize_tokens(one, kind, None, None, None, 0.0)
        index = of_token if kind == "plain" else position[held].long()
        got, whole = layout.unpack_tokens(codes, rows, inputs), layout.unpack_tokens(expected[0], len(one), inputs)
        assert torch.equal(got[position[held].long()], whole[index])
        assert torch.equal(scale[position[held].long()], expected[1][index])
        assert torch.equal(total[position[held].long()], expected[2][index])


def random_layer(outputs, inputs, experts, group_size, folded, adversarial=False):
    """Packed experts, and their codes and scales."""
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes = torch.randint(-8, 8, (experts, outputs, inputs), dtype=torch.int8, device="cuda")
    scale = torch.randint(1, 16 if folded else 400, (experts, outputs, groups), dtype=torch.int32, device="cuda")
    if adversarial:  # every bound is reached, in both directions
        codes[:, : outputs // 2], codes[:, outputs // 2 :] = -8, 7
        scale[:] = min(15 if folded else 32767, (2**31 - 1) // (127 * 8 * inputs))
    factor = torch.rand(experts, outputs, device="cuda") / 1024
    return moe.pack_experts(list(codes), list(scale), factor, group_size, folded), codes, scale


def random_rows(kind, tokens, choices, experts, inputs, adversarial=False):
    """Activations as a product reads them, their codes, and where each expert's rows are."""
    _, row_end = moe.route_tokens(routed_by(kind, tokens, choices, experts), experts)
    rows = moe.routed_rows(tokens, choices, experts)
    codes = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device="cuda")
    if adversarial:
        codes[: rows // 2], codes[rows // 2 :] = 127, -127
    scale = torch.rand(rows, device="cuda") + 0.5
    bounds, first = [], 0
    for expert, end in enumerate(row_end.tolist()):
        bounds.append((expert, first, end))
        first = -(-end // 8) * 8
    return (layout.pack_tokens(codes), scale, codes.sum(1, dtype=torch.int32), row_end), codes, bounds


CASES = [
    (1, 2, 8, 512, 1024, 128, False),
    (1, 1, 1, 64, 128, -1, True),
    (16, 2, 8, 1000, 1000, 32, False),
    (40, 8, 128, 1536, 2048, 128, False),
    (40, 8, 128, 2048, 768, 128, True),
    (300, 2, 8, 1001, 777, 64, True),
    (700, 2, 8, 2048, 4096, 128, False),
    (1024, 8, 128, 256, 384, 64, False),
]


@functools.cache
def compiled(case):
    """Every variant for a case, compiled side by side."""
    tokens, _, experts, _, _, group_size, folded = case
    found = grouped.variants(tokens, layout.groups_in_block(group_size), folded, 3, experts)
    compile_all(variant.text() for variant in found)
    return found


@pytest.mark.parametrize("adversarial", [False, True], ids=["random", "bounds"])
@pytest.mark.parametrize("kind", ["random", "one", "few", "some"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_variant_equals_the_exact_product(case, kind, adversarial):
    tokens, choices, experts, outputs, inputs, group_size, folded = case
    torch.manual_seed(0)
    layer, weights, scales = random_layer(outputs, inputs, experts, group_size, folded, adversarial)
    routed, codes, bounds = random_rows(kind, tokens, choices, experts, inputs, adversarial)
    expected = {
        (first, end): grouped_int32_product(codes[first:end], weights[expert], scales[expert], group_size)
        for expert, first, end in bounds
        if end > first
    }
    for variant in compiled(case):
        for _ in range(2):  # the second finds what the first left in the workspace
            sums = grouped.run(
                *routed, layer.packed, layer.factor_EO, outputs, tokens, choices, torch.int32, folded, variant
            )
            assert all(torch.equal(sums[first:end], exact) for (first, end), exact in expected.items()), variant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_outputs_are_rounded_once(case, dtype):
    tokens, choices, experts, outputs, inputs, group_size, folded = case
    layer, weights, scales = random_layer(outputs, inputs, experts, group_size, folded)
    routed, codes, bounds = random_rows("random", tokens, choices, experts, inputs)
    y = moe.w4a8_grouped_product(*routed, layer.packed, layer.factor_EO, tokens, choices, folded, dtype)
    for expert, first, end in bounds:
        sums = grouped_int32_product(codes[first:end], weights[expert], scales[expert], group_size).float()
        exact = sums * routed[1][first:end, None] * layer.factor_EO[expert]
        assert torch.equal(y[first:end], exact.to(dtype))


@pytest.mark.parametrize("outputs", [2048, 777])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_combines_in_the_order_of_choices(dtype, outputs):
    torch.manual_seed(0)
    chosen = routed_by("some", 50, 8, 60)
    position, _ = moe.route_tokens(chosen, 60)
    y = torch.randn(moe.routed_rows(50, 8, 60), outputs, device="cuda").to(dtype)
    weight = torch.rand(50, 8, device="cuda")
    held = (position >= 0)[..., None]
    expected = moe.combined(torch.where(held, y[position.clamp(min=0).long()], 0), weight)
    assert torch.equal(moe.combine_experts(y, position, weight), expected)


def mixture(tokens, choices, experts, hidden, width, kind="random"):
    torch.manual_seed(0)
    gate_up = random_layer(2 * width, hidden, experts, 64, False)[0]
    down = random_layer(hidden, width, experts, 64, False)[0]
    gate_up = gate_up._replace(factor_EO=gate_up.factor_EO / 500)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    chosen = routed_by(kind, tokens, choices, experts)
    return x, chosen, torch.rand(tokens, choices, device="cuda"), gate_up, down


@pytest.mark.parametrize("kind", ["random", "one", "some"])
@pytest.mark.parametrize("tokens, choices, experts, hidden, width", [(1, 2, 8, 1024, 1792), (37, 8, 32, 768, 200)])
def test_the_whole_feed_forward(tokens, choices, experts, hidden, width, kind):
    given = mixture(tokens, choices, experts, hidden, width, kind)
    out, exact = moe.w4a8_experts(*given), moe.exact_experts(*given)
    # silu is approximated, by less than a step of bfloat16, which can move a code by one.
    assert (out.float() - exact.float()).abs().max() <= 0.01 * exact.float().abs().max()
    assert torch.equal(out, moe.w4a8_experts(*given))


def test_compiled_captured_and_on_another_stream():
    x, chosen, weight, gate_up, down = mixture(16, 4, 16, 512, 384)
    expected = moe.w4a8_experts(x, chosen, weight, gate_up, down)
    compiled = torch.compile(moe.w4a8_experts, fullgraph=True)
    assert torch.equal(compiled(x, chosen, weight, gate_up, down), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = moe.w4a8_experts(x, chosen, weight, gate_up, down)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe.w4a8_experts(x, chosen, weight, gate_up, down)
    for kind in ("random", "one", "some"):
        x.copy_(torch.randn_like(x))
        chosen.copy_(routed_by(kind, 16, 4, 16))
        graph.replay()
        assert torch.equal(captured, moe.w4a8_experts(x.clone(), chosen.clone(), weight, gate_up, down))


def test_refusals():
    x, chosen, weight, gate_up, down = mixture(4, 2, 4, 256, 64)
    with pytest.raises(InputError, match="int32 or int64"):
        moe.route_tokens(chosen.float(), 4)
    with pytest.raises(InputError, match="1 to 1024"):
        moe.route_tokens(chosen, 2000)
    position, row_end = moe.route_tokens(chosen, 4)
    with pytest.raises(InputError, match="plain or silu"):
        moe.quantize_routed(x, position, "rms", 4)
    with pytest.raises(InputError, match="do not fit"):
        moe.quantize_routed(x[:3], position, "plain", 4)
    routed = moe.quantize_routed(x, position, "plain", 4)
    with pytest.raises(InputError, match="do not fit"):
        moe.w4a8_grouped_product(*routed, row_end, gate_up.packed, gate_up.factor_EO, 9, 2, False, x.dtype)
    with pytest.raises(InputError, match="ends of rows"):
        moe.w4a8_grouped_product(*routed, row_end[:3], gate_up.packed, gate_up.factor_EO, 4, 2, False, x.dtype)
    with pytest.raises(InputError, match="do not fit"):
        moe.w4a8_experts(x, chosen, weight, down, gate_up)
