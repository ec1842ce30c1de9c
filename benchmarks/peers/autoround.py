"""AutoRound on a model and token windows that ``benchmarks/tuning.py`` gives it, in an environment of its own.

    python3 -m venv VENV && VENV/bin/pip install auto-round==0.16.1
    VENV/bin/python benchmarks/peers/autoround.py --model MODEL --tokens TOKENS.safetensors --out OUT \
        --bits 4 --group 64 --iterations 50

``TOKENS`` holds ``calibration``, int64 [windows, length]. ``OUT`` gets ``weights.safetensors`` (the dequantized weight
of every quantized layer, float32, from AutoRound's own codes and scales) and ``facts.json`` (seconds of the processor,
versions, settings), so that the same script evaluates AutoRound's result and everybody else's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class _Absent(ModuleType):
    """Stands for a package that AutoRound imports at its start and that tokens given as tensors never use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def auto_round() -> Any:
    """The class AutoRound, whether or not the packages for data sets are there."""
    for package in ("pandas", "datasets"):
        if find_spec(package) is None:
            sys.modules[package] = _Absent(package)
            sys.modules[package].__spec__ = ModuleSpec(package, None)
    return import_module("auto_round").AutoRound


def dequantized(layer: Any, group: int) -> Tensor:
    """scale * code in float32, with the code that is nearest to the weight AutoRound left in the layer."""
    rows, columns = layer.weight.shape
    size = columns if group == -1 else group
    scale = layer.scale.detach().cpu().reshape(rows, -1).float().repeat_interleave(size, 1)[:, :columns]
    return ((layer.weight.detach().cpu().float() / scale).round() * scale).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    windows = load_file(arguments.tokens)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    batches = [{"input_ids": batch} for batch in windows.split(arguments.batch)]
    wall, processor = time.perf_counter(), time.process_time()
    tuner = auto_round()(
        model,
        tokenizer,
        bits=arguments.bits,
        group_size=arguments.group,
        sym=True,
        iters=arguments.iterations,
        dataset=batches,
        nsamples=windows.shape[0],
        seqlen=windows.shape[1],
        batch_size=arguments.batch,
        seed=arguments.seed,
        device_map=arguments.device,
    )
    tuned, _ = tuner.quantize()
    facts = {
        "tool": f"AutoRound, {arguments.iterations} iterations"
        + (f", seed {arguments.seed}" if arguments.seed else ""),
        "versions": {name: version(name) for name in ("auto-round", "torch", "transformers")},
        "settings": {
            key: getattr(arguments, key) for key in ("bits", "group", "iterations", "batch", "seed", "device")
        },
        "cpu_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - wall,
    }
    weights = {
        name: dequantized(layer, arguments.group) for name, layer in tuned.named_modules() if hasattr(layer, "scale")
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.out / "weights.safetensors", metadata={"format": "pt"})
    (arguments.out / "facts.json").write_text(json.dumps(facts | {"layers": len(weights)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
