"""The benchmark of whole models, on a tiny shape on the CPU; speed itself needs a GPU."""

import json

import pytest
import torch

from finescale.bench.decode import bench_decode, kernel_group, speedups, text_row
from finescale.bench.random_model import fill_mixture, random_model, weight_bytes
from finescale.bench.shapes import SHAPES, shape_config
from finescale.errors import InputError
from finescale.runtime.fused import FusedDecoder


@pytest.fixture(scope="module")
def result():
    return bench_decode(
        ["tiny"], (1, 2), ("bf16", "w4a8", "w4a8-folded"), "cpu", prefill=20, context=6, steps=3, profiled=()
    )


def test_rows(result):
    assert [row["arm"] for row in result["rows"]] == ["bf16", "w4a8", "w4a8-folded"]
    for row in result["rows"]:
        assert list(row["decode"]) == ["1", "2"]
        for cell in (row["prefill"], *row["decode"].values()):
            assert cell["graph_equals_eager"] and cell["milliseconds"] > 0
            low, high = cell["spread"]
            assert low <= cell["milliseconds"] <= high
        assert row["decode"]["2"]["tokens_per_second"] == pytest.approx(2e3 / row["decode"]["2"]["milliseconds"])
        assert row["prefill"]["tokens_per_second"] == pytest.approx(20e3 / row["prefill"]["milliseconds"])
        assert "tiny" in text_row(row) and "differ" not in text_row(row)
    json.dumps(result)


def test_speedups_are_over_bfloat16_of_the_same_run(result):
    found = speedups(result["rows"], "tiny", "w4a8")
    bf16, w4a8 = result["rows"][:2]
    assert found["1"] == bf16["decode"]["1"]["milliseconds"] / w4a8["decode"]["1"]["milliseconds"]
    assert set(found) == {"prefill", "1", "2"}
    assert speedups(result["rows"][1:], "tiny", "w4a8") == {}


def test_a_model_of_random_weights():
    """Fused, of the right size, its activations neither vanishing nor exploding."""
    for arm, bytes_a_weight in (("bf16", 2), ("w4a8", 0.5 + 2 / 128), ("w4a8-folded", 0.5 + 2 / 128)):
        torch.manual_seed(0)
        model = random_model("tiny", arm, torch.device("cpu"))
        assert isinstance(model.model.layers[0], FusedDecoder)
        weights = 2 * (128 * (128 + 128) + 128 * 128 + 3 * 128 * 256)
        rest = 2 * 320 * 128 * 2
        assert weight_bytes(model) == pytest.approx(weights * bytes_a_weight + rest, rel=0.05)
        with torch.no_grad():
            logits = model(torch.arange(3, 40)[None]).logits
        assert logits.isfinite().all() and 0.01 < float(logits.float().std()) < 10
        packed = [tensor.data_ptr() for name, tensor in model.named_buffers() if name.endswith("packed")]
        assert len(set(packed)) == len(packed) and len(packed) in (0, 8)


def test_mixtures_of_experts():
    result = bench_decode(["tiny-experts"], (1,), ("bf16", "w4a8"), "cpu", prefill=8, context=4, steps=2, profiled=())
    weights = 2 * (128 * (128 + 128) + 128 * 128 + 4 * 3 * 128 * 128)
    for row, bytes_a_weight in zip(result["rows"], (2, 0.5 + 2 / 128), strict=True):
        assert row["decode"]["1"]["graph_equals_eager"]
        assert row["weights_gb"] * 1e9 == pytest.approx(weights * bytes_a_weight + 2 * 320 * 128 * 2, rel=0.05)
    with pytest.raises(InputError, match="no kernel of float scales"):
        fill_mixture(None, None, "w4a8-float", torch.device("cpu"))


def test_fewer_blocks():
    one = bench_decode(["tiny"], (1,), ("w4a8",), "cpu", prefill=4, context=3, steps=1, profiled=(), layers=1)
    assert one["setting"]["layers"] == one["rows"][0]["layers"] == 1 and "1 blocks" in text_row(one["rows"][0])
    bytes_of_two = weight_bytes(random_model("tiny", "w4a8", torch.device("cpu")))
    assert one["rows"][0]["weights_gb"] * 1e9 < bytes_of_two
    with pytest.raises(InputError, match="layers must be at least 1"):
        bench_decode(["tiny"], (1,), ("w4a8",), "cpu", layers=0)


def test_shapes_are_configs_of_transformers():
    for name in SHAPES:
        assert shape_config(name).num_hidden_layers in (2, 32, 40, 48)
    config = shape_config("llama-3-8b")
    assert config.num_key_value_heads == 8 and config.vocab_size == 128256


def test_kernels_are_told_apart():
    assert kernel_group("w4a8_gemm") == "W4A8 products"
    assert kernel_group("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == "bfloat16 products"
    assert kernel_group("_attend_kernel") == "attention"
    assert kernel_group("void at::native::vectorized_elementwise_kernel<4>") == "other"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["llama-9"],), "no shape"),
        ((["tiny"], (1,), ("w2",)), "arms are"),
        ((["tiny"], (0,)), "at least 1"),
        ((["tiny"], (1,), ("w4a8-float",), "cpu"), "Hopper"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        bench_decode(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(InputError, match="needs a Hopper GPU"):
        bench_decode(["tiny"])
