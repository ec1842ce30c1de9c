"""Tokens a second of greedy decoding on a CPU: float32 beside W4A8 with integer scales, one sequence.

    python benchmarks/decode_cpu.py --json benchmarks/results/decode-cpu.json [--model FOLDER]

Without a folder the model has the shapes of SmolLM2-135M and random weights: speed does not depend on values. Linear
layers of the blocks are replaced where they stand, by rounding to nearest; all else, the output head included, stays as
it is. Both models take turns, medians count.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from finescale.bench.machine import machine_facts
from finescale.grid import (
    ActivationScheme,
    InputRule,
    QuantizedWeight,
    WeightScheme,
    fit_grid,
    quantize_to_grid,
    with_integer_scales,
)
from finescale.runtime.load import load
from finescale.runtime.portable import PortableLinear, join_same_inputs

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
GROUP = 64
PROMPT = 32


def quantize_linears(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy whose blocks multiply in W4A8, and the kernel that does it."""
    model, kernel = copy.deepcopy(model), ""
    for name, module in list(model.model.named_modules()):  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear):
            grid = fit_grid(module.weight.data, WeightScheme(4, GROUP, True))
            grid = with_integer_scales(grid, module.weight.data, "auto")
            weight = QuantizedWeight(quantize_to_grid(module.weight.data, grid), grid)
            layer = PortableLinear(weight, None, InputRule(ActivationScheme(8)), torch.device("cpu"))
            kernel = str(layer.product.kernel)
            model.model.set_submodule(name, layer)  # type: ignore[union-attr, operator]
    join_same_inputs(model)
    return model, kernel


@torch.inference_mode()
def seconds_a_token(model: Any, tokens: int) -> float:
    """Of greedy decoding after a prompt; the prompt does not count."""
    prompt = torch.arange(1, PROMPT + 1)[None]
    out = model(prompt, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", help="a folder or GGUF file")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense: Any = load(options.model) if options.model else LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    quantized, kernel = quantize_linears(dense)
    models = {"float32": dense, kernel: quantized}
    times: dict[str, list[float]] = {name: [] for name in models}
    for counted in [False, *[True] * options.rounds]:
        for name, model in models.items():
            seconds = seconds_a_token(model, options.tokens)
            if counted:
                times[name].append(seconds)
    speed = {name: 1 / statistics.median(each) for name, each in times.items()}
    result = {
        "benchmark": "decode_cpu",
        "machine": machine_facts(),
        "model": options.model or "shapes of SmolLM2-135M, random weights",
        "group_size": GROUP,
        "tokens": options.tokens,
        "tokens_per_second": speed,
        "slowest_and_fastest": {name: [1 / max(each), 1 / min(each)] for name, each in times.items()},
        "command": " ".join(["python benchmarks/decode_cpu.py", *sys.argv[1:]]),
    }
    print(", ".join(f"{name} {value:.1f} tokens/s" for name, value in speed.items()))
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
