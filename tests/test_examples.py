"""Every example runs, on tiny models, as its first lines say."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from finescale.runtime.checkpoint import open_quantized
from tests.helpers import W4A8, quantize, read_json, recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(capsys, monkeypatch):
    """``example("quantize", arguments...) -> what it printed``."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name, *arguments):
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_are_short_and_run_here():
    own = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 40, path
        assert f"python examples/{path.name} " in source, path
        assert f'example("{path.stem}"' in own, path


def test_quantize(example, tiny, text, tmp_path):
    printed = example("quantize", tiny("llama", torch.float16), text, tmp_path / "out")
    assert "14 layers" in printed and "loaded a LlamaForCausalLM" in printed and "KL 0." in printed
    assert read_json(tmp_path / "out" / "report.json")["recipe"]["solver"]["sweeps"] == 10


def test_custom_recipe(example, tiny, text, tmp_path):
    printed = example("custom_recipe", tiny("llama"), text, tmp_path / "out")
    assert "{3: 6, 4: 1}" in printed and "50% of the block weights" in printed
    assert not any(".layers.0." in name for name in open_quantized(tmp_path / "out").layer_names())


def test_custom_solver(example, tiny, text, tmp_path):
    printed = example("custom_solver", tiny("llama"), text, tmp_path / "out")
    error = float(printed.split()[-1])
    report = quantize(tiny("llama"), tmp_path / "rtn", recipe(), text)
    nearest = sum(record["relative_error"] for record in report["layers"]) / len(report["layers"])
    assert 0 < error < 0.9 * nearest
    assert read_json(tmp_path / "out" / "report.json")["recipe"]["solver"] == {
        "name": "custom_solver:NUDGE",
        "passes": 3,
    }


def test_convert_gptq(example, tiny, text, tmp_path):
    chosen = recipe("gptq", 4, 32, weights={"symmetric": True}, format="gptq")
    quantize(tiny("llama", torch.float16), tmp_path / "gptq", chosen, text)
    printed = example("convert_gptq", tmp_path / "gptq", tmp_path / "out")
    assert "int32 cannot overflow in 14 of 14 layers" in printed
    assert open_quantized(tmp_path / "out").activations.bits == 8


def test_generate(example, tiny, text, tmp_path):
    integer = {"mode": "before", "amplifier": "auto"}
    chosen = recipe("rtn", 4, 32, integer_scale=integer, **W4A8)
    quantize(tiny("llama", torch.float16), tmp_path / "out", chosen, text)
    printed = example("generate", tmp_path / "out", "Once upon a time")
    assert printed.startswith("Once upon a time") and "Linear'}" in printed
    other = example("fast_generation", tmp_path / "out", "Once upon a time").splitlines()
    assert other[0] == printed.splitlines()[0] and "LlamaDecoderLayer" in other[-1]
