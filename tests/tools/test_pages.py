"""The tables of quality as Markdown: changes by integer scales over several parts of the calibration text."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pages import changes, scales, shown_change


def row(perplexity):
    return {"perplexity": perplexity}


def test_changes_are_of_the_same_part_of_the_text():
    rows = {
        "a, float": row(10.0),
        "a, integer": row(11.0),
        "a, float, part 2": row(20.0),
        "a, integer, part 2": row(18.0),
        "a, integer, part 3": row(7.0),  # its float row is not there yet
        "a, folded": row(10.5),
        "a-b, integer": row(5.0),
        "a-b, float": row(5.0),
    }
    assert changes(rows, "a", "integer") == pytest.approx([math.log(1.1), math.log(0.9)])
    assert changes(rows, "a", "folded") == pytest.approx([math.log(1.05)])
    assert changes(rows, "a-b", "integer") == [0.0] and changes(rows, "a-b", "folded") == []
    lines = scales(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `a`", "| `a-b`"]
    assert "| 10.00 |  |  | 11.00 | -0.50% ± 10.03% (2) | 10.50 | +4.88% |" in lines[2]


def test_a_change_without_rows_is_left_out():
    assert shown_change([]) == ""
