"""What a figure of the report is: a picture with words around it, or a reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

# The attention side of a block is drawn in cool colours, the rest in warm ones, so that a glance tells them apart.
COOL, WARM = ("s0", "s1", "s2", "s3"), ("s4", "s5", "s6", "s7")


@dataclass(frozen=True)
class Figure:
    """key: id in the page; takeaway: what the picture shows for this model; caption: how to read it."""

    key: str
    title: str
    takeaway: str
    caption: str
    alt: str
    svg: Markup


@dataclass(frozen=True)
class Omitted:
    """A figure that could not be drawn, and why."""

    key: str
    title: str
    reason: str


def colours(kinds: list[str]) -> dict[str, tuple[str, int]]:
    """For every kind of linear (colour class, marker shape), steady for the usual names."""
    result: dict[str, tuple[str, int]] = {}
    used = {"cool": 0, "warm": 0}
    for kind in kinds:
        side = "cool" if "attn" in kind or "attention" in kind else "warm"
        palette, nth = (COOL, used["cool"]) if side == "cool" else (WARM, used["warm"])
        used[side] += 1
        result[kind] = (palette[nth % 4], (nth + nth // 4) % 4)
    return result
