"""``finescale compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finescale.cli import options
from finescale.cli.common import console, progress_bar, quiet_libraries, stderr, write_json_file


def compare(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; an unfinished one there goes on.")],
    recipes: Annotated[str | None, typer.Option(help="Recipes: names or YAML files, with commas between.")] = None,
    bits: Annotated[str | None, typer.Option(help="Bits of the weights, as 4,3 (default: the recipes').")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group sizes, as -1,64; -1 is per channel (default: the recipes').")
    ] = None,
    grid: Annotated[
        list[Path] | None, typer.Option(help="YAML file with grids of recipes, bits, groups, settings.")
    ] = None,
    set_: options.Settings = None,
    calibration: Annotated[
        str, typer.Option(help="Plain text or jsonl file, or hub data set, for all cells.")
    ] = "builtin:calibration",
    samples: options.Samples = None,
    sample_length: options.Length = None,
    text: Annotated[str, typer.Option(help="Evaluation text.")] = "builtin:evaluation",
    windows: options.EvaluationWindows = None,
    length: options.EvaluationLength = None,
    bos: options.Bos = False,
    dtype: Annotated[str, typer.Option(help="Of the evaluation: float32, bfloat16 or float16.")] = "float32",
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks, with commas between; needs --task-data.")] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder of the tasks' jsonl files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions of each task.")] = None,
    shared_statistics: Annotated[
        bool,
        typer.Option("--shared-statistics", help="Solve on the original's activations, collected once for all."),
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time every cell's model at the end, one after another.")] = (
        False
    ),
    peers: Annotated[Path | None, typer.Option(help="JSON file with rows of other tools.")] = None,
    devices: Annotated[str, typer.Option(help="Devices, as cuda:0,cuda:1.")] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="Processes (default: one per device).")] = None,
    seed: options.Seed = 0,
    drop_checkpoints: Annotated[
        bool, typer.Option("--drop-checkpoints", help="Keep only the numbers of finished cells.")
    ] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the comparison here.")] = None,
) -> None:
    """Many recipes on one model: tables of accuracy, size and speed, in one page."""
    quiet_libraries()
    from finescale.compare.grid import cells_of, make_grid, read_grids, with_shared_statistics
    from finescale.compare.run import Options, read_peers
    from finescale.compare.run import compare as run_comparison
    from finescale.compare.speed import add_speeds
    from finescale.errors import InputError
    from finescale.report.compare import comparison_tables, write_comparison

    grids = [part for path in grid or [] for part in read_grids(path)]
    if recipes is not None:
        values = {"recipes": _words(recipes), "bits": _numbers(bits, "--bits"), "groups": _numbers(groups, "--groups")}
        grids.append(make_grid(values, "--recipes"))
    elif bits or groups:
        raise InputError("--bits and --groups belong to --recipes; name the recipes.")
    cells = cells_of(grids, options.settings_of(set_, samples, sample_length))
    if shared_statistics:
        cells = [with_shared_statistics(cell) for cell in cells]
    chosen = Options(
        calibration=calibration,
        text=text,
        windows=windows,
        length=length,
        bos=bos,
        dtype=dtype,
        seed=seed,
        tasks=tuple(_words(tasks or "")),
        task_data=None if task_data is None else str(task_data),
        limit=limit,
        devices=tuple(_words(devices)),
        jobs=jobs,
        keep=not drop_checkpoints,
    )
    others = [] if peers is None else read_peers(peers)
    with progress_bar("cells") as update:

        def told(what: str, done: int, total: int) -> None:
            update(what, done, total)
            if not stderr.is_terminal:
                stderr.print(f"{done}/{total} {what}", markup=False)

        result = run_comparison(model, cells, out, chosen, others, told)
        if speed:
            result = add_speeds(result, model, out, chosen.devices[0], told)
    for table in comparison_tables(result):
        console.print(table)
    page = write_comparison(result, out)
    console.print(f"tables, figures: {out}\npage:            {page}")
    write_json_file(json_, result)
    failed = [row["key"] for row in result["rows"] if "error" in row]
    if failed:
        raise InputError(f"{len(failed)} of {len(cells)} cells failed ({', '.join(failed[:3])}); {out} says why.")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None, option: str) -> list[int]:
    from finescale.errors import InputError

    try:
        return [int(word) for word in _words(text or "")]
    except ValueError as error:
        raise InputError(f"{option} {text}: write whole numbers with commas between, as 4,3.") from error
