"""The rows of activations.py and tuning.py in one queue, those that decide first, over a few processes that stay.

    python benchmarks/tables.py --data ../shared --models smollm2 --device cuda --jobs 4 --work WORK

One process makes many rows: Python's start, the texts' tokens and the float model's outputs are paid for once in each.
Every row has a file of its own in ``--results`` as with the tables' own scripts, so a run that is broken off goes on;
both tables are written anew after each row. More than four processes get in each other's way on one GPU. ``--rows``
takes patterns of ``table:part/row`` divided by semicolons, in the order wanted; without it they come in that of ORDER.
"""

from __future__ import annotations

import fnmatch
import tempfile
from itertools import chain
from pathlib import Path

import activations
import tuning
from pages import write_pages
from rich.console import Console
from rows import Row, Setting, Task, measure, spread

from finescale.cli.common import quiet_libraries

ROTATED = activations.ROTATED
ONE_SHOT = (
    "RTN", "SmoothQuant 0.5", "QLLM, reassembly", "QuaRot, online too", "FPTQ", "AWQ", "QuaRot, online too + GPTQ",
    "GPTQ", "QuantEase",
)  # fmt: skip
BALANCED = "QuaRot, online too + QuantEase + balanced rounding"
ORDER = (
    "activations:ours at*", "activations:integer scales/*converted", "activations:blocks together/*",
    "activations:rank/*", "activations:samples/*", "activations:W4A4/QLLM + *correction + GPTQ",
    "activations:expansion, corrected/*",
    "activations:expansion/adaptive*", "activations:expansion/*", "activations:correction/*", "tuning:[342]/recipe*",
    "activations:integer scales/fptq*", "activations:W4A4/recipe*", "activations:W4A4/QLLM + GPTQ",
    "tuning:[34]/rtn", "tuning:[34]/gptq", "tuning:[34]/quantease",
    "tuning:[342]/rounding from quantease, signed scales", "tuning:[34]/rounding from rtn",
    "tuning:[34]/rounding from rtn, signed scales",
    *(f"activations:{bits}/{name}" for bits in ("W4A4", "W4A8", "W6A6") for name in ("QLLM", "OmniQuant")),
    *(f"activations:{bits}/{name}" for bits in ("W4A4", "W4A8", "W6A6") for name in ONE_SHOT),
    *(f"activations:{bits}/{ROTATED}" for bits in ("W4A16", "W4A8", "W6A6", "W4A4")),
    "activations:integer scales/w4a8-integer-scale*", "activations:integer scales/*part [3456]",
    "activations:integer scales/*",
    "activations:W4A4/QLLM, correction", "activations:W4A16/GPTQ", "activations:W4A16/QuantEase",
    "activations:W4A8/recipe*", "activations:W4A8/QuantEase + rounding", "activations:W4A16/QuantEase + rounding",
    f"activations:W4A4/{BALANCED}", "activations:W4A4/QLLM + * + rounding", "activations:W4A4/QuaRot*",
    "tuning:2/*signed*", "tuning:[34]/*signed*", "tuning:w4a8/*", "activations:W4A16/*",
    "tuning:*", "activations:*",
)  # fmt: skip
Named = dict[str, tuple[Row, Setting]]


def in_order(rows: Named, patterns: tuple[str, ...]) -> list[str]:
    """Names that match a pattern, in the order of these, the first of each table's models first."""
    found: dict[str, None] = {}
    for pattern in patterns:
        found |= dict.fromkeys(name for name in rows if fnmatch.fnmatchcase(name.partition(" ")[2], pattern))
    return list(found)


def main() -> None:
    parser = activations.parser_of(__doc__, "")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        tables = {
            name: activations.pairs_of(arguments, rows, work)
            for name, rows in (("activations", activations.all_rows()), ("tuning", tuning.all_rows(False)))
        }
        named: Named = {
            f"{setting.name} {table}:{row.part}/{row.name}": (row, setting)
            for table, pairs in tables.items()
            for row, setting in pairs
        }
        names = in_order(named, tuple(arguments.rows.split(";")) if arguments.rows else ORDER)
        if arguments.list:
            console.print("\n".join(names), soft_wrap=True)
            return
        tasks: list[Task] = [
            (measure, *named[name], work, arguments.results / table_of(name), arguments.proof, arguments.threads)
            for name in names
        ]
        arguments.results.mkdir(parents=True, exist_ok=True)
        for line in chain(spread(tasks, arguments.jobs), [""]):  # once more when all is there already
            console.print(line, soft_wrap=True)
            for table, pairs in tables.items():
                activations.write(arguments.results / f"{table}.json", table, pairs, arguments.results / table)
        for page in write_pages(arguments.results):
            console.print(f"written to {page}")


def table_of(name: str) -> str:
    """The table of a name such as ``smollm2 tuning:3/gptq``."""
    return name.partition(" ")[2].partition(":")[0]


if __name__ == "__main__":
    main()
