"""The report as one self-contained HTML page: figures are inline SVG, nothing is fetched from anywhere."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from finescale.report import accuracy, cost, facts, page, scales, units
from finescale.report.figure import Figure, Omitted

_TEMPLATES = Path(__file__).with_name("templates")


@cache
def template(name: str) -> Template:
    """A template of this package by its file's name."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _figures(
    report: Mapping[str, object],
    run: Mapping[str, object] | None,
    layers: Sequence[facts.Layer],
    rows: Sequence[facts.Comparison],
) -> dict[str, Figure | Omitted]:
    """Every figure of the page by its key, drawn or omitted with the reason."""
    drawn: list[Figure | Omitted] = [
        accuracy.comparison_figure(rows),
        accuracy.error_figure(layers),
        accuracy.error_map(layers),
        scales.integer_scales(layers),
        scales.float_scales(layers),
        scales.amplifier_figure(layers),
        cost.time_figure(run),
        cost.memory_figure(report, run),
    ]
    if not layers:
        about_layers = ("fig-error", "fig-error-map", "fig-scales", "fig-float-scales", "fig-amplifier")
        reason = "the report lists no layers."
        drawn = [Omitted(f.key, f.title, reason) if f.key in about_layers else f for f in drawn]
    return {figure.key: figure for figure in drawn}


def render_html(
    report: Mapping[str, object],
    run: Mapping[str, object] | None = None,
    comparisons: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """The page as text. Deterministic: the same input gives the same bytes.

    Args:
        report: the contents of report.json (what was done, per-layer facts); absent parts are named, not invented.
        run: the contents of run.json (seconds, bytes) or None.
        comparisons: rows {"name", "perplexity", "size_bytes", "kl" (nats per token), "top1" (share)} or None.
    """
    layers, rows = facts.read_layers(report), facts.read_comparisons(comparisons)
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None and layer.relative_error > 0]
    low, high = (min(errors), max(errors)) if errors else (1.0, 1.0)

    def level(key: str) -> int:
        """Colour step 0..8 of a relative error on the log scale of this model."""
        value = float(key) if key else 0.0
        if value <= 0 or high <= low:
            return 0
        return min(accuracy.RAMP - 1, int(math.log(value / low) / math.log(high / low) * accuracy.RAMP))

    return template("report.html.j2").render(
        model=units.clean(units.mapping(report.get("model")).get("name") or "unnamed model"),
        family=units.clean(units.mapping(report.get("model")).get("family") or ""),
        recipe_name=units.clean(report.get("recipe_name") or "custom recipe"),
        version=units.clean(report.get("finescale") or ""),
        scheme=page.scheme_line(report, layers),
        tiles=page.tiles(report, run, layers),
        fallbacks=[units.clean(item, 600) for item in units.sequence(report.get("fallbacks"))],
        fallbacks_known=isinstance(report.get("fallbacks"), list | tuple),
        noted=sum(bool(layer.notes) for layer in layers),
        overflowing=[layer.name for layer in layers if (layer.overflow_use or 0.0) >= scales.LIMIT],
        figures=_figures(report, run, layers, rows),
        comparison=page.comparison_sheet(rows) if rows else None,
        sheet=page.layer_sheet(layers),
        layer_total=len(layers),
        level=level,
        engines=page.engine_rows(report),
        provenance=page.provenance(report, run),
        has_run=run is not None,
        recipe_text=page.recipe_text(report),
    )


def write_html(
    report: Mapping[str, object],
    run: Mapping[str, object] | None,
    path: Path,
    comparisons: Sequence[Mapping[str, object]] | None = None,
) -> None:
    """Writes the page to `path` (parent folders are made); the file appears whole or not at all.

    Raises OSError where the folder cannot be written. See `render_html` for the arguments.
    """
    write_whole(path, render_html(report, run, comparisons))


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all; parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "replace"))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files private; a report is an ordinary file
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
