"""What the real command writes for a trained model, in a real vLLM on a CPU: the same greedy tokens as finescale's own.

vLLM's CPU kernels for packed weights need float16 and run W4A8 files as W4A16 there, so that finescale generates
without rounding the inputs, too.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import finescale
from finescale.runtime.load import load

pytestmark = pytest.mark.vllm
WORKER = Path(__file__).parent / "greedy_worker.py"
SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "zoo" / "llama"
TEXT = SHARED / "data" / "books" / "books_valid.txt"
TOKENS = 12
RUNS = {
    "w4a16": ("quantease", ("weights.symmetric=true", "weights.group_size=64", "solver.sweeps=4")),
    "w4a16-asymmetric": ("gptq", ("weights.group_size=64",)),
    "w4a8-integer-scale": ("w4a8-integer-scale", ("solver.sweeps=4",)),
    "w4a8-folded": ("w4a8-folded", ("solver.sweeps=4",)),
    "gptq": ("gptq", ("weights.symmetric=true", "weights.group_size=64", "format=gptq")),
    "gptq-v2": ("gptq", ("weights.symmetric=true", "weights.group_size=128", "format=gptq_v2")),
    "awq": ("gptq", ("weights.group_size=64", "format=awq")),
    "dense": ("gptq", ("weights.bits=3", "format=dense")),
}


@pytest.fixture(scope="module")
def generated(request, tmp_path_factory):
    """Greedy tokens by run: of vLLM and of finescale."""
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
    request_path, answer_path = root / "request.json", root / "answer.json"
    folders = [str(root / name) for name in RUNS]
    request_path.write_text(
        json.dumps({"checkpoints": folders, "prompts": prompts, "tokens": TOKENS, "dtype": "float16"})
    )
    subprocess.run([python, str(WORKER), str(request_path), str(answer_path)], check=True)
    answers = {Path(answer["checkpoint"]).name: answer for answer in json.loads(answer_path.read_text())}
    return {name: (answers[name], [_greedy(root / name, prompt) for prompt in prompts]) for name in RUNS}


def _prompts() -> list[list[int]]:
    from finescale.calibration.data import encode, open_tokenizer

    tokens_T = encode(open_tokenizer(MODEL), TEXT.read_text()[:20000])
    return [tokens_T[start : start + 48].tolist() for start in (0, 1000, 2000)]


def _greedy(folder: Path, prompt: list[int]) -> list[int]:
    model = load(folder, rounding="none")
    tokens = list(prompt)
    for _ in range(TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", RUNS)
def test_greedy_tokens_are_those_of_finescale(generated, name):
    answer, expected = generated[name]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == expected
