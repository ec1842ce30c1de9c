"""W4A8 checkpoints in a real vLLM on a CPU through finescale's plugin: exact, with the tokens of finescale itself."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import finescale
from finescale.runtime.load import load
from tests.vllm.greedy_worker import ENVIRONMENT

pytestmark = pytest.mark.vllm
WORKER = Path(__file__).parent / "greedy_worker.py"
SHARED = Path(__file__).parents[3] / "shared"
ZOO = SHARED / "models" / "zoo"
TEXT = SHARED / "data" / "books" / "books_valid.txt"
FAMILIES = ("llama", "mistral", "opt", "falcon")
PROMPTS = [[5, 9, 30, 77, 12, 8], [100, 101, 7, 3, 2, 50, 61]]
TOKENS = 12


@pytest.fixture(scope="module")
def checkpoints(vllm_python, tmp_path_factory):
    if not ZOO.is_dir():
        pytest.skip("the trained test models are not here")
    root = tmp_path_factory.mktemp("plugin")
    settings = ("solver.name=rtn", "weights.group_size=64", "calibration.samples=2", "calibration.length=64")
    for family in FAMILIES:
        finescale.quantize(
            ZOO / family, "w4a8-integer-scale", out=root / family, calibration=str(TEXT), settings=settings
        )
    return root


def greedy(folder, prompt):
    model = load(folder, path="integer")
    tokens = list(prompt)
    for _ in range(TOKENS):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def answers(checkpoints, vllm_python):
    request_path, answer_path = checkpoints / "request.json", checkpoints / "answer.json"
    folders = [str(checkpoints / family) for family in FAMILIES]
    # float32, which vLLM's own CPU kernels refuse for packed weights: these are finescale's.
    request = {"checkpoints": folders, "prompts": PROMPTS, "tokens": TOKENS, "dtype": "float32", "plugins": "finescale"}
    request_path.write_text(json.dumps(request))
    subprocess.run([vllm_python, str(WORKER), str(request_path), str(answer_path)], check=True)
    return {Path(answer["checkpoint"]).name: answer for answer in json.loads(answer_path.read_text())}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_finescale(answers, checkpoints, family):
    answer = answers[family]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == [greedy(checkpoints / family, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("factor, words", [(4.0, "int32 bound"), (0.77, "not integers|not the stored one")])
def test_a_changed_scale_is_refused(checkpoints, vllm_python, tmp_path, factor, words):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "changed"
    subprocess.run(["cp", "-r", str(checkpoints / "llama"), str(folder)], check=True)
    file, tensors, name = next(
        (file, tensors, key)
        for file in sorted(folder.glob("*.safetensors"))
        for tensors in (load_file(file),)
        for key in tensors
        if key.endswith("weight_scale")
    )
    tensors[name] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    request = {"checkpoints": [str(folder)], "prompts": PROMPTS, "dtype": "float32", "plugins": "finescale"}
    (tmp_path / "request.json").write_text(json.dumps(request))
    subprocess.run([vllm_python, str(WORKER), tmp_path / "request.json", tmp_path / "answer.json"], check=True)
    (answer,) = json.loads((tmp_path / "answer.json").read_text())
    assert re.search(words, answer["error"])


@contextlib.contextmanager
def served(python, folder, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": "finescale"}
    options = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--port", str(port)]
    command = [str(python), "-m", "finescale.cli.main", "serve", str(folder), *options, "--served-model-name", "zoo"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1/completions", process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def post(url, prompt, stream=False):
    body = {"model": "zoo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.loads(response.read())["choices"][0]["text"]
        lines = [line.decode().strip().removeprefix("data: ") for line in response]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines if line and line != "[DONE]")


def test_serve_answers_an_openai_client(checkpoints, vllm_python, tmp_path):
    from finescale.calibration.data import open_tokenizer

    folder = checkpoints / "llama"
    tokenizer = open_tokenizer(folder)
    expected = [tokenizer.decode(greedy(folder, prompt)) for prompt in PROMPTS]
    with served(vllm_python, folder, tmp_path / "log.txt") as (url, process):
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda prompt: post(url, prompt), PROMPTS * 2))
        assert texts == expected * 2
        assert post(url, PROMPTS[0], stream=True) == expected[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
