"""What the page says in words and tables: header, tiles, comparison rows, layer rows, provenance.

Everything returned here is plain text; the template escapes it.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from finescale.report import units
from finescale.report.facts import Comparison, Layer
from finescale.report.scales import LIMIT, typical_amplifier

_ABSENT = "not in the report"
MAX_ROWS = 2000  # beyond this the page would grow heavy (models with many experts)


@dataclass(frozen=True)
class Tile:
    """One headline number: its label, its value with unit, one explaining line, the exact value on hover."""

    label: str
    value: str
    note: str
    exact: str = ""
    share: float | None = None  # draws a bar when given


@dataclass(frozen=True)
class Cell:
    """One table cell; `key` is the exact number that sorting uses ("" sorts last)."""

    text: str
    key: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table: heads are (title, explanation, css class); absent: columns nobody has a value for; common: facts
    that hold for every row and are said once instead of in a column."""

    heads: tuple[tuple[str, str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    absent: tuple[str, ...] = ()
    common: tuple[str, ...] = ()


def _only(values: Iterable[object]) -> str | None:
    """The one common value as text, 'mixed' if several, None if none."""
    distinct = {value for value in values if value is not None}
    if not distinct:
        return None
    return str(distinct.pop()) if len(distinct) == 1 else "mixed"


def scheme_line(report: Mapping[str, object], layers: Sequence[Layer]) -> str:
    """The scheme in one line, read from the layers themselves rather than from the recipe's wishes."""
    parts = []
    counts = Counter(layer.bits for layer in layers if layer.bits is not None)
    if len(counts) == 1:
        parts.append(f"{next(iter(counts))}-bit weights")
    elif counts:
        parts.append(" and ".join(f"{bits}-bit ({n})" for bits, n in sorted(counts.items())) + " weights")
    groups = Counter(layer.group_size for layer in layers if layer.group_size is not None).most_common()
    if groups:
        word = "per channel" if groups[0][0] == -1 else f"group size {groups[0][0]}"
        others = sum(n for _, n in groups[1:])
        parts.append(f"{word} ({units.plural(others, 'layer')} differ{'s' if others == 1 else ''})" if others else word)
    symmetric = _only(layer.symmetric for layer in layers)
    if symmetric:
        parts.append({"True": "symmetric", "False": "asymmetric"}.get(symmetric, "symmetric and asymmetric"))
    activations = units.integer(units.mapping(units.mapping(report.get("recipe")).get("activations")).get("bits"))
    if activations is not None and activations < 16:
        parts.append(f"{activations}-bit activations")
    if any(layer.amplifier is not None for layer in layers):
        parts.append(
            "integer scales" if all(layer.amplifier is not None for layer in layers) else "some integer scales"
        )
    solver = _only(layer.solver for layer in layers)
    if solver and solver not in ("mixed", units.MISSING):
        parts.append(f"solver {solver}")
    return " · ".join(parts)


def tiles(report: Mapping[str, object], run: Mapping[str, object] | None, layers: Sequence[Layer]) -> list[Tile]:
    """The headline numbers; those that are unknown say why."""
    model, size = units.mapping(report.get("model")), units.mapping(report.get("size"))
    before, after = units.number(size.get("before_bytes")), units.number(size.get("after_bytes"))
    ratio = after / before if before and after is not None else None
    share = units.number(model.get("quantized_share"))
    quantized, parameters = units.number(model.get("quantized_parameters")), units.number(model.get("parameters"))
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    uses = [layer.overflow_use for layer in layers if layer.overflow_use is not None]
    bits = units.number(size.get("bits_per_weight"))
    result = [
        Tile(
            "Size on disk",
            f"{units.size(before)} → {units.size(after)}" if before or after else units.MISSING,
            f"{units.percent(ratio)} of the original" if ratio is not None else _ABSENT,
            f"{units.count(before)} → {units.count(after)} bytes" if before or after else "",
            ratio if ratio is not None and ratio <= 1 else None,
        ),
        Tile(
            "Bits per weight",
            units.sig(bits, 4),
            "stored bits ÷ weights" if bits is not None else _ABSENT,
            _exact(bits),
        ),
        Tile(
            "Parameters quantized",
            units.percent(share),
            f"{units.large(quantized)} of {units.large(parameters)}" if quantized and parameters else _ABSENT,
            f"{units.count(quantized)} of {units.count(parameters)} parameters" if quantized and parameters else "",
            share if share is not None and 0 <= share <= 1 else None,
        ),
        Tile(
            "Relative output error",
            units.sig(statistics.median(errors)) if errors else units.MISSING,
            f"median of {units.plural(len(errors), 'layer')}; largest {units.sig(max(errors))}" if errors else _ABSENT,
            _exact(statistics.median(errors)) if errors else "",
        ),
    ]
    result += _run_tiles(run)
    result.append(_calibration_tile(units.mapping(report.get("calibration"))))
    if any(layer.amplifier is not None for layer in layers):
        use = f"int32 overflow use at most {units.sig(max(uses))}" if uses else "overflow use not in the report"
        result.append(Tile("Scale amplifier", typical_amplifier(layers), use, _exact(max(uses)) if uses else ""))
    else:
        result.append(Tile("Scale amplifier", *(("none", "scales are floats") if layers else (units.MISSING, _ABSENT))))
    return result


def _exact(value: float | None) -> str:
    return "" if value is None else repr(value)


def _run_tiles(run: Mapping[str, object] | None) -> list[Tile]:
    if run is None:
        return [Tile(name, units.MISSING, "there is no run.json beside the report") for name in ("Time", "Peak memory")]
    seconds, peak = units.number(run.get("seconds")), units.number(run.get("peak_rss_bytes"))
    started, resumed = run.get("started"), units.integer(run.get("resumed_from_block"))
    note = f"started {units.clean(started, 40)}" if started else "start time unknown"
    if resumed is not None:
        note = f"resumed from block {resumed}; " + note
    return [
        Tile("Time", units.seconds(seconds), note, f"{_exact(seconds)} s" if seconds is not None else ""),
        Tile(
            "Peak memory",
            units.size(peak),
            "resident memory of the process",
            f"{units.count(peak)} bytes" if peak is not None else "",
        ),
    ]


def _calibration_tile(calibration: Mapping[str, object]) -> Tile:
    tokens = units.number(calibration.get("tokens"))
    if not calibration or (tokens is None and calibration.get("source") is None):
        return Tile("Calibration", "none", "no text was used, or it is not in the report")
    samples, length = units.integer(calibration.get("samples")), units.integer(calibration.get("length"))
    shape = f"{units.count(samples)} samples × {units.count(length)} tokens, " if samples and length else ""
    return Tile("Calibration", f"{units.count(tokens)} tokens", f"{shape}{units.clean(calibration.get('source'), 60)}")


def comparison_sheet(rows: Sequence[Comparison]) -> Sheet:
    """The comparison table: perplexity, distance to the original, divergence, agreement, size."""
    base = next((row.perplexity for row in rows if row.reference and row.perplexity is not None), None)
    original = next((row.size_bytes for row in rows if row.reference and row.size_bytes), None)
    candidates = [row.perplexity for row in rows if row.perplexity is not None and not row.reference]
    best = min(candidates) if candidates else None
    heads = (
        ("recipe", "", "name"),
        ("perplexity", "exp of the mean loss per token; lower is better", "number"),
        ("Δ original", "perplexity minus that of the original model", "number"),
        ("KL", "mean KL divergence to the original model, nats per token", "number"),
        ("top-1", "share of tokens whose most likely successor is the original model's", "number"),
        ("size", "bytes on disk", "number"),
        ("of original", "size as a share of the original model's", "number"),
    )
    body = []
    for row in rows:
        delta = row.perplexity - base if row.perplexity is not None and base is not None and not row.reference else None
        share = row.size_bytes / original if row.size_bytes is not None and original else None
        mark = "reference" if row.reference else "best" if best is not None and row.perplexity == best else ""
        body.append(
            (
                Cell(row.name, kind=mark),
                Cell(units.sig(row.perplexity, 5), _exact(row.perplexity), mark),
                Cell(
                    units.MISSING
                    if delta is None
                    else f"{delta:+.3f}"
                    if abs(delta) < 1000
                    else f"+{units.sig(delta)}",
                    _exact(delta),
                ),
                Cell(units.sig(row.kl), _exact(row.kl)),
                Cell(units.percent(row.top1), _exact(row.top1)),
                Cell(units.size(row.size_bytes), _exact(row.size_bytes)),
                Cell(units.percent(share), _exact(share)),
            )
        )
    return _without_absent(heads, body)


def layer_sheet(layers: Sequence[Layer]) -> Sheet:
    """The table of all layers, in model order; above MAX_ROWS the ones with the largest error."""
    heads = (
        ("layer", "name of the linear layer in the model", "name"),
        ("shape", "outputs × inputs", "number"),
        ("bits", "bits per weight code", "number"),
        ("group", "weights that share a scale", "number"),
        ("solver", "how the codes were chosen", "text"),
        ("amplifier", "scale = S ÷ amplifier; folded: S × one factor per output", "number"),
        ("scales", "smallest to largest: the integer S, or the float scale where there is no amplifier", "number"),
        ("overflow use", "largest possible int32 sum ÷ 2³¹; proven below 1", "number"),
        ("relative error", "||(W − Wq)X||² / ||WX||²", "number"),
        ("weight MSE", "mean of (W − Wq)²", "number"),
        ("tokens", "calibration tokens this layer saw", "number"),
        ("notes", "", "text"),
    )
    kept = list(layers)
    if len(kept) > MAX_ROWS:
        worst = sorted(range(len(kept)), key=lambda i: -(kept[i].relative_error or 0.0))[:MAX_ROWS]
        kept = [kept[i] for i in sorted(worst)]
    body = [_layer_row(layer) for layer in kept]
    return _without_absent(heads, body, once=("solver", "tokens"))


def _layer_row(layer: Layer) -> tuple[Cell, ...]:
    whole = layer.amplifier is not None
    ends = [units.count(v) if whole else units.sig(v) for v in (layer.scale_min, layer.scale_max) if v is not None]
    use = layer.overflow_use
    elements = 1
    for side in layer.shape:
        elements *= side
    return (
        Cell(layer.name),
        Cell(" × ".join(units.count(n) for n in layer.shape) or units.MISSING, str(elements) if layer.shape else ""),
        Cell(units.sig(layer.bits), _exact(layer.bits)),
        Cell(units.group(layer.group_size), _exact(layer.group_size)),
        Cell(layer.solver, "" if layer.solver == units.MISSING else layer.solver),
        Cell("folded", "1") if layer.folded else Cell(units.count(layer.amplifier), _exact(layer.amplifier)),
        Cell(" – ".join(ends) or units.MISSING, _exact(layer.scale_max)),
        Cell(units.sig(use), _exact(use), "bad" if use is not None and use >= LIMIT else ""),
        Cell(units.sig(layer.relative_error), _exact(layer.relative_error), "error"),
        Cell(units.sig(layer.weight_mse), _exact(layer.weight_mse)),
        Cell(units.count(layer.tokens), _exact(layer.tokens), "bad" if layer.tokens == 0 else ""),
        Cell("; ".join(layer.notes), "; ".join(layer.notes), "note"),
    )


def _without_absent(
    heads: tuple[tuple[str, str, str], ...], body: Sequence[tuple[Cell, ...]], once: tuple[str, ...] = ()
) -> Sheet:
    used = [i == 0 or any(row[i].key for row in body) for i in range(len(heads))]
    common = []
    for i, head in enumerate(heads):
        if head[0] in once and used[i] and len({row[i].text for row in body}) == 1:  # say it once, save the width
            used[i] = False
            common.append(f"{head[0]} {body[0][i].text}")
    return Sheet(
        tuple(head for head, keep in zip(heads, used, strict=True) if keep),
        tuple(tuple(cell for cell, keep in zip(row, used, strict=True) if keep) for row in body),
        tuple(
            head[0]
            for i, head in enumerate(heads)
            if i > 0 and not any(row[i].key for row in body) and head[0] != "notes"
        ),
        tuple(common),
    )


def engine_rows(report: Mapping[str, object]) -> list[tuple[str, bool | None, str, str]]:
    """(engine, loads or unknown, what truly runs, remark)."""
    rows = []
    for raw in units.sequence(report.get("engines")):
        item = units.mapping(raw)
        loads = item.get("loads")
        texts = [units.clean(item.get(key) or units.MISSING) for key in ("engine", "runs_as", "remark")]
        rows.append((texts[0], loads if isinstance(loads, bool) else None, texts[1], texts[2]))
    return rows


def provenance(
    report: Mapping[str, object], run: Mapping[str, object] | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts for repeating the run, as titled lists of (name, value)."""
    sections = [
        ("Model", units.mapping(report.get("model"))),
        ("Calibration", units.mapping(report.get("calibration"))),
        ("Machine", units.mapping((run or {}).get("machine"))),
        ("Versions", units.mapping((run or {}).get("versions"))),
    ]
    return [(title, [(units.clean(k), _plain(v)) for k, v in facts.items()]) for title, facts in sections if facts]


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, str | int | float | bool) or value is None:
        return units.clean(value)
    return units.clean(json.dumps(value, default=str))


def recipe_text(report: Mapping[str, object]) -> str:
    """The full recipe as YAML, or an empty text."""
    recipe = units.mapping(report.get("recipe"))
    if not recipe:
        return ""
    text = yaml.safe_dump(json.loads(json.dumps(dict(recipe), default=str)), sort_keys=False, allow_unicode=True)
    return "\n".join(units.clean(line, 1000) for line in str(text).split("\n"))
