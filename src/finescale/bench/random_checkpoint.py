"""Checkpoints of Llama's architecture with random weights, written shard by shard, to run at a large size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from finescale.calibration.data import builtin_text


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a model."""

    hidden: int
    mlp: int
    blocks: int
    heads: int
    vocabulary: int = 32000


OPEN_LLAMA_3B = LlamaShape(3200, 8640, 26, 32)
LLAMA_2_7B = LlamaShape(4096, 11008, 32, 32)
SHAPES = {
    "open-llama-3b": OPEN_LLAMA_3B,
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-7b-2-blocks": replace(LLAMA_2_7B, blocks=2),
    "tiny": LlamaShape(64, 96, 4, 4, 2000),
}


def write_random_llama(folder: Path, shape: LlamaShape, dtype: torch.dtype, device: str = "cpu") -> int:
    """Write config, a tokenizer of 1000 tokens, and one shard a block; returns the number of parameters.

    Args:
        folder: is made.
        shape: of the model.
        dtype: of the file.
        device: where random numbers are made; on the CPU, where that takes its time, all blocks have the same ones.
    """
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=False, dtype=str(dtype).removeprefix("torch."), architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    _tokenizer().save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return (0.02 * torch.randn(*size, generator=generator, device=device)).to("cpu", dtype)

    weight_map: dict[str, str] = {}
    parameters = 0
    block: dict[str, Tensor] = {}
    for index in range(shape.blocks + 1):
        if index == shape.blocks:
            tensors = {
                "model.embed_tokens.weight": random(shape.vocabulary, shape.hidden),
                "lm_head.weight": random(shape.vocabulary, shape.hidden),
                "model.norm.weight": torch.ones(shape.hidden, dtype=dtype),
            }
        else:
            if not block or device != "cpu":
                block = _block(shape, random, dtype)
            tensors = {f"model.layers.{index}.{key}": tensor for key, tensor in block.items()}
        name = f"model-{index + 1:05d}-of-{shape.blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def _block(shape: LlamaShape, random: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    attention = {f"self_attn.{name}_proj.weight": random(shape.hidden, shape.hidden) for name in "qkvo"}
    mlp = {f"mlp.{name}_proj.weight": random(shape.mlp, shape.hidden) for name in ("gate", "up")}
    norms = {f"{name}_layernorm.weight": torch.ones(shape.hidden, dtype=dtype) for name in ("input", "post_attention")}
    return attention | mlp | {"mlp.down_proj.weight": random(shape.hidden, shape.mlp)} | norms


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator([builtin_text()[:100_000]], trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core)
