"""GPTQModel's GPTQ on a model and token windows that another script gives it, in an environment of its own.

    python3 -m venv VENV && VENV/bin/pip install gptqmodel==7.6.0
    VENV/bin/python benchmarks/peers/gptqmodel_gptq.py --model MODEL --tokens TOKENS.safetensors --out OUT \
        --bits 4 --group 64

``TOKENS`` holds ``calibration``, int64 [windows, length]. ``OUT`` gets ``checkpoint``, the model as GPTQModel saves it
(format gptq, which finescale reads), and ``facts.json`` (seconds of the processor, versions, settings). Symmetric
weights; the tool's own defaults otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

if (os.cpu_count() or 1) < 4:  # version 7.6 cannot start its pools of threads on two cores
    os.cpu_count = lambda: 4  # type: ignore[method-assign]

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    windows = load_file(arguments.tokens)["calibration"]
    config = QuantizeConfig(
        bits=arguments.bits, group_size=arguments.group, sym=True, offload_to_disk=False, pack_impl="original"
    )
    model = GPTQModel.load(arguments.model, config, device=arguments.device, dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    wall, processor = time.perf_counter(), time.process_time()
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)  # of the packing alone
    facts = {
        "tool": "GPTQModel GPTQ",
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "settings": {"bits": arguments.bits, "group": arguments.group, "symmetric": True, "device": arguments.device},
        "cpu_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - wall,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save(str(arguments.out / "checkpoint"))
    (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
