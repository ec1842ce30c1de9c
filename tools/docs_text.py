"""Numbers and tables as Markdown."""

from __future__ import annotations

from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """Some significant digits; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table; bars and line ends inside cells are escaped."""
    cells = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(_cell(value) for value in row) + " |\n" for row in cells)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
