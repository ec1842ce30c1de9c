"""``from_pretrained`` with finescale imported: the same model as ``finescale.load``."""

import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from finescale.api import quantize
from finescale.claim import left_to_transformers, register
from finescale.errors import InputError
from finescale.runtime.load import load
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.portable import PortableLinear
from tests.helpers import recipe

QUANTIZED = (QuantizedLinear, PortableLinear)
"""The second where the processor has int8 products."""


@pytest.fixture(scope="module")
def checkpoint(tiny, text, tmp_path_factory):
    def make(family):
        out = tmp_path_factory.mktemp(family) / "out"
        chosen = recipe(
            "rtn", 4, 32,
            weights={"symmetric": True}, activations={"bits": 8}, integer_scale={"mode": "before", "amplifier": "auto"},
        )  # fmt: skip
        quantize(tiny(family), chosen, calibration=str(text), out=out)
        return out

    return make


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "opt", "gpt2"])
def test_same_as_load(checkpoint, family, caplog):
    folder = checkpoint(family)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any("UNEXPECTED" in record.message or "MISSING" in record.message for record in caplog.records)
    layers = [module for module in model.modules() if isinstance(module, QUANTIZED)]
    assert layers and all(getattr(layer, "dense_OI", None) is None for layer in layers)
    expected = load(folder, path="kernel")
    prompt = torch.arange(6)[None] + 3
    assert torch.equal(model(prompt).logits, expected(prompt).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = expected.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), tokens)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), tokens)


def test_registered_by_importing_finescale_alone(checkpoint):
    """In a fresh process, where nothing of finescale's runtime was imported before; and importing it stays light."""
    program = (
        "import sys, finescale\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint('llama'))!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in [kind.__name__ for kind in QUANTIZED]


def test_left_to_transformers(checkpoint):
    folder = checkpoint("llama")
    with left_to_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any(isinstance(module, QUANTIZED) for module in model.modules())
    register()
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(isinstance(module, QUANTIZED) for module in model.modules())


def test_several_devices_are_refused(checkpoint):
    with pytest.raises(InputError, match="onto one device"):
        AutoModelForCausalLM.from_pretrained(checkpoint("llama"), device_map={"model": "cpu", "lm_head": "disk"})
