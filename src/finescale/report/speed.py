"""The picture of `finescale bench decode`: how many times faster than bfloat16, by sequences decoded at once."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from finescale.report import svg

COLOURS = {"w4a8": "s1", "w4a8-folded": "s2", "w4a8-float": "s5", "w4a8-kv8": "s3", "w4a8-folded-kv8": "s4"}
NAMES = {
    "w4a8": "integer scales",
    "w4a8-folded": "folded scales",
    "w4a8-float": "float scales",
    "w4a8-kv8": "integer, int8 cache",
    "w4a8-folded-kv8": "folded, int8 cache",
}
STYLE = """
svg { font-family: system-ui, sans-serif; background: #fff; --ink: #1d2730; --soft: #5b6874; --grid: #ecebe6; }
.s1 { --c: #3b83bd; } .s2 { --c: #3aa39a; } .s5 { --c: #d9953a; } .s3 { --c: #8f6bb8; } .s4 { --c: #c25f78; }
@media (prefers-color-scheme: dark) {
  svg { background: #1b2126; --ink: #e6e9eb; --soft: #9aa6b0; --grid: #262d33; }
}
text { font-size: 12px; fill: var(--ink); } .tick, .muted { fill: var(--soft); } .axis-title { font-weight: 600; }
.grid { stroke: var(--grid); } .base { stroke: var(--soft); } .reference { stroke: var(--soft); stroke-dasharray: 4 3; }
.fill { fill: var(--c); } .line { fill: none; stroke: var(--c); stroke-width: 1.8; }
"""
"""The page's colours, for a picture that stands alone."""
PANEL = 250.0


def speed_figure(speedups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Markup:
    """A file's text: one panel a model, a line for each kind of scales.

    Args:
        speedups: over bfloat16, by model, kind of scales (``COLOURS``), and batch or ``prefill``.
    """
    found = {model: {arm: values for arm, values in arms.items() if values} for model, arms in speedups.items()}
    found = {model: arms for model, arms in found.items() if arms}
    drawn = {arm for arms in found.values() for arm in arms}
    panels = [_panel(model, arms, index * PANEL) for index, (model, arms) in enumerate(found.items())]
    height = max(1, len(panels)) * PANEL + 30
    legend = svg.legend(70, height - 12, [(COLOURS[arm], NAMES[arm]) for arm in COLOURS if arm in drawn])
    picture = svg.document(
        height, "Speed-up of W4A8 over bfloat16", svg.join([svg.el("style", Markup(STYLE)), *panels, legend])
    )
    return Markup(str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def _panel(model: str, arms: Mapping[str, Mapping[str, float]], top: float) -> Markup:
    box = svg.Box(70, top + 40, svg.WIDTH - 30, top + PANEL - 50)
    batches = [key for key in next(iter(arms.values())) if key != "prefill"]
    places = {key: box.left + (i + 0.5) * (box.right - box.left) / (len(batches) + 1) for i, key in enumerate(batches)}
    places["prefill"] = box.right - 0.5 * (box.right - box.left) / (len(batches) + 1)
    y = svg.padded([1.0, *(v for s in arms.values() for v in s.values())], box.bottom, box.top, zero=True)
    parts = [svg.y_axis(box, y, f"{model}: times faster than bfloat16", 4)]
    parts.append(svg.line(box.left, y(1.0), box.right, y(1.0), "reference"))
    parts.append(svg.line(box.left, box.bottom, box.right, box.bottom, "base"))
    for key, x in places.items():
        parts.append(svg.text(x, box.bottom + 18, key if key == "prefill" else f"batch {key}", "tick", "middle"))
    for shape, (arm, values) in enumerate(arms.items()):
        points = [(places[key], y(values[key])) for key in batches if key in values]
        parts.append(svg.polyline(points, f"line {COLOURS[arm]}") if len(points) > 1 else Markup(""))
        for key, value in values.items():
            tip = f"{model}, {NAMES[arm]}, {key}: {value:.2f}"
            parts.append(svg.marker(places[key], y(value), shape, 4.0, f"fill {COLOURS[arm]}", tip))
    return svg.join(parts)
