"""The two tables that the README and the site begin with: accuracy beside other tools, speed beside bfloat16."""

from __future__ import annotations

from tools.docs_peers import BEST, ours_beside, tools_of
from tools.docs_speed import Results, products, served
from tools.docs_text import number, table

BITS = (4, 3, 2)
TOKENS = (1, 16, 64, 128, 1024, 4096)
BATCHES = ("1", "16", "64", "128")


def accuracy_headline(results: Results) -> str:
    """Perplexity of SmolLM2 in symmetric groups of 64: tools and our best recipe down, bits across."""
    facts = results["peers-smollm2"]
    ours = ours_beside(results, facts)[BEST]
    rows = tools_of(facts) | {"**finescale** (`w4-best`, `w3-best`, `w2-best`)": ours}
    lines = [
        (label, *(number(row[b]["perplexity"], 4) if b in row else "–" for b in BITS)) for label, row in rows.items()
    ]
    return table(("weights alone", *(f"{b} bits" for b in BITS)), lines)


def speed_headline(results: Results) -> str:
    """Times faster than bfloat16 on an H100: one product, and Llama-2-7B's shape in vLLM."""
    product, whole = products(results), served(results)
    shape = (4096, 22016)
    rows = [
        (f"the product 4096 x 22016, {word}", *(f"{product[*shape, scales, tokens]:.1f}" for tokens in TOKENS))
        for scales, word in (("integer", "any integer scales"), ("folded", "folded scales"))
    ]
    gains = {step: whole["bf16", step] / whole["finescale-folded", step] for step in (*BATCHES, "prefill")}
    cells = [f"{gains[str(tokens)]:.2f}" if str(tokens) in gains else "" for tokens in TOKENS[:-1]]
    prefill = results["serving-h100"]["setting"]["prefill"]
    rows.append(("Llama-2-7B in vLLM, folded scales", *cells, f"{gains['prefill']:.2f} (prefill of {prefill})"))
    return table(("times as fast as bfloat16, tokens at a time", *map(str, TOKENS)), rows)
