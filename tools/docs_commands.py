"""What the pages tell a reader to type: commands, Python and YAML, in the order in which they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PROGRAMS = ("finescale", "make", "python3?", "torchrun", "pip")
_FENCE = re.compile(r"^```\{?[ .]*(\w*)")


@dataclass(frozen=True)
class Part:
    """A command line, or the text of a block of Python or YAML; ``line`` is where it begins in the page."""

    kind: Literal["command", "python", "yaml"]
    text: str
    line: int


def parts_of(page: str) -> Iterator[Part]:
    """Everything that a page's code blocks tell the reader to run, or to write into a file."""
    language, block, start = None, [], 0
    for number, line in enumerate(page.splitlines(), 1):
        fence = _FENCE.match(line)
        if language is not None and fence:
            yield from _block(language, block, start)
            language = None
        elif fence:
            language, block, start = fence[1], [], number + 1
        elif language is not None:
            block.append(line)
        elif re.match(r" {4}|\t", line):
            # Indented code: what a backslash continues is taken up by the first line.
            before = page.splitlines()[number - 2] if number > 1 else ""
            if not before.endswith("\\"):
                yield from _commands(_continued(page.splitlines()[number - 1 :]), number)


def _block(language: str, lines: list[str], start: int) -> Iterator[Part]:
    if language in ("python", "yaml"):
        yield Part("python" if language == "python" else "yaml", "\n".join(lines) + "\n", start)
    elif language in ("", "bash", "sh", "console", "text"):
        for number, _ in enumerate(lines):
            if number == 0 or not lines[number - 1].endswith("\\"):
                yield from _commands(_continued(lines[number:]), start + number)


def _continued(lines: list[str]) -> str:
    whole = ""
    for line in lines:
        whole += line.strip()
        if not whole.endswith("\\"):
            break
        whole = whole[:-1]
    return whole


def _commands(line: str, number: int) -> Iterator[Part]:
    if re.match(rf"(\$ )?([A-Z_]+=\S+ )*({'|'.join(PROGRAMS)}) ", line):
        yield Part("command", line.removeprefix("$ ").partition("  #")[0].strip(), number)


def mentions_of(page: str) -> list[str]:
    """Commands in the middle of a sentence, which may leave arguments out."""
    return re.findall(r"`((?:finescale|make|python) [^`\n]+)`", page)


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command line sets in front, and its words; torchrun's as those of finescale itself."""
    words = shlex.split(command)
    count = next(n for n, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    variables = dict(word.split("=", 1) for word in words[:count])
    words = words[count:]
    if words[0] == "torchrun":
        words = ["finescale", *words[words.index("finescale.cli.main") + 1 :]]
    return variables, words
