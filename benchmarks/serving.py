"""Decode and prefill times in a real vLLM on one GPU: bfloat16, vLLM's own 4-bit kernels, and finescale's plugin.

    python benchmarks/serving.py --json benchmarks/results/serving-h100.json --shape llama-2-7b

Needs vLLM (0.20 or later) and finescale in one environment, and a Hopper GPU. Weights are random; the shape is that of
the named model. Every arm runs in a process of its own, engine included, with the same settings: CUDA graphs of all
decode batches, no prefix cache, greedy sampling. A decode step is the time of 128 more tokens over 128; medians and
spreads are of ``--repeat`` runs. Checks generate from a small model by the plugin and by `finescale.load`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving_models import SHAPES, model_config, write_model

PREPARE = "prepare"
CHECKS = {"check": "tiny", "check-mixtral": "tiny-mixtral"}
BATCHES = (1, 16, 64, 128)
PREFILL, PROMPT, TOKENS = 2048, 128, 128
SAMPLING = "ArgMax"
"""In the name of the kernel that ends each step: greedy sampling."""
CAPTURED = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
MARLIN_ONLY = "CutlassW4A8LinearKernel,MacheteLinearKernel,AllSparkLinearKernel"
ARMS: dict[str, dict[str, Any]] = {
    "bf16": {"weights": None},
    "machete": {"weights": "w4a16"},
    "marlin-w4a8": {
        "weights": "w4a16",
        "dtype": "float16",
        "environment": {"VLLM_MARLIN_INPUT_DTYPE": "int8", "VLLM_DISABLED_KERNELS": MARLIN_ONLY},
    },
    "finescale-folded": {"weights": "folded"},
    "finescale-integer": {"weights": "integer"},
    "finescale-folded-flash-attention": {"weights": "folded", "attention": "vLLM"},
    "bf16-two-processes": {"weights": None, "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
    "finescale-folded-two-processes": {"weights": "folded", "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}},
    "bf16-compile": {"weights": None, "compile": True},
    "finescale-folded-compile": {"weights": "folded", "compile": True},
}
"""What is compared. Machete is what vLLM takes for W4A16 on Hopper; Marlin rounds activations to int8 only when told to
by its environment variable, and its Hopper code is compiled for float16. With flash-attention, decoding keeps vLLM's
own attention, which all arms but finescale's have."""
DEFAULT = ("bf16", "finescale-folded", "machete", "marlin-w4a8", "finescale-integer", *CHECKS)


def engine(folder: Path, arm: dict[str, Any], memory: float) -> Any:
    """vLLM with the settings that all arms share."""
    from vllm import LLM

    compilation: dict[str, Any] = {"cudagraph_capture_sizes": list(CAPTURED)}
    if not arm.get("compile"):
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    own = arm["weights"] in ("folded", "integer")
    return LLM(
        model=str(folder), load_format="auto" if own else "dummy", skip_tokenizer_init=True,
        dtype=arm.get("dtype", "bfloat16"), max_model_len=2304, gpu_memory_utilization=memory, max_num_seqs=128,
        max_num_batched_tokens=8192, enable_prefix_caching=False, generation_config="vllm", seed=0,
        disable_log_stats=True, compilation_config=compilation,
    )  # fmt: skip


def generated(llm: Any, prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> Any:
    """Greedy continuations."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
    )  # fmt: skip
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def run_arm(
    folder: Path, arm: dict[str, Any], shape: str, repeat: int, memory: float, profiled: bool, answer: Path
) -> None:
    """Milliseconds of a prefill, and of a decode step by batch, written to ``answer`` one by one."""
    if arm["weights"] == "w4a16":
        _random_bits_in_dummy_weights()
    if arm.get("attention") == "vLLM":
        from finescale.runtime import vllm_rotary

        vllm_rotary.page_attention = lambda *_: None
    started, before = time.time(), _compiled()
    llm = engine(folder, arm, memory)
    compiled = _compiled() - before
    gc.collect()
    gc.freeze()  # what vLLM does in an engine's own process: collections need not walk through it again and again
    result: dict[str, Any] = {
        "ready_seconds": round(time.time() - started, 1), "compiled_kernels": compiled, "machine": _machine()
    }  # fmt: skip
    print(f"ready in {result['ready_seconds']} s", flush=True)
    vocabulary = SHAPES[shape]["vocab_size"]

    def seconds(count: int, length: int, tokens: int) -> float:
        prompts = random_prompts(count, length, vocabulary)
        begin = time.perf_counter()
        outputs = generated(llm, prompts, tokens)
        taken = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return taken

    seconds(1, PREFILL, 1)
    seconds(1, PROMPT, 16)
    result["prefill_ms"] = _summary([seconds(1, PREFILL, 1) * 1e3 for _ in range(2 * repeat)])
    result["decode_ms"] = {}
    for batch in BATCHES:
        seconds(batch, PROMPT, 4)
        first = statistics.median(seconds(batch, PROMPT, 1) for _ in range(repeat))
        steps = [(seconds(batch, PROMPT, TOKENS + 1) - first) / TOKENS * 1e3 for _ in range(repeat)]
        result["decode_ms"][str(batch)] = _summary(steps)
        answer.write_text(json.dumps(result))
    if not profiled:
        return
    result["profile"] = {"prefill": _profile(llm, lambda: seconds(1, PREFILL, 1), 0)}
    for batch in BATCHES:
        # The first step is that of the prompts.
        result["profile"][str(batch)] = _profile(llm, lambda b=batch: seconds(b, PROMPT, 9), 1)  # type: ignore[misc]
        answer.write_text(json.dumps(result))


def _machine() -> dict[str, Any]:
    import vllm

    from finescale.bench.machine import machine_facts

    return machine_facts() | {"vllm": vllm.__version__}


def _compiled() -> int:
    """Kernels of finescale that were compiled so far."""
    from finescale.environment import cache_folder

    return len(list(cache_folder().glob("*.cubin")))


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "smallest": round(min(values), 4),
        "largest": round(max(values), 4),
    }


def _profile(llm: Any, call: Callable[[], Any], first: int) -> dict[str, Any]:
    """What the GPU did in an average step of a call, from step ``first`` on."""
    from finescale.bench.timeline import between, summary

    def start(worker: Any) -> None:
        from finescale.bench.timeline import start_tracing

        worker.finescale_trace = start_tracing()

    def stop(worker: Any) -> str:
        from finescale.bench.timeline import traced

        return json.dumps(traced(worker.finescale_trace))

    llm.collective_rpc(start)
    call()
    events = [tuple(event) for event in json.loads(llm.collective_rpc(stop)[0])]
    return summary(between(events, SAMPLING)[first:])


def _random_bits_in_dummy_weights() -> None:
    """vLLM's dummy loader leaves integers as they are in memory: random bits instead, and scales of a sane size."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    original = dummy_loader.initialize_dummy_weights

    def initialize(model: Any, *args: Any, **kwargs: Any) -> None:
        own = list(model.named_parameters(recurse=False))
        if not own and not list(model.buffers(recurse=False)):
            return
        original(model, *args, **kwargs)
        for name, parameter in own:
            if parameter.dtype == torch.int32 and "packed" in name:
                parameter.data.random_(-(2**31), 2**31 - 1)
            elif name.endswith("weight_scale"):
                parameter.data.copy_(torch.rand_like(parameter, dtype=torch.float32) * 0.004 + 0.002)

    dummy_loader.initialize_dummy_weights = initialize


def compare_with_finescale(folder: Path, arm: dict[str, Any], memory: float) -> dict[str, Any]:
    """Greedy tokens of the small model by the plugin, with CUDA graphs, beside `finescale.load` on the same GPU, which
    says what it makes of the same tokens; and how far finescale in bfloat16 is from itself in float32."""
    import torch

    import finescale

    prompts = random_prompts(3, 24, SHAPES["tiny"]["vocab_size"], seed=1)
    outputs = [output.outputs[0] for output in generated(engine(folder, arm, memory), prompts, 24, logprobs=1)]
    tokens_PT = torch.tensor([list(output.token_ids) for output in outputs])
    found_PT = torch.tensor([[row[t].logprob for row, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs])
    whole = torch.cat((torch.tensor(prompts), tokens_PT), 1).cuda()
    expected = []
    for dtype in (torch.bfloat16, torch.float32):
        model = finescale.load(folder, dtype=dtype, device="cuda", path="kernel")
        with torch.no_grad():
            logits = torch.cat([model(ids[None]).logits[:, len(prompts[0]) - 1 : -1].float() for ids in whole])
        expected.append(logits.log_softmax(-1).cpu())
    own_PT, exact_PT = (logprobs.gather(-1, tokens_PT[..., None])[..., 0] for logprobs in expected)
    return {
        "machine": _machine(),
        "tokens": tokens_PT.numel(),
        "same_token": int((expected[0].argmax(-1) == tokens_PT).sum()),
        "largest_logprob_difference": round(float((found_PT - own_PT).abs().max()), 4),
        "same_token_in_bfloat16_and_float32": int((expected[0].argmax(-1) == expected[1].argmax(-1)).sum()),
        "largest_difference_of_bfloat16_and_float32": round(float((own_PT - exact_PT).abs().max()), 4),
    }


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """What would otherwise be done in the arms, one after the other: models are written, the plugin's kernels compiled,
    and vLLM looks its models' classes up (in a process of its own that imports all of vLLM; it keeps what it finds)."""
    from vllm.model_executor.models.registry import ModelRegistry

    started = time.time()
    with ThreadPoolExecutor() as pool:
        families = {model_config(CHECKS.get(name, options.shape), "")["architectures"][0] for name in options.arms}
        looked_up = [pool.submit(ModelRegistry.models[family].inspect_model_cls) for family in families]
        compiled = pool.submit(compile_ahead, options.shape)
        for name in options.arms:
            arm, shape = arm_of(name), CHECKS.get(name, options.shape)
            model = model_folder(options.folder, arm, shape)
            if not (model / "config.json").is_file():
                write_model(model, shape, arm["weights"], arm.get("dtype", "bfloat16"))
        for one in looked_up:
            one.result()
        return {"kernels": compiled.result(), "seconds": round(time.time() - started, 1)}


def compile_ahead(shape: str) -> int:
    """Compile the plugin's kernels for all sizes of the run at once: this costs processor time, not the GPU's."""
    import torch

    from finescale.kernels.hopper import gemm, quantize
    from finescale.kernels.jit import compile_all, source_text
    from finescale.kernels.launch import multiprocessors_of

    sizes = SHAPES[shape]
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    keys = sizes["num_key_value_heads"] * hidden // sizes["num_attention_heads"]
    layers = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)]
    counts = (*CAPTURED, PROMPT, PREFILL, 8192)
    chosen = {
        gemm.choose(tokens, outputs, inputs // 128, 1, folded, gemm.OUT_TYPES[torch.bfloat16], gemm.capacity(0))
        for tokens in counts
        for outputs, inputs in layers
        for folded in (True, False)
    }
    texts = {variant.text() for variant in chosen}
    before = (("plain", False, hidden), ("rms", False, hidden), ("rms", True, hidden), ("silu", False, wide))
    for tokens in counts:
        for kind, add, inputs in before:
            form = quantize.form(kind, add, torch.bfloat16, tokens, inputs, multiprocessors_of(0))
            texts.add(source_text("quantize.cu", dict(form.settings), {}))
    compile_all(texts)
    return len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT), choices=[*CHECKS, *ARMS])
    parser.add_argument(
        "--profiled", nargs="*", default=["bf16", "finescale-folded"], help="arms whose kernels are timed"
    )
    parser.add_argument("--shape", default="llama-2-7b", choices=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=180, help="limit for each arm; the first one also waits for imports"
    )
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory that vLLM takes")
    parser.add_argument("--folder", type=Path, help="for the models; a temporary one by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _child(options)
        return
    facts: dict[str, Any] = {
        "benchmark": "serving",
        "machine": {},
        "command": " ".join(["python benchmarks/serving.py", *sys.argv[1:]]),
        "setting": {
            "shape": options.shape,
            "repeat": options.repeat,
            "prefill": PREFILL,
            "prompt": PROMPT,
            "tokens": TOKENS,
        },
        "arms": {},
    }
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        folder = options.folder or Path(temporary)
        # While one arm loads its model the next one imports vLLM; what is timed runs alone.
        names = [PREPARE, *options.arms]
        waiting = [_start(name, options, folder) for name in names[:2]]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_end_all(running)))
        for place, name in enumerate(names):
            process = waiting.pop(0)
            _say_go(process)
            waiting += [_start(following, options, folder) for following in names[place + 2 : place + 3]]
            answer = _finish(name, process, options.seconds, folder)
            facts["machine"] |= answer.pop("machine", {})
            if name not in ARMS:
                facts[name] = answer
            else:
                facts["arms"][name] = answer
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps({name: facts[name] for name in CHECKS if name in facts}))
    print(summary_table(facts["arms"]))


def summary_table(arms: dict[str, Any]) -> str:
    """Milliseconds, and how many times faster than bfloat16, one line an arm."""
    columns = [("prefill", lambda arm: arm["prefill_ms"]["median"])]
    columns += [(f"batch {b}", lambda arm, b=b: arm["decode_ms"][str(b)]["median"]) for b in BATCHES]  # type: ignore[misc]
    lines = [" | ".join(["arm".ljust(26), *(name for name, _ in columns)])]
    for name, arm in arms.items():
        cells = []
        for _, read in columns:
            try:
                baseline = arms["bf16-compile" if name.endswith("compile") else "bf16"]
                cells.append(f"{read(arm):.3f} ms x{read(baseline) / read(arm):.2f}")
            except KeyError:
                cells.append("-")
        lines.append(" | ".join([name.ljust(26), *cells]))
    return "\n".join(lines)


running: list[subprocess.Popen[bytes]] = []
"""Processes of arms, each of which leads a group of its own."""


def _end_all(processes: list[subprocess.Popen[bytes]]) -> str:
    """Ends them with all that they started; says so."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
    return "stopped; what was measured is in the file"


def _start(name: str, options: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    arm = ARMS.get(name, {})
    # The engine in the process that asks it: with few sequences a step is shorter than what two processes say to each
    # other about it.
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
    } | arm.get("environment", {})  # fmt: skip
    log = (options.json.parent / f"{options.json.stem}-{name}.log").open("w")
    options_of_child = ["--json", str(options.json), "--shape", options.shape, "--repeat", str(options.repeat)]
    options_of_child += ["--memory", str(options.memory), "--arms", *options.arms]
    options_of_child += ["--profiled", *options.profiled]
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), *options_of_child]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )  # fmt: skip
    running.append(process)
    return process


def _say_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended before: its log says why
        process.stdin.write(b"go\n")
        process.stdin.flush()


def _finish(name: str, process: subprocess.Popen[bytes], seconds: float, folder: Path) -> dict[str, Any]:
    started = time.time()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped", flush=True)
    _end_all([process])  # what is left of it: vLLM's own processes
    process.wait()
    answer = folder / f"{name}.json"
    taken = round(time.time() - started, 1)
    print(f"{name}: return code {process.returncode}, {taken} s", flush=True)
    found = json.loads(answer.read_text()) if answer.is_file() else {"error": f"return code {process.returncode}"}
    return found | {"seconds": taken}


def arm_of(name: str) -> dict[str, Any]:
    return ARMS["finescale-folded" if name in CHECKS else name]


def model_folder(folder: Path, arm: dict[str, Any], shape: str) -> Path:
    return folder / f"model-{shape}-{arm['weights']}-{arm.get('dtype', 'bfloat16')}"


def _child(options: argparse.Namespace) -> None:
    import vllm
    import vllm.v1.engine.llm_engine

    print("vLLM", vllm.__version__, flush=True)
    sys.stdin.readline()
    name, answer = options.one, options.folder / f"{options.one}.json"
    if name == PREPARE:
        answer.write_text(json.dumps(prepare(options)))
        os._exit(0)
    arm, shape = arm_of(name), CHECKS.get(name, options.shape)
    model = model_folder(options.folder, arm, shape)
    if name in CHECKS:
        answer.write_text(json.dumps(compare_with_finescale(model, arm, options.memory)))
    else:
        run_arm(model, arm, shape, options.repeat, options.memory, name in options.profiled, answer)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
