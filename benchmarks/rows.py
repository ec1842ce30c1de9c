"""Rows of a benchmark's table: one recipe, quantized, proved and evaluated; many of them side by side.

Each row is kept in a file of its own as soon as it is done, so that a run can be broken off, go on, and be spread over
processes; two runs into one folder share the work. What a row's file holds for the same setting and recipe is not
computed again.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import multiprocessing
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescale.bench.machine import machine_facts
from finescale.calibration.data import encode, open_tokenizer, read_text
from finescale.cli.common import quiet_libraries
from finescale.demo import find_demo_model
from finescale.evaluate.perplexity import cut_windows, evaluate_windows
from finescale.evaluate.reference import Reference, capture_reference
from finescale.formats.gguf import is_gguf, local_folder, unpack_gguf
from finescale.pipeline.convert import convert
from finescale.pipeline.quantize import prepare, run
from finescale.pipeline.verify import verify
from finescale.pipeline.walk import PHASES
from finescale.recipe import Recipe
from finescale.runtime.load import load

LENGTH = 512


@dataclass(frozen=True)
class Setting:
    """Model, texts and sizes of a run; ``calibration`` begins with the windows that are used, ``evaluation`` is the
    device that computes perplexities."""

    name: str
    model: str
    calibration: str
    text: str
    samples: int
    windows: int
    window_length: int
    device: str
    evaluation: str

    def shown(self) -> dict[str, Any]:
        """As plain values, without folders."""
        names = {key: Path(getattr(self, key)).name for key in ("calibration", "text")} | {"model": self.name}
        return asdict(self) | names | {"length": LENGTH}


@dataclass(frozen=True)
class Row:
    """A row: where it stands in the table (part, name), what its recipe says, how many windows and which of the
    calibration text it gets (the first ones, or those after ``draw`` times as many), and the seed of their order;
    ``converted`` gives the finished checkpoint integer scales as ``finescale convert`` does, its codes as they are."""

    part: str
    name: str
    values: Mapping[str, Any]
    samples: int | None = None
    draw: int = 0
    seed: int = 0
    converted: bool = False


def settings(
    name: str,
    data: Path,
    work: Path,
    smollm2: str | None,
    samples: int,
    windows: int | None,
    device: str,
    evaluation: str,
) -> Setting:
    """The setting of ``smollm2``, ``smollm2-bfloat16`` or ``zoo-FAMILY``.

    The second is the first with its weights, and so its scales, in the type in which it was published. SmolLM2
    calibrates on the start of WikiText-2 valid and is evaluated on the start of its test part (20 windows x 2048); the
    zoo's models on the second and first half of the books (40 x 512).
    """
    work.mkdir(parents=True, exist_ok=True)
    if name.startswith("smollm2"):
        file = Path(smollm2) if smollm2 else find_demo_model()
        dtype = torch.bfloat16 if name == "smollm2-bfloat16" else torch.float32
        # A GPU computes in the type of the file: in float32 then, as a CPU does.
        unpacked = is_gguf(file) and (device != "cpu" or dtype == torch.bfloat16)
        model = str(unpack_gguf(file, work / name, dtype) if unpacked else local_folder(file))
        wiki = data / "data" / "wikitext2"
        texts = wiki / "wiki.valid.raw", wiki / "wiki.test.joined.txt"
        return Setting(name, model, str(texts[0]), str(texts[1]), samples, windows or 20, 2048, device, evaluation)
    books = (data / "data" / "books" / "books_valid.txt").read_text(encoding="utf-8")
    parts = work / "books-second-half.txt", work / "books-first-half.txt"
    parts[0].write_text(books[len(books) // 2 :], encoding="utf-8")
    parts[1].write_text(books[: len(books) // 2], encoding="utf-8")
    model = str(data / "models" / "zoo" / name.removeprefix("zoo-"))
    return Setting(name, model, str(parts[0]), str(parts[1]), samples, windows or 40, LENGTH, device, evaluation)


def calibration_of(setting: Setting, samples: int, work: Path, draw: int = 0) -> Path:
    """A file with a part of the calibration text that holds ``samples`` windows and less than one more: its start, or
    what comes after ``draw`` such parts."""
    out = work / f"calibration-{setting.name}-{samples}{f'-{draw}' if draw else ''}.txt"
    if not out.is_file():
        text = Path(setting.calibration).read_text(encoding="utf-8")
        tokenizer = open_tokenizer(Path(setting.model))
        for _ in range(draw + 1):
            end = _end_of(text, tokenizer, samples * LENGTH)
            part, text = text[:end], text[end:]
        partial = out.with_name(f"{out.name}.{os.getpid()}")  # others may be looking for it
        partial.write_text(part, encoding="utf-8")
        partial.replace(out)
    return out


def _end_of(text: str, tokenizer: Any, tokens: int) -> int:
    """Where the start of a text that holds so many tokens, and less than a window more, ends."""
    low, high = 0, len(text)
    while high - low > LENGTH // 2:  # a token is at least one character, so the rest is below a window
        middle = (low + high) // 2
        if encode(tokenizer, text[:middle]).shape[0] >= tokens:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=8)
def tokens_of(model: str, text: str) -> Tensor:
    """A text's tokens, int64 [T], once in each process."""
    return encode(open_tokenizer(Path(model)), read_text(text))


@lru_cache(maxsize=2)
def evaluation_of(setting: Setting) -> tuple[Tensor, PreTrainedModel | Reference]:
    """The evaluation's windows, int64 [W, T], and the float model on them, once in each process."""
    windows_WT = cut_windows(tokens_of(setting.model, setting.text), setting.windows, setting.window_length, None)
    model = load(setting.model, device=setting.evaluation)
    known = capture_reference(model, windows_WT)
    if known is None:
        return windows_WT, model
    return windows_WT, replace(known, hidden_WTI=known.hidden_WTI.to(setting.evaluation))


def quality(setting: Setting, model: PreTrainedModel) -> dict[str, Any]:
    """Perplexity, the mean KL divergence from the original in nats per token, and the loss of each window."""
    result = evaluate_windows(model, *evaluation_of(setting))
    losses = [round(loss, 6) for loss in result.window_losses]
    return {
        "perplexity": result.perplexity,
        "kl": result.kl,
        "original": result.reference_perplexity,
        "window_losses": losses,
    }


def recipe_of(row: Row, setting: Setting) -> Recipe:
    """The recipe of a row."""
    calibration = {"samples": row.samples or setting.samples, "length": LENGTH}
    return Recipe.from_dict({"name": f"{row.part} {row.name}", "calibration": calibration} | dict(row.values))


def measure(row: Row, setting: Setting, work: Path, proof: bool) -> dict[str, Any]:
    """Quantize, prove and evaluate one row."""
    recipe = recipe_of(row, setting)
    out = work / re.sub(r"\W+", "-", f"{setting.name}-{row.part}-{row.name}")
    part = recipe.calibration
    calibration = calibration_of(setting, -(-part.samples * part.length // LENGTH), work, row.draw)
    tokens_T = tokens_of(setting.model, str(calibration))
    clock, processor = time.perf_counter(), time.process_time()
    job = prepare(setting.model, recipe, out, str(calibration), row.seed, setting.device, tokens_T=tokens_T)
    report = run(job, fresh=True)
    seconds = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
    if proof:
        verify(out)
    result = quality(setting, load(out, device=setting.evaluation)) | seconds
    if row.converted:
        convert(out, out / "converted", fresh=True)
        before = {"float_perplexity": result["perplexity"], "float_kl": result["kl"]}
        result |= quality(setting, load(out / "converted", device=setting.evaluation)) | before
    result |= _of_the_report(report) | {"phases": _phases(out), "seconds_in_all": time.perf_counter() - clock}
    shutil.rmtree(out)
    return result


def _of_the_report(report: dict[str, Any]) -> dict[str, Any]:
    """Channels that splitting added, how much of int32 is used, the block that tuning left with the largest error."""
    transforms = [part for block in report.get("transforms", []) for part in block]
    added = [layer["extra"] for part in transforms for layer in part["layers"].values() if "extra" in layer]
    used = [layer["overflow_use"] for layer in report["layers"] if layer["overflow_use"]]
    learned = [block[-1]["error_after"] for block in report.get("tuning", []) if block]
    worst = {"largest_error": max(learned), "block": learned.index(max(learned))} if learned else {}
    return ({"extra_channels": sum(added)} if added else {}) | ({"overflow_use": max(used)} if used else {}) | worst


def _phases(out: Path) -> dict[str, float]:
    """Seconds by phase, over all blocks."""
    blocks = json.loads((out / "run.json").read_text(encoding="utf-8"))["blocks"]
    total: dict[str, float] = {}  # untouched blocks have no phases
    for block in blocks:
        for phase in PHASES:
            total[phase] = round(total.get(phase, 0.0) + block.get(phase, 0.0), 2)
    return total


def _file_of(folder: Path, setting: Setting, row: Row) -> Path:
    return folder / (re.sub(r"\W+", "-", f"{setting.name} {row.part} {row.name}").strip("-").lower() + ".json")


def _signature(row: Row, setting: Setting) -> dict[str, Any]:
    shown = {key: value for key, value in setting.shown().items() if key not in ("device", "evaluation")}
    return {"setting": shown, "recipe": recipe_of(row, setting).to_dict(), "part": row.part, "row": row.name}


def stored(folder: Path, setting: Setting, row: Row) -> dict[str, Any] | None:
    """What the row's file holds, if it was made with this setting and recipe."""
    file = _file_of(folder, setting, row)
    if not file.is_file():
        return None
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    facts["recipe"] = json.loads(json.dumps(Recipe.from_dict(facts["recipe"]).to_dict()))  # with options that are new
    wanted = json.loads(json.dumps(_signature(row, setting)))
    return facts if all(facts.get(key) == value for key, value in wanted.items()) else None


def store(folder: Path, setting: Setting, row: Row, result: dict[str, Any]) -> None:
    """Write the row's file."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": setting.device, "evaluation": setting.evaluation, "machine": machine_facts()}
    facts = _signature(row, setting) | where | {"result": result}
    _file_of(folder, setting, row).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def chosen(rows: list[Row], patterns: str) -> list[Row]:
    """Rows whose ``part/name`` matches one of the shell patterns, divided by semicolons, in the order of these."""
    if not patterns:
        return rows
    found: dict[tuple[str, str], Row] = {}
    for pattern in patterns.split(";"):
        for row in rows:
            if fnmatch.fnmatchcase(f"{row.part}/{row.name}", pattern):
                found.setdefault((row.part, row.name), row)
    return list(found.values())


Work = Callable[[Row, Setting, Path, bool], dict[str, Any]]
Task = tuple[Work, Row, Setting, Path, Path, bool, int]
"""What makes a row, the row, its setting, the shared folder, the folder of results, whether to verify, threads."""


def _failure_file(folder: Path, setting: Setting, row: Row) -> Path:
    return _file_of(folder, setting, row).with_suffix(".failed")


def _usable(setting: Setting) -> bool:
    """Whether this process can still compute: some errors on a GPU stay until it ends."""
    try:
        torch.ones(1, device=setting.device).item()
    except RuntimeError:
        return False
    return True


def _claim(folder: Path, setting: Setting, row: Row) -> Path | None:
    """A file that says that this process makes the row; None where another one on this machine does, or has."""
    file = _file_of(folder, setting, row).with_suffix(".begun")
    folder.mkdir(parents=True, exist_ok=True)
    if stored(folder, setting, row) is not None:
        return None
    if file.is_file():
        try:
            os.kill(int(file.read_text(encoding="utf-8")), 0)
        except (ProcessLookupError, ValueError):  # it was broken off
            file.unlink(missing_ok=True)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(str(os.getpid()))
    except FileExistsError:
        return None
    return file


def _one(work_of: Work, row: Row, setting: Setting, work: Path, folder: Path, proof: bool, threads: int) -> str:
    quiet_libraries()
    torch.set_num_threads(threads)
    claim = _claim(folder, setting, row)
    if claim is None:
        return f"{setting.name} {row.part}/{row.name}: made by another process"
    try:
        result = work_of(row, setting, work, proof)
        store(folder, setting, row, result)
    except Exception as error:  # the other rows go on
        message = f"{setting.name} {row.part}/{row.name}: FAILED, {error}\n{traceback.format_exc(limit=-8)}"
        folder.mkdir(parents=True, exist_ok=True)
        _failure_file(folder, setting, row).write_text(message, encoding="utf-8")
        if not _usable(setting):  # every row after it would fail too
            claim.unlink(missing_ok=True)
            print(message, flush=True)
            os._exit(1)
        return message
    finally:
        claim.unlink(missing_ok=True)
        if "cuda" in (setting.device, setting.evaluation):  # other processes need the memory
            gc.collect()
            torch.cuda.empty_cache()
    _failure_file(folder, setting, row).unlink(missing_ok=True)
    return f"{setting.name} {row.part}/{row.name}: {result['perplexity']:.3f} ({result['seconds']:.0f} s)"


def run_rows(
    rows: list[tuple[Row, Setting]],
    folder: Path,
    work: Path,
    jobs: int = 1,
    proof: bool = True,
    threads: int = 1,
    work_of: Work = measure,
) -> Iterator[str]:
    """Do what is not stored yet, ``jobs`` rows at a time, in order; yields a line for each that is done."""
    return spread([(work_of, row, setting, work, folder, proof, threads) for row, setting in rows], jobs)


def spread(tasks: Sequence[Task], jobs: int) -> Iterator[str]:
    """Do the rows of one or several tables, ``jobs`` at a time, in order, each process one after the other; yields a
    line for each that is done. A row that failed before comes last."""
    todo = [task for task in tasks if stored(task[4], task[2], task[1]) is None]
    todo.sort(key=lambda task: _failure_file(task[4], task[2], task[1]).is_file())
    if jobs == 1:
        yield from (_one(*task) for task in todo)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_one, *task) for task in todo]):
            yield done.result()


def merged(rows: list[tuple[Row, Setting]], folder: Path, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """All stored rows by model and part: ``{model: {setting, rows: {part: {name: result}}}}``."""
    models: dict[str, Any] = {}
    for row, setting in rows:
        facts = stored(folder, setting, row)
        if facts is not None:
            shown = replace(setting, device=facts["device"], evaluation=facts["evaluation"]).shown()
            entry = models.setdefault(setting.name, {"setting": shown, "rows": {}})
            result = {key: value for key, value in facts["result"].items() if not keep or key in keep}
            entry["original_perplexity"] = result.pop("original")
            entry["rows"].setdefault(row.part, {})[row.name] = result
    return models


def machine_of(rows: list[tuple[Row, Setting]], folder: Path) -> dict[str, Any]:
    """The machine of the first stored row."""
    for row, setting in rows:
        facts = stored(folder, setting, row)
        if facts is not None:
            return dict(facts["machine"])
    return machine_facts()
