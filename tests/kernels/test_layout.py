import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.kernels import layout


def random_weight(outputs, inputs, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.randint(-32767, 32768, (outputs, groups), dtype=torch.int32, generator=generator)
    return codes, scale


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 700),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    seed=st.integers(0, 99),
)
def test_weights_come_back(outputs, inputs, group_size, seed):
    codes, scale = random_weight(outputs, inputs, group_size, seed)
    packed = layout.pack_weight(codes, scale, group_size)
    in_block = layout.groups_in_block(group_size)
    assert packed.shape == (-(-outputs // 64), -(-inputs // 128), 4096 + 128 * in_block)
    codes_again, scale_again = layout.unpack_weight(packed, outputs, inputs, group_size)
    assert torch.equal(codes_again, codes) and torch.equal(scale_again, scale)


def test_weights_lie_as_a_warpgroup_holds_them():
    codes, scale = random_weight(64, 128, 64)
    unit = layout.pack_weight(codes, scale, 64)[0, 0]
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for word in range(8):
            step, half = divmod(word, 2)
            output, first = warp * 16 + half * 8 + lane // 4, step * 32 + lane % 4 * 4
            for byte in range(4):
                both = int(unit[word // 4 * 2048 + thread * 16 + word % 4 * 4 + byte])
                assert both % 16 - 8 == codes[output, first + byte]
                assert both // 16 - 8 == codes[output, first + 16 + byte]
        for group in range(2):
            at = 4096 + group * 128 + warp * 32 + lane // 4 * 4
            pair = unit[at : at + 4].view(torch.int16)
            outputs = [warp * 16 + lane // 4, warp * 16 + lane // 4 + 8]
            assert pair.tolist() == scale[outputs, group].tolist()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 40), inputs=st.integers(1, 400), seed=st.integers(0, 99))
def test_tokens_come_back(tokens, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8, generator=generator)
    packed = layout.pack_tokens(x)
    assert tuple(packed.shape) == layout.packed_tokens_shape(tokens, inputs)
    assert torch.equal(layout.unpack_tokens(packed, tokens, inputs), x)


def test_tokens_are_swizzled():
    x = torch.randint(-127, 128, (11, 300), dtype=torch.int8)
    packed = layout.pack_tokens(x)
    for token in range(11):
        for k in range(300):
            piece = k % 128 // 16 ^ token % 8
            assert packed[k // 128, token // 8, token % 8 * 128 + piece * 16 + k % 16] == x[token, k]


def test_refusals():
    codes, scale = random_weight(8, 96, 48)
    with pytest.raises(InputError, match="groups of 48"):
        layout.pack_weight(codes, scale, 48)
    with pytest.raises(InputError, match="must be"):
        layout.pack_weight(codes, scale, 32)
    codes, scale = random_weight(8, 96, 32)
    for outside in (8, -9):
        codes[3, 5] = outside
        with pytest.raises(InputError, match="4-bit codes"):
            layout.pack_weight(codes, scale, 32)
    codes[3, 5] = -8
    with pytest.raises(InputError, match="exceeds 32767"):
        layout.pack_weight(codes, scale.abs() + 32768, 32)
