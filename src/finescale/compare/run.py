"""The whole comparison: what is shared is made once, then every cell, in one process or in several."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from finescale._version import __version__
from finescale.bench.machine import machine_facts
from finescale.calibration.data import BUILTIN, encode, open_tokenizer, read_text
from finescale.calibration.shared import collected
from finescale.compare.cell import Shared, finished, run_cell, run_original, statistics_place
from finescale.compare.grid import Cell
from finescale.errors import InputError
from finescale.evaluate.perplexity import cut_windows
from finescale.evaluate.reference import capture_reference, save_reference
from finescale.evaluate.tasks import find_tasks, task_file
from finescale.formats import registry
from finescale.models import open_skeleton
from finescale.pipeline.journal import write_json
from finescale.pipeline.plan import make_plan
from finescale.pipeline.quantize import prepare, resolve_model
from finescale.pipeline.statistics import collect_statistics
from finescale.runtime.load import load, usable_device

Progress = Callable[[str, int, int], None]
"""``(what ended, cells done, cells in all)``."""
RESULT = "compare.json"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Options:
    """How every cell is made and judged; see ``finescale compare``."""

    calibration: str = "builtin:calibration"
    text: str = "builtin:evaluation"
    windows: int | None = None
    length: int | None = None
    bos: bool = False
    dtype: str = "float32"
    seed: int = 0
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    devices: tuple[str, ...] = ("cpu",)
    jobs: int | None = None
    keep: bool = True


def compare(
    model: str | Path,
    cells: Sequence[Cell],
    out: Path,
    options: Options | None = None,
    peers: Sequence[dict[str, Any]] = (),
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize and evaluate a model by every cell, and return the comparison (also ``out/compare.json``).

    Finished cells of an earlier run in the same settings are kept; a cell that was killed goes on after its last block.

    Args:
        model: folder, hub name or GGUF file.
        cells: what is compared (``finescale.compare.grid.cells_of``).
        out: folder of the comparison.
        options: calibration, evaluation, devices.
        peers: rows of other tools, shown beside (``read_peers``).
        on_progress: called after each cell.

    Raises:
        InputError, CheckpointError: what cannot work, before the first cell. What fails in a cell is noted in its row.
    """
    options = options or Options()
    on_progress = on_progress or (lambda *_: None)
    if not options.devices:
        raise InputError("--devices names none; use cpu, or cuda:0,cuda:1.")
    for device in options.devices:
        usable_device(device)
    for task in find_tasks(options.tasks) if options.tasks else []:
        if options.task_data is None:
            raise InputError("--tasks in a comparison needs --task-data, a folder with the tasks' jsonl files.")
        task_file(task, Path(options.task_data))
    shared = _prepare(model, cells, out, options)
    source = resolve_model(model)
    size = {"size_bytes": source.total_bytes(), "bits_per_weight": 8 * source.float_dtype().itemsize}
    rows = [_original(shared, options.devices[0]) | size]
    on_progress("original", 0, len(cells))
    result = {
        "benchmark": "compare",
        "finescale": __version__,
        "machine": machine_facts(),
        "model": Path(str(model)).name,
        "setting": _setting(shared, rows[0], options),
        "rows": rows,
        "peers": list(peers),
    }
    _share_statistics(shared, cells, options.devices[0], on_progress)
    made = {}
    for number, row in enumerate(_run_all(shared, cells, options), 1):
        made[row["key"]] = row
        result["rows"] = rows + [made[cell.key] for cell in cells if cell.key in made]
        write_json(out / RESULT, result)  # a comparison that is stopped has a table of what it did
        ending = f"failed: {row['error']}" if "error" in row else f"perplexity {row['perplexity']:.4g}"
        on_progress(f"{row['key']}: {ending}", number, len(cells))
    return result


def _setting(shared: Shared, original: dict[str, Any], options: Options) -> dict[str, Any]:
    names = ("windows", "length", "tokens", "bos", "dtype")
    facts = {"calibration": Path(shared.calibration).name, "text": Path(shared.text).name, "seed": shared.seed}
    return facts | {name: original[name] for name in names} | {"tasks": list(shared.tasks), "limit": options.limit}


def _prepare(model: str | Path, cells: Sequence[Cell], out: Path, options: Options) -> Shared:
    """Check every cell, encode both texts, and claim the folder."""
    if not cells:
        raise InputError("nothing to compare; name --recipes or a --grid.")
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {options.dtype}; choose float32, bfloat16 or float16.")
    source = resolve_model(model)
    skeleton = open_skeleton(source)
    for cell in cells:
        try:
            make_plan(skeleton, cell.recipe, registry.get(cell.recipe.format))
        except InputError as error:
            raise InputError(f"{cell.key}: {error}") from error
    tokenizer = open_tokenizer(source.path)
    if options.bos and tokenizer.bos_token_id is None:
        raise InputError("the tokenizer has no beginning-of-sequence token; leave --bos out.")
    longest = getattr(skeleton.model.config, "max_position_embeddings", None) or 2048
    length = options.length or min(2048, longest)
    if length > longest:
        raise InputError(f"--length {length} is longer than the model's {longest} positions; use at most {longest}.")
    bos = tokenizer.bos_token_id if options.bos else None
    tokens = {
        "calibration": encode(tokenizer, read_text(options.calibration or BUILTIN)),
        "windows": cut_windows(encode(tokenizer, read_text(options.text)), options.windows, length, bos),
    }
    hashes = {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tokens.items()
    }
    shared = Shared(
        model=str(source.path),
        folder=str(out),
        calibration=options.calibration,
        calibration_sha256=hashes["calibration"],
        text=options.text,
        text_sha256=hashes["windows"],
        bos=options.bos,
        dtype=options.dtype,
        seed=options.seed,
        tasks=options.tasks,
        task_data=options.task_data,
        limit=options.limit,
        keep=options.keep,
        reference=True,
        fingerprint=source.fingerprint(),
    )
    _claim(shared, out)
    save_file({name: tensor.contiguous() for name, tensor in tokens.items()}, shared.tokens_file)
    return shared


def _claim(shared: Shared, out: Path) -> None:
    """Raises InputError where the folder holds something else, or a comparison on other texts or another model."""
    place = out / SETTINGS
    places = ("folder", "model", "keep", "task_data", "calibration", "text")  # the texts are known by their hashes
    facts = {key: value for key, value in asdict(shared).items() if key not in places}
    facts = json.loads(json.dumps(facts))
    if place.is_file():
        if json.loads(place.read_text(encoding="utf-8")) != facts:
            raise InputError(
                f"{out} holds a comparison with another model, text or evaluation; give the same settings to go on, or "
                "another --out."
            )
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} holds files that finescale compare did not write; choose an empty or new --out.")
    (out / "shared").mkdir(parents=True, exist_ok=True)
    write_json(place, facts)


def _original(shared: Shared, device: str) -> dict[str, Any]:
    """The original's row; its head inputs are kept for the cells."""
    if not shared.reference_file.is_file():
        dtype: torch.dtype = getattr(torch, shared.dtype)
        model = load(shared.model, dtype, device)
        reference = capture_reference(model, load_file(shared.tokens_file)["windows"])
        if reference is not None:
            save_reference(reference, shared.reference_file)
        return run_original(shared, device, model)
    return run_original(shared, device)


def _share_statistics(shared: Shared, cells: Sequence[Cell], device: str, on_progress: Progress) -> None:
    """Collect what cells with ``calibration.sequential: false`` are solved on, once for all with the same windows."""
    tokens_T = load_file(shared.tokens_file)["calibration"]
    seen = set()
    for cell in cells:
        part, learns = cell.recipe.calibration, cell.recipe.solver.entry().needs_hessian
        key = (part.model_dump_json(), learns)  # what decides the windows, see pipeline.quantize
        if part.sequential or key in seen or finished(shared, cell.key, cell.recipe.to_dict(), device):
            continue
        seen.add(key)
        nowhere = Path(shared.folder) / "shared" / "nowhere"
        job = prepare(shared.model, cell.recipe, nowhere, shared.calibration, shared.seed, device, tokens_T=tokens_T)
        folder, own = statistics_place(shared.folder, job)
        if collected(folder, own) is None:
            collect_statistics(
                job.skeleton, job.calibration.tokens_BT, part.batch_size, job.device, job.compute_dtype, folder, own,
                on_progress,
            )  # fmt: skip


def _run_all(shared: Shared, cells: Sequence[Cell], options: Options) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    jobs = min(options.jobs or len(options.devices), len(cells))
    if jobs <= 1:
        for cell in cells:
            yield run_cell(shared, cell, options.devices[0])
        return
    waiting: SimpleQueue[Cell] = SimpleQueue()
    done: SimpleQueue[dict[str, Any] | BaseException] = SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    threads = max(1, (psutil.cpu_count(logical=False) or 1) // jobs)
    with ThreadPoolExecutor(jobs) as lanes:
        for number in range(jobs):
            lanes.submit(_lane, shared, options.devices[number % len(options.devices)], threads, waiting, done)
        try:
            for _ in cells:
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:  # after an interrupt too: lanes end when nothing is waiting
            with suppress(Empty):
                while True:
                    waiting.get_nowait()


def _lane(
    shared: Shared,
    device: str,
    threads: int,
    waiting: SimpleQueue[Cell],
    done: SimpleQueue[dict[str, Any] | BaseException],
) -> None:
    """A process of its own that works through waiting cells on one device; one that dies is started again."""
    # Not forked: CUDA cannot be used in a forked process.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, _start, (threads,))
    try:
        while True:
            try:
                cell = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put(pool.submit(run_cell, shared, cell, device).result())
            except BrokenProcessPool:
                reason = "its process died, most likely for lack of memory; use fewer --jobs and start again"
                done.put({"key": cell.key, "label": cell.label, "recipe": cell.recipe.to_dict(), "error": reason})
                pool = ProcessPoolExecutor(1, context, _start, (threads,))
            except BaseException as error:  # a defect: the comparison ends with it
                done.put(error)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(threads: int) -> None:
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def read_peers(path: Path) -> list[dict[str, Any]]:
    """Rows of other tools: a list under ``peers``, each with ``label``, ``perplexity`` and ``provenance`` (versions,
    settings and the script that made it), and what else is known of ``bits``, ``group_size``, ``bits_per_weight``,
    ``size_bytes``, ``kl``.

    Raises:
        InputError: no such file, or a row without these.
    """
    if not path.is_file():
        raise InputError(f"the file of peers {path} does not exist; check the path.")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["peers"]
        for row in rows:
            float(row["perplexity"]), str(row["label"]), dict(row["provenance"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} must hold a list under peers, each row with label, perplexity and provenance ({error})."
        ) from error
    found: list[dict[str, Any]] = rows
    return found
