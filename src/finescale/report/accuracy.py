"""Figures about accuracy: recipes compared, relative output error by block, and the same as a map."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from markupsafe import Markup

from finescale.report import svg, units
from finescale.report.facts import Comparison, Layer, short_kinds
from finescale.report.figure import Figure, Omitted, colours

RAMP = 9  # colour steps r0..r8 of the style sheet
ROW = 28.0
LABEL_GAP = 17.0
ERROR_TEXT = "||(W − Wq)X||² / ||WX||²"
Cells = dict[str, dict[int, list[Layer]]]  # kind -> block -> its layers (several only for experts)


def comparison_figure(rows: Sequence[Comparison]) -> Figure | Omitted:
    """Perplexity of each recipe as a dot, the unquantized model as a line."""
    key, title = "fig-comparison", "Perplexity by recipe"
    shown = [row for row in rows if row.perplexity is not None and row.perplexity > 0]
    if not rows:
        return Omitted(key, title, "no comparison with other recipes was made (finescale compare makes one).")
    if len(shown) < 2:
        return Omitted(key, title, "fewer than two of the compared recipes have a perplexity.")
    values = [row.perplexity or 0.0 for row in shown]
    log = max(values) / min(values) > 4
    widest = max(len(row.name[:44]) for row in shown)
    box = svg.Box(min(360.0, 30 + widest * 6.9), 34, svg.WIDTH - 150, 34 + ROW * len(shown))
    axis = svg.padded(values, box.left, box.right, log=log)
    parts: list[str] = []
    for value in axis.ticks(7):
        parts.append(svg.line(axis(value), box.top, axis(value), box.bottom, "grid"))
    reference = next((row for row in shown if row.reference), None)
    base = None if reference is None else axis(reference.perplexity or 0.0)
    if base is not None:
        parts += [
            svg.line(base, box.top - 6, base, box.bottom, "reference"),
            svg.text(base, box.top - 12, "original model", "muted", "middle" if base > box.left + 50 else None),
        ]
    candidates = [row.perplexity or 0.0 for row in shown if not row.reference]
    best = min(candidates) if candidates else None
    for i, row in enumerate(shown):
        value, y = row.perplexity or 0.0, box.top + ROW * (i + 0.5)
        name = row.name if len(row.name) <= 44 else row.name[:43] + "…"
        start = base if base is not None else box.left
        tone = "c-ref" if row.reference else "c-best" if value == best else "s1"
        parts += [
            svg.text(box.left - 14, y + 4, name, "label strong" if value == best else "label", "end"),
            svg.line(start, y, axis(value), y, f"stem {tone}"),
            svg.marker(axis(value), y, 0, 6, f"fill {tone}", f"{row.name}: perplexity {units.sig(value, 5)}"),
            svg.text(axis(value) + 13, y + 4, units.sig(value, 4), "label strong" if value == best else "label"),
        ]
        if row.size_bytes is not None:
            parts.append(svg.text(svg.WIDTH - 4, y + 4, units.size(row.size_bytes), "muted", "end"))
    if any(row.size_bytes is not None for row in shown):
        parts.append(svg.text(svg.WIDTH - 4, box.top - 12, "size on disk", "muted", "end"))
    parts.append(svg.x_axis(box, axis, "perplexity (lower is better)" + (", log scale" if log else "")))
    best_row = next((row for row in shown if not row.reference and row.perplexity == best), shown[0])
    takeaway = f"{best_row.name} comes closest, at perplexity {units.sig(best_row.perplexity, 4)}"
    if reference is not None and best is not None:
        takeaway += f"; the original model has {units.sig(reference.perplexity, 4)}"
    caption = (
        "Each dot is one recipe, all evaluated on the same text. Perplexity is the exponential of the mean loss per "
        "token. The stem shows the distance from the original model where that was evaluated too."
    )
    alt = "Dot plot of perplexity. " + "; ".join(f"{row.name} {units.sig(row.perplexity, 4)}" for row in shown)
    return Figure(key, title, takeaway + ".", caption, alt, svg.document(box.bottom + 46, alt, svg.join(parts)))


def error_cells(layers: Sequence[Layer]) -> Cells:
    """Layers of blocks that have a positive or zero relative error, by kind and block."""
    cells: Cells = {}
    for layer in layers:
        if layer.block is not None and layer.relative_error is not None and layer.relative_error >= 0:
            cells.setdefault(layer.kind, {}).setdefault(layer.block, []).append(layer)
    return cells


def error_figure(layers: Sequence[Layer]) -> Figure | Omitted:
    """Relative output error by block, one line per kind of linear, log scale."""
    key, title = "fig-error", "Relative output error by block"
    cells = error_cells(layers)
    errors = [_error(layer) for rows in cells.values() for group in rows.values() for layer in group]
    positive = [e for e in errors if e > 0]
    if not positive:
        return Omitted(key, title, "no layer of a block reports a relative error above zero.")
    floor = min(positive) / 3
    kinds, names, look = list(cells), short_kinds(cells), colours(list(cells))
    margin = 26 + max(len(names[kind]) for kind in kinds) * svg.CHARACTER
    height = max(330.0, len(kinds) * LABEL_GAP)
    box = svg.Box(56, 40, svg.WIDTH - min(margin, 300), 40 + height)
    y = svg.padded([max(e, floor) for e in errors], box.bottom, box.top, log=True)
    blocks = sorted({block for rows in cells.values() for block in rows})
    x = svg.Axis(blocks[0] - 0.6, blocks[-1] + 0.6, box.left, box.right)
    ends = [y(max(floor, _middle(cells[kind][max(cells[kind])]))) for kind in kinds]
    places = svg.spread(ends, LABEL_GAP, box.top, box.bottom)
    radius = 3.2 if len(blocks) <= 40 else 2.2
    series = []
    for kind, end, place in zip(kinds, ends, places, strict=True):
        series.append(_series(cells[kind], names[kind], look[kind], x, y, floor, radius, (end, place, box.right)))
    parts = [
        svg.y_axis(box, y, "relative output error", sub="log scale, no unit; lower is better"),
        svg.x_axis(box, x, "block of the model", _block_ticks(blocks), lambda v: f"{v:.0f}"),
        *series,
    ]
    every = [layer for rows in cells.values() for group in rows.values() for layer in group]
    worst, middle = max(every, key=_error), statistics.median(errors)
    takeaway = (
        f"Median {units.sig(middle)}; the largest, {units.sig(_error(worst))}, is in {worst.name} "
        f"({units.sig(_error(worst) / middle, 2) if middle else 'far above'}{'×' if middle else ''} the median)."
    )
    caption = (
        f"Relative output error is {ERROR_TEXT}: of the energy of a layer's output on the calibration tokens, the "
        "share that quantizing its weights changed; 0.01 is one percent. Cool colours are attention, warm colours the "
        "rest of the block. A line far above its neighbours marks a layer that deserves more bits or a smaller group. "
        "Hover over a point for its name and value."
    )
    if any(len(group) > 1 for rows in cells.values() for group in rows.values()):
        caption += (
            " Where a block has several layers of a kind (experts), the line is their median, the band their range."
        )
    if outside := sum(layer.block is None for layer in layers):
        caption += f" {units.plural(outside, 'layer')} outside the blocks: in the table only."
    alt = f"Line plot of relative output error over {len(blocks)} blocks, one line per kind of linear layer. {takeaway}"
    return Figure(key, title, takeaway, caption, alt, svg.document(box.bottom + 46, alt, svg.join(parts)))


def _error(layer: Layer) -> float:
    return layer.relative_error or 0.0


def _middle(group: Sequence[Layer]) -> float:
    return statistics.median(_error(layer) for layer in group)


def _block_ticks(blocks: Sequence[int]) -> list[float]:
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100, 1000) if (blocks[-1] - blocks[0]) / s <= 20)
    return [float(b) for b in range(blocks[0], blocks[-1] + 1) if b % step == 0 or blocks[0] == blocks[-1]]


def _series(
    rows: dict[int, list[Layer]],
    name: str,
    look: tuple[str, int],
    x: svg.Axis,
    y: svg.Axis,
    floor: float,
    radius: float,
    label: tuple[float, float, float],
) -> Markup:
    colour, shape = look
    blocks = sorted(rows)
    points = [(x(b), y(max(floor, _middle(rows[b])))) for b in blocks]
    parts: list[str] = []
    if any(len(rows[b]) > 1 for b in blocks):
        low = [(x(b), y(max(floor, min(map(_error, rows[b]))))) for b in blocks]
        high = [(x(b), y(max(floor, max(map(_error, rows[b]))))) for b in blocks]
        parts.append(svg.band(low, high, f"band faint {colour}"))
    parts.append(svg.polyline(points, f"line {colour}"))
    for block, (px, py) in zip(blocks, points, strict=True):
        group = rows[block]
        tip = f"{group[0].name}: {units.sig(_error(group[0]))}"
        if len(group) > 1:
            errors = [_error(layer) for layer in group]
            tip = (
                f"block {block}, {len(group)} × {name}: median {units.sig(_middle(group))}, "
                f"{units.sig(min(errors))} to {units.sig(max(errors))}"
            )
        parts.append(svg.marker(px, py, shape, radius, f"fill dot {colour}", tip))
    end, place, right = label
    parts += [
        svg.polyline([(points[-1][0] + 5, end), (right + 4, place), (right + 10, place)], f"leader {colour}"),
        svg.text(right + 14, place + 4, name if len(name) <= 40 else name[:39] + "…", f"label strong ink {colour}"),
    ]
    return svg.el("g", *parts, cls="series")


def error_map(layers: Sequence[Layer]) -> Figure | Omitted:
    """The same errors as a map, kinds by blocks: where in the model the error sits."""
    key, title = "fig-error-map", "Map of the relative output error"
    cells = error_cells(layers)
    worst = {k: {b: max(map(_error, group)) for b, group in rows.items()} for k, rows in cells.items()}
    positive = [e for rows in worst.values() for e in rows.values() if e > 0]
    blocks = sorted({block for rows in cells.values() for block in rows})
    if not positive:
        return Omitted(key, title, "no layer of a block reports a relative error above zero.")
    if len(blocks) < 2:
        return Omitted(key, title, "the model has a single block; the figure above shows all of it.")
    low, high = min(positive), max(positive)
    if high / low < 1.02:
        low, high = low / 1.1, high * 1.1
    names = short_kinds(cells)
    left = min(300.0, 20 + max(len(n) for n in names.values()) * svg.CHARACTER)
    box = svg.Box(left, 36, svg.WIDTH - 8, 36 + 26.0 * len(cells))
    step = (box.right - box.left) / (blocks[-1] - blocks[0] + 1)
    gap = 1.5 if step > 8 else 0.5
    parts: list[str] = []
    for i, (kind, rows) in enumerate(worst.items()):
        top = box.top + 26.0 * i
        parts.append(svg.text(box.left - 10, top + 17, names[kind][:40], "label", "end"))
        for block, value in rows.items():
            level = 0 if value <= 0 else int(math.log(value / low) / math.log(high / low) * RAMP)
            group = cells[kind][block]
            tip = f"{max(group, key=_error).name}: {units.sig(value)}"
            where = box.left + step * (block - blocks[0])
            tone = f"r{min(RAMP - 1, max(0, level))}"
            parts.append(svg.rect(where, top, step - gap, 26 - 1.5, f"fill {tone}", tip, rx=2 if step > 8 else None))
    x = svg.Axis(blocks[0] - 0.5, blocks[-1] + 0.5, box.left, box.right)
    for at in _block_ticks(blocks):
        parts.append(svg.text(x(at) - gap / 2, box.bottom + 16, f"{at:.0f}", "tick", "middle"))
    parts.append(svg.text((box.left + box.right) / 2, box.bottom + 36, "block of the model", "axis-title", "middle"))
    parts.append(_ramp_legend(box.right, low, high))
    where_worst = max(worst, key=lambda k: statistics.median(worst[k].values()))
    several = any(len(group) > 1 for rows in cells.values() for group in rows.values())
    takeaway = (
        f"{names[where_worst]} has the largest typical error, "
        f"{units.sig(statistics.median(worst[where_worst].values()))}."
    )
    caption = (
        "One cell per layer, coloured by its relative output error on a log scale from "
        f"{units.sig(low)} to {units.sig(high)}. A row near the high end of the legend is a kind of layer that is hard "
        "to quantize, such a column a block that is; a single cell is an outlier. Empty: no such layer, or it was not "
        "quantized."
    )
    if several:
        caption += " A cell with several layers (experts) shows the worst of them."
    alt = f"Heat map of relative output error, {len(cells)} kinds of layers by {len(blocks)} blocks. {takeaway}"
    return Figure(key, title, takeaway, caption, alt, svg.document(box.bottom + 44, alt, svg.join(parts)))


def _ramp_legend(right: float, low: float, high: float) -> Markup:
    width, upper = 18.0, units.sig(high)
    start = right - len(upper) * svg.CHARACTER - 8 - width * RAMP
    parts = [svg.rect(start + width * i, 8, width, 12, f"fill r{i}") for i in range(RAMP)]
    return svg.join(
        [
            svg.text(start - 8, 18, f"relative output error  {units.sig(low)}", "muted", "end"),
            *parts,
            svg.text(right, 18, upper, "muted", "end"),
        ]
    )
