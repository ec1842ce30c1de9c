"""A hook of mkdocs: pages that mkdocs.yml does not name appear under Methods, by their first heading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def named(entries: list[Any]) -> Iterator[str]:
    """Every page that a navigation names."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, str):
                yield value
            else:
                yield from named(value)


def with_the_rest(nav: list[Any], docs: Path) -> list[Any]:
    """The navigation with the pages of a folder that it lacks at the end of its section Methods."""
    rest = sorted({path.name for path in docs.glob("*.md")} - set(named(nav)))
    return [{"Methods": [*entry["Methods"], *rest]} if "Methods" in entry else entry for entry in nav]


def on_config(config: Any) -> Any:
    """Called by mkdocs once the configuration is read."""
    config["nav"] = with_the_rest(config["nav"], Path(config["docs_dir"]))
    return config
