"""Every sentence that finescale's errors can say, collected from the source, by topic."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KINDS = ("InputError", "CheckpointError", "NumericsError", "ValueError")

# Topic, the files it is about (the first match counts, by the start of the path), and what to do about it in general.
TOPICS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "A recipe, a key or a setting is refused",
        (
            "recipe.py",
            "grid/scheme.py",
            "grid/bilevel.py",
            "solvers/registry",
            "solvers/spqr",
            "solvers/quantease",
            "solvers/outliers",
            "transforms/registry",
            "transforms/fptq",
            "tuning/registry",
            "cli/",
        ),
        "Recipes are checked in full before anything else happens, and a key that does not exist is an error, so that "
        "a typing mistake cannot silently change a result. The sentence names the key as you would write it after "
        "`--set`. `finescale recipes NAME` prints a recipe with all its keys; the [options](recipe-keys.md) have their "
        "defaults and limits. `--dry-run` checks everything and does nothing.",
    ),
    (
        "The model cannot be read",
        ("formats/source", "formats/gguf", "models/", "demo.py"),
        "The files of the model are checked against each other before work starts: the index against the shards, the "
        "shards against their headers, the headers against the configuration. Most of these sentences mean that a "
        "download was cut short: download the named file again. A model of an unknown family may be tried with "
        "`--allow-unknown-family`; look at the plan (`--dry-run`) before you trust it.",
    ),
    (
        "The text does not suit",
        ("calibration/", "evaluate/", "api.py"),
        "Calibration takes `samples` windows of `length` tokens of one text, and windows do not overlap. A short text "
        "needs fewer or shorter windows. The defaults give way by themselves, with a note; what you asked for by name "
        "does not.",
    ),
    (
        "The run cannot start, or cannot go on",
        (
            "pipeline/plan",
            "pipeline/journal",
            "pipeline/quantize",
            "pipeline/block",
            "pipeline/transform",
            "pipeline/layers",
            "pipeline/output",
            "ranks.py",
            "environment.py",
            "claim.py",
        ),
        "Memory, disk, the share of the weights that would be quantized, and the output folder are checked before the "
        "first block. A run that stopped goes on when the same command is given again; finished blocks are kept "
        "([how](how-it-runs.md)). A folder that holds a run with *other* settings is never overwritten without "
        "`--fresh`.",
    ),
    (
        "A number that must not be",
        (
            "solvers/",
            "tuning/",
            "grid/fit",
            "grid/activation",
            "grid/inputs",
            "grid/outliers",
            "grid/hadamard",
            "transforms/",
        ),
        "NaN or infinity in a weight or a Hessian is reported with the name of the layer. In a weight it is in the "
        "model itself. In the activations of a float16 model it is often an overflow: run with the model in bfloat16, "
        "or look whether transformers gives finite logits for the same text.",
    ),
    (
        "Integer scales",
        ("grid/integer_scale", "grid/folded", "pipeline/convert"),
        "A checkpoint with integer scales is written only with the proof that no sum can leave int32. `auto` takes the "
        "largest amplifier for which the proof holds; a fixed one may be too large for a layer. Symmetric weights and "
        "8-bit symmetric activations are needed.",
    ),
    (
        "The format cannot hold these weights",
        ("formats/", "grid/packing"),
        "Each file format holds some bit widths, groups and zero points and not others; this is checked before the "
        "work. `compressed-tensors` holds most, `dense` everything. [Formats and engines](formats.md) has the tables.",
    ),
    (
        "Verification fails",
        ("pipeline/verify",),
        "`finescale verify` reads everything again. If a file differs from what was written, it was damaged or changed "
        "afterwards: copy it again, or quantize again with `--fresh`. Verification is done against the model that was "
        "quantized, not against a later version of it.",
    ),
    (
        "The checkpoint cannot be loaded or run",
        ("runtime/", "kernels/", "bench/", "pipeline/"),
        "`finescale inspect DIR` says which kernel runs each layer; `finescale bench gemm --explain` says it for this "
        "machine in general. The path `float` of `finescale.load` runs everywhere.",
    ),
    ("Anything else", ("",), "These are rare; each sentence says what to do."),
)

# Sentences that belong to a topic wherever they are said.
BY_WORD = {"NaN or Inf": "A number that must not be", "could overflow int32": "Integer scales"}


def sentences(expression: ast.expr, tree: ast.AST) -> list[str]:
    """What an expression can say: constants as they are, everything that is computed as an ellipsis."""
    if isinstance(expression, ast.Constant):
        return [str(expression.value)]
    if isinstance(expression, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in expression.values)]
    if isinstance(expression, ast.BinOp):
        return [a + b for a in sentences(expression.left, tree) for b in sentences(expression.right, tree)]
    if isinstance(expression, ast.IfExp):
        return sentences(expression.body, tree) + sentences(expression.orelse, tree)
    if isinstance(expression, ast.Name):
        return [
            sentence
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == expression.id
            for sentence in sentences(node.value, tree)
        ] or ["…"]
    return ["…"]


def raised(source: str) -> Iterator[tuple[str, str]]:
    """(class, sentence) of each error that a file raises on purpose, in the order of the file."""
    tree = ast.parse(source)
    found = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    for call in sorted(found, key=lambda node: node.lineno):
        kind = ast.unparse(call.func).rpartition(".")[2]
        if kind in KINDS and call.args:
            yield from ((kind, sentence) for sentence in sentences(call.args[0], tree) if sentence.strip("… .:;()"))


def errors_by_topic(package: Path) -> dict[str, list[tuple[str, str]]]:
    """Topic -> (file, sentence), without repetitions."""
    found: dict[str, list[tuple[str, str]]] = {topic: [] for topic, _, _ in TOPICS}
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        topic = next(topic for topic, starts, _ in TOPICS if name.startswith(starts))
        for _, sentence in raised(file.read_text(encoding="utf-8")):
            place = found[next((better for word, better in BY_WORD.items() if word in sentence), topic)]
            if (name, sentence) not in place:
                place.append((name, sentence))
    return found


def error_tables(package: Path) -> str:
    """One section a topic: what it means in general, then every sentence with its file."""
    parts = []
    found = errors_by_topic(package)
    for topic, _, remedy in TOPICS:
        if found[topic]:
            lines = "".join(
                f"- `{sentence.replace('`', chr(39))}` <small>{name}</small>\n" for name, sentence in found[topic]
            )
            parts.append(f"## {topic}\n\n{remedy}\n\n{lines}")
    return "\n".join(parts)
