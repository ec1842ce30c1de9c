"""Other tools' rows for ``finescale compare --peers``: run their scripts, evaluate what they made.

    python benchmarks/peers/rows.py --model ../shared/models/zoo/llama --name zoo-llama --data ../shared --work WORK \
        --tool llm_compressor=VENV/bin/python --bits 4,3 --groups 64,-1

writes ``benchmarks/peers/NAME.json``; rows that it holds of other tools stay. Every tool gets the same 64 windows of
512 tokens that ``benchmarks/compare.py`` calibrates on, runs in its own environment, and its dequantized weights are
evaluated by finescale on the same windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from finescale.api import evaluate
from finescale.bench.machine import machine_facts
from finescale.calibration.data import encode, open_tokenizer
from finescale.cli.common import quiet_libraries
from finescale.formats.gguf import local_folder
from finescale.runtime.load import load

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import compare as benchmark  # noqa: E402


def row_of(
    tool: str, python: str, model: str, work: Path, setting: dict[str, Any], bits: int, group: int
) -> dict[str, Any]:
    """Run a tool's script unless its weights are there, and evaluate them."""
    out = work / f"{tool}-{bits}-{group}"
    if not (out / "facts.json").is_file():
        command = [python, str(HERE / f"{tool}.py"), "--model", model, "--tokens", str(work / "tokens.safetensors"),
                   "--out", str(out), "--bits", str(bits), "--group", str(group)]  # fmt: skip
        subprocess.run(command, check=True)
    original, changed = load(model), _changed(model, out)
    found = evaluate(
        changed, str(work / "evaluation.txt"), windows=setting["windows"], length=setting["length"], against=original,
        tokenizer_from=model,
    )  # fmt: skip
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    return {
        "label": facts["tool"],
        "bits": bits,
        "group_size": group,
        "symmetric": group != -1,
        "perplexity": found.perplexity,
        "kl": found.kl,
        "top1": found.top1,
        "provenance": {
            "script": f"benchmarks/peers/{tool}.py",
            "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
            "settings": ", ".join(f"{key} {value}" for key, value in facts["settings"].items()),
            "processor_seconds": round(facts["cpu_seconds"]),
        },
    }


def _changed(model: str, out: Path) -> PreTrainedModel:
    """The model as a tool left it: dequantized weights put into the original, or a checkpoint that finescale reads."""
    if (out / "checkpoint").is_dir():
        return load(out / "checkpoint")
    changed = load(model)
    for name, weight_OI in load_file(out / "weights.safetensors").items():
        module: Any = changed.get_submodule(name)
        module.weight.data.copy_(weight_OI)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tool", action="append", required=True, help="SCRIPT=PYTHON, of a script beside this one")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--groups", default="64")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    model, work = str(local_folder(arguments.model)), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    setting = benchmark.setting_of(arguments.name, arguments.data, work, model)
    tokens = encode(open_tokenizer(Path(model)), (work / "calibration.txt").read_text(encoding="utf-8"))
    count = benchmark.SAMPLES * benchmark.LENGTH
    save_file({"calibration": tokens[:count].view(benchmark.SAMPLES, benchmark.LENGTH)}, work / "tokens.safetensors")
    path = HERE / f"{arguments.name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"peers": []}
    for tool in arguments.tool:
        script, _, python = tool.partition("=")
        for bits in map(int, arguments.bits.split(",")):
            for group in map(int, arguments.groups.split(",")):
                row = row_of(script, python, model, work, setting, bits, group)
                row["provenance"]["machine"] = machine_facts()["processor"]
                same = [(row["label"], bits, group), None]
                result["peers"] = [
                    old for old in result["peers"]
                    if (old["label"], old["bits"], old["group_size"]) != same[0] or old.get("activation_bits")
                ]  # fmt: skip
                result["peers"].append(row)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(f"{row['label']}, {bits} bits, group {group}: {row['perplexity']:.3f}", flush=True)


if __name__ == "__main__":
    main()
