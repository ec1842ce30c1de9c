"""Every format in a real vLLM on a CPU, against the dequantized model: greedy tokens and log-probabilities.

    pytest tests/vllm -m vllm --vllm-python PATH_OF_A_PYTHON_WITH_VLLM

vLLM's CPU kernels for packed weights refuse float32. In float16 they multiply by unrounded activations, whatever the
file says of these; in bfloat16, on a processor with AMX, by activations of 8 bits, whatever the file says.
"""

from pathlib import Path

import pytest

from finescale.grid import ActivationScheme, WeightScheme
from tests.formats.checkpoints import LLAMA, PROMPTS, prompt_logits, random_model, write_checkpoint, write_dense
from tests.vllm.asking import ask

pytestmark = pytest.mark.vllm
TOKENS = 8
A8 = ActivationScheme(8)
CASES = {
    "packed": ("compressed-tensors", WeightScheme(4, 64, True), None, {}),
    "packed-negative-scales": ("compressed-tensors", WeightScheme(4, 64, True, "signed"), None, {}),
    "gptq-negative-scales": ("gptq", WeightScheme(4, 64, True, "signed"), None, {}),
    "packed-per-channel": ("compressed-tensors", WeightScheme(4, -1, True), None, {}),
    "packed-asymmetric": ("compressed-tensors", WeightScheme(4, 32, False), None, {}),
    "packed-activations": ("compressed-tensors", WeightScheme(4, 64, True), A8, {}),
    "packed-several-schemes": (
        "compressed-tensors",
        WeightScheme(4, 64, True),
        None,
        {"1.mlp.down": WeightScheme(4, 32, False)},
    ),
    "gptq": ("gptq", WeightScheme(4, 64, True), None, {}),
    "gptq-v2": ("gptq_v2", WeightScheme(4, 64, True), None, {}),
    "gptq-several-schemes": ("gptq", WeightScheme(4, 64, True), None, {"1.mlp.down": WeightScheme(4, 32, True)}),
    "awq": ("awq", WeightScheme(4, 64, False), None, {}),
    "dense": ("dense", WeightScheme(3, 64, False), None, {}),
}
REFUSED = {
    "three-bits": ("compressed-tensors", WeightScheme(3, 64, True), None, {}),
    "gptq-asymmetric": ("gptq_v2", WeightScheme(4, 64, False), None, {}),
}


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """What vLLM makes of every case, and the folder of the dequantized model of each."""
    python = request.config.getoption("--vllm-python", default=None)
    if not python:
        pytest.skip("give --vllm-python PATH, an interpreter with vLLM, to load checkpoints in it")
    root = tmp_path_factory.mktemp("vllm")
    tensors = random_model(LLAMA, root / "source")
    for case, (format_name, scheme, activations, overrides) in (CASES | REFUSED).items():
        dense = write_checkpoint(
            root / "source", tensors, root / case, format_name, scheme, activations, overrides=overrides
        )
        write_dense(root / "source", dense, root / f"{case}-dense")
    folders = [root / case for case in CASES | REFUSED]
    return root, ask(python, root, folders, prompts=PROMPTS, tokens=TOKENS, dtype="float16", plugins="")


def greedy(folder: Path) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(TOKENS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        outputs.append(ids[len(prompt) :])
    return outputs


@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_the_dequantized_model(answers, case):
    root, found = answers
    answer = found[case]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == greedy(root / f"{case}-dense")
    differences = []
    for logits, prompt, logprobs in zip(
        prompt_logits(root / f"{case}-dense"), PROMPTS, answer["prompt_logprobs"], strict=True
    ):
        expected = logits.log_softmax(-1)
        pairs = zip(range(len(prompt) - 1), prompt[1:], logprobs, strict=True)
        differences += [abs(float(expected[position, token]) - logprob) for position, token, logprob in pairs]
    assert sum(differences) / len(differences) < 0.02, max(differences)


@pytest.mark.parametrize("case", REFUSED)
def test_vllm_refuses_what_the_table_of_engines_says(answers, case):
    from finescale.formats.engines import engine_table

    _, found = answers
    format_name, scheme, activations, _ = REFUSED[case]
    rows = engine_table(format_name, [scheme], activations, "llama")
    assert not next(row["loads"] for row in rows if row["engine"] == "vLLM (x86 CPU)")
    assert "error" in found[case]
