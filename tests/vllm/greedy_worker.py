"""Greedy tokens of checkpoints in a real vLLM, run by another interpreter than the tests' own.

    PYTHON_WITH_VLLM greedy_worker.py REQUEST.json ANSWER.json

REQUEST: {"checkpoints": [folder, ...], "prompts": [[token id, ...], ...], "tokens": 16, "dtype": "float32",
          "max_model_len": 128, "top": 5, "seconds": 300,
          "plugins": "" (names of the vLLM plugins to load, with commas; none by default),
          "emulate": false (whether to emulate the kernels of a Hopper GPU), "ranks": 1, "options": {} (more of LLM's)}
ANSWER: one entry per checkpoint: {"checkpoint", "tokens": [[id, ...], ...],
          "logprobs": [[{id: logprob, ...}, ...], ...], "prompt_logprobs": [[logprob of each prompt token but the
          first], ...], "kernels": [kernels that vLLM says it uses], "modules": [classes in the model], "seconds"}
        or {"checkpoint", "error": last lines of the log, "returncode"}.

Every checkpoint is loaded in a process of its own, one after the other: an engine that dies (of an instruction the
machine lacks, say) takes no other with it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors reach us, and there is no child process to leave behind
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
ROOT = str(Path(__file__).parents[2])
KERNEL = re.compile(r"Using (\w*(?:Kernel|Experts|MoEMethod|MoE backend)\w*(?: for \w+)?)")


def generate(request: dict) -> dict:
    """Load the one checkpoint of the request and generate."""
    from vllm import LLM, SamplingParams

    if request.get("emulate"):
        from tests.vllm import emulated_kernels  # noqa: F401

    llm = LLM(
        model=request["checkpoints"][0],
        dtype=request.get("dtype", "float32"),
        max_model_len=request.get("max_model_len", 128),
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=max(2, len(request["prompts"])),
        seed=0,
        tensor_parallel_size=request.get("ranks", 1),
        **request.get("options", {}),
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request.get("tokens", 16),
        logprobs=request.get("top", 5),
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    prompts = request["prompts"]
    modules = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))[0]
    return {
        "modules": modules,
        "prompt_logprobs": [
            [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, prompts, strict=True)
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ],
    }


def run_alone(request: dict, checkpoint: str, folder: Path) -> dict:
    """Run `generate` for one checkpoint in a process of its own."""
    question, answer, log = folder / "question.json", folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(request | {"checkpoints": [checkpoint]}))
    command = [sys.executable, __file__, "--one", str(question), str(answer)]
    started = time.monotonic()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | {"VLLM_PLUGINS": request.get("plugins", ""), "PYTHONPATH": ROOT},
                timeout=request.get("seconds", 300),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    lines = log.read_text(errors="replace").splitlines()
    if code != 0 or not answer.exists():
        return {"checkpoint": checkpoint, "error": "\n".join(lines[-30:]), "returncode": code}
    kernels = sorted({match for line in lines for match in KERNEL.findall(line)})
    seconds = round(time.monotonic() - started, 1)
    return {"checkpoint": checkpoint, **json.loads(answer.read_text()), "kernels": kernels, "seconds": seconds}


def main() -> None:
    one = sys.argv[1] == "--one"
    request_path, answer_path = sys.argv[-2:]
    request = json.loads(Path(request_path).read_text())
    if one:
        answer: object = generate(request)
    else:
        with tempfile.TemporaryDirectory() as folder:
            answer = [run_alone(request, checkpoint, Path(folder)) for checkpoint in request["checkpoints"]]
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
