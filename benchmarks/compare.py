"""The comparison of all methods on one model, mixed precision, and integer scales on zero-shot tasks.

    python benchmarks/compare.py --data ../shared --model SMOLLM2.gguf --device cuda --jobs 3 --work WORK

makes ``compare-NAME.json`` (the methods of ``grids/``, mixed precision at three sizes, other tools' rows),
``tasks-NAME.json`` (eight tasks with float and integer scales) and figures, in ``--results``. Calibration is 64 windows
of 512 tokens from the start of the text, evaluation 20 windows of 2048, the setting of the other tools' rows in
``results/peers-NAME.json``. What ``WORK`` holds already is not made again; ``--minutes`` ends the run early with what
it has. ``--parts page`` only writes page, tables and plots again, with the other tools' rows that came since.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finescale.calibration.data import encode, open_tokenizer
from finescale.compare.run import read_peers
from finescale.evaluate.tasks import TASKS, paired_change
from finescale.formats.gguf import local_folder
from finescale.report.compare import write_comparison

HERE = Path(__file__).parent
SAMPLES, LENGTH, JUDGING = 64, 512, 8
GRIDS = "core,more,inputs,learned,published"
TARGETS = (3.75, 3.5, 4.0)
"""Stored bits per weight, scales included: groups of 64 make 3.25 of all 3 bits and 4.25 of all 4."""
GROUPS = ("--set", "weights.symmetric=true", "--set", "weights.group_size=64", "--set", "weights.clip=mse")
MEASURED = (*GROUPS, "--set", "solver.sweeps=3")
"""What bits cost hardly depends on the last sweeps; the mixed recipes run with all of them."""


def beginning(text: str, tokenizer: Any, windows: int) -> str:
    """The start of a text that holds so many windows and less than one more."""
    low, high = 0, len(text)
    while high - low > LENGTH // 2:  # a token is at least one character, so the rest is below a window
        middle = (low + high) // 2
        if encode(tokenizer, text[:middle]).shape[0] >= windows * LENGTH:
            high = middle
        else:
            low = middle
    return text[:high]


def setting_of(name: str, data: Path, work: Path, model: str) -> dict[str, Any]:
    """Texts and sizes; calibration and evaluation never overlap."""
    if name == "smollm2":
        calibration = (data / "data" / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
        evaluation = (data / "data" / "wikitext2" / "wiki.test.joined.txt").read_text(encoding="utf-8")
        windows, length = 20, 2048
    else:
        books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
        calibration, evaluation = books[len(books) // 2 :], books[: len(books) // 2]
        windows, length = 40, 512
    tokenizer = open_tokenizer(Path(model))
    texts = {
        "calibration.txt": beginning(calibration, tokenizer, SAMPLES),
        "mixing.txt": beginning(calibration, tokenizer, SAMPLES + JUDGING),
        "evaluation.txt": evaluation,
    }
    for file, text in texts.items():
        (work / file).write_text(text, encoding="utf-8")
    return {"windows": windows, "length": length}


class Runner:
    """Commands of finescale with what they have in common."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = str(local_folder(arguments.model))
        self.work, self.device, self.jobs = arguments.work, arguments.device, arguments.jobs
        self.grids = arguments.grids
        self.targets = [float(word) for word in arguments.targets.split(",") if word]
        self.work.mkdir(parents=True, exist_ok=True)
        self.setting = setting_of(arguments.name, arguments.data, self.work, self.model)
        self.end = time.monotonic() + 60 * arguments.minutes

    def start(self, *words: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "finescale.cli.main", *map(str, words)]
        print("$ finescale", *words, flush=True)
        return subprocess.Popen(command, start_new_session=True)

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Exit code; at the end of the time the process and its workers are interrupted, results so far stay."""
        try:
            return process.wait(max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                return process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait()

    def compare(self, out: Path, *words: Any) -> subprocess.Popen[bytes]:
        work = self.work
        return self.start(
            "compare", self.model, "--out", out, "--calibration", work / "calibration.txt", "--samples", SAMPLES,
            "--sample-length", LENGTH, "--text", work / "evaluation.txt", "--windows", self.setting["windows"],
            "--length", self.setting["length"], "--devices", self.device, "--jobs", self.jobs, *words,
        )  # fmt: skip

    def mix(self, target: float) -> Path:
        out: Path = self.work / f"mixed-{target:g}.yaml"
        process = self.start(
            "mix", self.model, "--recipe", "quantease", *MEASURED, "--target-bits", target, "--choices", "2,3,4,6",
            "--calibration", self.work / "mixing.txt", "--samples", SAMPLES, "--length", LENGTH, "--windows", JUDGING,
            "--sensitivity", self.work / "sensitivity.json", "--device", self.device, "--out", out,
            "--json", out.with_suffix(".json"),
        )  # fmt: skip
        self.wait(process)
        return out


def methods(runner: Runner, name: str, results: Path, files: list[str]) -> None:
    """The grids, and beside them sensitivities and mixed recipes, whose size lies between the grid's; one table."""
    out, mixed = runner.work / "compare", runner.work / "mixed"
    grids = [word for file in files for word in ("--grid", runner.grids / f"{file}.yaml")]
    peers = HERE / "results" / f"peers-{name}.json"
    grid = runner.compare(out, *grids, *(["--peers", peers] if peers.is_file() else []))
    recipes = [path for path in map(runner.mix, runner.targets) if path.is_file()]
    if recipes:
        chosen = {path.stem: json.loads(path.with_suffix(".json").read_text()) for path in recipes}
        sensitivity = json.loads((runner.work / "sensitivity.json").read_text())
        found = {"setting": sensitivity["setting"], "chosen": chosen, "units": sensitivity["units"]}
        (results / f"sensitivity-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        runner.wait(runner.compare(mixed, "--recipes", ",".join(map(str, recipes)), "--set", "solver.sweeps=30"))
    runner.wait(grid)
    joined = joined_result(out, mixed)
    if joined is not None:
        keep(joined, runner.work / "joined", results, f"compare-{name}")


def joined_result(*folders: Path) -> dict[str, Any] | None:
    """Comparisons in one setting as one, the original once; interrupted ones with what they have."""
    files = [folder / "compare.json" for folder in folders if (folder / "compare.json").is_file()]
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not parts:
        return None
    rows = {row["key"]: row for part in parts for row in part["rows"]}
    return parts[0] | {"rows": list(rows.values())}


def page(runner: Runner, name: str, results: Path) -> None:
    """The committed comparison with the other tools' rows as they now are: nothing is quantized."""
    result = json.loads((results / f"compare-{name}.json").read_text(encoding="utf-8"))
    result["peers"] = read_peers(results / f"peers-{name}.json")
    keep(result, runner.work / "page", results, f"compare-{name}")


CONVERSIONS = {
    "converted, automatic amplifier": ("--amplifier", "auto"),
    "converted, amplifier 1024": ("--amplifier", "1024"),
    "converted, folded": ("--folded",),
}
"""The codes of float scales, and integer scales put on them afterwards, as in the paper."""


def converted(runner: Runner, out: Path, base: dict[str, Any], words: list[Any]) -> list[dict[str, Any]]:
    """Rows of the checkpoint with float scales, converted in each way and evaluated side by side."""
    checkpoint, work = out / "cells" / base["key"] / "checkpoint", runner.work
    text = ["--text", work / "evaluation.txt", "--against", runner.model, "--device", runner.device]
    text += [word for key, value in runner.setting.items() for word in (f"--{key}", value)]
    made = {label: out / f"converted-{number}" for number, label in enumerate(CONVERSIONS)}
    started = []
    for label, folder in made.items():
        if not folder.with_suffix(".json").is_file():
            runner.wait(runner.start("convert", checkpoint, "--out", folder, "--fresh", *CONVERSIONS[label]))
            started.append(runner.start("evaluate", folder, *text, *words, "--json", folder.with_suffix(".json")))
    for process in started:
        runner.wait(process)
    rows = []
    for label, file in ((label, folder.with_suffix(".json")) for label, folder in made.items()):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            own = {key: value for key, value in found.items() if key in base}
            rows.append(base | own | {"key": f"{base['key']}-{file.stem}", "label": label})
    return rows


def tasks(runner: Runner, name: str, results: Path, data: Path, limit: int) -> None:
    """Eight tasks with float scales and with every form of integer scales, and the changes question by question."""
    out = runner.work / "tasks"
    words = ["--tasks", ",".join(TASKS), "--task-data", data / "data" / "tasks", "--limit", limit]
    runner.wait(runner.compare(out, "--grid", runner.grids / "scales.yaml", *words))
    result = joined_result(out)
    if result is None:
        return
    base = next((row for row in result["rows"] if row["key"].startswith("w4a8-float-scale") and row.get("tasks")), None)
    if base is not None:
        result["rows"] += converted(runner, out, base, words)
    result["changes"] = changes(result["rows"])
    keep(result, out, results, f"tasks-{name}")
    for row in result["changes"]:
        print(f"{row['label']:45} {row['task']:15} {100 * row['change']:+.2f} ± {100 * (row['error'] or 0):.2f} points")


def changes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy with integer scales minus that with float scales, over the same questions, with its standard error."""
    done = [row for row in rows if row.get("tasks")]
    base = next((row for row in done if row["label"].startswith("w4a8-float-scale")), None)
    if base is None:
        return []
    found = []
    for row in done:
        if row is base or row["recipe"] is None:
            continue
        every, other = "", ""
        for own, of_base in zip(row["tasks"], base["tasks"], strict=True):
            mean, error = paired_change(own["right"], of_base["right"])
            found.append({"label": row["label"], "task": own["task"], "change": mean, "error": error})
            every, other = every + own["right"], other + of_base["right"]
        mean, error = paired_change(every, other)
        found.append({"label": row["label"], "task": "all", "change": mean, "error": error})
    return found


def keep(result: dict[str, Any], out: Path, results: Path, name: str) -> None:
    """Numbers, page and figures of a comparison, without its checkpoints."""
    write_comparison(result, out)
    (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for file, target in (("compare.html", f"{name}.html"), ("tables.md", f"{name}.md")):
        shutil.copyfile(out / file, results / target)
    for figure in (out / "figures").glob("*.svg"):
        shutil.copyfile(figure, results / f"{name}-{figure.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a GGUF file")
    parser.add_argument("--name", default="smollm2", help="smollm2 or zoo-llama: which texts, and the results' names")
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="folder with data/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and numbers so far")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--grids", type=Path, default=HERE / "grids", help="folder of the grid files")
    parser.add_argument("--files", default=GRIDS, help="grid files of the part methods, the first cells first")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="sizes of mixed precision")
    parser.add_argument("--parts", default="methods,tasks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--minutes", type=float, default=600.0)
    arguments = parser.parse_args()
    runner = Runner(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    if "methods" in arguments.parts.split(","):
        methods(runner, arguments.name, arguments.results, arguments.files.split(","))
    if "page" in arguments.parts.split(","):
        page(runner, arguments.name, arguments.results)
    if "tasks" in arguments.parts.split(","):
        tasks(runner, arguments.name, arguments.results, arguments.data, arguments.limit)


if __name__ == "__main__":
    main()
