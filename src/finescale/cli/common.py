"""What commands share: consoles, the progress bar, JSON for machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 60.0

console = Console()
if not console.is_terminal and console.width == 80:
    console.width = 140  # rich's guess for files and pipes, which limit nothing; 80 columns break the names of layers
stderr = Console(stderr=True)


def quiet_libraries() -> None:
    """No progress bars and advice of transformers between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with ETA on a terminal, elsewhere (a batch job's log) a line a minute; yields ``(label, done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    options: dict[str, Any] = {"transient": True, "speed_estimate_period": 3600, "disable": not stderr.is_terminal}
    with Progress(*columns, console=stderr, **options) as progress:
        task = progress.add_task("starting", total=None)
        start = said = time.monotonic()

        def update(label: str, done: int, total: int) -> None:
            nonlocal said
            progress.update(task, description=label, completed=done, total=total)
            now = time.monotonic()
            if not stderr.is_terminal and now - said >= SECONDS_BETWEEN_LINES:
                said = now
                passed = f"{(now - start) / 60:.0f} min"
                stderr.print(f"{label} ({done} of {total} {unit} done, {passed})", markup=False, highlight=False)

        yield update


def write_json_file(path: Path | None, value: Any) -> None:
    """The ``--json`` file of a command, when asked for."""
    if path is None:
        return
    from finescale.pipeline.journal import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
