"""Reads the dictionaries of report.json and run.json into typed facts; anything missing or malformed becomes None.

The report describes files somebody else may have written, so nothing here trusts a type or a length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finescale.report import units

Floats = NDArray[np.float64]
EIGHT_BITS = 256  # integer scales below this fit an unsigned byte


@dataclass(frozen=True)
class Histogram:
    """edges [bins + 1], ascending, and counts [bins] of a layer's scales."""

    edges: Floats
    counts: Floats

    @property
    def total(self) -> float:
        return float(self.counts.sum())

    def below(self, values_N: Floats) -> Floats:
        """How many scales lie below each value [N]; uniform inside a bin."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)])
        return np.asarray(np.interp(values_N, self.edges, cumulative), dtype=np.float64)

    def integers_below(self, limits_N: Floats) -> Floats:
        """How many integers lie below each limit [N]: exact when an edge is in (limit - 1, limit], else uniform."""
        first = np.searchsorted(self.edges, limits_N - 1, side="right")
        edge = self.edges[np.minimum(first, self.edges.size - 1)]
        between = (first < self.edges.size) & (edge <= limits_N)
        return self.below(np.where(between, edge, limits_N))

    def separates(self, limit: int) -> bool:
        """Whether `integers_below` is exact at this limit."""
        inside = bool(((self.edges > limit - 1) & (self.edges <= limit)).any())
        return inside or self.edges[-1] <= limit or self.edges[0] >= limit


@dataclass(frozen=True)
class CurvePoint:
    """One candidate amplifier: weight MSE (weight^2) and overflow use (largest B_j / 2^31), either may be unknown."""

    amplifier: int
    weight_mse: float | None
    overflow_use: float | None


@dataclass(frozen=True)
class Layer:
    """One linear layer of report.json; `kind` is its name without the block prefix, other numbers as `*`."""

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    solver: str
    relative_error: float | None
    weight_mse: float | None
    amplifier: int | None
    folded: bool
    overflow_use: float | None
    scale_min: float | None
    scale_max: float | None
    histogram: Histogram | None
    curve: tuple[CurvePoint, ...]
    tokens: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BlockTime:
    """Seconds one block took; `other` is what the four named parts do not explain."""

    block: int
    total: float
    load: float
    forward: float
    solve: float
    write: float
    other: float


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison; kl in nats per token, top1 a share in 0..1."""

    name: str
    perplexity: float | None
    size_bytes: float | None
    kl: float | None
    top1: float | None
    reference: bool


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.experts.7.up_proj` -> `mlp.experts.*.up_proj`; names without a block stay whole."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    kept = parts if first is None else parts[first + 1 :]
    return ".".join("*" if part.isdigit() else part for part in kept)


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Each kind's shortest unambiguous ending: `self_attn.q_proj` -> `q_proj` when no other kind ends so."""
    every = list(dict.fromkeys(kinds))
    result = {}
    for kind in every:
        parts = kind.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        result[kind] = next(
            (e for e in endings if sum(k == e or k.endswith("." + e) for k in every) == 1),
            kind,
        )
    return result


def read_layers(report: Mapping[str, object]) -> list[Layer]:
    """Every layer of the report, in its order."""
    return [_layer(units.mapping(item)) for item in units.sequence(report.get("layers")) if isinstance(item, Mapping)]


def _layer(item: Mapping[str, object]) -> Layer:
    name = units.clean(item.get("name"))
    symmetric, amplifier = item.get("symmetric"), units.integer(item.get("amplifier"))
    shape = [units.integer(n) for n in units.sequence(item.get("shape"))]
    return Layer(
        name=name,
        kind=kind_of(name),
        block=units.integer(item.get("block")),
        shape=tuple(n for n in shape if n is not None),
        bits=units.integer(item.get("bits")),
        group_size=units.integer(item.get("group_size")),
        symmetric=symmetric if isinstance(symmetric, bool) else None,
        solver=units.clean(item.get("solver"), 60),
        relative_error=units.number(item.get("relative_error")),
        weight_mse=units.number(item.get("weight_mse")),
        amplifier=amplifier if amplifier is not None and amplifier > 0 else None,
        folded=item.get("folded") is True,
        overflow_use=units.number(item.get("overflow_use")),
        scale_min=units.number(item.get("scale_min")),
        scale_max=units.number(item.get("scale_max")),
        histogram=_histogram(units.mapping(item.get("scale_histogram"))),
        curve=_curve(item.get("amplifier_curve")),
        tokens=units.integer(item.get("tokens")),
        notes=tuple(units.clean(note) for note in units.sequence(item.get("notes"))),
    )


def _histogram(item: Mapping[str, object]) -> Histogram | None:
    edges = [units.number(v) for v in units.sequence(item.get("edges"))]
    counts = [units.number(v) for v in units.sequence(item.get("counts"))]
    if len(counts) < 1 or len(edges) != len(counts) + 1 or None in edges or None in counts:
        return None
    edge, mass = np.array(edges, dtype=np.float64), np.array(counts, dtype=np.float64)
    if (np.diff(edge) < 0).any() or (mass < 0).any() or mass.sum() == 0:
        return None
    if edge[0] == edge[-1]:  # all scales equal and the writer kept zero-width bins: give the step a width
        return Histogram(np.array([edge[0], np.nextafter(edge[0], np.inf)]), np.array([mass.sum()]))
    return Histogram(edge, mass)


def _curve(items: object) -> tuple[CurvePoint, ...]:
    points = []
    for raw in units.sequence(items):
        item = units.mapping(raw)
        amplifier = units.integer(item.get("amplifier"))
        if amplifier is not None and amplifier > 0:
            mse, use = units.number(item.get("weight_mse")), units.number(item.get("overflow_use"))
            points.append(CurvePoint(amplifier, mse, use))
    return tuple(sorted(points, key=lambda point: point.amplifier))


def read_blocks(run: Mapping[str, object]) -> list[BlockTime]:
    """The timed blocks of run.json, in order of their index."""
    result = []
    for raw in units.sequence(run.get("blocks")):
        item = units.mapping(raw)
        block = units.integer(item.get("block"))
        parts = [max(0.0, units.number(item.get(key)) or 0.0) for key in ("load", "forward", "solve", "write")]
        total = units.number(item.get("seconds"))
        total = sum(parts) if total is None else max(total, sum(parts))
        if block is not None and total > 0:
            load, forward, solve, write = parts
            result.append(BlockTime(block, total, load, forward, solve, write, total - sum(parts)))
    return sorted(result, key=lambda item: item.block)


def read_comparisons(rows: Iterable[Mapping[str, object]] | None) -> list[Comparison]:
    """Comparison rows in their order; the unquantized reference is the row with KL 0 or a name that says so."""
    result = []
    for row in rows or ():
        name, kl = units.clean(row.get("name"), 80), units.number(row.get("kl"))
        plain = re.split(r"[^a-z0-9]", name.casefold().strip())[0]
        known = plain in {"original", "float", "baseline", "unquantized", "fp16", "bf16", "fp32", "float16", "bfloat16"}
        values = [units.number(row.get(key)) for key in ("perplexity", "size_bytes", "top1")]
        result.append(Comparison(name, values[0], values[1], kl, values[2], known if kl is None else kl == 0))
    return result


def share_of_eight_bits(layers: Iterable[Layer]) -> tuple[float, bool] | None:
    """(share of integer scales S <= 255, whether it is exact) over layers with an amplifier and a histogram."""
    fit, total, exact = 0.0, 0.0, True
    for layer in layers:
        histogram = layer.histogram
        if layer.amplifier is None or histogram is None:
            continue
        total += histogram.total
        if layer.scale_max is not None and layer.scale_max < EIGHT_BITS:
            fit += histogram.total
        elif layer.scale_min is None or layer.scale_min < EIGHT_BITS:
            fit += float(histogram.integers_below(np.array([EIGHT_BITS], dtype=np.float64))[0])
            exact = exact and histogram.separates(EIGHT_BITS)
    return None if total == 0 else (fit / total, exact)
