"""The project's own rules for what is shipped (everything under src/), beyond what ruff and mypy know.

    python tools/lint_project.py [ROOT]

prints each finding as `path:line: sentence` and exits with 1 if there are any. Code rules look at the syntax tree, so
prose may speak of pickles; the rule about paths looks at every line, so comments and docstrings may not name one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAXIMUM_LINES = 500

# The one file that may read the environment, for what other programs announce there (process ranks, caches).
# Features are switched by recipes and flags: what an environment variable switches, no report shows.
ENVIRONMENT_FILE = "src/finescale/environment.py"

# Reading a file with any of these can run code that lies in the file.
UNSAFE_MODULES = frozenset({"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})

BANNED_NAMES = {
    "torch.load": "torch.load can run code that lies in the file: read safetensors instead",
    "torch.save": "torch.save writes a pickle: write safetensors instead",
}

ENVIRONMENT_NAMES = frozenset({"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"})

BANNED_TRUE_ARGUMENTS = {
    "trust_remote_code": "trust_remote_code=True runs code from a model's folder: pass on what the user chose",
    "allow_pickle": "allow_pickle=True can run code that lies in the file: read arrays without pickle",
}

CODE_SUFFIXES = frozenset({".c", ".cpp", ".cu", ".cuh", ".h", ".js", ".py"})
TEXT_SUFFIXES = CODE_SUFFIXES | {".css", ".html", ".j2", ".jinja", ".json", ".md", ".txt", ".yaml", ".yml"}

# A path of somebody's machine. What precedes the slash must not make it part of a longer path or a URL.
MACHINE_PATH = re.compile(r"(?<![\w.~/:}\])-])/(?:home|media|mnt|opt|root|scratch|tmp|Users|work|workspace)/")


# A row of CONTRIBUTING's table of rooms, ground floor first.
ROOM = re.compile(r"^\| `(\w+)(?:/|\.py)`", re.MULTILINE)


class Finding(NamedTuple):
    """One violation: the file relative to the root, the line counted from 1, and a sentence with the remedy."""

    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence}"


def dotted_name(node: ast.expr, imported: dict[str, str]) -> str | None:
    """`np.load` -> "numpy.load", by the file's imports; None for anything but names joined by dots."""
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value, imported)
        return None if base is None else f"{base}.{node.attr}"
    return None


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `import torch as t` gives {"t": "torch"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module]
    return []


def true_arguments(node: ast.AST) -> Iterator[str]:
    """Names that the node sets to the constant True: as an argument, a dictionary's key, or by assignment."""
    pairs: list[tuple[str | None, ast.expr | None]] = []
    if isinstance(node, ast.Call):
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [
            (key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None, value)
            for key, value in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Assign):
        pairs = [(target_name(target), node.value) for target in node.targets]
    elif isinstance(node, ast.AnnAssign):
        pairs = [(target_name(node.target), node.value)]
    for name, value in pairs:
        if name is not None and isinstance(value, ast.Constant) and value.value is True:
            yield name


def target_name(target: ast.expr) -> str | None:
    """The last name of an assignment's target: `a.b = ...`, `b = ...` and `a["b"] = ...` all give "b"."""
    if isinstance(target, ast.Attribute):
        return target.attr
    if isinstance(target, ast.Name):
        return target.id
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        return str(target.slice.value)
    return None


def check_code(path: str, source: str) -> Iterator[Finding]:
    """The rules that read the syntax tree of one Python file."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield Finding(path, error.lineno or 1, f"is not Python: {error.msg}")
        return
    imported = imported_names(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        for module in imported_modules(node):
            if module.split(".")[0] in UNSAFE_MODULES:
                yield Finding(path, line, f"{module} can run code that lies in a file: use safetensors or json instead")
        for argument in true_arguments(node):
            if argument in BANNED_TRUE_ARGUMENTS:
                yield Finding(path, line, BANNED_TRUE_ARGUMENTS[argument])
        # A use is found where the name is used; importing it by its own name is found there too, by the use.
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = dotted_name(node, imported)
            if name in BANNED_NAMES:
                yield Finding(path, line, BANNED_NAMES[name])
            elif name in ENVIRONMENT_NAMES and path != ENVIRONMENT_FILE:
                yield Finding(path, line, f"{name} may be read in {ENVIRONMENT_FILE} only: add a function there")


def check_rooms(path: str, source: str, rooms: list[str]) -> Iterator[Finding]:
    """Imports of rooms that stand below the file's own in CONTRIBUTING's table; nothing where the file is in none."""
    own = path.removeprefix("src/finescale/").split("/")[0].removesuffix(".py")
    if own not in rooms:
        return
    for node in ast.walk(ast.parse(source)):
        for module in imported_modules(node):
            parts = module.split(".")
            if parts[0] == "finescale" and parts[1:] and parts[1] in rooms[rooms.index(own) + 1 :]:
                sentence = f"{own} may not use {parts[1]}, which stands below it among the rooms of CONTRIBUTING.md"
                yield Finding(path, getattr(node, "lineno", 1), sentence)


def check_text(path: str, source: str) -> Iterator[Finding]:
    """The rules that read lines, for text of any kind."""
    lines = source.splitlines()
    if len(lines) > MAXIMUM_LINES and Path(path).suffix in CODE_SUFFIXES:
        sentence = f"has {len(lines)} lines, more than {MAXIMUM_LINES}: split it by subject"
        yield Finding(path, MAXIMUM_LINES + 1, sentence)
    for number, line in enumerate(lines, start=1):
        found = MACHINE_PATH.search(line)
        if found:
            sentence = f"{found.group()} is a path of one machine: take the path from the user, or use tempfile"
            yield Finding(path, number, sentence)


def check_packages(root: Path) -> Iterator[Finding]:
    """A folder of Python files without `__init__.py` works from a checkout and is missing from the wheel."""
    for folder in sorted({file.parent for file in (root / "src").glob("*/**/*.py")}):
        if not (folder / "__init__.py").is_file():
            path = folder.relative_to(root).as_posix()
            yield Finding(path, 1, "has Python files and no __init__.py: without it the wheel leaves them out")


def check(root: Path) -> tuple[list[Finding], int]:
    """All findings under `root`/src, sorted by path and line, and how many files were read."""
    findings: list[Finding] = []
    files = [file for file in sorted((root / "src").rglob("*")) if file.is_file() and file.suffix in TEXT_SUFFIXES]
    files = [file for file in files if not any(part.endswith(".egg-info") for part in file.parts)]
    guide = root / "CONTRIBUTING.md"
    rooms = ROOM.findall(guide.read_text(encoding="utf-8")) if guide.is_file() else []
    for file in files:
        path = file.relative_to(root).as_posix()
        source = file.read_text(encoding="utf-8")
        findings += check_text(path, source)
        if file.suffix == ".py":
            found = list(check_code(path, source))
            findings += found or check_rooms(path, source, rooms)  # what is no Python has no imports either
    findings += check_packages(root)
    return sorted(set(findings)), len(files)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    if not (root / "src").is_dir():
        print(f"{root} has no folder src: give the project's root", file=sys.stderr)
        return 2
    findings, files = check(root)
    for finding in findings:
        print(finding)
    print(f"lint_project: {files} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
