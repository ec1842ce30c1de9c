"""The README begins with numbers of benchmarks/results, and the tables of speed are what the files say."""

from pathlib import Path

import pytest

from tools.docs_claims import load_results
from tools.docs_headlines import accuracy_headline, speed_headline
from tools.docs_speed import decode_table, product_table, serving_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results():
    return load_results(ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("headline", [accuracy_headline, speed_headline])
def test_the_readme_begins_with_what_was_measured(results, headline):
    readme, made = (ROOT / "README.md").read_text(encoding="utf-8"), headline(results)
    assert made in readme, f"put this table into README.md:\n\n{made}"


def test_tables_of_speed():
    rows = [{"inputs": 8, "outputs": 4, "tokens": 1, "bf16": 10.0, "integer": 4.0, "folded": 3.0}]
    table = product_table({"gemm-h100": {"rows": rows}}, ((8, 4),))
    assert "| 8, 4 | integer | 2.50 | –" in table and "|  | folded | 3.33 | –" in table
    arms = {
        "bf16": {"prefill_ms": {"median": 48.0}, "decode_ms": {"1": {"median": 6.0}}},
        "finescale-folded": {"prefill_ms": {"median": 32.0}, "decode_ms": {"1": {"median": 2.0}}},
    }
    table = serving_table({"serving-h100": {"setting": {"prefill": 2048}, "arms": arms}})
    assert "| bfloat16 | 48.0 | 6.00 |" in table and "faster than bfloat16 | 1.50 | 3.00 |" in table
    steps = [({"milliseconds": 8.0}, {"1": {"milliseconds": 6.0}}), (None, {"1": {"milliseconds": 2.0}})]
    rows = [
        {"model": "llama-2-7b", "arm": arm, "prefill": prefill, "decode": decode}
        for arm, (prefill, decode) in zip(("bf16", "w4a8"), steps, strict=True)
    ]
    assert "| Llama-2-7B, any integers | – | 3.00 |" in decode_table(
        {"decode-h100": {"setting": {"prefill": 2048}, "rows": rows}}
    )
