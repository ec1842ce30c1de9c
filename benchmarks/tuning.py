"""Learned rounding beside one-shot solvers and AutoRound: same model, calibration, text and bits, in one run.

    python3 -m venv VENV && VENV/bin/pip install auto-round==0.16.1
    python benchmarks/tuning.py --data ../shared --autoround VENV/bin/python
    python benchmarks/tuning.py --data ../shared --device cuda --jobs 8 --rows '3/*;2/*'

Weights of all linears in the blocks, symmetric, groups of 64. Calibration: 64 windows of 512 tokens from the start of
the text. Rows: round to nearest, GPTQ, QuantEase; OmniQuant's learned clipping; learned rounding from round to nearest,
from GPTQ, from QuantEase; AutoRound with 50 iterations (without ``--autoround`` that row is left out; it runs on the
CPU). W4A8 rows have inputs rounded to int8 per token, float and integer scales; AutoRound's are its 4-bit weights with
the same rounding of the inputs. Columns: perplexity, KL to the original, seconds of the clock and of the processor.
``--rows``, ``--jobs`` and the files of the rows are those of ``benchmarks/activations.py``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from activations import (
    GPTQ,
    LEARNED,
    QUANTEASE,
    ROTATION,
    RTN,
    SAMPLES,
    method,
    pairs_of,
    parser_of,
    part,
    values_of,
    write,
)
from rich.console import Console
from rich.table import Table
from rows import LENGTH, Row, Setting, calibration_of, chosen, measure, quality, recipe_of, run_rows
from safetensors.torch import load_file, save_file

from finescale.cli.common import quiet_libraries
from finescale.grid import ActivationScheme, fake_quantize_tokens
from finescale.pipeline.quantize import prepare
from finescale.runtime.load import load

PEER = "AutoRound 0.16.1, 50 iterations"
GROUP = 64
GPTQ_DAMPED = GPTQ | {"damping": 0.01}
ROUNDING = part("rounding")
CLIPPING = part("omniquant", equivalence=False, **LEARNED)
SOLVERS: dict[str, dict[str, Any]] = {
    "rtn": method(),
    "gptq": method(GPTQ_DAMPED),
    "quantease": method(QUANTEASE),
    "omniquant, clipping": method(RTN, [CLIPPING]),
    "rounding from rtn": method(RTN, [], [part("rounding", start="weight")]),
    "rounding from gptq": method(GPTQ_DAMPED, [], [ROUNDING]),
    "rounding from quantease": method(QUANTEASE, [], [ROUNDING]),
}
SHORT = {"samples": 256, "length": 128, "batch_size": 32}
"""The same text in shorter windows: four times as many first tokens, which models use as attention sinks."""
SHORTEST = {"samples": 1024, "length": 32, "batch_size": 128}
MORE: dict[str, dict[str, Any]] = {
    "rounding from quantease, 512 steps": method(QUANTEASE, [], [part("rounding", iterations=512)]),
    "rounding from quantease, balanced": method(QUANTEASE, [], [part("rounding", loss="balanced")]),
    "rounding from quantease, balanced, 512 steps": method(
        QUANTEASE, [], [part("rounding", loss="balanced", iterations=512)]
    ),
    "rounding from quantease, balanced, windows of 128": method(
        QUANTEASE, [], [part("rounding", loss="balanced", batch_size=8)], calibration=SHORT
    ),
    "quantease, windows of 128": method(QUANTEASE, calibration=SHORT),
    "rounding from quantease, unseen": method(QUANTEASE, [], [part("rounding", loss="balanced", unseen=True)]),
    "rounding from quantease, unseen, 512 steps": method(
        QUANTEASE, [], [part("rounding", loss="balanced", unseen=True, iterations=512, checks=8)]
    ),
    "rounding from quantease, first tokens": method(QUANTEASE, [], [part("rounding", loss="balanced", first=0.1)]),
    "rounding from quantease, first tokens, windows of 128": method(
        QUANTEASE, [], [part("rounding", loss="balanced", first=0.1, batch_size=8)], calibration=SHORT
    ),
    "rounding from quantease, first tokens, windows of 32": method(
        QUANTEASE, [], [part("rounding", loss="balanced", first=0.2, batch_size=32)], calibration=SHORTEST
    ),
    "rounding from quantease, half steps": method(QUANTEASE, [], [part("rounding", loss="balanced", rate=0.01)]),
    "rounding from quantease, windows of 32": method(
        QUANTEASE, [], [part("rounding", loss="balanced", batch_size=32)], calibration=SHORTEST
    ),
    "quantease, windows of 32": method(QUANTEASE, calibration=SHORTEST),
    "rounding from quantease, mse": method(QUANTEASE, [], [part("rounding", loss="mse")]),
    "rounding from quantease, learned clipping": method(QUANTEASE, [CLIPPING], [ROUNDING]),
    "rounding from quantease, coarser steps": method(
        QUANTEASE, [], [part("rounding", iterations=512, rate=0.01, scale_rate=0.003, bound=1.0)]
    ),
    "rounding from quantease, rotated": method(QUANTEASE, [part("quarot")], [ROUNDING]),
    "rounding from quantease, rotated online": method(QUANTEASE, [ROTATION], [ROUNDING]),
}
INT8 = {"activations": {"bits": 8}}
W4A8: dict[str, dict[str, Any]] = {
    "quantease, float scales": method(QUANTEASE) | INT8,
    "rounding from quantease, float scales": method(QUANTEASE, [], [ROUNDING]) | INT8,
    "rounding from quantease, integer scales": method(
        QUANTEASE, [], [ROUNDING], integer_scale={"mode": "before"}
    ) | INT8,
}  # fmt: skip


SIGNED: dict[str, dict[str, Any]] = {
    "quantease, signed scales": SOLVERS["quantease"],
    "rounding from rtn, signed scales": SOLVERS["rounding from rtn"],
    "rounding from quantease, signed scales": SOLVERS["rounding from quantease"],
    "rounding from quantease, balanced, signed scales": MORE["rounding from quantease, balanced"],
    "rounding from quantease, signed scales, windows of 128": method(
        QUANTEASE, [], [part("rounding", batch_size=8)], calibration=SHORT
    ),
}
SEEDS = (1, 2)
"""Of the order in which learned rounding sees the windows, besides 0; AutoRound's ``--seed`` is the same."""
OURS = {4: "w4-best", 3: "w3-best", 2: "w2-best"}
"""Our own recipes, as they come with finescale: groups of 64 and 128, whichever fits."""

SHORTER = ((80, 1), (96, 1), (64, 2), (48, 2), (40, 4), (32, 4), (64, 4))
"""Steps and windows a step of our own recipes in less time; as they come they make 128 steps of 2 windows."""


def shorter(steps: int, size: int) -> dict[str, Any]:
    """Learned rounding of so many steps with so many windows."""
    return {"tuning": [part("rounding", iterations=steps, batch_size=size)]}


def in_less_time(values: dict[str, Any]) -> dict[str, Any]:
    """One of our own recipes in AutoRound's time: short steps, fewer checks, and batches that fit a cache."""
    tuning = [part("rounding", iterations=80, batch_size=1, checks=2)]
    return values | {"tuning": tuning, "calibration": {"samples": SAMPLES, "length": LENGTH, "batch_size": 4}}


def weights_of(bits: int, clip: str = "mse") -> dict[str, Any]:
    return {"weights": {"bits": bits, "group_size": GROUP, "symmetric": True, "clip": clip}}


def all_rows(peer: bool) -> list[Row]:
    """Rows of every part; AutoRound's are marked by their name."""
    rows = [Row(str(bits), name, weights_of(bits) | SOLVERS[name]) for bits in (4, 3, 2) for name in SOLVERS]
    rows += [Row(str(bits), name, weights_of(bits) | MORE[name]) for bits in (4, 3, 2) for name in MORE]
    rows += [Row(str(bits), name, weights_of(bits, "signed") | SIGNED[name]) for bits in (4, 3, 2) for name in SIGNED]
    name = "rounding from quantease, signed scales"
    rows += [
        Row(str(bits), f"{name}, seed {seed}", weights_of(bits, "signed") | SIGNED[name], seed=seed)
        for bits in (4, 3, 2)
        for seed in SEEDS
    ]
    damped = method(QUANTEASE | {"damping": 0.1}, [], [ROUNDING])
    rows += [
        Row(
            str(bits),
            f"{name}, damping 0.1" + (f", seed {seed}" if seed else ""),
            weights_of(bits, "signed") | damped,
            seed=seed,
        )
        for bits in (4, 3, 2)
        for seed in (0, *SEEDS)
    ]
    rows += [Row(str(bits), f"recipe {name}", values_of(name)) for bits, name in OURS.items()]
    rows += [
        Row(str(bits), f"recipe {name}, {steps} steps of {size} windows", values_of(name) | shorter(steps, size))
        for bits, name in OURS.items()
        for steps, size in SHORTER
    ]
    rows += [
        Row(str(bits), f"recipe {name}, 80 steps of 1 windows, 2 checks", in_less_time(values_of(name)))
        for bits, name in OURS.items()
    ]
    rows += [Row("w4a8", name, weights_of(4) | values) for name, values in W4A8.items()]
    if peer:
        rows += [Row(str(bits), PEER, weights_of(bits) | method()) for bits in (4, 3)]
        rows.append(Row("w4a8", PEER, weights_of(4) | method() | INT8))
    return rows


def work_of(python: str | None, threads: int, row: Row, setting: Setting, work: Path, proof: bool) -> dict[str, Any]:
    """A row of ours, or AutoRound's."""
    if row.name != PEER:
        return measure(row, setting, work, proof)
    assert python is not None
    return autoround(python, threads, row, setting, work)


def autoround(python: str, threads: int, row: Row, setting: Setting, work: Path) -> dict[str, Any]:
    """AutoRound's row; its weights are made once and used for W4A8 too."""
    bits = row.values["weights"]["bits"]
    out = work / f"autoround-{setting.name}-{bits}"
    start = time.perf_counter()
    if not (out / "facts.json").is_file():
        tokens = work / f"tokens-{out.name}.safetensors"
        text = calibration_of(setting, setting.samples, work)
        job = prepare(setting.model, recipe_of(row, setting), work / "unused", str(text))
        save_file({"calibration": job.calibration.tokens_BT.contiguous()}, tokens)
        values = {
            "model": setting.model, "tokens": tokens, "out": out, "bits": bits, "group": GROUP, "iterations": 50,
            "threads": threads,
        }  # fmt: skip
        arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        script = Path(__file__).parent / "peers" / "autoround.py"
        done = subprocess.run([python, str(script), *arguments], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"AutoRound failed: {done.stderr[-600:]}")
    model = load(setting.model, device=setting.evaluation)
    scheme = ActivationScheme(8)
    for name, weight_OI in load_file(out / "weights.safetensors").items():
        module: Any = model.get_submodule(name)
        module.weight.data.copy_(weight_OI)
        if "activations" in row.values:
            module.register_forward_pre_hook(lambda _, args: (fake_quantize_tokens(args[0], scheme),))
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    seconds = {"seconds": facts.get("seconds", time.perf_counter() - start), "cpu_seconds": facts["cpu_seconds"]}
    return quality(setting, model) | seconds | {"versions": facts["versions"]}


def print_tables(console: Console, models: dict[str, Any]) -> None:
    for model, entry in models.items():
        for title, rows in entry["rows"].items():
            heading = f"{model}, {title} bits: symmetric, group {GROUP}; original {entry['original_perplexity']:.2f}"
            table = Table("method", "perplexity", "KL", "seconds", "processor seconds", title=heading)
            for name, row in sorted(rows.items(), key=lambda item: item[1]["perplexity"]):
                table.add_row(
                    name, f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['seconds']:.0f}",
                    f"{row['cpu_seconds']:.0f}",
                )  # fmt: skip
            console.print(table)


def main() -> None:
    parser = parser_of(__doc__, "benchmarks/results/tuning.json")
    parser.add_argument("--autoround", help="the Python of an environment with auto-round")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()
    folder = arguments.json.with_suffix("")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        pairs = pairs_of(arguments, all_rows(True), work)
        todo = pairs_of(arguments, chosen(all_rows(bool(arguments.autoround)), arguments.rows), work)
        if arguments.list:
            console.print("\n".join(f"{setting.name} {row.part}/{row.name}" for row, setting in todo))
            return
        peer = partial(work_of, arguments.autoround, arguments.threads)
        for line in run_rows(todo, folder, work, arguments.jobs, arguments.proof, arguments.threads, peer):
            console.print(line, soft_wrap=True)
            write(arguments.json, "tuning", pairs, folder)
        models = write(arguments.json, "tuning", pairs, folder)
    print_tables(console, models)
    console.print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
