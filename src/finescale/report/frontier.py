"""Accuracy against size and against speed: every model a mark, those that no other beats in both on a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from markupsafe import Markup

from finescale.report import svg, units
from finescale.report.figure import Figure, Omitted

_STYLE = Path(__file__).with_name("templates") / "style.css.j2"
AXES = (
    ("size_bytes", "fig-size", "Perplexity and size", "size on disk", True),
    ("bits_per_weight", "fig-bits", "Perplexity and bits per weight", "stored bits per quantized weight", True),
    ("prompt_speed", "fig-prompt-speed", "Perplexity and speed of prompts", "prompt tokens per second", False),
    ("generated_speed", "fig-generated-speed", "Perplexity and speed of generation", "tokens per second", False),
)
_WORST = 5.0
"""Models whose perplexity is so many times the least are named below the plot: they would take all of its height."""


class Point(Protocol):
    """What a row must have to be drawn."""

    @property
    def label(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def values(self) -> Mapping[str, float]: ...


def pareto(points: Sequence[tuple[float, float]], less_x: bool) -> list[int]:
    """Numbers of the points (x, y) that no other point equals or beats in both, least y best, in order of x.

    Args:
        points: coordinates.
        less_x: whether a smaller x is better, else a larger one.
    """
    sign = 1 if less_x else -1
    order = sorted(range(len(points)), key=lambda number: (sign * points[number][0], points[number][1]))
    kept: list[int] = []
    for number in order:
        if not kept or points[number][1] < points[kept[-1]][1]:
            kept.append(number)
    return kept if less_x else kept[::-1]


def figures(rows: Sequence[Point]) -> list[Figure | Omitted]:
    """The plots for which there is data; speed is left out without a word where nothing was timed."""
    drawn: list[Figure | Omitted] = []
    for key, name, title, words, less in AXES:
        shown = [row for row in rows if key in row.values and "perplexity" in row.values and row.kind != "original"]
        if key.endswith("_speed") and not shown:
            continue
        original = next((row for row in rows if row.kind == "original"), None)
        drawn.append(_figure(name, title, words, less, key, *_without_the_worst(shown, original), original))
    return drawn


def _without_the_worst(rows: Sequence[Point], original: Point | None) -> tuple[list[Point], list[Point]]:
    """What is drawn, and what has lost too much to be."""
    known = [row.values["perplexity"] for row in (*rows, original) if row is not None and "perplexity" in row.values]
    highest = _WORST * min(known, default=0.0)
    near = [row for row in rows if row.values["perplexity"] <= highest]
    return (near, [row for row in rows if row not in near]) if len(near) > 1 else (list(rows), [])


def _figure(
    name: str,
    title: str,
    words: str,
    less: bool,
    key: str,
    shown: Sequence[Point],
    left_out: Sequence[Point],
    original: Point | None,
) -> Figure | Omitted:
    if len(shown) < 2:
        return Omitted(name, title, "fewer than two models have both numbers.")
    points = [(row.values[key], row.values["perplexity"]) for row in shown]
    front = pareto(points, less)
    base = None if original is None else original.values.get("perplexity")
    box = svg.Box(70, 44, svg.WIDTH - 210, 470)
    x = svg.padded([point[0] for point in points], box.left, box.right)
    y = svg.padded([*(point[1] for point in points), *([base] if base else [])], box.bottom, box.top, log=True)
    size = key == "size_bytes"
    parts = [
        svg.y_axis(box, y, "perplexity", sub="log scale; lower is better"),
        svg.x_axis(
            box, x, f"{words} ({'less' if less else 'more'} is better)", label=units.size if size else units.tick
        ),
    ]
    if base is not None:
        parts.append(svg.line(box.left, y(base), box.right, y(base), "reference"))
        parts.append(svg.text(box.left + 6, y(base) - 6, f"original {units.sig(base, 4)}", "muted"))
    parts.append(svg.polyline([(x(points[n][0]), y(points[n][1])) for n in front], "line c-best"))
    labels = list(dict.fromkeys(row.label for row in shown))
    for number, (row, (at, value)) in enumerate(zip(shown, points, strict=True)):
        look = labels.index(row.label)
        tone = "c-ref" if row.kind == "peer" else f"s{look % 8}"
        tip = (
            f"{row.label}, {row.scheme}: perplexity {units.sig(value, 4)}, {units.size(at) if size else units.sig(at)}"
        )
        ring = " ring" if number in front else ""
        parts.append(svg.marker(x(at), y(value), look // 8 + look, 5.5, f"fill {tone} dot", tip))
        if ring:
            parts.append(svg.el("circle", cx=x(at), cy=y(value), r=9.0, cls="ring"))
    parts += _names(labels, shown, box)
    parts += _front_names([shown[n] for n in front], [(x(points[n][0]), y(points[n][1])) for n in front])
    best = min(range(len(shown)), key=lambda number: points[number][1])
    drawn = f"{len(shown)} models drawn" if left_out else f"{len(shown)} models"
    sentence = (
        f"{len(front)} of {drawn} are on the Pareto front; the least perplexity has {shown[best].label} "
        f"({shown[best].scheme}), {units.sig(points[best][1], 4)}."
    )
    caption = (
        "Each mark is one model, all evaluated on the same text; rings and the line mark those that no other model "
        "beats in both numbers. Grey marks are other tools."
    )
    if left_out:
        names = ", ".join(f"{row.label} ({row.scheme}) {units.sig(row.values['perplexity'], 3)}" for row in left_out)
        caption += f" Not drawn, beyond {_WORST:g} times the least: {names}."
    alt = f"Scatter plot of perplexity against {words}. On the front: " + "; ".join(
        f"{shown[n].label} {shown[n].scheme} {units.sig(points[n][1], 4)}" for n in front
    )
    return Figure(name, title, sentence, caption, alt, svg.document(box.bottom + 52, alt, svg.join(parts)))


def _names(labels: Sequence[str], shown: Sequence[Point], box: svg.Box) -> list[Markup]:
    """The legend at the right: every label with its mark."""
    parts = []
    gap = min(20.0, (box.bottom - box.top) / max(1, len(labels)))
    for look, label in enumerate(labels):
        peer = any(row.kind == "peer" for row in shown if row.label == label)
        at = box.top + gap * (look + 0.5)
        text = label if len(label) <= 27 else label[:26] + "…"
        tone = "c-ref" if peer else f"s{look % 8}"
        parts.append(svg.marker(box.right + 24, at, look // 8 + look, 5, f"fill {tone} dot", label))
        parts.append(svg.text(box.right + 36, at + 4, text))
    return parts


def _front_names(rows: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[Markup]:
    """Schemes beside the marks of the front, where there is room."""
    parts: list[Markup] = []
    last: tuple[float, float, int] | None = None
    for row, (x, y) in zip(rows, places, strict=True):
        if last is None or abs(x - last[0]) > 10 + 7.5 * last[2] or abs(y - last[1]) > 16:
            parts.append(svg.text(x + 12, y - 8, row.scheme, "label strong"))
            last = (x, y, len(row.scheme))
    return parts


def alone(figure: Figure) -> str:
    """The picture as an SVG file of its own, with the page's colours."""
    text = str(figure.svg)
    start = text.index(">") + 1
    head = text[:start].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    font = "text { font-family: sans-serif; } svg { background: var(--paper); }"
    return f"{head}<style>{_STYLE.read_text(encoding='utf-8')}{font}</style>{text[start:]}\n"
