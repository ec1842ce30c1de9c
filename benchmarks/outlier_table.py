"""What ``benchmarks/outliers.py`` has found: means over the seeds, what is asked of them, and its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

FAMILIES = ("llama", "opt", "bloom", "falcon")
OTHERS = ("wikitext", "lambada")
"""Texts beside the books."""
ORIGINAL, PLAIN_PUBLISHED, PLAIN, STRUCTURED = "original", "plain published", "plain", "structured 1 %"
UNSTRUCTURED, UNSTRUCTURED_WIDE = "unstructured 1 %", "unstructured 1 %, 16 bits"
PLAIN_NO_ROOT, STRUCTURED_NO_ROOT = "plain, moments themselves", "structured 1 %, moments themselves"
UNSTRUCTURED_NO_ROOT = "unstructured 1 %, moments themselves"
SPQR_64, SPQR_64_OURS = "spqr of unstructured's size", "spqr of unstructured's size, as ours"
SPQR_32, SPQR_32_BYTES = "spqr of 16 bits' size", "spqr of 16 bits' size, outliers of 8"
SPQR_32_OURS = "spqr of 16 bits' size, outliers of 8, as ours"
UNSTRUCTURED_LIKE_32, FROM_SPQR = "unstructured of 16 bits' size", "spqr-quantease of unstructured's size"
SPQR, FROM_SPQR_16, UNSTRUCTURED_LIKE_16 = "spqr published", "spqr-quantease", "unstructured of published spqr's size"
ORDER = (
    ORIGINAL, PLAIN_PUBLISHED, PLAIN, STRUCTURED, UNSTRUCTURED, SPQR_64, SPQR_64_OURS, FROM_SPQR, UNSTRUCTURED_WIDE,
    PLAIN_NO_ROOT, STRUCTURED_NO_ROOT, UNSTRUCTURED_NO_ROOT, SPQR_32, SPQR_32_BYTES, SPQR_32_OURS, UNSTRUCTURED_LIKE_32,
    SPQR, FROM_SPQR_16, UNSTRUCTURED_LIKE_16,
)  # fmt: skip
"""Rows of the table."""


def means(seeds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run over its seeds: perplexity (its logarithm's mean), KL, bits; and the deviation of both means."""
    result: dict[str, dict[str, Any]] = {}
    for name in ORDER:
        rows = [rows[name] for rows in seeds.values() if name in rows]
        if not rows:
            continue
        facts: dict[str, Any] = {"seeds": len(rows), "bits_per_weight": _mean(row["bits_per_weight"] for row in rows)}
        facts |= _mean_quality(rows)
        for text in OTHERS:
            having = [{"kl": 0.0} | row[text] for row in rows if text in row]
            facts |= {text: _mean_quality(having)} if having else {}
        result[name] = facts
    return result


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _mean_quality(rows: list[dict[str, Any]]) -> dict[str, float]:
    logs, kls = [math.log(row["perplexity"]) for row in rows], [row["kl"] or 0.0 for row in rows]
    found = {"perplexity": math.exp(statistics.fmean(logs)), "kl": statistics.fmean(kls)}
    if len(rows) > 1 and any(kls):
        found["log_deviation"] = statistics.stdev(logs) / len(rows) ** 0.5
        found["kl_deviation"] = statistics.stdev(kls) / len(rows) ** 0.5
    return found


QUESTIONS = {
    "columns_beat_plain": (STRUCTURED, PLAIN),
    "columns_beat_plain_published": (STRUCTURED, PLAIN_PUBLISHED),
    "weights_beat_columns": (UNSTRUCTURED, STRUCTURED),
    "weights_beat_spqr_of_their_size": (UNSTRUCTURED, SPQR_64),
    "weights_beat_spqr_of_their_size_as_ours": (UNSTRUCTURED, SPQR_64_OURS),
    "weights_of_16_bits_beat_spqr_of_their_size": (UNSTRUCTURED_WIDE, SPQR_32),
    "weights_beat_spqr_of_16_bits_size": (UNSTRUCTURED_LIKE_32, SPQR_32),
    "weights_beat_spqr_of_16_bits_size_outliers_of_8": (UNSTRUCTURED_LIKE_32, SPQR_32_BYTES),
    "weights_beat_spqr_of_16_bits_size_as_ours": (UNSTRUCTURED_LIKE_32, SPQR_32_OURS),
    "weights_of_8_bits_beat_16": (UNSTRUCTURED, UNSTRUCTURED_WIDE),
    "weights_beat_those_without_the_root": (UNSTRUCTURED, UNSTRUCTURED_NO_ROOT),
    "columns_beat_plain_without_the_root": (STRUCTURED_NO_ROOT, PLAIN_NO_ROOT),
    "weights_beat_columns_without_the_root": (UNSTRUCTURED_NO_ROOT, STRUCTURED_NO_ROOT),
    "weights_without_the_root_beat_spqr_of_their_size": (UNSTRUCTURED_NO_ROOT, SPQR_64),
    "spqr_quantease_beats_spqr_of_weights_size": (FROM_SPQR, SPQR_64),
    "spqr_quantease_beats_weights": (FROM_SPQR, UNSTRUCTURED),
    "weights_beat_published_spqr_of_their_size": (UNSTRUCTURED_LIKE_16, SPQR),
    "spqr_quantease_beats_published_spqr": (FROM_SPQR_16, SPQR),
}
WAYS = {
    "way_of_plain_published": (UNSTRUCTURED, PLAIN_PUBLISHED),
    "way_of_plain_published_with_16_bits": (UNSTRUCTURED_WIDE, PLAIN_PUBLISHED),
    "way_of_plain_published_with_16_bits_size": (UNSTRUCTURED_LIKE_32, PLAIN_PUBLISHED),
    "way_of_plain_published_without_the_root": (UNSTRUCTURED_NO_ROOT, PLAIN_PUBLISHED),
    "way_of_plain": (UNSTRUCTURED, PLAIN),
}
LABELS = tuple(f"{text}{kind}" for text in ("", "wikitext_", "lambada_", "texts_") for kind in ("perplexity", "kl"))
"""The books, the other texts, and the mean of the three."""
ALL = "all"


def _loss(rows: dict[str, Any], name: str, label: str) -> float | None:
    """Log perplexity or KL of a run, None where it was not measured."""
    text, _, kind = label.rpartition("_")
    if text == "texts":
        losses = [_loss(rows, name, f"{one}{kind}") for one in ("", *(f"{other}_" for other in OTHERS))]
        known = [loss for loss in losses if loss is not None]
        return statistics.fmean(known) if len(known) == len(losses) else None
    row = rows.get(name, {})
    value = (row.get(text, {}) if text else row).get(kind)
    return None if value is None else value if kind == "kl" else math.log(value)


def judge(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is asked of the outliers, each question by the seeds that have both of its runs.

    ``difference``: mean over the seeds of the logarithm of the first run's perplexity (or KL) over the second one's,
    with its standard ``error``; ``holds`` when it is below zero.
    """
    found: dict[str, Any] = {}
    for label in LABELS:
        for question, (better, worse) in QUESTIONS.items():
            pairs = [(_loss(rows, better, label), _loss(rows, worse, label), rows) for rows in seeds.values()]
            known = [(one, other, rows) for one, other, rows in pairs if one is not None and other is not None]
            if known:
                kl = label.endswith("kl")
                logs = [math.log(one / other) if kl else one - other for one, other, _ in known]
                found[f"{question}_by_{label}"] = _difference(logs) | (
                    {} if kl else {"text_error": _text_error([rows for *_, rows in known], better, worse, label)}
                )
        for question, (of, base) in WAYS.items():
            ways = [[_loss(rows, name, label) for name in (of, base, ORIGINAL)] for rows in seeds.values()]
            complete = [[value for value in way if value is not None] for way in ways]
            complete = [way for way in complete if len(way) == 3]
            if complete:
                lost, base_lost = (sum(way[at] - way[2] for way in complete) for at in (0, 1))
                found[f"{question}_by_{label}"] = lost / base_lost
    return found


def _difference(logs: list[float]) -> dict[str, Any]:
    mean = statistics.fmean(logs)
    error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else None
    return {"holds": mean < 0, "difference": mean, "error": error, "seeds": len(logs)}


def _text_error(seeds: list[dict[str, Any]], better: str, worse: str, label: str) -> float | None:
    """Standard error over the parts of the text, of the means over the seeds."""
    text = label.rpartition("_")[0]
    of = [[rows[name] for name in (better, worse)] for rows in seeds]
    if text:
        of = [[row.get(text, {}) for row in pair] for pair in of]
    if not all("parts" in row for pair in of for row in pair):
        return None
    changes = torch.tensor([[pair[0]["parts"], pair[1]["parts"]] for pair in of], dtype=torch.float64)
    by_part = (changes[:, 0] - changes[:, 1]).mean(0)
    return float(by_part.std() / len(by_part) ** 0.5) if len(by_part) > 1 else None


def pooled(judgements: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean of the small models, with the standard error of theirs, for what was asked of all of them."""
    found: dict[str, Any] = {}
    for question, value in next(iter(judgements.values()), {}).items():
        values = [judgements[family][question] for family in FAMILIES if question in judgements.get(family, {})]
        if len(values) == len(FAMILIES):
            if isinstance(value, dict):
                found[question] = _difference([one["difference"] for one in values])
            else:
                found[question] = statistics.fmean(values)
    return found


def show(result: dict[str, Any]) -> None:
    console = Console(width=160)
    families = list(result["means"])
    table = Table("run", *families, title="perplexity / 1000 KL (stored bits per weight)")
    for name in ORDER:
        rows = [result["means"][family].get(name) for family in families]
        table.add_row(
            name,
            *(
                f"{row['perplexity']:.2f} / {1000 * row['kl']:.1f} ({row['bits_per_weight']:.2f})" if row else "-"
                for row in rows
            ),
        )
    console.print(table)
    judged = result["judgement"]
    asked = Table("change in %, or share of the way", *judged)
    for question in dict.fromkeys(question for facts in judged.values() for question in facts):
        asked.add_row(question.replace("_", " "), *(_change(facts.get(question)) for facts in judged.values()))
    console.print(asked)


def _change(value: Any) -> str:
    if isinstance(value, dict):
        error = "" if value["error"] is None else f" ± {100 * value['error']:.1f}"
        return f"{100 * math.expm1(value['difference']):+.1f}{error}"
    return "-" if value is None else f"{value:.0%} of the way"
