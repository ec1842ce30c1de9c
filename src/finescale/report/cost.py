"""Figures about cost: seconds per block by what they were spent on, and bytes: memory against model size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from finescale.report import svg, units
from finescale.report.facts import BlockTime, read_blocks
from finescale.report.figure import Figure, Omitted

PARTS = (
    ("load", "t0", "read weights"),
    ("forward", "t1", "run calibration tokens"),
    ("solve", "t2", "choose codes"),
    ("write", "t3", "write files"),
    ("other", "t4", "everything else"),
)


def time_figure(run: Mapping[str, object] | None) -> Figure | Omitted:
    """Seconds per block, stacked by load, forward, solve and write."""
    key, title = "fig-time", "Time per block"
    if run is None:
        return Omitted(key, title, "there is no run.json beside the report (it holds time and memory).")
    blocks = read_blocks(run)
    if not blocks:
        return Omitted(key, title, "run.json holds no block times.")
    spent = {name: sum(_part(block, name) for block in blocks) for name, _, _ in PARTS}
    total = sum(spent.values())
    shown = [entry for entry in PARTS if spent[entry[0]] > 0.002 * total or entry[0] != "other"]
    box = svg.Box(56, 74, svg.WIDTH - 12, 310)
    first, last = blocks[0].block, blocks[-1].block
    x = svg.Axis(first - 0.6, last + 0.6, box.left, box.right)
    y = svg.padded([block.total for block in blocks], box.bottom, box.top, zero=True)
    width = min(46.0, (x(1) - x(0)) * 0.76)
    columns = []
    for block in blocks:
        at, low, pieces = x(block.block) - width / 2, 0.0, []
        for name, colour, _ in shown:
            part = _part(block, name)
            if part > 0:
                tip = f"block {block.block}, {name}: {units.seconds(part)} of {units.seconds(block.total)}"
                pieces.append(svg.rect(at, y(low + part), width, y(low) - y(low + part), f"fill {colour}", tip))
                low += part
        columns.append(svg.el("g", *pieces))
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100, 1000) if (last - first) / s <= 20)
    ticks = [float(b) for b in range(first, last + 1) if b % step == 0 or first == last]
    entries = [(colour, f"{name} {units.percent(spent[name] / total, 0)}") for name, colour, _ in shown]
    parts = [
        svg.legend(10, 18, entries),
        svg.y_axis(box, y, "time", 5, sub="seconds"),
        *columns,
        svg.x_axis(box, x, "block of the model", ticks, lambda v: f"{v:.0f}"),
    ]
    largest = max(spent, key=lambda name: spent[name])
    takeaway = (
        f"{units.seconds(statistics.median(block.total for block in blocks))} per block (median); "
        f"{units.percent(spent[largest] / total, 0)} of the {units.seconds(total)} in blocks went to "
        f"{'everything else' if largest == 'other' else largest}."
    )
    caption = (
        "Wall-clock seconds of each block: "
        + ", ".join(f"{name} ({words}) {units.seconds(spent[name])}" for name, _, words in shown)
        + ". Blocks are quantized one after the other; the first ones may be slower while files are read."
    )
    resumed = units.integer(run.get("resumed_from_block"))
    if resumed is not None:
        caption += (
            f" The run was resumed from block {resumed}: earlier blocks may be missing or from the first attempt."
        )
    alt = f"Stacked columns of seconds for {len(blocks)} blocks. {takeaway}"
    return Figure(key, title, takeaway, caption, alt, svg.document(box.bottom + 46, alt, svg.join(parts)))


def _part(block: BlockTime, name: str) -> float:
    return float(getattr(block, name))


def memory_figure(report: Mapping[str, object], run: Mapping[str, object] | None) -> Figure | Omitted:
    """Model size before and after, and the peak memory of the run, as bars on one axis."""
    key, title = "fig-memory", "Size and memory"
    sizes = units.mapping(report.get("size"))
    rows = [
        ("original model", units.number(sizes.get("before_bytes")), "t4"),
        ("quantized model", units.number(sizes.get("after_bytes")), "s1"),
        ("peak memory of the run", units.number((run or {}).get("peak_rss_bytes")), "s5"),
    ]
    known = [(name, value, colour) for name, value, colour in rows if value is not None and value > 0]
    if len(known) < 2:
        return Omitted(key, title, "sizes and peak memory are not in the report.")
    left = 176.0
    box = svg.Box(left, 12, svg.WIDTH - 96, 12 + 34.0 * len(known))
    x = svg.padded([value for _, value, _ in known], box.left, box.right, zero=True)
    parts: list[str] = []
    for i, (name, value, colour) in enumerate(known):
        top = box.top + 34.0 * i
        bar = svg.rect(
            box.left, top + 5, x(value) - box.left, 22, f"fill {colour}", f"{name}: {units.count(value)} bytes", rx=2
        )
        parts += [
            svg.text(box.left - 12, top + 20, name, "label", "end"),
            bar,
            svg.text(x(value) + 10, top + 20, units.size(value), "label strong"),
        ]
    parts.append(svg.line(box.left, box.top, box.left, box.bottom, "base"))
    facts = {name: value for name, value, _ in known}
    before, after, peak = (facts.get(name) for name, _, _ in rows)
    takeaway = []
    if before and after:
        takeaway.append(f"The files shrank to {units.percent(after / before)} of the original")
    if before and peak:
        takeaway.append(f"the run held at most {units.size(peak)}, {units.sig(peak / before, 2)}× the original's size")
    sentence = "; ".join(takeaway)
    sentence = sentence[:1].upper() + sentence[1:] + "."
    caption = (
        "Bytes of the weight files before and after, and the largest resident memory of the process (code and "
        "libraries included). Blocks are quantized one at a time, so peak memory follows the largest block, the "
        "embeddings and the calibration tokens, not the whole model."
    )
    if peak is None:
        caption += " Peak memory is not shown: there is no run.json, or it does not hold it."
    alt = "Bars: " + ", ".join(f"{name} {units.size(value)}" for name, value, _ in known)
    return Figure(key, title, sentence, caption, alt, svg.document(box.bottom + 10, alt, svg.join(parts)))
