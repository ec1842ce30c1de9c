"""What the real command writes for a trained model, in a real vLLM on a CPU: the same greedy tokens as finescale's own.

vLLM's CPU kernels for packed weights need float16 and run W4A8 files as W4A16 there, so that finescale generates
without rounding the inputs, too. Its kernel for W8A8 needs bfloat16 and rounds them.
"""

from pathlib import Path

import pytest
import torch

import finescale
from finescale.runtime.load import load
from tests.vllm.asking import ask, greedy, shortfall

pytestmark = pytest.mark.vllm
SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "zoo" / "llama"
TEXT = SHARED / "data" / "books" / "books_valid.txt"
TOKENS = 12
RUNS = {
    "w4a16": ("quantease", ("weights.symmetric=true", "weights.group_size=64", "solver.sweeps=4")),
    "w4a16-asymmetric": ("gptq", ("weights.group_size=64",)),
    "w4a8-integer-scale": ("w4a8-integer-scale", ("solver.sweeps=4",)),
    "w4a8-folded": ("w4a8-folded", ("solver.sweeps=4",)),
    "w8a8": ("w8a8", ()),
    "gptq": ("gptq", ("weights.symmetric=true", "weights.group_size=64", "format=gptq")),
    "gptq-v2": ("gptq", ("weights.symmetric=true", "weights.group_size=128", "format=gptq_v2")),
    "awq": ("gptq", ("weights.group_size=64", "format=awq")),
    "dense": ("gptq", ("weights.bits=3", "format=dense")),
}


@pytest.fixture(scope="module")
def generated(request, tmp_path_factory):
    """By run: vLLM's answer, the folder, and the prompts."""
    python = request.config.getoption("--vllm-python", default=None)
    if not python:
        pytest.skip("give --vllm-python PATH, an interpreter with vLLM, to load checkpoints in it")
    if not MODEL.is_dir():
        pytest.skip("the trained test models are not here")
    root = tmp_path_factory.mktemp("pipeline")
    for name, (recipe, settings) in RUNS.items():
        sizes = ("calibration.samples=8", "calibration.length=128")
        finescale.quantize(MODEL, recipe, out=root / name, calibration=str(TEXT), settings=(*sizes, *settings))
    prompts = _prompts()
    each = {str(root / "w8a8"): {"dtype": "bfloat16"}}
    folders = [root / name for name in RUNS]
    answers = ask(python, root, folders, prompts=prompts, tokens=TOKENS, dtype="float16", plugins="", each=each)
    return {name: (answers[name], root / name, prompts) for name in RUNS}


def _prompts() -> list[list[int]]:
    from finescale.calibration.data import encode, open_tokenizer

    tokens_T = encode(open_tokenizer(MODEL), TEXT.read_text()[:20000])
    return [tokens_T[start : start + 48].tolist() for start in (0, 1000, 2000)]


@pytest.mark.parametrize("name", RUNS)
def test_greedy_tokens_are_those_of_finescale(generated, name):
    answer, folder, prompts = generated[name]
    assert "error" not in answer, answer["error"]
    if name == "w8a8":  # bfloat16 rounds more than two likely tokens may differ by
        assert shortfall(load(folder, torch.bfloat16), answer["tokens"], prompts) < 0.25
    else:
        assert answer["tokens"] == greedy(load(folder, rounding="none"), prompts, TOKENS)
