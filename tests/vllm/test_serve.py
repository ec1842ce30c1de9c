"""``finescale serve``: an OpenAI client talks to a real vLLM with finescale's plugin."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import finescale
from finescale.runtime.load import load
from tests.vllm.asking import PROMPTS, TOKENS, greedy
from tests.vllm.greedy_worker import ENVIRONMENT

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def checkpoint(vllm_python, zoo, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "llama"
    text = str(shared / "data" / "books" / "books_valid.txt")
    settings = ("solver.name=rtn", "weights.group_size=64", "calibration.samples=2", "calibration.length=64")
    finescale.quantize(zoo("llama"), "w4a8-integer-scale", out=folder, calibration=text, settings=settings)
    return folder


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


def test_serve_answers_an_openai_client(checkpoint, vllm_python, tmp_path):
    from finescale.calibration.data import open_tokenizer

    tokenizer = open_tokenizer(checkpoint)
    expected = [tokenizer.decode(tokens) for tokens in greedy(load(checkpoint, path="integer"))]
    with served(vllm_python, checkpoint, tmp_path / "log.txt") as (url, process):
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda prompt: post(url, prompt), PROMPTS * 2))
        assert texts == expected * 2
        assert post(url, PROMPTS[0], stream=True) == expected[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
