import xml.etree.ElementTree as ElementTree

import pytest
import torch

from finescale.bench.gemm import bench_gemm
from finescale.bench.gemm_cpu import NAMES, bench_gemm_cpu
from finescale.bench.gemm_products import Product
from finescale.bench.plot import speedup_figure
from finescale.errors import InputError
from finescale.kernels.cpu_int8 import int8_product_is_exact


@pytest.mark.parametrize("shape, tokens", [((100, 64), 1), ((0, 64), 1), ((128, 0), 1), ((128, 64), 0)])
def test_sizes_that_are_none_are_refused_first(shape, tokens):
    with pytest.raises(InputError, match="multiples of the group"):
        bench_gemm((shape,), (tokens,))


@pytest.mark.skipif(not int8_product_is_exact(), reason="needs int8 instructions that add in 32 bits")
def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr("finescale.bench.gemm_cpu._ROTATED_BYTES", 1)
    result = bench_gemm_cpu(((96, 40),), (1, 70), rounds=2)
    assert [row["tokens"] for row in result["rows"]] == [1, 70]
    for row in result["rows"]:
        assert row["integer_equal"] and row["folded_equal"]
        for name in NAMES:
            low, high = row[f"{name}_quartiles"]
            assert 0 < low <= row[name] <= high


@pytest.mark.parametrize("shapes, tokens", [(((0, 8),), (1,)), (((8, 8),), (0,)), (((8, 8),), ())])
def test_sizes_that_are_none_are_refused_on_a_cpu(shapes, tokens):
    with pytest.raises(InputError, match="at least 1"):
        bench_gemm_cpu(shapes, tokens)


def test_cpus_without_exact_products_are_refused(monkeypatch):
    monkeypatch.setattr("finescale.bench.gemm_cpu.int8_product_is_exact", lambda: False)
    with pytest.raises(InputError, match="no int8 dot products"):
        bench_gemm_cpu()


def test_the_difference_is_relative_to_the_largest_value():
    expected = torch.tensor([[-4.0, 1.0]])
    product = Product([torch.tensor([[-4.0, 1.5]])], lambda weight, tokens: weight, lambda tokens: expected)
    assert product.difference(None) == pytest.approx(0.125)


def test_the_figure_has_a_panel_for_each_shape_and_a_line_for_each_timed_product():
    rows = [
        {"inputs": inputs, "outputs": 64, "tokens": tokens, "bf16": 10.0, "integer": 5.0, "folded": 4.0 + tokens}
        for inputs in (128, 256)
        for tokens in (1, 16)
    ]
    rows.append({"inputs": 512, "outputs": 64, "tokens": 1, "bf16_error": "out of memory"})
    text = speedup_figure(rows, "bf16", ("integer", "folded", "fp8"))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = [element.text for element in root.iter() if element.text]
    assert "128 inputs, 64 outputs" in words and "256 inputs, 64 outputs" in words
    assert "integer" in words and "fp8" not in words
    assert "integer, 16 tokens: 2.00 times as fast" in words
    assert text.count('class="line s0"') == 2
