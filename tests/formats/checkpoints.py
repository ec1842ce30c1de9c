"""Small checkpoints in every format, written without the pipeline: round to nearest, then pack."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finescale.formats import get
from finescale.grid import ActivationScheme, QuantizedWeight, WeightScheme, fit_grid, quantize_to_grid

COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = {**COMMON, "model_type": "llama", "intermediate_size": 192}
MIXTRAL: dict[str, Any] = {
    **COMMON,
    "model_type": "mixtral",
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
PROMPTS = [list(range(3, 43)), [7, 250, 99, 18, 31, 5, 180, 77]]
QUANTIZED = re.compile(r"\.layers\.\d+\..*(proj|w1|w2|w3)\.weight$")


def random_model(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """A random float16 model, saved in ``folder`` under the names of real checkpoints; its tensors.

    The output layer is scaled up, for sharp predictions: greedy tokens must not hang on the rounding of float16.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, initializer_range=0.08))
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    model.half().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_checkpoint(
    source: Path,
    tensors: dict[str, Tensor],
    folder: Path,
    format_name: str,
    scheme: WeightScheme,
    activations: ActivationScheme | None = None,
    overrides: dict[str, WeightScheme] | None = None,
) -> dict[str, Tensor]:
    """Quantize every layer of the blocks and write a checkpoint; returns the dequantized model in float32."""
    entry = get(format_name)
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    schemes: dict[str, WeightScheme] = {}
    for key, tensor in tensors.items():
        if QUANTIZED.search(key) is None:
            stored[key], dense[key] = tensor, tensor.float()
            continue
        name = key.removesuffix(".weight")
        chosen = next((other for pattern, other in (overrides or {}).items() if re.search(pattern, name)), scheme)
        grid = fit_grid(tensor.float(), chosen, torch.float16)
        weight = QuantizedWeight(quantize_to_grid(tensor.float(), grid), grid)
        stored |= {f"{name}.{suffix}": part for suffix, part in entry.pack(weight).items()}
        dense[key], schemes[name] = weight.dequantize(), chosen
    config = json.loads((source / "config.json").read_text())
    ignore = [key.removesuffix(".weight") for key in tensors if key.endswith("gate.weight")]
    quantization = entry.quantization_config(schemes, activations, ["lm_head", *ignore], {"version": 1, "layers": {}})
    if quantization is not None:
        config["quantization_config"] = quantization
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def prompt_logits(folder: Path) -> list[Tensor]:
    """float32 logits [T, V] of each prompt by transformers, for a checkpoint that it can load."""
    from transformers import AutoModelForCausalLM

    from finescale.claim import left_to_transformers

    with left_to_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def write_dense(source: Path, dense: dict[str, Tensor], folder: Path) -> Path:
    """The dequantized model as an ordinary float32 checkpoint."""
    folder.mkdir(parents=True)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
