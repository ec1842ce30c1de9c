"""A figure of `bench gemm`: speed-ups over a baseline by tokens, a panel for each shape, as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from finescale.report import svg

_PANEL, _GAP, _TOP = (400.0, 230.0), (70.0, 96.0), 96.0
# The colours of the report's pages, light and dark: text, soft text, grid, background, then one for each line.
_LIGHT = "#1c2530 #5c6875 #e3e7ec #ffffff #1f4e79 #3b83bd #3aa39a #7a6bb5 #b5552f #d9953a #a5426b #7d7a3a"
_DARK = "#e6eaf0 #9aa6b4 #2c3540 #151a20 #8fb6e8 #55a0dc #5cc4b8 #ab9ce6 #e58a63 #ebb765 #dd84a8 #bdb969"


def _style(colours: str) -> str:
    ink, soft, grid, card, *series = colours.split()
    return (
        f"svg{{background:{card}}}text{{font:12px system-ui,sans-serif;fill:{ink}}}"
        f".tick{{fill:{soft};font-size:11.5px}}.axis-title,.strong{{font-weight:600}}.grid{{stroke:{grid}}}"
        f".base{{stroke:{soft};stroke-opacity:.55}}"
        f".reference{{stroke:{soft};stroke-dasharray:4 3}}.dot{{stroke:{card};stroke-width:.8}}"
        ".line{fill:none;stroke-width:1.8;stroke-linejoin:round}"
        + "".join(f".fill.s{n}{{fill:{colour}}}.line.s{n}{{stroke:{colour}}}" for n, colour in enumerate(series))
    )


def speedup_figure(rows: Sequence[dict[str, Any]], base: str, names: Sequence[str]) -> str:
    """The text of an SVG file.

    Args:
        rows: of ``bench_gemm`` or ``bench_gemm_cpu``: ``inputs``, ``outputs``, ``tokens`` and times by name.
        base: name of what speed-ups are over.
        names: those to draw; one that was never timed is left out.
    """
    shapes = list(dict.fromkeys((row["inputs"], row["outputs"]) for row in rows))
    drawn = [name for name in names if name != base and any(name in row and base in row for row in rows)]
    parts = [
        svg.text(24, 30, f"Speed-up over {base}, by number of tokens", "strong"),
        svg.legend(24, 56, [(f"s{index % 8}", name) for index, name in enumerate(drawn)]),
    ]
    for index, shape in enumerate(shapes):
        left = 64 + (index % 2) * (_PANEL[0] + _GAP[0])
        top = _TOP + 20 + (index // 2) * (_PANEL[1] + _GAP[1])
        box = svg.Box(left, top, left + _PANEL[0], top + _PANEL[1])
        parts.append(_panel(box, [row for row in rows if (row["inputs"], row["outputs"]) == shape], base, drawn))
    height = _TOP + -(-len(shapes) // 2) * (_PANEL[1] + _GAP[1])
    style = _style(_LIGHT) + "@media(prefers-color-scheme:dark){" + _style(_DARK) + "}"
    picture = svg.document(height, f"Speed-up over {base}", svg.join([svg.el("style", Markup(style)), *parts]))
    return str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _panel(box: svg.Box, rows: list[dict[str, Any]], base: str, names: list[str]) -> Markup:
    timed = [row for row in rows if base in row]
    ratios = {name: [(row["tokens"], row[base] / row[name]) for row in timed if name in row] for name in names}
    tokens = [row["tokens"] for row in rows]
    x = svg.padded(tokens, box.left, box.right, log=True)
    y = svg.padded([1.0, *(ratio for line in ratios.values() for _, ratio in line)], box.bottom, box.top, zero=True)
    heading = f"{rows[0]['inputs']} inputs, {rows[0]['outputs']} outputs"
    every = tokens if len(tokens) <= 7 else tokens[::2]
    parts = [
        svg.y_axis(box, y, heading),
        svg.x_axis(box, x, "tokens", every, str),
        svg.line(box.left, y(1.0), box.right, y(1.0), "reference"),
    ]
    for index, name in enumerate(names):
        points = [(x(count), y(ratio)) for count, ratio in ratios[name]]
        if len(points) > 1:
            parts.append(svg.polyline(points, f"line s{index % 8}"))
        for (count, ratio), (at_x, at_y) in zip(ratios[name], points, strict=True):
            tip = f"{name}, {count} tokens: {ratio:.2f} times as fast"
            parts.append(svg.marker(at_x, at_y, index, 3.4, f"fill dot s{index % 8}", tip))
    return svg.join(parts)
