"""Decode and prefill times in a real vLLM on one GPU: bfloat16, vLLM's own 4-bit kernels, and finescale's plugin.

    python benchmarks/serving.py --json benchmarks/results/serving-h100.json --shape llama-2-7b

Needs vLLM (0.20 or later) and finescale in one environment, and a Hopper GPU. Weights are random; the shape is that of
the named model. Every arm runs in a process of its own, with the same settings: CUDA graphs of all decode batches, no
prefix cache, greedy sampling. A decode step is the time of 128 more tokens over 128; medians and spreads are of
``--repeat`` runs. Before anything is timed, a small model is generated from by the plugin and by `finescale.load`.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GROUP = 128
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048,
    },
    "tiny-mixtral": {
        "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
CHECKS = {"check": "tiny", "check-mixtral": "tiny-mixtral"}
BATCHES = (1, 16, 64, 128)
PREFILL, PROMPT, TOKENS = 2048, 128, 128
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
    "bf16-compile": {"weights": None, "compile": True},
    "finescale-folded-compile": {"weights": "folded", "compile": True},
}
"""What is compared. Machete is what vLLM takes for W4A16 on Hopper; Marlin rounds activations to int8 only when told to
by its environment variable, and its Hopper code is compiled for float16."""
DEFAULT = (*CHECKS, "bf16", "machete", "marlin-w4a8", "finescale-folded", "finescale-integer")


def model_config(shape: str, dtype: str) -> dict[str, Any]:
    """config.json of a Llama, or a Mixtral, of this shape."""
    family = "mixtral" if "num_local_experts" in SHAPES[shape] else "llama"
    return SHAPES[shape] | {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def write_model(folder: Path, shape: str, weights: str | None, dtype: str) -> None:
    """A folder that vLLM loads: of finescale's forms with weights, of others the config alone (dummy weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape, dtype)
    if weights == "w4a16":
        from finescale.formats.compressed_tensors import quantization_config
        from finescale.grid import WeightScheme

        config["quantization_config"] = quantization_config({"layer": WeightScheme(4, GROUP, True)}, None, [])
    elif weights is not None:
        config["quantization_config"] = write_quantized(folder, config, weights)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_quantized(folder: Path, config: dict[str, Any], form: str) -> dict[str, Any]:
    """Random W4A8 weights, the same in every block, one file for each; the quantization config that belongs to them."""
    import torch
    from safetensors.torch import save_file

    from finescale.formats.compressed_tensors import quantization_config
    from finescale.grid import ActivationScheme, WeightScheme

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }  # fmt: skip
    feed_forward = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    experts, router = config.get("num_local_experts", 0), "block_sparse_moe.gate"
    for expert in range(experts):
        names = zip(("w1", "w3", "w2"), feed_forward.values(), strict=True)
        linears |= {f"block_sparse_moe.experts.{expert}.{name}": shape for name, shape in names}
    if not experts:
        linears |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
    tensors, facts = {}, {}
    for name, shape_OI in linears.items():
        stored, facts[name] = random_layer(shape_OI, form, device)
        tensors |= {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in stored.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.rand(hidden).add_(0.5).bfloat16()
    if experts:
        tensors[f"{router}.weight"] = torch.randn(experts, hidden).mul_(0.1).bfloat16()
    index, layers = {}, {}
    blocks = range(config["num_hidden_layers"])
    for block in blocks:
        prefix = f"model.layers.{block}."
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / f"block-{block:03}.safetensors")
        index |= {prefix + name: f"block-{block:03}.safetensors" for name in tensors}
        layers |= {prefix + name: entry for name, entry in facts.items()}
    rest = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, device=device).bfloat16().cpu(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": torch.randn(config["vocab_size"], hidden, device=device).mul_(0.05).bfloat16().cpu(),
    }
    save_file(rest, folder / "rest.safetensors")
    index |= dict.fromkeys(rest, "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    schemes = dict.fromkeys(layers, WeightScheme(4, GROUP, True))
    own = {"version": 1, "finescale": "benchmark", "kv_cache": None, "layers": layers}
    routers = [f"model.layers.{block}.{router}" for block in blocks] if experts else []
    return quantization_config(schemes, ActivationScheme(8), routers, own)


def random_layer(shape_OI: tuple[int, int], form: str, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of one layer as they are stored, and what the checkpoint says of it; outputs of about unit size."""
    import torch

    from finescale.formats.compressed_tensors import pack
    from finescale.grid import Grid, QuantizedWeight, WeightScheme, contiguous_groups
    from finescale.grid.integer_scale import prove_no_overflow

    outputs, inputs = shape_OI
    codes_OI = torch.randint(-7, 8, shape_OI, dtype=torch.int8, device=device)
    largest = 15 if form == "folded" else 60
    scale_OG = torch.randint(largest // 3, largest + 1, (outputs, inputs // GROUP), device=device)
    scale_OG[:, :2] = torch.tensor([13, 11], device=device)  # without a common divisor, which folded scales have not
    amplifier = 2 ** round(8 + (0 if form == "folded" else 2) + torch.tensor(inputs / 512.0).log2().item() / 2)
    group_of_I = contiguous_groups(inputs, GROUP, device)
    bound = prove_no_overflow("layer", codes_OI, scale_OG.int(), group_of_I)
    grid = Grid(WeightScheme(4, GROUP, True), scale_OG.float() / amplifier, None, group_of_I, torch.bfloat16)
    folded = {"amplifier": 1, "folded": True} if form == "folded" else {"amplifier": amplifier}
    facts = {"bits": 4, "group_size": GROUP, "symmetric": True, "bound": bound, **folded}
    return pack(QuantizedWeight(codes_OI, grid)), facts


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


def run_arm(folder: Path, arm: dict[str, Any], shape: str, repeat: int, memory: float, answer: Path) -> None:
    """Milliseconds of a prefill, and of a decode step by batch, written to ``answer`` one by one."""
    import torch

    if arm["weights"] == "w4a16":
        _random_bits_in_dummy_weights()
    started = time.time()
    llm = engine(folder, arm, memory)
    result: dict[str, Any] = {"ready_seconds": round(time.time() - started, 1), "machine": _machine()}
    print(f"ready in {result['ready_seconds']} s", flush=True)
    vocabulary = SHAPES[shape]["vocab_size"]

    def seconds(count: int, length: int, tokens: int) -> float:
        prompts = random_prompts(count, length, vocabulary)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        outputs = generated(llm, prompts, tokens)
        torch.cuda.synchronize()
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
    result["kernels"] = {str(batch): _profile(lambda b=batch: seconds(b, PROMPT, 9)) for batch in (1, 64)}  # type: ignore[misc]
    answer.write_text(json.dumps(result))


def _machine() -> dict[str, Any]:
    import vllm

    from finescale.bench.machine import machine_facts

    return machine_facts() | {"vllm": vllm.__version__}


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "smallest": round(min(values), 4),
        "largest": round(max(values), 4),
    }


def _profile(call: Any) -> list[tuple[str, int, float]]:
    """The longest GPU kernels of a call: name, calls, microseconds in all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)[:16]
    return [(row.key[:100], row.count, round(row.device_time_total, 1)) for row in rows]


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
    """Greedy tokens of the small model by the plugin, with CUDA graphs, and by `finescale.load`, on the same GPU."""
    import torch

    import finescale

    prompts = random_prompts(3, 24, SHAPES["tiny"]["vocab_size"], seed=1)
    outputs = generated(engine(folder, arm, memory), prompts, 24, logprobs=1)
    model = finescale.load(folder, dtype=torch.bfloat16, device="cuda", path="kernel")
    equal, worst, total = 0, 0.0, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        for step, token in enumerate(tokens):
            total += 1
            equal += int(expected[step].argmax()) == token
            found = output.outputs[0].logprobs[step][token].logprob
            worst = max(worst, abs(found - float(expected[step, token])))
    return {
        "machine": _machine(),
        "tokens": total,
        "same_token": equal,
        "largest_logprob_difference": round(worst, 4),
    }


def compile_ahead(shape: str) -> dict[str, Any]:
    """Compile the plugin's kernels for all sizes of the run at once: this costs processor time, not the GPU's."""
    import torch

    from finescale.kernels.hopper import gemm
    from finescale.kernels.jit import compile_source, source_text

    sizes = SHAPES[shape]
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    keys = sizes["num_key_value_heads"] * hidden // sizes["num_attention_heads"]
    layers = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)]
    chosen = {
        gemm.choose(tokens, outputs, inputs // 128, 1, folded, gemm.OUT_TYPES[torch.bfloat16], gemm.capacity(0))
        for tokens in (*CAPTURED, PREFILL, 8192)
        for outputs, inputs in layers
        for folded in (True, False)
    }
    texts = [source_text("gemm.cu", dict(v.settings()), dict(v.headers())) for v in chosen]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: compile_source(text, "sm_90a"), texts))
    return {"variants": len(texts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT), choices=[*CHECKS, *ARMS])
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
        # All processes start at once and wait with everything imported, for imports take longer than most runs.
        names = ["compile", *options.arms]
        processes = {name: _start(name, options, folder) for name in names}
        for name, process in processes.items():
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


def _start(name: str, options: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    arm = ARMS.get(name, {})
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_USE_DEEP_GEMM": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
    } | arm.get("environment", {})  # fmt: skip
    log = (options.json.parent / f"{options.json.stem}-{name}.log").open("w")
    options_of_child = ["--json", str(options.json), "--shape", options.shape, "--repeat", str(options.repeat)]
    options_of_child += ["--memory", str(options.memory)]
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), *options_of_child]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    )  # fmt: skip


def _finish(name: str, process: subprocess.Popen[bytes], seconds: float, folder: Path) -> dict[str, Any]:
    started = time.time()
    try:
        process.communicate(b"go\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
    answer = folder / f"{name}.json"
    taken = round(time.time() - started, 1)
    print(f"{name}: return code {process.returncode}, {taken} s", flush=True)
    found = json.loads(answer.read_text()) if answer.is_file() else {"error": f"return code {process.returncode}"}
    return found | {"seconds": taken}


def _child(options: argparse.Namespace) -> None:
    name, folder = options.one, options.folder
    answer = folder / f"{name}.json"
    if name == "compile":
        answer.write_text(json.dumps(compile_ahead(options.shape)))
        return
    import torch
    import vllm
    import vllm.v1.engine.llm_engine  # most of what LLM() imports

    print("vLLM", vllm.__version__, "torch", torch.__version__, flush=True)
    sys.stdin.readline()
    arm = ARMS["finescale-folded" if name in CHECKS else name]
    shape = CHECKS.get(name, options.shape)
    model = folder / f"model-{shape}-{arm['weights']}-{arm.get('dtype', 'bfloat16')}"
    if not (model / "config.json").is_file():
        started = time.time()
        write_model(model, shape, arm["weights"], arm.get("dtype", "bfloat16"))
        print(f"model written in {time.time() - started:.1f} s", flush=True)
        torch.cuda.empty_cache()
    if name in CHECKS:
        answer.write_text(json.dumps(compare_with_finescale(model, arm, options.memory)))
    else:
        run_arm(model, arm, shape, options.repeat, options.memory, answer)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
