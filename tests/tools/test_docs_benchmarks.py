"""Tables of results."""

import json
from pathlib import Path

from tools.docs_benchmarks import (
    attention_tiles,
    benchmark_tables,
    decode_cpu,
    launch_cost,
    load_memory,
    mixtures,
    products,
    runs,
    serving,
    triton_tiles,
)
from tools.docs_comparisons import merged_channels, rounded_scales
from tools.docs_text import number

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


def test_plots_of_a_result_are_in_the_page(tmp_path):
    facts = {"benchmark": "tuning", "machine": {}, "models": {}}
    (tmp_path / "a.json").write_text(json.dumps(facts))
    (tmp_path / "a-fig-size.svg").write_text("<svg/>")
    assert '<img alt="a-fig-size" src="data:image/svg+xml;base64,PHN2Zy8+">' in benchmark_tables(tmp_path)


def test_runs_of_any_depth():
    rows = {"W4A4": {"RTN": {"perplexity": 42.266, "seconds": 3, "recipe": "x"}, "QLLM": {"perplexity": 40.0}}}
    setting = {"samples": 16, "text": "books"}
    text = runs({"models": {"zoo": {"setting": setting, "original_perplexity": 35.5, "rows": rows, "ablation": {}}}})
    assert "zoo: samples 16, text books; original perplexity 35.5." in text
    assert "zoo, W4A4:\n\n| run | perplexity | seconds |" in text
    assert "| RTN | 42.27 | 3 |\n| QLLM | 40 | – |" in text


def test_numbers():
    assert [number(value) for value in (None, 0.12345, 12345.6, 3)] == ["–", "0.123", "12346", "3"]


def test_products_without_a_time_have_a_dash():
    rows = [{"inputs": 8, "outputs": 4, "tokens": 1, "bf16": 10.0, "integer": 4.0, "fp8_error": "wrong by 1"}]
    text = products({"base": "bf16", "names": ["integer", "fp8"], "group_size": 128, "rows": rows})
    assert "| 8, 4 | 1 | 10 | 2.5 | – |" in text


def test_mixtures_of_experts():
    row = {"model": "m", "part": "gate_up", "tokens": 16, "bf16": 12.0, "integer": 4.0, "folded": 3.0}
    assert "| m | gate and up | 16 | 12 | 4 (3.00 x) | 3 (4.00 x) |" in mixtures({"rows": [row]})


def test_decoding_on_a_cpu():
    speed = {"tokens_per_second": {"float32": 10.0}, "slowest_and_fastest": {"float32": [9.0, 11.0]}}
    assert "| float32 | 10 | 9 to 11 |" in decode_cpu({"model": "m", "tokens": 4, **speed})


def test_tiles():
    row = {
        "inputs": 8,
        "outputs": 4,
        "tokens": 1,
        "bf16": 9.0,
        "chosen": [3.0, [1]],
        "ours": [[2.0, [64, 16, 1, 4, 3]]],
    }
    assert "| 8, 4 | 1 | 9 | 3 | 2 | [64, 16, 1, 4, 3] |" in triton_tiles({"rows": [row]})


def test_memory_of_loading():
    row = {"model": "m", "form": "integer", "weights_gb": 7.2, "peak_gb": 7.5, "peak_over_weights": 1.042}
    text = load_memory({"rows": [row | {"seconds": 30.0, "host_peak_gb": 5.0}]})
    assert "| m | integer | 7.2 | 7.5 | 1.04 | 30 | 5 |" in text


def test_steps_of_vllm():
    kernels = {"w4a8_gemm 128x1x1": [900.0, 96], "w4a8_gemm 115x1x1": [100.0, 32], "something": [7.0, 1]}
    profile = {"1": {"step_us": 1500.0, "idle_us": 50.0, "launches": 129, "kernels": kernels, "waits": {}}}
    arms = {"ours": {"decode_ms": {"1": {"median": 2.0}}, "prefill_ms": {"median": 30.0}, "profile": profile}}
    setting = {"shape": "s", "prefill": 8, "prompt": 8, "tokens": 8, "repeat": 3}
    text = serving({"setting": setting, "machine": {}, "arms": arms})
    assert "| ours | 1 | 1500 | 50 | 1000 | 0 | 0 | 0 | 0 | 7 |" in text


def test_forms_of_attention():
    row = {"batch": 16, "kv_heads": 8, "group": 4, "cache": "int8", "reading": 5.0}
    forms = [
        {"tiles": [64, 528, 4, 2, False], "microseconds": 9.0},
        {"tiles": [32, 528, 4, 1, True], "microseconds": 8},
    ]
    text = attention_tiles({"rows": [row | {"forms": forms}]})
    assert "| 16 | 8 x 4 | int8 | 5 | 64/528/4/2: 9, 32/528/4/1 plain: 8 |" in text


def test_host_time_of_a_call():
    text = launch_cost({"microseconds": {"product": {"operator": 11.7, "custom_op": 14.1}}})
    assert "| operator | operator | custom_op |" in text and "| product | 11.7 | 14.1 |" in text


def test_scales_made_integers():
    scale = {"bits": 4, "stored": "float16", "changed": 0.036, "largest_change": 0.0014, "rms_change": 0.00011}
    error = {"layers": 42, "mean_log_change": -0.0002, "standard_error": 0.0003}
    facts = {"model": "m", "group_size": 64, "scales": [scale | {"smallest_integer": 244}], "errors": {"gptq": error}}
    text = rounded_scales(facts)
    assert "| 4 bits | float16 | 3.6% | 0.14% | 0.011% | 244 |" in text
    assert "| gptq | 42 | -0.020% ± 0.030% |" in text


def test_merging_beside_dropping():
    row = {
        "input": "q_proj",
        "share": "0.01",
        "layers": 8,
        "members": 5.25,
        "merged_change": 0.01,
        "merged_range": 1.25,
    }
    text = merged_channels({"model": "m", "rows": [row | {"dropped_change": 0.02, "dropped_range": 0.99}]})
    assert "| `q_proj` | 1% | 1.00% | 2.00% | 5.25 | +25% | -1% |" in text
