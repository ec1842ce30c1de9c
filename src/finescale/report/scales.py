"""Figures about scales: the integer scales S and the bits they need (Integer Scale, arXiv 2405.14597, figure 4),
float scales, and the choice of the amplifier with the overflow bound it must keep.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from finescale.report import svg, units
from finescale.report.facts import EIGHT_BITS, CurvePoint, Floats, Histogram, Layer, share_of_eight_bits
from finescale.report.figure import Figure, Omitted

BARS = 64
DOTS = 400  # at most this many layers are drawn one by one
LIMIT = 1.0  # overflow use 1 means a sum of 2^31: the first value an int32 accumulator cannot hold


def integer_scales(layers: Sequence[Layer]) -> Figure | Omitted:
    """Histogram of the integer scales and of the bits they need."""
    key, title = "fig-scales", "Integer scales"
    chosen = [layer for layer in layers if layer.amplifier is not None]
    known = [layer for layer in chosen if layer.histogram is not None]
    if not chosen:
        return Omitted(key, title, "the scales of this model are floats (integer_scale.mode is off).")
    share = share_of_eight_bits(known)
    if share is None:
        return Omitted(key, title, "the report holds no histogram of the integer scales.")
    histograms = [layer.histogram for layer in known if layer.histogram is not None]
    total = sum(h.total for h in histograms)
    largest = max(
        layer.scale_max if layer.scale_max is not None else float(layer.histogram.edges[-1])
        for layer in known
        if layer.histogram is not None
    )
    stop = _quantile_limit(histograms, total, 0.999)
    left, right = svg.Box(56, 44, 552, 300), svg.Box(650, 44, svg.WIDTH - 8, 300)
    parts = [_value_bars(left, histograms, stop), _bit_bars(right, histograms, total, known)]
    amplifiers = sorted({layer.amplifier for layer in known if layer.amplifier is not None})
    folded = all(layer.folded for layer in known)
    which = (
        "folded"
        if folded
        else f"amplifier {amplifiers[0]:,}"
        if len(amplifiers) == 1
        else f"amplifiers {amplifiers[0]:,} to {amplifiers[-1]:,}"
    )
    meaning = (
        "A folded scale is S times one factor per output, S one per group of weights."
        if folded
        else "An integer scale is S = round(amplifier × scale), one per group of weights."
    )
    about = "" if share[1] else "About "
    takeaway = (
        f"{about}{units.percent(share[0], 2)} of the {units.count(total)} integer scales fit 8 bits (S ≤ 255); "
        f"the largest is {units.count(largest)} ({which})."
    )
    beyond = total - float(_below(histograms, [stop])[0])
    caption = (
        f"{meaning} Left: how often each value occurs"
        + (f" (beyond the axis: {units.count(beyond)}, up to S = {units.count(largest)})" if beyond >= 0.5 else "")
        + ". Right: the bits needed to store S, as a share of all scales. Very small S round coarsely, very large ones "
        "use up the int32 accumulator. Compare figure 4 of Integer Scale (arXiv 2405.14597)."
    )
    if len(known) < len(layers):
        caption += f" {units.plural(len(layers) - len(known), 'layer')} without integer scales or histogram left out."
    alt = f"Histogram of integer scales, and bar chart of the bits they need. {takeaway}"
    return Figure(key, title, takeaway, caption, alt, svg.document(346, alt, svg.join(parts)))


def _quantile_limit(histograms: Sequence[Histogram], total: float, share: float) -> int:
    """A whole number below which at least `share` of all scales lie; the smallest of about 600 candidates."""
    high = max(2, math.ceil(max(float(h.edges[-1]) for h in histograms)) + 1)
    steps = np.arange(1, high + 1) if high <= 600 else np.unique(np.geomspace(1, high, 600).round())
    reached = np.flatnonzero(_below(histograms, steps.tolist()) >= share * total * (1 - 1e-12))
    return max(int(steps[reached[0]]) if reached.size else high, 2)


def _below(histograms: Sequence[Histogram], limits: Sequence[int]) -> Floats:
    """How many integer scales of all layers lie below each limit [N]."""
    limits_N = np.array(limits, dtype=np.float64)
    return np.sum([h.integers_below(limits_N) for h in histograms], axis=0, dtype=np.float64)


def _value_bars(box: svg.Box, histograms: Sequence[Histogram], stop: int) -> Markup:
    width = 2 ** max(0, math.ceil(math.log2(stop / BARS)))  # a power of two, so that bars end where 8 bits end
    limits = [width * i for i in range(math.ceil(stop / width) + 1)]
    below = _below(histograms, limits).tolist()
    counts = [b - a for a, b in pairwise(below)]
    x = svg.Axis(-0.5, limits[-1] - 0.5, box.left, box.right)
    y = svg.padded(counts, box.bottom, box.top, zero=True)
    bars = []
    for limit, amount in zip(limits, counts, strict=False):
        if amount > 0:
            a, b = x(limit - 0.5), x(limit + width - 0.5)
            label = f"S = {limit}" if width == 1 else f"S = {limit} to {limit + width - 1}"
            tone = "s1" if limit < EIGHT_BITS else "c-warn"
            tip = f"{label}: {units.count(amount)} scales"
            bars.append(
                svg.rect(a, y(amount), b - a - (1 if b - a > 3 else 0.3), box.bottom - y(amount), f"fill {tone}", tip)
            )
    parts = [
        svg.y_axis(box, y, "scales", 5, units.compact, sub="number of groups"),
        *bars,
        svg.x_axis(box, x, "value of the integer scale S"),
    ]
    if x.high > EIGHT_BITS:
        at = x(EIGHT_BITS - 0.5)
        flip = at > (box.left + box.right) / 2
        parts += [
            svg.line(at, box.top - 4, at, box.bottom, "reference"),
            svg.text(
                at - 6 if flip else at + 6, box.top + 6, "8 bits end here (255)", "muted", "end" if flip else None
            ),
        ]
    return svg.join(parts)


def _bit_bars(box: svg.Box, histograms: Sequence[Histogram], total: float, layers: Sequence[Layer]) -> Markup:
    top = max(1, _quantile_limit(histograms, total, 1.0 - 1e-12) - 1).bit_length()
    below = [0.0, *_below(histograms, [2**bits for bits in range(1, top + 1)]).tolist()]
    shares = [max(0.0, b - a) / total for a, b in pairwise(below)]
    first = next(i for i, share in enumerate(shares) if share > 0)
    first, last = min(first, 7), max(top, 8)
    shares += [0.0] * (last - len(shares))
    x = svg.Axis(first + 0.5, last + 0.5, box.left, box.right)
    y = svg.Axis(0.0, max(shares) * (1.2 if last > 8 else 1.06), box.bottom, box.top)  # headroom for "fit 8 bits"
    step, parts = (box.right - box.left) / (last - first), []
    for bits in range(first + 1, last + 1):
        share = shares[bits - 1]
        tip = f"{units.plural(bits, 'bit')}, S = {2 ** (bits - 1)} to {2**bits - 1}: {units.percent(share, 2)}"
        tone, at = "s1" if bits <= 8 else "c-warn", x(bits) - step * 0.39
        if share > 0:
            parts.append(svg.rect(at, y(share), step * 0.78, box.bottom - y(share), f"fill {tone}", tip, rx=1.5))
            if step > 26:
                short = f"{share * 100:.0f}" if share >= 0.0095 else "<1"
                parts.append(svg.text(x(bits), y(share) - 5, short, "tick", "middle"))
    fence = x(8.5)
    if last > 8:
        parts.append(svg.line(fence, box.top - 4, fence, box.bottom, "reference"))
        parts.append(svg.text(fence - 6, box.top + 6, "fit 8 bits", "muted", "end"))
    every = 1 if last - first <= 12 else 2
    ticks = [float(bits) for bits in range(first + 1, last + 1) if (bits - 8) % every == 0]
    return svg.join(
        [
            svg.y_axis(box, y, "share of scales", 4, lambda v: f"{v * 100:.0f}", sub="percent"),
            *parts,
            svg.x_axis(box, x, "bits needed to store S", ticks),
        ]
    )


def float_scales(layers: Sequence[Layer]) -> Figure | Omitted:
    """Histogram of float scales, on a log axis because scales of layers differ by factors."""
    key, title = "fig-float-scales", "Float scales"
    floats = [layer for layer in layers if layer.amplifier is None]
    if not floats:
        return Omitted(key, title, "every scale of this model is an integer over an amplifier, or folded.")
    histograms = [layer.histogram for layer in floats if layer.histogram is not None and layer.histogram.edges[-1] > 0]
    if not histograms:
        return Omitted(key, title, "the report holds no histogram of the float scales.")
    highest = max(float(h.edges[-1]) for h in histograms)
    lowest = min((float(h.edges[h.edges > 0][0]) for h in histograms), default=highest)
    lowest = max(lowest, highest * 1e-9)
    x_all = svg.padded([lowest, highest], 56, svg.WIDTH - 16, log=True)
    limits = (
        np.geomspace(lowest, highest * (1 + 1e-9), BARS + 1)
        if highest > lowest
        else np.array([lowest * 0.97, highest * 1.03])
    )
    below = np.sum([h.below(limits) for h in histograms], axis=0).tolist()
    counts = [b - a for a, b in pairwise(below)]
    box = svg.Box(56, 44, svg.WIDTH - 16, 260)
    y = svg.padded(counts, box.bottom, box.top, zero=True)
    bars = []
    for low, high, amount in zip(limits[:-1], limits[1:], counts, strict=True):
        if amount > 0:
            a, b = x_all(float(low)), x_all(float(high))
            tip = f"{units.sig(float(low))} to {units.sig(float(high))}: {units.count(amount)} scales"
            bars.append(svg.rect(a, y(amount), b - a - 1, box.bottom - y(amount), "fill s1", tip))
    total = sum(h.total for h in histograms)
    parts = [
        svg.y_axis(box, y, "scales", 5, units.compact, sub="number of groups"),
        *bars,
        svg.x_axis(box, x_all, "scale (weight units per code step, log scale)"),
    ]
    takeaway = f"{units.count(total)} scales between {units.sig(lowest)} and {units.sig(highest)}."
    caption = (
        "A dequantized weight is scale × (code − zero point): the scale is the step between neighbouring values, one "
        "per group. Layers far to the left have small weights; their scales would need a large amplifier as integers."
    )
    if len(histograms) < len(layers):
        caption += (
            f" {units.plural(len(layers) - len(histograms), 'layer')} without float scales or histogram left out."
        )
    alt = f"Histogram of the float scales. {takeaway}"
    return Figure(key, title, takeaway, caption, alt, svg.document(306, alt, svg.join(parts)))


def amplifier_figure(layers: Sequence[Layer]) -> Figure | Omitted:
    """Weight MSE and overflow use against the amplifier, median and range over layers, with what was chosen."""
    key, title = "fig-amplifier", "Choice of the amplifier"
    if all(layer.amplifier is None for layer in layers):
        return Omitted(key, title, "the scales of this model are floats, so no amplifier was chosen.")
    if all(layer.folded for layer in layers):
        return Omitted(key, title, "the scales are folded: each output has a factor in place of an amplifier.")
    curves = [layer.curve for layer in layers if layer.curve]
    if not curves:
        return Omitted(key, title, "the report holds no amplifier curve (the amplifier was given, not searched).")
    left, right = svg.Box(56, 44, 452, 320), svg.Box(560, 44, svg.WIDTH - 12, 320)
    candidates = sorted({point.amplifier for curve in curves for point in curve})
    chosen = Counter(layer.amplifier for layer in layers if layer.amplifier is not None)
    shown = sorted({*candidates, *chosen})
    first, last = math.log2(shown[0]) - 0.5, math.log2(shown[-1]) + 0.5
    axes = [svg.Axis(first, last, box.left, box.right) for box in (left, right)]
    mse = _over_layers(curves, candidates, lambda point: point.weight_mse)
    use = _over_layers(curves, candidates, lambda point: point.overflow_use)
    if not mse and not use:
        return Omitted(key, title, "the amplifier curves hold no positive values.")
    parts = []
    if mse:
        parts.append(_curve_panel(left, axes[0], mse, "weight MSE", "weight², log scale", "s1"))
        parts.append(_chosen_marks(left, axes[0], mse, chosen))
    if use:
        parts.append(
            _curve_panel(right, axes[1], use, "overflow use", "largest sum ÷ 2³¹, log scale", "s4", limit=True)
        )
        parts.append(_layer_dots(right, axes[1], use, layers))
    common = chosen.most_common(1)[0]
    uses = [layer.overflow_use for layer in layers if layer.overflow_use is not None]
    takeaway = (
        f"Amplifier {common[0]:,} in {units.plural(common[1], 'layer')}"
        if len(chosen) == 1
        else (
            f"{len(chosen)} different amplifiers, {min(chosen):,} to {max(chosen):,}; most often {common[0]:,} "
            f"({common[1]} of {units.plural(sum(chosen.values()), 'layer')})"
        )
    )
    if uses:
        takeaway += (
            f"; the largest overflow use is {units.sig(max(uses))}, {'below' if max(uses) < LIMIT else 'NOT below'} 1"
        )
    caption = (
        "A larger amplifier rounds the scales more finely (left, the mean squared error of the dequantized weights) "
        "but makes the int32 sums larger (right, where 1 is the first sum that does not fit). Line: median over "
        "layers; dark band: middle 80 %; light band: smallest to largest. Rings at left: the amplifiers chosen and by "
        "how many layers. Dots at right: every layer at the amplifier it got; all must lie below 1."
    )
    if len(curves) < len(layers):
        caption += f" Curves of {len(curves)} of {units.plural(len(layers), 'layer')}."
    alt = f"Two line plots over the amplifier: weight mean squared error and overflow use. {takeaway}."
    return Figure(key, title, takeaway + ".", caption, alt, svg.document(366, alt, svg.join(parts)))


Quantiles = dict[int, tuple[float, float, float, float, float]]  # amplifier -> min, 10 %, median, 90 %, max


def _over_layers(
    curves: Sequence[tuple[CurvePoint, ...]], candidates: Sequence[int], pick: Callable[[CurvePoint], float | None]
) -> Quantiles:
    values: dict[int, list[float]] = {}
    for curve in curves:
        for point in curve:
            value = pick(point)
            if value is not None and value > 0:
                values.setdefault(point.amplifier, []).append(value)
    result: Quantiles = {}
    for amplifier in candidates:
        if amplifier in values:
            low, tenth, median, ninth, high = np.quantile(values[amplifier], [0.0, 0.1, 0.5, 0.9, 1.0]).tolist()
            result[amplifier] = (low, tenth, median, ninth, high)
    return result


def _value_axis(box: svg.Box, rows: Quantiles, limit: bool) -> svg.Axis:
    values = [v for row in rows.values() for v in (row[0], row[4])] + ([LIMIT, 2 * LIMIT] if limit else [])
    return svg.padded(values, box.bottom, box.top, log=True)


def _curve_panel(
    box: svg.Box, x: svg.Axis, rows: Quantiles, title: str, sub: str, colour: str, limit: bool = False
) -> Markup:
    y = _value_axis(box, rows, limit)
    across = [(x(math.log2(a)), row) for a, row in rows.items()]
    parts: list[str] = [svg.y_axis(box, y, title, 6, sub=sub)]
    if limit:
        parts += [
            svg.rect(box.left, box.top, box.right - box.left, y(LIMIT) - box.top, "danger"),
            svg.line(box.left, y(LIMIT), box.right, y(LIMIT), "limit"),
            svg.text(box.left + 6, y(LIMIT) - 6, "an int32 sum could overflow", "label strong ink c-bad"),
        ]
    for low, high in ((0, 4), (1, 3)):
        lower, upper = [(px, y(row[low])) for px, row in across], [(px, y(row[high])) for px, row in across]
        parts.append(svg.band(lower, upper, f"band {colour}"))
    parts.append(svg.polyline([(px, y(row[2])) for px, row in across], f"line {colour}"))
    for (px, row), amplifier in zip(across, rows, strict=True):
        tip = f"amplifier {amplifier:,}: median {units.sig(row[2])}, {units.sig(row[0])} to {units.sig(row[4])}"
        parts.append(svg.marker(px, y(row[2]), 0, 3, f"fill {colour}", tip))
    exponents = range(math.ceil(x.low), math.floor(x.high) + 1)
    stride = max(1, math.ceil(len(exponents) * 40 / (box.right - box.left)))
    ticks = [float(e) for e in exponents if e % stride == 0]
    parts.append(svg.x_axis(box, x, "amplifier (powers of two)", ticks, lambda e: f"{2.0**e:,.0f}"))
    return svg.join(parts)


def _chosen_marks(box: svg.Box, x: svg.Axis, rows: Quantiles, chosen: Counter[int]) -> Markup:
    y = _value_axis(box, rows, False)
    parts: list[str] = []
    for amplifier, amount in sorted(chosen.items()):
        if amplifier in rows:
            px, py = x(math.log2(amplifier)), y(rows[amplifier][2])
            tip = f"amplifier {amplifier:,}: chosen by {units.plural(amount, 'layer')}"
            label = units.plural(amount, "layer") if len(chosen) <= 2 else f"{amount:,}"
            above = y(rows[amplifier][4]) - 9
            parts += [
                svg.line(px, above + 4, px, box.bottom, "reference"),
                svg.marker(px, py, 0, 6.5, "ring", tip),
                svg.text(px - 3, above, label, "label strong")
                if len(chosen) <= 2
                else svg.text(px, above, label, "label strong", "middle"),
            ]
    return svg.join(parts)


def _layer_dots(box: svg.Box, x: svg.Axis, rows: Quantiles, layers: Sequence[Layer]) -> Markup:
    y = _value_axis(box, rows, True)
    kept = [layer for layer in layers if layer.amplifier is not None and (layer.overflow_use or 0) > 0]
    kept.sort(key=lambda layer: -(layer.overflow_use or 0.0))
    kept = kept[:: max(1, math.ceil(len(kept) / DOTS))]
    step = x(1.0) - x(0.0)
    parts = []
    for i, layer in enumerate(kept):
        use = layer.overflow_use or 0.0
        aside = (
            ((i * 0.618034 + 0.5) % 1.0 - 0.5) * step * 0.75
        )  # spread sideways so that equal amplifiers stay visible
        px = x(math.log2(layer.amplifier or 1)) + aside
        py = min(box.bottom, max(box.top, y(use)))
        tip = f"{layer.name}: amplifier {layer.amplifier:,}, overflow use {units.sig(use)}"
        parts.append(svg.marker(px, py, 0, 2.4, "fill mote" if use < LIMIT else "fill c-bad", tip))
    return svg.join(parts)


def typical_amplifier(layers: Sequence[Layer]) -> str:
    """The amplifiers in words: `1,024`, or the range with the median."""
    if layers and all(layer.folded for layer in layers):
        return "folded"
    values = [layer.amplifier for layer in layers if layer.amplifier is not None]
    if not values:
        return units.MISSING
    if min(values) == max(values):
        return f"{values[0]:,}"
    return f"{min(values):,} to {max(values):,} (median {statistics.median_low(values):,})"
