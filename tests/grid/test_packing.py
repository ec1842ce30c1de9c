"""Packing against an oracle on Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.grid.packing import pack_rows, packed_words, to_signed, to_unsigned, unpack_rows


def slow_pack(values: list[int], bits: int, layout: str) -> list[int]:
    """One row as signed 32-bit words, written as the layouts are defined."""
    if layout == "dense":
        stream = sum(value << (bits * index) for index, value in enumerate(values))
        words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(-(-len(values) * bits // 32))]
    else:
        per_word = 32 // bits
        chunks = [values[start : start + per_word] for start in range(0, len(values), per_word)]
        words = [sum(value << (bits * index) for index, value in enumerate(chunk)) for chunk in chunks]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@st.composite
def rows(draw):
    bits = draw(st.sampled_from([2, 3, 4, 8, 1, 5, 6, 7]))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    value = st.integers(0, 2**bits - 1)
    values = draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=height, max_size=height))
    return bits, values


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from(["dense", "aligned"]), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_words_equal_the_oracle_and_unpack_again(bits_and_values, layout, dtype):
    bits, values = bits_and_values
    codes = torch.tensor(values, dtype=dtype)
    packed = pack_rows(codes, bits, layout)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [slow_pack(row, bits, layout) for row in values]
    assert packed.shape[-1] == packed_words(codes.shape[-1], bits, layout)
    assert unpack_rows(packed, bits, codes.shape[-1], layout).tolist() == values


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layouts_agree_where_the_width_divides_32(bits):
    codes = torch.arange(3 * 41).reshape(3, 41) % 2**bits
    assert torch.equal(pack_rows(codes, bits, "dense"), pack_rows(codes, bits, "aligned"))


def test_three_bits_straddle_words_in_the_dense_layout():
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10] = 0b101  # bits 30, 31 of the first word and bit 0 of the second
    assert pack_rows(codes, 3).tolist() == [1 << 30, 1, 0]
    assert pack_rows(codes, 3, "aligned").tolist() == [0, 0b101, 0, 0]


def test_more_than_two_dimensions():
    codes = torch.randint(0, 8, (2, 3, 5, 33), dtype=torch.uint8)
    packed = pack_rows(codes, 3)
    assert packed.shape == (2, 3, 5, 4)
    assert torch.equal(unpack_rows(packed, 3, 33), codes)


def test_values_not_contiguous_in_memory():
    codes = torch.randint(0, 16, (40, 24), dtype=torch.uint8)
    assert torch.equal(pack_rows(codes.t(), 4), pack_rows(codes.t().contiguous(), 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_and_unsigned(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int16).to(torch.int8)
    values = to_unsigned(codes, bits)
    assert values.tolist() == list(range(2**bits))
    assert torch.equal(to_signed(values, bits), codes)


def test_refusals():
    with pytest.raises(InputError, match="1 to 8 bits"):
        pack_rows(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(InputError, match="need 3 words a row but there are 2"):
        unpack_rows(torch.zeros(1, 2, dtype=torch.int32), 3, 32)
    with pytest.raises(InputError, match="dense or aligned"):
        packed_words(4, 3, "loose")  # type: ignore[arg-type]
