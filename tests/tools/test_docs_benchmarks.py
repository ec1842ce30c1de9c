"""Tables of results."""

import json
from pathlib import Path

from tools.docs_benchmarks import benchmark_tables, number, runs

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_numbers_are_those_of_the_files():
    text = benchmark_tables(RESULTS)
    facts = json.loads((RESULTS / "accuracy-smollm2.json").read_text())
    for bits, group in facts["solvers"].items():
        for solver, found in group["summary"].items():
            perplexity, kl = number(found["perplexity"]["mean"], 4), number(found["kl"]["mean"])
            assert f"| {bits} | {solver} | {perplexity} | {kl} |" in text
    for path in RESULTS.glob("*.json"):
        assert f"| `{path.name}` |" in text


def test_runs_of_any_depth():
    rows = {"W4A4": {"RTN": {"perplexity": 42.266, "seconds": 3, "recipe": "x"}, "QLLM": {"perplexity": 40.0}}}
    setting = {"samples": 16, "text": "books"}
    text = runs({"models": {"zoo": {"setting": setting, "original_perplexity": 35.5, "rows": rows, "ablation": {}}}})
    assert "zoo: samples 16, text books; original perplexity 35.5." in text
    assert "zoo, W4A4:\n\n| run | perplexity | seconds |" in text
    assert "| RTN | 42.27 | 3 |\n| QLLM | 40 | – |" in text


def test_numbers():
    assert [number(value) for value in (None, 0.12345, 12345.6, 3)] == ["–", "0.123", "12346", "3"]
