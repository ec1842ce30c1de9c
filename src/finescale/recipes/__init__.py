"""The named recipes, one YAML file each. Nothing heavy is imported here, so that listing them is quick."""

from __future__ import annotations

from importlib import resources


def recipe_names() -> list[str]:
    """Names of the recipes that come with finescale."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of one of them."""
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
