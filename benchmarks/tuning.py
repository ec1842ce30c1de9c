"""Learned rounding beside one-shot solvers and AutoRound: same model, calibration, text and bits, in one run.

    python3 -m venv VENV && VENV/bin/pip install auto-round==0.16.1
    python benchmarks/tuning.py --data ../shared --autoround VENV/bin/python --json benchmarks/results/tuning.json

Weights of all linears in the blocks, symmetric, groups of 64. Calibration: 64 windows of 512 tokens from the start of
the text. Rows: round to nearest, GPTQ, QuantEase; learned rounding from round to nearest; from QuantEase; AutoRound
with 50 iterations (without ``--autoround`` that row is left out). W4A8 rows have inputs rounded to int8 per token,
float and integer scales; AutoRound's are its 4-bit weights with the same rounding of the inputs. Columns: perplexity,
KL to the original, processor seconds of one thread. Rows already in the JSON file are kept, so that a run can go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finescale.api import evaluate, quantize
from finescale.bench.machine import machine_facts
from finescale.calibration.data import encode, open_tokenizer
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import local_folder
from finescale.grid import ActivationScheme, fake_quantize_tokens
from finescale.pipeline.quantize import prepare
from finescale.recipe import Recipe
from finescale.runtime.load import load

SAMPLES, LENGTH, GROUP = 64, 512, 64
PEER = "AutoRound 0.16.1, 50 iterations"
RTN = {"name": "rtn"}
GPTQ = {"name": "gptq", "damping": 0.01}
QUANTEASE = {"name": "quantease", "sweeps": 10, "start": "gptq", "damping": 0.01}
ROUNDING = {"name": "rounding"}
SOLVERS: dict[str, dict[str, Any]] = {
    "rtn": {"solver": RTN},
    "gptq": {"solver": GPTQ},
    "quantease": {"solver": QUANTEASE},
    "rounding from rtn": {"solver": RTN, "tuning": {"name": "rounding", "options": {"start": "weight"}}},
    "rounding from quantease": {"solver": QUANTEASE, "tuning": ROUNDING},
}
INT8 = {"activations": {"bits": 8}}
W4A8: dict[str, dict[str, Any]] = {
    "quantease, float scales": {"solver": QUANTEASE} | INT8,
    "rounding from quantease, float scales": {"solver": QUANTEASE, "tuning": ROUNDING} | INT8,
    "rounding from quantease, integer scales": {
        "solver": QUANTEASE, "tuning": ROUNDING, "integer_scale": {"mode": "before"},
    } | INT8,
}  # fmt: skip


def settings_of(data: Path) -> dict[str, dict[str, Any]]:
    """Models with their texts: calibration and evaluation never overlap."""
    wiki = data / "data" / "wikitext2"
    books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
    return {
        "smollm2": {
            "model": str(local_folder(find_demo_model())),
            "calibration": (wiki / "wiki.valid.raw").read_text(encoding="utf-8"),
            "evaluation": (wiki / "wiki.test.joined.txt").read_text(encoding="utf-8"),
            "windows": 20,
            "window_length": 2048,
        },
        "zoo-llama": {
            "model": str(data / "models" / "zoo" / "llama"),
            "calibration": books[len(books) // 2 :],
            "evaluation": books[: len(books) // 2],
            "windows": 40,
            "window_length": 512,
        },
    }


def beginning(text: str, model: str) -> str:
    """The start of a text that holds ``SAMPLES`` windows of ``LENGTH`` tokens and less than one more."""
    tokenizer = open_tokenizer(Path(model))
    low, high = 0, len(text)
    while high - low > LENGTH // 2:  # a token is at least one character, so the rest is below a window
        middle = (low + high) // 2
        if encode(tokenizer, text[:middle]).shape[0] >= SAMPLES * LENGTH:
            high = middle
        else:
            low = middle
    return text[:high]


class Runner:
    """Quantizes and evaluates one model many times on the same texts."""

    def __init__(self, setting: dict[str, Any], work: Path) -> None:
        self.model, self.work = setting["model"], work
        self.windows, self.length = setting["windows"], setting["window_length"]
        work.mkdir(parents=True, exist_ok=True)
        self.calibration, self.evaluation = work / "calibration.txt", work / "evaluation.txt"
        self.calibration.write_text(beginning(setting["calibration"], self.model), encoding="utf-8")
        self.evaluation.write_text(setting["evaluation"], encoding="utf-8")
        self.original = load(self.model)

    def quality(self, model: PreTrainedModel | Path) -> dict[str, Any]:
        """Perplexity, and the mean KL divergence from the original in nats per token."""
        loaded = model if isinstance(model, PreTrainedModel) else load(model)
        result = evaluate(
            loaded,
            str(self.evaluation),
            windows=self.windows,
            length=self.length,
            against=self.original,
            tokenizer_from=self.model,
        )
        return {"perplexity": result.perplexity, "kl": result.kl, "original": result.reference_perplexity}

    def recipe(self, bits: int, parts: dict[str, Any]) -> Recipe:
        weights = {"bits": bits, "group_size": GROUP, "symmetric": True, "clip": "mse"}
        return Recipe.from_dict({"weights": weights, "calibration": {"samples": SAMPLES, "length": LENGTH}} | parts)

    def quantized(self, name: str, bits: int, parts: dict[str, Any]) -> dict[str, Any]:
        out = self.work / f"{bits}-{name}".replace(" ", "-").replace(",", "")
        clock = time.process_time()
        report = quantize(self.model, self.recipe(bits, parts), out=out, calibration=str(self.calibration), fresh=True)
        seconds = time.process_time() - clock
        used = max((layer["overflow_use"] or 0.0) for layer in report["layers"])
        return self.quality(out) | {"cpu_seconds": seconds, "overflow_use": used or None}

    def peer(self, python: str, bits: int, int8: bool) -> dict[str, Any]:
        """AutoRound's row; its weights are made once and used for W4A8 too."""
        out = self.work / f"autoround-{bits}"
        if not (out / "facts.json").is_file():
            tokens = self.work / "tokens.safetensors"
            job = prepare(self.model, self.recipe(bits, {}), self.work / "unused", str(self.calibration))
            save_file({"calibration": job.calibration.tokens_BT.contiguous()}, tokens)
            script = Path(__file__).parent / "peers" / "autoround.py"
            values = {"model": self.model, "tokens": tokens, "out": out, "bits": bits, "group": GROUP, "iterations": 50}
            arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))]
            subprocess.run([python, str(script), *arguments], check=True)
        model = load(self.model)
        scheme = ActivationScheme(8)
        for name, weight_OI in load_file(out / "weights.safetensors").items():
            module: Any = model.get_submodule(name)
            module.weight.data.copy_(weight_OI)
            if int8:
                module.register_forward_pre_hook(lambda _, args: (fake_quantize_tokens(args[0], scheme),))
        facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
        return self.quality(model) | {"cpu_seconds": facts["cpu_seconds"], "versions": facts["versions"]}


def print_table(console: Console, model: str, title: str, rows: dict[str, dict[str, Any]]) -> None:
    original = next(iter(rows.values()))["original"]
    table = Table(title=f"{model}, {title}: symmetric, group {GROUP}; original {original:.2f}")
    for column in ("method", "perplexity", "KL", "processor seconds"):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['cpu_seconds']:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--models", default="zoo-llama,smollm2")
    parser.add_argument("--parts", default="4,3,2,w4a8")
    parser.add_argument("--rows", default="", help="only rows whose name begins with one of these, by commas")
    parser.add_argument("--autoround", help="the Python of an environment with auto-round")
    parser.add_argument("--work", type=Path, help="keep checkpoints here")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tuning.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    console = Console()
    result: dict[str, Any] = {"benchmark": "tuning", "machine": machine_facts(), "seed": 0, "models": {}}
    if arguments.json.is_file():
        result |= {"models": json.loads(arguments.json.read_text(encoding="utf-8"))["models"]}
    with tempfile.TemporaryDirectory() as temporary:
        for model in arguments.models.split(","):
            runner = Runner(settings_of(arguments.data)[model], (arguments.work or Path(temporary)) / model)
            for part in arguments.parts.split(","):
                bits = 4 if part == "w4a8" else int(part)
                rows = result["models"].setdefault(model, {}).setdefault(part, {})
                methods: dict[str, dict[str, Any]] = W4A8 if part == "w4a8" else SOLVERS
                for name in [*methods, *([PEER] if arguments.autoround else [])]:
                    if name in rows or not name.startswith(tuple(arguments.rows.split(","))):
                        continue
                    if name == PEER:
                        rows[name] = runner.peer(arguments.autoround, bits, part == "w4a8")
                    else:
                        rows[name] = runner.quantized(f"{part}-{name}", bits, methods[name])
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
                    console.print(f"{model}, {part}, {name}: {rows[name]['perplexity']:.3f}")
                if rows:
                    print_table(console, model, part, rows)


if __name__ == "__main__":
    main()
