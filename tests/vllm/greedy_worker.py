"""Greedy tokens of checkpoints in a real vLLM, run by another interpreter than the tests' own.

    PYTHON_WITH_VLLM greedy_worker.py REQUEST.json ANSWER.json

REQUEST: {"checkpoints": [folder, ...], "prompts": [[token id, ...], ...], "tokens": 16, "dtype": "float32",
          "max_model_len": 128, "top": 5, "seconds": 300 (for each checkpoint),
          "plugins": "" (names of the vLLM plugins to load, with commas; none by default),
          "emulate": false (whether to emulate the kernels of a Hopper GPU), "ranks": 1, "options": {} (more of LLM's),
          "each": {folder: {what differs for this checkpoint}}}
ANSWER: one entry per checkpoint: {"checkpoint", "tokens": [[id, ...], ...],
          "logprobs": [[{id: logprob, ...}, ...], ...], "prompt_logprobs": [[logprob of each prompt token but the
          first], ...], "kernels": [kernels that vLLM says it uses], "modules": [classes in the model], "seconds"}
        or {"checkpoint", "error": last lines of the log}.

Checkpoints are loaded one after the other in one process, for vLLM takes long to import. Where that process dies (of an
instruction the machine lacks, say), another one goes on with the next checkpoint.
"""

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors reach us, and there is no child process to leave behind
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks on few cores
}
ROOT = str(Path(__file__).parents[2])
KERNEL = re.compile(r"Using (\w*(?:Kernel|Experts|MoEMethod|MoE backend)\w*(?: for \w+)?)")
MARK = "greedy_worker: checkpoint "


def generate(request: dict, checkpoint: str) -> dict:
    """Load one checkpoint and generate."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint,
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
    modules = llm.apply_model(module_classes)[0] if request.get("ranks", 1) == 1 else []
    with contextlib.suppress(AttributeError):
        llm.llm_engine.engine_core.shutdown()  # the processes of several ranks
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


def module_classes(model) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules()})


def run_all(request: dict, folder: Path) -> None:
    """In the child: every checkpoint, its answer in a file of its number; an exception is an answer too."""
    if request.get("emulate"):
        from tests.vllm import emulated_kernels  # noqa: F401
    from vllm.distributed import cleanup_dist_env_and_memory

    for number, checkpoint in enumerate(request["checkpoints"]):
        print(MARK + checkpoint, flush=True)
        answer = {}
        started = time.monotonic()
        try:
            answer = generate(request | request.get("each", {}).get(checkpoint, {}), checkpoint)
        except Exception:
            answer = {"error": traceback.format_exc()[-4000:]}
        answer["seconds"] = round(time.monotonic() - started, 1)
        (folder / f"{number}.json").write_text(json.dumps(answer))
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()


def run_in_child(request: dict, folder: Path) -> list[dict]:
    """Answers for the first checkpoints, up to the one at which the child died, if it did."""
    question, log = folder / "question.json", folder / "log.txt"
    for old in folder.glob("[0-9]*.json"):
        old.unlink()
    question.write_text(json.dumps(request))
    checkpoints = request["checkpoints"]
    environment = {"VLLM_PLUGINS": request.get("plugins", ""), "PYTHONPATH": ROOT}
    with log.open("w") as stream, contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, __file__, "--child", str(question), str(folder)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | environment,
            timeout=120 + request.get("seconds", 300) * len(checkpoints),
            check=False,
        )
    parts = log.read_text(errors="replace").split(MARK)[1:]
    answers: list[dict] = []
    for number, checkpoint in enumerate(checkpoints):
        lines = parts[number].splitlines() if number < len(parts) else []
        file = folder / f"{number}.json"
        if not file.exists():
            return [*answers, {"checkpoint": checkpoint, "error": "\n".join(lines[-30:]) or log.read_text()[-3000:]}]
        answer = json.loads(file.read_text())
        answer["kernels"] = sorted({match for line in lines for match in KERNEL.findall(line)})
        if "error" in answer:  # what vLLM's own processes said, too
            answer["error"] = "\n".join([*lines[-30:], answer["error"]])
        answers.append({"checkpoint": checkpoint, **answer})
    return answers


def main() -> None:
    request = json.loads(Path(sys.argv[-2]).read_text())
    if sys.argv[1] == "--child":
        run_all(request, Path(sys.argv[-1]))
        return
    answers: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(answers) < len(request["checkpoints"]):
            left = request["checkpoints"][len(answers) :]
            answers += run_in_child(request | {"checkpoints": left}, Path(folder))
    Path(sys.argv[-1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
