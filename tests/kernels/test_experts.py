"""Mixtures of experts without a GPU: the exact feed-forward, packing, shapes, and who computes what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from finescale.errors import InputError
from finescale.grid import ActivationScheme, quantize_tokens
from finescale.kernels import experts as moe
from finescale.kernels.hopper import grouped
from finescale.kernels.hopper.gemm import LARGEST_TILE, SHARED_BYTES
from finescale.kernels.reference import integer_scale_linear

EXPERTS, CHOICES, HIDDEN, WIDTH, GROUP = 5, 2, 96, 80, 32


def random_layer(outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (EXPERTS, outputs, inputs), dtype=torch.int8, generator=generator)
    scale_shape = (EXPERTS, outputs, -(-inputs // GROUP))
    return codes, torch.randint(1, 99, scale_shape, dtype=torch.int32, generator=generator)


def packed(codes, scales, amplifier):
    factor = torch.full(codes.shape[:2], 1 / amplifier)
    return moe.pack_experts(list(codes), list(scales), factor, GROUP, False)


@pytest.fixture
def mixture():
    (first, first_scale), (second, second_scale) = random_layer(2 * WIDTH, HIDDEN, 0), random_layer(HIDDEN, WIDTH, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(11, HIDDEN, generator=generator)
    chosen = torch.rand(11, EXPERTS, generator=generator).topk(CHOICES).indices
    return x, chosen, torch.rand(11, CHOICES, generator=generator), (first, first_scale), (second, second_scale)


def by_layers(x, chosen, weights, first, second):
    """Token by token, on the exact product of single layers."""

    def linear(x, layer, expert, amplifier):
        codes, scale = quantize_tokens(x, ActivationScheme(8))
        return integer_scale_linear(codes, scale, layer[0][expert], layer[1][expert], GROUP, amplifier)

    out = torch.zeros(x.shape[0], second[0].shape[1])
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if 0 <= expert < EXPERTS:
                both = linear(x[token : token + 1], first, expert, 512)
                inner = torch.nn.functional.silu(both[:, :WIDTH]) * both[:, WIDTH:]
                out[token] += linear(inner, second, expert, 4096)[0] * torch.tensor(weight)
    return out


def test_the_feed_forward_is_that_of_single_layers(mixture):
    x, chosen, weights, first, second = mixture
    gate_up, down = packed(*first, 512), packed(*second, 4096)
    chosen[3, 1], chosen[5] = -1, EXPERTS  # held by others
    out = moe.w4a8_experts(x, chosen, weights, gate_up, down)
    torch.testing.assert_close(out, by_layers(x, chosen, weights, first, second), rtol=1e-6, atol=1e-6)
    assert not out[5].any()
    halves = moe.w4a8_experts(x.bfloat16(), chosen, weights.bfloat16(), gate_up, down)
    assert halves.dtype == torch.bfloat16
    assert (halves.float() - out).abs().max() < 0.03 * out.abs().max()


def test_no_tokens(mixture):
    x, chosen, weights, first, second = mixture
    out = moe.w4a8_experts(x[:0], chosen[:0], weights[:0], packed(*first, 512), packed(*second, 4096))
    assert out.shape == (0, HIDDEN)


def test_layers_that_do_not_follow_each_other_are_refused(mixture):
    x, chosen, weights, _, second = mixture
    layer = random_layer(2 * 300, HIDDEN, 0)
    with pytest.raises(InputError, match="do not fit"):
        moe.w4a8_experts(x, chosen, weights, packed(*layer, 512), packed(*second, 4096))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 4))
def test_rows_hold_whatever_routing_gives(rows_of_expert, choices):
    total = sum(rows_of_expert)
    tokens = -(-total // choices)
    filled = sum(-(-rows // 8) * 8 for rows in rows_of_expert)
    assert filled <= moe.routed_rows(tokens, choices, len(rows_of_expert))


@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_shapes_without_data(tokens):
    rows = moe.routed_rows(tokens, 8, 128)
    with FakeTensorMode():
        chosen = torch.zeros(tokens, 8, dtype=torch.int64, device="cuda")
        position, row_end = moe.route_tokens(chosen, 128)
        assert position.shape == (tokens, 8) and row_end.shape == (128,) and position.dtype == torch.int32
        x = torch.zeros(tokens, 2048, dtype=torch.bfloat16, device="cuda")
        routed = moe.quantize_routed(x, position, "plain", 128)
        assert [t.shape for t in routed] == [(16, rows // 8, 1024), (rows,), (rows,)]
        weight = torch.zeros(128, 24, 16, 4224, dtype=torch.uint8, device="cuda")
        factor = torch.zeros(128, 1536, device="cuda")
        y = moe.w4a8_grouped_product(*routed, row_end, weight, factor, tokens, 8, False, torch.bfloat16)
        assert y.shape == (rows, 1536) and y.dtype == torch.bfloat16
        assert moe.quantize_routed(y, position, "silu", 128)[0].shape == (6, rows // 8, 1024)
        assert moe.combine_experts(y, position, torch.zeros(tokens, 8, device="cuda")).shape == (tokens, 1536)


@pytest.mark.parametrize("tokens, choices, experts", [(1, 2, 8), (5, 8, 128), (64, 2, 8), (300, 4, 60), (20, 4, 4)])
@pytest.mark.parametrize("width", [8, 32, 96])
def test_expected_tiles_are_those_of_random_routing(tokens, choices, experts, width):
    torch.manual_seed(0)
    active = tiles = 0
    trials = 300
    for _ in range(trials):
        chosen = torch.rand(tokens, experts).topk(choices).indices
        rows = torch.bincount(chosen.flatten(), minlength=experts)
        active += int((rows > 0).sum())
        tiles += int((-(-rows // width)).sum())
    found = grouped.expected_tiles(tokens, choices, experts, width)
    assert found == pytest.approx((active / trials, tiles / trials), rel=0.05)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("experts", [1, 8, 128, 1024])
@pytest.mark.parametrize("tokens", [1, 9, 64, 5000])
def test_variants_fit_the_chip(tokens, experts, folded):
    for groups in (1, 2, 4):
        found = grouped.variants(tokens, groups, folded, 0, experts)
        for variant in found:
            assert variant.shared_bytes <= SHARED_BYTES and variant.depth >= 4
            assert variant.tokens * variant.warpgroups <= LARGEST_TILE
        for outputs, blocks in ((28672, 32), (4096, 112), (1536, 16), (2048, 6)):
            ranked = grouped.ranked(tokens, min(2, experts), experts, outputs, blocks, groups, folded, 0, 132)
            assert sorted(ranked, key=str) == sorted(found, key=str)


def test_few_numbers_of_tokens_are_chosen_for():
    assert all(tokens <= grouped.rounded(tokens) <= tokens * 1.125 for tokens in range(1, 70000))
    assert len({grouped.rounded(tokens) for tokens in range(1, 65537)}) < 120
    assert all(grouped.rounded(2**power) == 2**power for power in range(17))
