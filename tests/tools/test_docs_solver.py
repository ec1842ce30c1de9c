"""Tables of the solvers' results."""

from tools import docs_solver

MEANS = {
    "llama": {
        "original": {"perplexity": 40.0, "kl": 0.0, "bits_per_weight": 16.0},
        "plain": {"perplexity": 44.0, "kl": 0.05, "bits_per_weight": 3.06},
    },
    "opt": {"original": {"perplexity": 41.0, "kl": 0.0, "bits_per_weight": 16.0}},
}


def test_outliers():
    yes, no = ({"holds": -by < 0, "difference": -by, "error": error} for by, error in ((0.585, 0.03), (-0.02, None)))
    judgement = {"llama": {"order_by_kl": yes, "way_of_plain": 0.354}, "opt": {"order_by_kl": no}}
    text = docs_solver.outliers({"means": MEANS, "judgement": judgement})
    assert "| plain | 44.00, 50.0 (3.06) | – |" in text
    assert "| order by kl | yes, -44.3% ± 1.7% | no, +2.0% |" in text and "| way of plain | 35% | – |" in text


def test_whole_runs():
    whole = {
        "seconds": 123.4, "phases": {"load": 10.0, "tune": 0.0}, "peak_gpu_bytes": 2e10, "peak_host_bytes": 5e9,
        "bits_per_weight": 4.01,
    }  # fmt: skip
    facts = {"shape": "llama-2-7b", "parameters": 6.74e9, "samples": 128, "length": 2048, "whole": whole}
    facts["killed"] = {"blocks_done_when_killed": 2, "same_bytes": True}
    text = docs_solver.large_on_gpu(facts)
    assert "| seconds, load | 10 |" in text and "tune" not in text
    assert "| killed after 2 of 4 blocks, started anew | the same bytes |" in text
    assert "| rtn | 2.5 | 60 |" in docs_solver.large_on_cpu(
        {"parameters": 3.4e9, "runs": {"rtn": {"peak_rss_bytes": 2.5e9, "seconds": 60.0}}}
    )


def test_two_gpus():
    row = {"model": "m", "solver": "s", "seconds_one": 2.0, "seconds_two": 1.0, "speedup": 2.0}
    row["shares"] = [{"shape": [8, 4], "rows": [8, 0]}, {"shape": [6, 4], "rows": [2, 4]}]
    runs = {"plain": {"same_bytes": True}, "outliers": {"failed": "no"}}
    text = docs_solver.two_gpus({"deterministic": runs, "rows": [row]})
    assert "wrote the same bytes (plain), other bytes (outliers)" in text
    assert "| m | s | 2 | 1 | 2.00 x | 8x4: 8 + 0, 6x4: 2 + 4 |" in text


def test_options():
    summary = {"twice": {"median": 0.93214, "largest": 0.95, "lower": 7}}
    facts = {"model": "m", "base": "b", "layers": ["x"] * 7, "schemes": {"4:64": {"summary": summary}}}
    text = docs_solver.solver_options(facts)
    assert "4 bits, groups of 64, symmetric" in text and "| twice | 0.9321 | 0.9500 | 7 of 7 |" in text
