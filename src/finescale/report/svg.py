"""Hand-written SVG: elements, scales and axes. Small, crisp, and coloured by the page's CSS (light and dark).

Every string passes through `el` or `text`, which escape it, so untrusted names may be drawn.
Lengths are in SVG user units, which equal CSS pixels when the page shows a figure at its natural width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from finescale.report import units

WIDTH = 960.0  # every figure has this width; the page scales it down on small screens
CHARACTER = 6.7  # average advance of a character at the 12 px label size, to reserve room for labels


@dataclass(frozen=True)
class Box:
    """The plotting rectangle inside a figure: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Axis:
    """A map from data to pixels: `low` lands on `start`, `high` on `stop`; linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low * 1e-3)) if self.log else value
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round values inside the axis: decades (with 2 and 5 when few) if log, else multiples of 1, 2 or 5."""
        return _log_ticks(self.low, self.high, wanted) if self.log else _linear_ticks(self.low, self.high, wanted)


def _linear_ticks(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / max(1, wanted)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    inside = (low * (1 - 1e-9), high * (1 + 1e-9))
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
        values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
        kept = [v for v in values if inside[0] <= v <= inside[1]]
        if len(kept) >= 3:
            break
    else:
        return [low, high] if decades < 0.3 else kept
    stride = max(1, math.ceil(len(kept) / max(2, wanted + 2)))
    return kept[::stride]


def padded(values: Iterable[float], start: float, stop: float, *, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values with a little air; at log only positive values count. `zero`: begin at 0."""
    kept = [v for v in values if not log or v > 0]
    if not kept:
        kept = [1.0]
    low, high = min(kept), max(kept)
    if log:
        air = max(1.15, (high / low) ** 0.06, (3 * low / high) ** 0.5)  # at least half a decade in view
        return Axis(low / air, high * air, start, stop, log=True)
    if zero:
        return Axis(0.0, high * 1.06 if high > 0 else 1.0, start, stop)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - air, high + air, start, stop)


def el(tag: str, *children: str, **attributes: object) -> Markup:
    """One element. Attribute names: `cls` is class, `_` becomes `-`; None is left out; floats keep 1 decimal."""
    parts = []
    for key, value in attributes.items():
        if value is not None:
            name = "class" if key == "cls" else key.replace("_", "-")
            parts.append(f' {name}="{_short(value) if isinstance(value, float) else escape(value)}"')
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{''.join(parts)}>{inner}</{tag}>")  # safe: every part above is escaped


def _short(value: float) -> str:
    rounded = f"{value:.1f}"
    return rounded[:-2] if rounded.endswith(".0") else rounded


def join(parts: Iterable[str]) -> Markup:
    """Elements in a row (escaping any part that is not an element)."""
    return Markup("").join(parts)


def text(x: float, y: float, content: str, cls: str = "label", anchor: str | None = None, **more: object) -> Markup:
    """A text element; anchor is start (default), middle or end."""
    return el("text", content, x=x, y=y, cls=cls, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, cls: str, **more: object) -> Markup:
    """A straight line."""
    return el("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls, **more)


def rect(x: float, y: float, width: float, height: float, cls: str, tip: str | None = None, **more: object) -> Markup:
    """A rectangle; `tip` shows on hover."""
    children = () if tip is None else (el("title", tip),)
    return el("rect", *children, x=x, y=y, width=max(0.0, width), height=max(0.0, height), cls=cls, **more)


def polyline(points: Sequence[tuple[float, float]], cls: str) -> Markup:
    """An open path through the points."""
    return el("path", d="M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points), cls=cls)


def band(lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], cls: str) -> Markup:
    """A filled area between two lines over the same x."""
    points = [*upper, *reversed(lower)]
    return el("path", d="M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) + "Z", cls=cls)


def marker(x: float, y: float, shape: int, radius: float, cls: str, tip: str) -> Markup:
    """Circle, square, triangle, diamond, by `shape` modulo 4: series stay apart without colour."""
    title, r = el("title", tip), radius
    if shape % 4 == 0:
        return el("circle", title, cx=x, cy=y, r=r, cls=cls)
    if shape % 4 == 1:
        return el("rect", title, x=x - r * 0.9, y=y - r * 0.9, width=r * 1.8, height=r * 1.8, cls=cls)
    corners: tuple[tuple[float, float], ...]
    if shape % 4 == 2:
        corners = ((x, y - r * 1.15), (x + r * 1.1, y + r * 0.8), (x - r * 1.1, y + r * 0.8))
    else:
        corners = ((x, y - r * 1.3), (x + r * 1.3, y), (x, y + r * 1.3), (x - r * 1.3, y))
    return el("path", title, d="M" + "L".join(f"{_short(a)} {_short(b)}" for a, b in corners) + "Z", cls=cls)


def y_axis(
    box: Box, axis: Axis, title: str, wanted: int = 6, label: Callable[[float], str] = units.tick, sub: str = ""
) -> Markup:
    """Horizontal grid lines, tick labels at the left, and the axis title written level above the plot."""
    heading = [el("tspan", title, cls="axis-title"), el("tspan", sub, cls="muted", dx=8) if sub else ""]
    parts = [el("text", *heading, x=box.left - 46, y=box.top - 14)]
    for value in axis.ticks(wanted):
        y = axis(value)
        parts += [line(box.left, y, box.right, y, "grid"), text(box.left - 8, y + 4, label(value), "tick", "end")]
    return join(parts)


def x_axis(
    box: Box, axis: Axis, title: str, values: Sequence[float] | None = None, label: Callable[[float], str] = units.tick
) -> Markup:
    """The base line, ticks with labels below it, and the axis title centred below those."""
    parts = [line(box.left, box.bottom, box.right, box.bottom, "base")]
    for value in axis.ticks(8) if values is None else values:
        x = axis(value)
        parts += [
            line(x, box.bottom, x, box.bottom + 4, "base"),
            text(x, box.bottom + 18, label(value), "tick", "middle"),
        ]
    parts.append(text((box.left + box.right) / 2, box.bottom + 38, title, "axis-title", "middle"))
    return join(parts)


def legend(x: float, y: float, entries: Sequence[tuple[str, str]], cls: str = "fill") -> Markup:
    """Swatches with names in a row, starting at x; entries are (colour class, name)."""
    parts = []
    for colour, name in entries:
        parts += [rect(x, y - 9, 11, 11, f"{cls} {colour}", rx=2), text(x + 17, y, name)]
        x += 17 + len(name) * CHARACTER + 20
    return join(parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted`, at least `gap` apart and within low..high where that is possible (order kept)."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else low))
    for k in range(len(placed) - 1, -1, -1):  # push back up whatever ran out at the bottom
        placed[k] = min(placed[k], high if k == len(placed) - 1 else placed[k + 1] - gap)
    result = [0.0] * len(wanted)
    for k, i in enumerate(order):
        result[i] = placed[k]
    return result


def document(height: float, alt: str, body: str) -> Markup:
    """The whole picture as an inline <svg> with its alternative text."""
    return el(
        "svg",
        body,
        viewBox=f"0 0 {_short(WIDTH)} {_short(height)}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label=alt,
    )
