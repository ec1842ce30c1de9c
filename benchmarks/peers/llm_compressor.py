"""llm-compressor's GPTQ on a model and token windows that another script gives it, in an environment of its own.

    python3 -m venv VENV && VENV/bin/pip install llmcompressor==0.14.0.1
    VENV/bin/python benchmarks/peers/llm_compressor.py --model MODEL --tokens TOKENS.safetensors --out OUT \
        --bits 4 --group 64

``TOKENS`` holds ``calibration``, int64 [windows, length]. ``OUT`` gets ``weights.safetensors`` (the dequantized weight
of every quantized layer, float32, from the tool's own scales and zero points) and ``facts.json`` (seconds of the
processor, versions, settings). ``--group -1`` is one asymmetric scale per channel, as in the papers.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def dequantized(layer: Any, bits: int, group: int) -> Tensor:
    """(code - zero point) * scale in float32, with the code nearest to the weight that the tool left in the layer."""
    weight = layer.weight.detach().cpu().float()
    rows, columns = weight.shape
    size = columns if group == -1 else group
    scale = layer.weight_scale.detach().cpu().reshape(rows, -1).float().repeat_interleave(size, 1)[:, :columns]
    zero = getattr(layer, "weight_zero_point", None)
    offset = (
        0.0 if zero is None else zero.detach().cpu().reshape(rows, -1).float().repeat_interleave(size, 1)[:, :columns]
    )
    codes = ((weight / scale).round() + offset).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    value: Tensor = ((codes - offset) * scale).contiguous()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1, help="the tool takes a GPU by itself where it sees one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    windows = load_file(arguments.tokens)["calibration"]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    grouped = arguments.group != -1
    weights = QuantizationArgs(
        num_bits=arguments.bits,
        type="int",
        symmetric=grouped,
        strategy="group" if grouped else "channel",
        group_size=arguments.group if grouped else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier(
        config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=arguments.damping, actorder="static"
    )
    rows = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    wall, processor = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=rows,
        recipe=modifier,
        num_calibration_samples=windows.shape[0],
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    facts = {
        "tool": "llm-compressor GPTQ",
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")},
        "settings": {key: getattr(arguments, key) for key in ("bits", "group", "damping")}
        | {"block_size": modifier.block_size, "actorder": "static"}
        | {"device": "cuda" if torch.cuda.is_available() else "cpu"},
        "cpu_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - wall,
    }
    found = {
        name: dequantized(layer, arguments.bits, arguments.group)
        for name, layer in model.named_modules()
        if hasattr(layer, "weight_scale")
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(found, arguments.out / "weights.safetensors", metadata={"format": "pt"})
    (arguments.out / "facts.json").write_text(json.dumps(facts | {"layers": len(found)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
