"""Peak host memory of quantizing the first blocks of a model with 3.4 billion parameters.

    python benchmarks/large_on_cpu.py --json benchmarks/results/large-on-cpu.json

Writes a checkpoint of OpenLLaMA-3B's shape (hidden 3200, MLP 8640, 26 blocks, vocabulary 32000, float16, 6.9 GB) with
random weights, one shard per block, and quantizes its first four blocks in a process of its own: round to nearest, and
QuantEase from GPTQ with few sweeps on few tokens. The peak is the largest resident memory that the kernel saw, mapped
files included. Needs 14 GB of disk under --folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from finescale.bench.machine import machine_facts
from finescale.calibration.data import builtin_text

HIDDEN, MLP, BLOCKS, VOCABULARY = 3200, 8640, 26, 32000
RUNS = {
    "rtn": ("--recipe", "rtn"),
    "quantease": ("--recipe", "quantease", "--set", "solver.sweeps=2"),
}


def write_model(folder: Path) -> int:
    """The checkpoint; returns its number of parameters. All blocks have the same random weights."""
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=BLOCKS, num_attention_heads=32,
        vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False, torch_dtype="float16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator([builtin_text()[:100_000]], trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).half()

    attention = {f"self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
    mlp = {"mlp.gate_proj.weight": random(MLP, HIDDEN), "mlp.up_proj.weight": random(MLP, HIDDEN),
           "mlp.down_proj.weight": random(HIDDEN, MLP)}  # fmt: skip
    norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN).half() for name in ("input", "post_attention")}
    block = attention | mlp | norms
    weight_map, parameters = {}, 0
    for index in range(BLOCKS + 1):
        name = f"model-{index + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
        tensors = {f"model.layers.{index}.{key}": tensor for key, tensor in block.items()}
        if index == BLOCKS:
            tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight":
                       random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).half()}  # fmt: skip
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parameters


def measure(model: Path, out: Path, words: tuple[str, ...], blocks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "finescale.cli.main", "quantize", str(model), "--out", str(out), *words]
    command += ["--samples", "4", "--length", "256", "--set", f"blocks={blocks}"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    run = json.loads((out / "run.json").read_text())
    return {
        "arguments": words,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": run["peak_rss_bytes"],
        "blocks": run["blocks"][:blocks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go for the time being")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/large-on-cpu.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "large_on_cpu", "seed": 0, "machine": machine_facts(), "runs": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result["parameters"] = write_model(Path(folder) / "model")
        for name, words in RUNS.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as out:
                result["runs"][name] = measure(Path(folder) / "model", Path(out) / "q", words, arguments.blocks)
            print(f"{name}: {result['runs'][name]['peak_rss_bytes'] / 1e9:.2f} GB at most, "
                  f"{result['runs'][name]['seconds']:.0f} s", flush=True)  # fmt: skip
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
