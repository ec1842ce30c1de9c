"""Tiny models and texts for the tests, made on the spot without any download, and runs over them.

Weights are random but not small: attention is peaked, biases and norms differ from their defaults, so that a layer that
is left out, mixed up or given the wrong bias changes the logits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from finescale.calibration.data import builtin_text
from finescale.pipeline.quantize import prepare, run
from finescale.recipe import Recipe
from finescale.runtime.checkpoint import open_quantized

VOCABULARY = 300
HIDDEN, MLP, POSITIONS = 64, 96, 256
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

_COMMON = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": POSITIONS, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
           "pad_token_id": None}  # fmt: skip
_GQA = _COMMON | {"num_key_value_heads": 2, "head_dim": 16}
_MOE = _GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA | {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": _GQA | {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3},
    "mistral": _GQA | {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": False},
    "mixtral": _GQA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
                       "intermediate_size": 32, "tie_word_embeddings": False},
    "qwen2": _GQA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _GQA | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2_moe": _MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 32,
                         "tie_word_embeddings": False},
    "qwen3_moe": _MOE | {"model_type": "qwen3_moe", "tie_word_embeddings": False},
    "opt": {"model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": MLP, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "vocab_size": VOCABULARY,
            "word_embed_proj_dim": HIDDEN, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    "bloom": {"model_type": "bloom", "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY,
              "bos_token_id": 0, "eos_token_id": 1},
    "falcon": _COMMON | {"model_type": "falcon", "multi_query": True, "parallel_attn": True, "bias": False,
                         "alibi": False, "new_decoder_architecture": False, "ffn_hidden_size": 4 * HIDDEN},
    "falcon-new": _COMMON | {"model_type": "falcon", "num_kv_heads": 2, "parallel_attn": True, "bias": True,
                             "alibi": False, "new_decoder_architecture": True, "ffn_hidden_size": 4 * HIDDEN},
    "gpt2": {"model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_inner": MLP,
             "n_positions": POSITIONS, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1},
}  # fmt: skip
EXPERT_KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")
KINDS = tuple(CONFIGS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` tokens, trained on a part of Python's language reference."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([builtin_text()[:60_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a kind of ``CONFIGS``, eval mode; every parameter differs from its default."""
    values = CONFIGS[kind] | changes
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (0.3 if "embed" in name or ".wte" in name else 0.16))
            else:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0))
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=0, eos_token_id=1)
    return model.to(dtype).eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def forget_prefix(folder: Path, prefix: str) -> None:
    """Rename the tensors of a one-file checkpoint as the hub has them for GPT-2 and BLOOM: no base prefix, no head."""
    tensors = read_tensors(folder)
    renamed = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    write_tensors(folder / "model.safetensors", renamed)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def change_tensor(folder: Path, key: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Rewrite the shard that holds ``key`` with ``change(tensor)`` in its place, or without it for None."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if key not in tensors:
            continue
        value = change(tensors[key].clone())
        if value is None:
            del tensors[key]
            index = folder / "model.safetensors.index.json"
            if index.is_file():
                facts = read_json(index)
                del facts["weight_map"][key]
                index.write_text(json.dumps(facts))
        else:
            tensors[key] = value
        write_tensors(file, tensors)
        return
    raise AssertionError(f"{folder} has no tensor {key}")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of the files of a folder by name; all of them unless named."""
    files = [folder / name for name in names] if names is not None else [p for p in folder.iterdir() if p.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def lasting_files(folder: Path) -> list[str]:
    """Names of the files that must be the same in every run with the same settings."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("run.json", "report.html", ".finescale"))


def assert_sentence(message: str) -> None:
    """One sentence on one line, for people: no traceback, no nested representation of an exception."""
    assert "\n" not in message.strip(), message
    assert message.strip().endswith("."), message
    assert "Traceback" not in message and "Error(" not in message, message
    assert re.match(r"\S", message), message


def recipe(solver: str = "rtn", bits: int = 4, group: int = -1, **parts: Any) -> Recipe:
    """A recipe for tiny models: few short windows; QuantEase with few sweeps."""
    options: dict[str, Any] = {"name": solver}
    if solver == "quantease":
        options |= {"sweeps": 3, "start": "gptq"}
    calibration = {"samples": 6, "length": 48, "batch_size": 4} | parts.pop("calibration", {})
    weights = {"bits": bits, "group_size": group, "symmetric": False} | parts.pop("weights", {})
    options |= parts.pop("options", {})
    return Recipe.from_dict({"name": solver, "weights": weights, "solver": options, "calibration": calibration} | parts)


W4A8 = {"weights": {"symmetric": True}, "activations": {"bits": 8}}
"""What integer scales need."""


def quantize(model: Path, out: Path, chosen: Recipe, text: Path, **checks: Any) -> dict[str, Any]:
    """The pipeline itself: prepare, then run."""
    return run(prepare(model, chosen, out, str(text), **checks))


class StopError(Exception):
    """What ends a run in the middle, like a kill that leaves no time to clean up."""


def stop_after(blocks: int) -> Callable[[str, int, int], None]:
    """To be told of a run's progress: raises StopError once so many blocks are done."""

    def stop(label: str, done: int, total: int) -> None:
        if done == blocks:
            raise StopError

    return stop


def reference_model(original: Path, quantized: Path) -> PreTrainedModel:
    """The float model of transformers, loaded by transformers itself, with every quantized weight put in dequantized.

    Fused experts are found by their index; GPT-2's Conv1D takes its weight transposed.
    """
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in open_quantized(quantized).layers():
            dense_OI = weight.dequantize()
            module = modules.get(name) or modules.get(prefix + name)
            if module is None:
                _set_expert(model, name, dense_OI)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(dense_OI)
            else:
                module.weight.copy_(dense_OI.T)
    return model.eval()


def _set_expert(model: PreTrainedModel, name: str, dense_OI: Tensor) -> None:
    path, index, leaf = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name.replace("block_sparse_moe", "mlp")).groups()  # type: ignore[union-attr]
    experts = model.get_submodule(path)
    if leaf in ("w2", "down_proj"):
        experts.down_proj[int(index)].copy_(dense_OI)  # type: ignore[operator]
        return
    half = dense_OI.shape[0]
    first = 0 if leaf in ("w1", "gate_proj") else half
    experts.gate_up_proj[int(index), first : first + half].copy_(dense_OI)  # type: ignore[operator]


def logits_of(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens_BT, use_cache=False).logits


def assert_same_logits(original: Path, quantized: Path) -> None:
    """A loaded checkpoint computes what transformers computes with its dequantized weights."""
    from finescale.runtime.load import load

    tokens_BT = some_tokens()
    expected = logits_of(reference_model(original, quantized), tokens_BT)
    torch.testing.assert_close(logits_of(load(quantized), tokens_BT), expected, rtol=1e-4, atol=1e-4)


def some_tokens(batch: int = 2, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def command(*arguments: Any) -> tuple[list[str], dict[str, str]]:
    """The real command line for ``subprocess``, and its environment."""
    import os
    import sys

    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return [sys.executable, "-m", "finescale.cli.main", *map(str, arguments)], environment
