"""Sets of layer names as the patterns that config files hold.

Each engine has its own rules: compressed-tensors targets and GPTQModel's `dynamic` rules are regular expressions
matched from the start of the name, `modules_in_block_to_quantize` entries are substrings of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def name_patterns(layers: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """Regular expressions (`re:...`) that match exactly ``layers`` among ``all_names``, few even for thousands of
    experts: names are merged over their first number (the block), then over their second (the expert).

    Engines rename what stands before the first number (`model.layers.0` to `language_model.model.layers.0`), so the
    patterns leave it open, unless that would catch names of another part of the model.
    """
    heads = {parts[0] for parts in map(_split_name, all_names) if len(parts) > 1}
    patterns = []
    for head, *rest in _merge_numbers(_merge_numbers([_split_name(name) for name in layers], 1), 3):
        if not rest:
            patterns.append(head)
            continue
        start = re.escape(head)
        if head and len(heads) == 1:
            start = r"(.*\.)?" + re.escape(head.rstrip(".").rsplit(".", 1)[-1] + ".")
        body = "".join(part if index % 2 == 0 else re.escape(part) for index, part in enumerate(rest))
        patterns.append(f"re:{start}{body}$")
    return patterns


def _split_name(name: str) -> tuple[str, ...]:
    """Text and whole-component numbers by turns: `a.b.12.c` gives `a.b.`, `12`, `.c`."""
    return tuple(re.split(r"(?:(?<=\.)|^)(\d+)(?=\.|$)", name))


def _merge_numbers(names: Sequence[tuple[str, ...]], position: int) -> list[tuple[str, ...]]:
    """Join names that differ only in the number at ``position`` into one with the alternatives `(1|2|...)` there."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for parts in names:
        if len(parts) <= position:
            merged[parts] = []
        else:
            merged.setdefault((*parts[:position], "", *parts[position + 1 :]), []).append(parts[position])
    return [
        (*parts[:position], *_alternatives(numbers), *parts[position + 1 :]) if numbers else parts
        for parts, numbers in merged.items()
    ]


def _alternatives(numbers: Sequence[str]) -> tuple[str]:
    return (numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})",)


def matches(name: str, pattern: str) -> bool:
    """Whether a compressed-tensors target or ignore entry (a name or `re:...`) matches a layer name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def names_in_block(layers: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """Names relative to their block (`self_attn.q_proj`) that single out ``layers`` by substring, as readers of
    `modules_in_block_to_quantize` match; full names where relative ones would also catch an ignored layer."""
    relative = list(dict.fromkeys("".join(_split_name(name)[2:]).lstrip(".") for name in layers))
    if not all(relative) or any(entry in other for entry in relative for other in ignore):
        return list(layers)
    return relative
