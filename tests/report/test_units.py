"""Numbers as text, scales and label placement."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finescale.report import facts, svg, units

NB = "\u00a0"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (12.345, "12.3"),
        (0.001234, "0.00123"),
        (9.9996, "10.0"),
        (54321.2, "54,321"),
        (1234567.0, "1.23×10⁶"),
        (0.0000123, "1.23×10⁻⁵"),
        (-0.5, "-0.500"),
        (128, "128"),
    ],
)
def test_sig(value: float | None, text: str) -> None:
    assert units.sig(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "50.0"),
        (0.99996, "99.996"),
        (1.0, "100"),
        (0.0, "0"),
        (0.00004, "0.004"),
    ],
)
def test_percent_never_rounds_to_all_or_nothing(value: float, text: str) -> None:
    assert units.percent(value) == f"{text}{NB}%"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (512, "512 B"),
        (1230, "1.23 kB"),
        (999_950, "1.00 MB"),
        (269_060_552, "269 MB"),
        (1.273e9, "1.27 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_size(value: float, text: str) -> None:
    assert units.size(value) == text.replace(" ", NB)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123 s"), (42.06, "42.1 s"), (59.99, "1 min 0 s"), (725, "12 min 5 s"), (7999, "2 h 13 min")],
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


def test_number_takes_only_finite_numbers() -> None:
    assert units.number(3) == 3.0
    for bad in (None, True, math.nan, math.inf, "3", [3], 10**400):
        assert units.number(bad) is None
        assert units.integer(bad) is None
    assert units.integer(2.0) == 2 and units.integer(2.5) is None


@given(st.floats(1e-12, 1e12), st.floats(1.0, 1e9), st.booleans())
def test_ticks_lie_on_the_axis(low: float, ratio: float, log: bool) -> None:
    axis = svg.padded([low, low * ratio], 0.0, 100.0, log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 14
    assert all(-0.01 <= axis(tick) <= 100.01 for tick in ticks)
    assert ticks == sorted(ticks)
    assert len({units.tick(tick) for tick in ticks}) == len(ticks) or not log


@given(st.lists(st.floats(0, 300), min_size=1, max_size=18))
def test_spread_keeps_labels_apart_and_in_order(wanted: list[float]) -> None:
    placed = svg.spread(wanted, 16, 0, 300)
    ordered = sorted(placed)
    assert all(b - a >= 15.999 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= -1e-6 and ordered[-1] <= 300 + 1e-6
    assert sorted(range(len(wanted)), key=lambda i: (wanted[i], placed[i])) == sorted(
        range(len(wanted)), key=lambda i: (placed[i],)
    )


def test_elements_escape() -> None:
    assert str(svg.text(1.0, 2.25, '<a&"')) == '<text x="1" y="2.2" class="label">&lt;a&amp;&#34;</text>'


def test_kinds() -> None:
    assert facts.kind_of("model.layers.3.mlp.experts.7.up_proj") == "mlp.experts.*.up_proj"
    assert facts.kind_of("lm_head") == "lm_head"
    names = facts.short_kinds(["self_attn.q_proj", "mlp.up_proj", "mlp.shared.up_proj"])
    assert names == {"self_attn.q_proj": "q_proj", "mlp.up_proj": "mlp.up_proj", "mlp.shared.up_proj": "shared.up_proj"}
