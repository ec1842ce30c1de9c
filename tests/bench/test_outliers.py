"""Planted outliers: the model computes the same, and methods against outliers take their harm away."""

import math

import pytest
import torch

from finescale.api import evaluate, quantize
from finescale.bench.outliers import plant_outliers
from finescale.errors import InputError
from finescale.recipe import Recipe
from finescale.runtime.load import load
from tests.helpers import logits_of, some_tokens

KINDS = ("llama", "mistral", "mixtral", "opt", "bloom", "falcon", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_and_outliers_appear(tiny, tmp_path, kind):
    chosen = plant_outliers(tiny(kind), tmp_path / "planted", 50, 3)
    assert len(chosen) == 3 == len(set(chosen))
    before, after = load(tiny(kind), torch.float64), load(tmp_path / "planted", torch.float64)
    expected, found = (logits_of(model, some_tokens()) for model in (before, after))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    norms = [m for name, m in after.named_modules() if name.endswith(("input_layernorm", "ln_1", "attn_layer_norm"))]
    outputs = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits_of(after, some_tokens())
    for output in outputs:
        absmax_I = output.abs().flatten(0, -2).amax(0)
        rest_I = absmax_I[[channel for channel in range(64) if channel not in chosen]]
        assert 15 < float(absmax_I[chosen].min() / rest_I.max()) < 200  # 50 on the prompt that planting looked at


def test_what_makes_no_outliers_is_refused(tiny, tmp_path):
    for size, channels in ((1.0, 3), (50, 0)):
        with pytest.raises(InputError, match="outliers"):
            plant_outliers(tiny("llama"), tmp_path / "out", size, channels)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(InputError, match="empty or new"):
        plant_outliers(tiny("llama"), tmp_path / "used", 50)


# FPTQ's published thresholds send ranges above 150 to one scale per token without equalization, which recovers a tenth;
# the zoo's planted ranges are above.
# Four channels of 50 times the rest would have to become 200 of 256: QLLM recovers 89.9 % with the published fifth.
METHODS = {
    "smoothquant": [{"name": "smoothquant"}],
    "fptq": [{"name": "fptq", "options": {"equalize": "all"}}],
    "awq": [{"name": "awq"}],
    "quarot": [{"name": "quarot"}],
    "omniquant": [{"name": "omniquant", "options": {"iterations": 40}}],
    "qllm": [{"name": "qllm", "options": {"max_expansion": 0.3}}],
}


@pytest.fixture(scope="module")
def bed(shared, zoo, tmp_path_factory):
    """The planted zoo llama, its perplexity as W4A8 by a list of transforms, and that of the unplanted one."""
    folder = tmp_path_factory.mktemp("bed")
    books = (shared / "data" / "books" / "books_valid.txt").read_text()[:900_000]
    (folder / "calibration.txt").write_text(books[450_000:])
    (folder / "evaluation.txt").write_text(books[:450_000])
    plant_outliers(zoo("llama"), folder / "planted", 50, 4)

    def perplexity(transforms, planted=True):
        recipe = Recipe.from_dict({
            "weights": {"bits": 4, "group_size": 64, "symmetric": True}, "activations": {"bits": 8},
            "solver": {"name": "gptq"}, "transforms": transforms, "calibration": {"samples": 8, "length": 256},
        })  # fmt: skip
        source, out = folder / "planted" if planted else zoo("llama"), folder / "out"
        quantize(source, recipe, out=out, calibration=str(folder / "calibration.txt"), fresh=True)
        text = str(folder / "evaluation.txt")
        return evaluate(load(out), text, windows=2, length=256, tokenizer_from=source).perplexity

    return perplexity


@pytest.mark.slow
def test_plain_w4a8_collapses_and_each_method_recovers(bed):
    clean, plain = bed([], planted=False), bed([])
    assert plain > 1.5 * clean
    loss = math.log(plain) - math.log(clean)
    recovered = {name: (math.log(plain) - math.log(bed(transforms))) / loss for name, transforms in METHODS.items()}
    assert all(share > 0.9 for share in recovered.values()), recovered
