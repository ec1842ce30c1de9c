"""Models of known shapes with random weights, written so that vLLM loads them: bfloat16, W4A16 and finescale's W4A8.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import json
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
    "llama-2-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


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
    tensors: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name, shape_OI in linears.items():
        stored, facts[name] = random_layer(shape_OI, form, device)
        tensors |= {f"{name}.{suffix}": tensor.cpu() for suffix, tensor in stored.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.rand(hidden).add_(0.5).bfloat16()
    if experts:
        tensors[f"{router}.weight"] = torch.randn(experts, hidden).mul_(0.1).bfloat16()
    index: dict[str, str] = {}
    layers: dict[str, Any] = {}
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
