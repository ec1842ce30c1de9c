"""The Hopper kernels against the exact product, bit for bit. Run on a GPU machine with `pytest -m gpu`."""

import pytest
import torch

from finescale.kernels import layout, linear  # noqa: F401  (registers the ops)
from finescale.kernels.hopper import gemm
from finescale.kernels.reference import grouped_int32_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
OPS = torch.ops.finescale


def make(tokens, outputs, inputs, group_size, folded, adversarial, seed=0):
    torch.manual_seed(seed)
    device = torch.device("cuda", 0)
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device=device)
    scale = torch.randint(1, 16 if folded else 400, (outputs, groups), dtype=torch.int32, device=device)
    x = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8, device=device)
    if adversarial:  # every bound is reached, in both directions
        codes[: outputs // 2], codes[outputs // 2 :] = -8, 7
        x[: tokens // 2], x[tokens // 2 :] = 127, -127
        # The largest scale that int32 allows everywhere, or that folding allows.
        size = inputs if group_size == -1 else group_size
        scale[:] = min(15 if folded else 32767, (2**31 - 1) // (127 * 8 * inputs), (2**31 - 1) // (127 * 8 * size))
    return x, codes, scale


CASES = [
    (1, 64, 128, 128, False),
    (5, 64, 128, -1, False),
    (3, 200, 576, 64, False),
    (9, 1536, 576, 64, True),
    (16, 4096, 4096, 128, False),
    (33, 1536, 576, 32, True),
    (64, 4096, 11008, 128, False),
    (100, 6144, 4096, 128, False),
    (128, 1000, 1000, 32, False),
    (130, 5120, 5120, 128, True),
    (256, 22016, 4096, 128, True),
    (300, 13824, 5120, 128, False),
    (777, 1001, 777, 64, False),
    (1000, 4096, 4096, -1, False),
    (1000, 4096, 14336, 64, True),
    (7, 28672, 8192, 256, False),
]


@pytest.mark.parametrize("adversarial", [False, True], ids=["random", "bounds"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_exact_product(case, adversarial):
    tokens, outputs, _, group_size, folded = case
    x, codes, scale = make(*case, adversarial)
    packed, packed_x = layout.pack_weight(codes, scale, group_size), layout.pack_tokens(x)
    x_scale, x_sum = torch.rand(tokens, device=x.device) + 0.5, x.sum(1, dtype=torch.int32)
    expected = grouped_int32_product(x, codes, scale, group_size)
    for _ in range(2):  # the second finds what the first left in the workspace
        sums = gemm.run(packed_x, x_scale, x_sum, packed, tokens, outputs, 1024, None, torch.int32, folded)
        assert torch.equal(sums, expected)
    bias = torch.randn(outputs, device=x.device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = OPS.w4a8_product(packed_x, x_scale, x_sum, packed, bias, None, outputs, 1024, folded, dtype)
        assert torch.equal(out, (expected.float() * (x_scale[:, None] / 1024) + bias).to(dtype))
    own = torch.rand(outputs, device=x.device)
    out = OPS.w4a8_product(packed_x, x_scale, x_sum, packed, None, own, outputs, 1, folded, torch.float32)
    assert torch.equal(out, expected.float() * x_scale[:, None] * own)


@pytest.mark.parametrize(
    "case",
    [(8, 1000, 1152, 128, False), (20, 520, 1024, 64, True), (64, 4096, 4096, 128, False), (200, 4096, 2048, 128, True),
     (300, 6144, 1024, 128, True), (96, 3000, 1024, 32, False)],
    ids=str,
)  # fmt: skip
def test_every_variant_equals_the_exact_product(case):
    tokens, outputs, _, group_size, folded = case
    x, codes, scale = make(*case, False)
    packed, packed_x = layout.pack_weight(codes, scale, group_size), layout.pack_tokens(x)
    x_scale, x_sum = torch.rand(tokens, device=x.device) + 0.5, x.sum(1, dtype=torch.int32)
    expected = grouped_int32_product(x, codes, scale, group_size)
    for variant in gemm.variants(tokens, layout.groups_in_block(group_size), folded, 3):
        for _ in range(2):
            sums = gemm.run(
                packed_x, x_scale, x_sum, packed, tokens, outputs, 1, None, torch.int32, folded, variant
            )  # fmt: skip
            assert torch.equal(sums, expected), variant


def test_no_tokens():
    x, codes, scale = make(0, 128, 256, 128, False, False)
    out = OPS.w4a8_product(
        layout.pack_tokens(x), x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32),
        layout.pack_weight(codes, scale, 128), None, None, 128, 1, False, torch.bfloat16,
    )  # fmt: skip
    assert out.shape == (0, 128)


@pytest.mark.parametrize(
    "tokens, inputs",
    [(1, 4096), (7, 576), (300, 11008), (5, 777), (64, 28672), (1500, 4096), (3000, 576), (700, 777), (400, 28672)],
)
@pytest.mark.parametrize("kind", ["plain", "rms", "layer", "silu"])
def test_quantizers(kind, tokens, inputs):
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    x = torch.randn(tokens, 2 * inputs if kind == "silu" else inputs, device=device).bfloat16()
    norm = kind in ("rms", "layer")
    gain = torch.randn(inputs, device=device).bfloat16() if norm else None
    residual = torch.randn(tokens, inputs, device=device).bfloat16() if norm else None
    y, added = x, None
    if norm:
        y = added = x + residual
    if kind == "rms":
        y = gain * (y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    if kind == "layer":
        y = torch.nn.functional.layer_norm(y, (inputs,), gain, None, 1e-5)
    if kind == "silu":
        y = torch.nn.functional.silu(x[:, :inputs]) * x[:, inputs:]
    codes, scale, total = OPS.quantize_tokens(x, kind, residual, gain, None, 1e-5)
    largest = y.float().abs().amax(-1)
    expected_scale = largest / torch.full_like(largest, 127.0)
    expected = (y.float() / expected_scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    got = layout.unpack_tokens(codes, tokens, inputs)
    if kind == "plain":
        assert torch.equal(scale, expected_scale) and torch.equal(got, expected)
    # A norm adds in another order than torch: a bfloat16 step now and then, never more.
    assert (got.int() - expected.int()).abs().max() <= 1
    assert (got != expected).float().mean() < 0.01
    assert torch.equal(total, got.sum(1, dtype=torch.int32))
    assert added is None or torch.equal(residual, added)


@pytest.mark.parametrize("tokens", [2, 2000])
def test_quotients_near_halves_round_as_a_division_does(tokens):
    generator = torch.Generator("cuda").manual_seed(tokens)
    scale = torch.rand(tokens, 1, device="cuda", generator=generator) + 1e-3
    halves = torch.randint(-127, 127, (tokens, 1024), device="cuda", generator=generator) + 0.5
    steps = torch.randint(-2, 3, halves.shape, device="cuda", generator=generator) * 2.0**-23
    x = halves * scale * (1 + steps)
    x[:, 0] = 127 * scale[:, 0]
    codes, got, _ = OPS.quantize_tokens(x, "plain", None, None, None, 0.0)
    expected = x.abs().amax(1) / torch.full_like(got, 127.0)
    assert torch.equal(got, expected)
    exact = (x / expected[:, None]).round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(layout.unpack_tokens(codes, tokens, 1024), exact)


def test_zeros_and_nan_reach_the_scale():
    x = torch.zeros(3, 256, device="cuda")
    x[1, 7] = float("nan")
    x[2, 9] = float("inf")
    codes, scale, _ = OPS.quantize_tokens(x, "plain", None, None, None, 0.0)
    assert scale[0] == 1 and torch.isnan(scale[1]) and torch.isinf(scale[2])
    assert not layout.unpack_tokens(codes, 3, 256)[0].any()


def layer_call(packed, outputs):
    def call(x):
        codes, scale, total = OPS.quantize_tokens(x, "plain", None, None, None, 0.0)
        return OPS.w4a8_product(codes, scale, total, packed, None, None, outputs, 64, False, x.dtype)

    return call


def test_compiled_captured_and_on_another_stream():
    _, codes, scale = make(1, 512, 1024, 128, False, False)
    call = layer_call(layout.pack_weight(codes, scale, 128), 512)
    x = torch.randn(16, 1024, device="cuda").bfloat16()
    expected = call(x)
    assert torch.equal(torch.compile(call, fullgraph=True)(x), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = call(x)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    still = x.clone()
    with torch.cuda.graph(graph):
        captured = call(still)
    for seed in range(3):
        torch.manual_seed(seed)
        still.copy_(torch.randn_like(still))
        graph.replay()
        assert torch.equal(captured, call(still.clone()))
