"""Numbers that stand in sentences of the pages are those of the files. Tables are made from the files anyway."""

import math
from functools import partial
from pathlib import Path

import pytest

from tools.docs_claims import load_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = load_results(ROOT / "benchmarks" / "results")


def rounding(bits):
    return RESULTS["tuning"]["models"]["smollm2"]["rows"][bits]["rounding from quantease"]["perplexity"]


def large():
    whole = RESULTS["large-on-gpu"]["whole"]
    memory = (whole["peak_gpu_bytes"] / 1e9, whole["peak_host_bytes"] / 1e9)
    return whole["seconds"], whole["phases"]["solve"], *memory


def rounded_well():
    """Rows of many tokens, and those that reach 80 % of a copy as the page says it, to a whole percent."""
    shares = [row["share_of_copy"] for row in RESULTS["quantize-h100"]["rows"] if row["tokens"] >= 4096]
    return sum(share >= 0.8 for share in shares), len(shares)


def memory_on_cpu():
    runs = RESULTS["large-on-cpu"]["runs"]
    return tuple(runs[recipe]["peak_rss_bytes"] / 1e9 for recipe in ("rtn", "quantease"))


def two_gpus():
    models = RESULTS["two-gpus"]["models"]
    return tuple(
        models[f"{model}, {run}"]
        for model in ("Llama-2-70B", "Llama-2-7B")
        for run in ("2xfp16, 30 sweeps from gptq", "2xfp16, 30 sweeps from the weight")
    )


def outliers(question):
    """Of the four models: shares of a way, or changes with their errors, in percent."""
    found = RESULTS["outliers-zoo"]["judgement"]
    for family in ("bloom", "falcon", "llama", "opt"):
        value = found[family][question]
        if isinstance(value, dict):
            ratio = math.exp(value["difference"])
            yield 100 * (ratio - 1)
            yield 100 * ratio * value["error"]
        else:
            yield 100 * value


FOUR = "{:.0f}, {:.0f}, {:.0f} and {:.0f}"
CHANGES = "{:+.1f} ± {:.1f}, {:+.1f} ± {:.1f}, {:+.1f} ± {:.1f} and {:+.1f} ± {:.1f}"
OUTLIERS = (
    (f"leave {FOUR} % of the way from the original to published", "way_of_plain_published_by_perplexity"),
    (f"in the mean of the three texts {FOUR}, on SmolLM2", "way_of_plain_published_by_texts_perplexity"),
    (f"3.30 bits a weight) leave {FOUR} %", "way_of_plain_published_with_16_bits_size_by_perplexity"),
    (f"with the same options by {CHANGES} (on", "columns_beat_plain_by_texts_kl"),
    (f"on the books alone by {CHANGES})", "columns_beat_plain_by_kl"),
    (f"weights that of columns by {CHANGES}.", "weights_beat_columns_by_texts_kl"),
    (f"it is the same: {CHANGES},", "columns_beat_plain_without_the_root_by_texts_kl"),
    (f"then {CHANGES}.", "weights_beat_columns_without_the_root_by_texts_kl"),
    (f"they leave {FOUR} %, in the mean", "way_of_plain_published_without_the_root_by_perplexity"),
    (
        f"%, in the mean of the three texts {FOUR}: the root",
        "way_of_plain_published_without_the_root_by_texts_perplexity",
    ),
    (f"the recipe's differs by {CHANGES}, without", "weights_beat_spqr_of_their_size_by_kl"),
    (f"without the root by {CHANGES}, and", "weights_without_the_root_beat_spqr_of_their_size_by_kl"),
    (f"outliers of 16 bits as published) by {CHANGES}.", "weights_beat_spqr_of_16_bits_size_by_kl"),
    (f"the three texts differs by {CHANGES} (on the books", "weights_beat_spqr_of_their_size_by_texts_perplexity"),
    (f"KL changes by {CHANGES} %", "weights_beat_those_without_the_root_by_kl"),
)


def same_cpu(bits, name):
    """Processor seconds, seconds, perplexity and KL of a row on one CPU."""
    row = RESULTS["tuning-same-cpu-smollm2"]["models"]["smollm2"]["rows"][bits][name]
    return row["cpu_seconds"], row["seconds"], row["perplexity"], row["kl"]


AUTOROUND, SHORT = "AutoRound 0.16.1, 50 iterations", "80 steps of 1 windows"


SENTENCES = [
    (
        "docs/quantease.md",
        "{:.2f} times as fast as one from GPTQ and {:.2f} times from the weight, those of Llama-2-7B {:.2f} and {:.2f} "
        "times",
        two_gpus,
    ),
    *(("docs/quantease.md", sentence, partial(outliers, question)) for sentence, question in OUTLIERS),
    ("docs/tuning.md", "perplexity {:.2f} at 4 bits and {:.2f} at 3", lambda: (rounding("4"), rounding("3"))),
    (
        "docs/tuning.md",
        "took {:.0f} processor seconds ({:.0f} by the clock) and came to {:.2f} (KL {:.4f}), `w4-best`",
        partial(same_cpu, "4", AUTOROUND),
    ),
    (
        "docs/tuning.md",
        "{:.0f} ({:.0f}) and {:.2f} ({:.4f}). At 3 bits",
        partial(same_cpu, "4", f"recipe w4-best, {SHORT}"),
    ),
    (
        "docs/tuning.md",
        "took {:.0f} ({:.0f}) and came to {:.2f} ({:.3f}), `w3-best`",
        partial(same_cpu, "3", AUTOROUND),
    ),
    (
        "docs/tuning.md",
        "cache, {:.0f} ({:.0f}) and {:.2f} ({:.3f}): better",
        partial(same_cpu, "3", f"recipe w3-best, {SHORT}, 2 checks"),
    ),
    (
        "docs/quantease.md",
        "took {:.0f} s as a command, {:.0f} of them solving, with {:.1f} GB of GPU memory and {:.1f} GB",
        large,
    ),
    ("docs/quantease.md", "needs {:.1f} GB with `rtn` and {:.1f} GB with `quantease` on a CPU", memory_on_cpu),
    ("docs/kernels.md", "bytes in {} of {} rows with 4096 tokens and more", rounded_well),
    (
        "README.md",
        "(original {:.2f})",
        lambda: (RESULTS["tuning"]["models"]["smollm2"]["original_perplexity"],),
    ),
]


@pytest.mark.parametrize(("page", "sentence", "values"), SENTENCES, ids=lambda value: str(value)[:40])
def test_a_sentence_says_what_the_file_says(page, sentence, values):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    wanted = sentence.format(*values())
    assert wanted in text, f"{page} should say: {wanted}"
