"""Merging channels beside dropping them, input by input: what both change, and what they do to the weights' range.

    python benchmarks/merged_channels.py --data ../shared --json benchmarks/results/merged-channels-smollm2.json

For queries, gates and down projections of the first blocks, on the full-precision model's activations: a share of the
channels, those of most energy, is split in two, and as many of the others are merged (QLLM) or dropped, so that the
width is the old one. Columns: the relative squared change of the layer's output, both ways; the most channels in one
average; and the mean range of a row of weights over what it was, which is what its step is made of. CPU, two minutes.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from layer_errors import LayerAt, calibration_of, layers_of, smollm2_parser
from rich.console import Console
from torch import Tensor

from finescale.bench.machine import machine_facts
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.formats.gguf import unpack_gguf
from finescale.transforms.reassembly import Reassembly, assemble, disassemble, merge_scores, prune

SAMPLES, LENGTH, BLOCKS = 8, 512, 8
SHARES = (0.01, 0.03, 0.05, 0.1)
INPUTS = ("q_proj", "gate_proj", "down_proj")


def effective(parts: Reassembly, weight_OI: Tensor) -> Tensor:
    """The weight that meets the old input when the new weight meets the gathered one, float64 [O, I]."""
    gather, weight_OJ = parts.gather(), parts.weight(weight_OI)
    out_OI = torch.zeros(weight_OI.shape, dtype=torch.float64)
    for index_J, gain_J in zip(gather.index_KJ, gather.gain_KJ, strict=True):
        out_OI.index_add_(1, index_J, (weight_OJ * gain_J).double())
    return out_OI


def energy(weight_OI: Tensor, hessian_II: Tensor) -> float:
    """Mean squared output of a weight."""
    return float(((weight_OI @ hessian_II) * weight_OI).sum())


def range_of(weight_OI: Tensor) -> float:
    """Mean range of a row, zero included."""
    return float((weight_OI.amax(1).clamp(min=0) - weight_OI.amin(1).clamp(max=0)).mean())


def measured(layer: LayerAt, share: float) -> dict[str, float]:
    """One layer and share."""
    weight_OI, hessian_II = layer.weight_OI, layer.hessian_II.float()
    loudest = hessian_II.diagonal().argsort(descending=True)[: int(share * weight_OI.shape[1])]
    split_I = torch.ones(weight_OI.shape[1], dtype=torch.int64)
    split_I[loudest] = 2
    parts = disassemble(split_I)
    merged = assemble(parts, merge_scores(hessian_II, weight_OI, "exact"))
    dropped = prune(parts, hessian_II, weight_OI)
    exact = energy(weight_OI.double(), hessian_II.double())
    found = {"members": float(torch.bincount(merged.group_E).max())}
    for name, tried in (("merged", merged), ("dropped", dropped)):
        change_OI = effective(tried, weight_OI) - weight_OI.double()
        found[f"{name}_change"] = energy(change_OI, hessian_II.double()) / exact
        found[f"{name}_range"] = range_of(tried.weight(weight_OI)) / range_of(weight_OI)
    return found


def main() -> None:
    arguments = smollm2_parser(__doc__, "merged-channels").parse_args()
    quiet_libraries()
    model = str(unpack_gguf(Path(arguments.smollm2 or find_demo_model()), arguments.work, torch.float32))
    text = arguments.data / "data" / "wikitext2" / "wiki.valid.raw"
    layers: dict[str, dict[str, list[dict[str, float]]]] = {}
    for layer in layers_of(model, calibration_of(model, str(text), SAMPLES, LENGTH), blocks=BLOCKS):
        kind = layer.name.rpartition(".")[2]
        if kind in INPUTS:
            for share in SHARES:
                layers.setdefault(kind, {}).setdefault(f"{share:g}", []).append(measured(layer, share))
    rows = [
        {"input": kind, "share": share, "layers": len(found)}
        | {key: statistics.mean(each[key] for each in found) for key in found[0]}
        for kind, shares in layers.items()
        for share, found in shares.items()
    ]
    facts = {"benchmark": "merged_channels", "model": "smollm2", "machine": machine_facts(), "rows": rows}
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    for row in rows:
        Console().print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
