"""Other tools' rows at our calibration: run their scripts, evaluate what they made with our own evaluation.

    python benchmarks/peers/rows.py --model ../shared/models/zoo/llama --name zoo-llama --data ../shared --work WORK \\
        --tool llm_compressor=VENV/bin/python --tool 'autoround=VENV/bin/python --iterations 200' --bits 4,3,2

writes ``benchmarks/results/peers-NAME.json``, which ``finescale compare --peers`` reads too; rows that it holds of
other tools stay. Every tool gets the same 64 windows of 512 tokens that ``benchmarks/compare.py`` and
``benchmarks/tuning.py`` calibrate on, and runs in its own environment; what it made is evaluated as dequantized float32
weights in the original model, on the same windows. Words after a tool's Python go to its script.
"""

from __future__ import annotations

import argparse
import json
import shlex
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


def made(tool: str, model: str, work: Path, bits: int, group: int) -> tuple[Path, list[str]]:
    """Run a tool's script unless its result is there; the folder of the result, and the command."""
    script, _, rest = tool.partition("=")
    python, *options = shlex.split(rest)
    out = work / "-".join([script, str(bits), str(group), *(word.strip("-") for word in options)])
    values = ["--model", model, "--tokens", str(work / "tokens.safetensors"), "--out", str(out)]
    values += ["--bits", str(bits), "--group", str(group), *options]
    if not (out / "facts.json").is_file():
        subprocess.run([python, str(HERE / f"{script}.py"), *values], check=True, cwd=work)  # some leave logs there
    shown = ["VENV/bin/python", f"benchmarks/peers/{script}.py", "--model", "MODEL", "--tokens", "TOKENS", "--out"]
    return out, [*shown, "OUT", *values[6:]]


def row_of(facts: dict[str, Any], quality: dict[str, Any], command: list[str], bits: int, group: int) -> dict[str, Any]:
    """What the table and ``finescale compare --peers`` need of one result."""
    return {
        "label": facts["tool"],
        "bits": bits,
        "group_size": group,
        "symmetric": group != -1,
        **quality,
        "provenance": {
            "command": shlex.join(command),
            "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
            "settings": ", ".join(f"{key} {value}" for key, value in facts["settings"].items()),
            "processor_seconds": round(facts["cpu_seconds"]),
            "machine": machine_facts()["processor"],
        },
    }


def changed(model: str, out: Path, device: str) -> PreTrainedModel:
    """The model as a tool left it: dequantized weights put into the original, or a checkpoint that finescale reads."""
    if (out / "checkpoint").is_dir():
        return load(out / "checkpoint", device=device)
    found = load(model, device=device)
    for name, weight_OI in load_file(out / "weights.safetensors").items():
        module: Any = found.get_submodule(name)
        module.weight.data.copy_(weight_OI)
    return found


def quality_of(model: PreTrainedModel, folder: str, work: Path, setting: dict[str, Any], kl: bool) -> dict[str, Any]:
    """Perplexity and each window's loss; with ``kl`` also the mean divergence from the original and the agreement of
    the first guess."""
    found = evaluate(
        model, str(work / "evaluation.txt"), windows=setting["windows"], length=setting["length"],
        against=load(folder, device=model.device) if kl else None, tokenizer_from=folder,
    )  # fmt: skip
    losses = {"window_losses": [round(loss, 6) for loss in found.window_losses]}
    return {"perplexity": found.perplexity} | ({"kl": found.kl, "top1": found.top1} if kl else {}) | losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    parser.add_argument("--tool", action="append", required=True, help="'SCRIPT=PYTHON more words', a script in here")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="64")
    parser.add_argument("--windows", type=int, help="of the evaluation, instead of the usual number")
    parser.add_argument("--device", default="cpu", help="of the evaluation, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the evaluation")
    parser.add_argument("--kl", action=argparse.BooleanOptionalAction, default=True, help="twice as long")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    model, work = str(Path(local_folder(arguments.model)).resolve()), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    setting = benchmark.setting_of(arguments.name, arguments.data, work, model)
    setting["windows"] = arguments.windows or setting["windows"]
    tokens = encode(open_tokenizer(Path(model)), (work / "calibration.txt").read_text(encoding="utf-8"))
    count = benchmark.SAMPLES * benchmark.LENGTH
    save_file({"calibration": tokens[:count].view(benchmark.SAMPLES, benchmark.LENGTH)}, work / "tokens.safetensors")
    path = arguments.results / f"peers-{arguments.name}.json"
    for tool in arguments.tool:
        for bits in map(int, arguments.bits.split(",")):
            for group in map(int, arguments.groups.split(",")):
                out, command = made(tool, model, work, bits, group)
                facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
                quality = quality_of(changed(model, out, arguments.device), model, work, setting, arguments.kl)
                row = row_of(facts, quality, command, bits, group)
                keep(path, row, setting, arguments.name)
                print(f"{row['label']}, {bits} bits, group {group}: {row['perplexity']:.3f}", flush=True)


def keep(path: Path, row: dict[str, Any], setting: dict[str, Any], name: str) -> None:
    """Put a row into the file, in the place of the one it repeats."""
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"peers": []}
    result = {
        "benchmark": "peers",
        "model": name,
        "setting": {"samples": benchmark.SAMPLES, "sample_length": benchmark.LENGTH, **setting},
        "peers": [old for old in result["peers"] if _cell(old) != _cell(row)] + [row],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["label"], row["bits"], row["group_size"], row.get("activation_bits")


if __name__ == "__main__":
    main()
