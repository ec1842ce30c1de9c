"""What the papers claim beside what was measured."""

import re
from pathlib import Path

import pytest

from tools.docs_claims import CLAIMS, MISSING, claims_table, load_results
from tools.docs_comparisons import compared
from tools.docs_text import number

ROOT = Path(__file__).resolve().parents[2]
RESULTS = load_results(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("page", CLAIMS)
def test_every_claim_has_a_row_and_a_command_that_exists(page):
    text = claims_table(page, RESULTS)
    assert len(text.splitlines()) == 2 + len(CLAIMS[page])
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script
    assert claims_table(page, {}).count(MISSING) == len(CLAIMS[page])


def test_numbers_are_the_files():
    text = claims_table("quantease", RESULTS)
    for bits, entry in RESULTS["accuracy-zoo-llama"]["solvers"].items():
        before, after = (number(entry["summary"][s]["perplexity"]["mean"], 4) for s in ("gptq", "quantease"))
        assert f"{bits} bits per channel: {before} → {after}" in text


def cell(label, bits, perplexity, stored, **parts):
    weights = {"bits": bits, "group_size": 64, "symmetric": True}
    recipe = {"weights": weights, "solver": {"name": "quantease"}, "overrides": parts.pop("overrides", [])} | parts
    return {"label": label, "recipe": recipe, "perplexity": perplexity, "kl": 0.1, "bits_per_weight": stored}


def test_mixed_precision_is_held_against_the_same_recipe_only():
    overrides = [{"pattern": "a", "weights": {"bits": 4}}]
    rows = [
        cell("quantease", 3, 40.0, 3.25), cell("quantease", 4, 10.0, 4.25),
        cell("mixed", 3, 15.0, 3.75, overrides=overrides),
        cell("other", 3, 1.0, 3.25, tuning=[{"name": "rounding"}]),
    ]  # fmt: skip
    text = compared({"model": "m", "setting": {}, "machine": {}, "rows": rows})
    assert "| 3.750 | 15 | 40 at 3.25, 10 at 4.25 | 20 | -25.0% | 0.1 |" in text


def test_changes_of_tasks_and_peers_are_shown():
    changes = [{"label": "integer", "task": "piqa", "change": 0.002, "error": 0.004}]
    peer = {"label": "tool", "bits": 4, "group_size": 64, "perplexity": 11.0, "provenance": {"script": "x.py"}}
    facts = {"model": "m", "setting": {}, "machine": {}, "rows": [cell("a", 4, 9.0, 4.25)], "peers": [peer]}
    text = compared(facts | {"changes": changes})
    assert "| piqa | – | +0.20 ± 0.40 |" in text and "* tool: script x.py." in text and "tool (peer)" in text
