"""tools/lint_project.py: planted violations are found, at their lines, and a clean tree passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import lint_project

CLEAN = '''"""Reads no pickle; see torch.load for what is not used, and https://example.org/home/x."""

import os
from pathlib import Path

import torch


def read(folder: Path, trust_remote_code: bool = False) -> bytes:
    """Relative paths such as src/tmp/x and os.path are fine."""
    torch.manual_seed(0)
    options = {"trust_remote_code": trust_remote_code}
    return (folder / os.fspath("a/tmp/b")).read_bytes() if options else b""
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / "src" / "finescale"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "clean.py").write_text(CLEAN)
    return tmp_path


def write(root: Path, name: str, source: str) -> None:
    file = root / "src" / "finescale" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


def test_clean_tree_passes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint_project.main([str(root)]) == 0
    assert capsys.readouterr().out == "lint_project: 2 files, 0 findings\n"


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("import torch\nx = torch.load('a')\n", 2, "torch.load"),
        ("import torch as t\nt.load('a')\n", 2, "torch.load"),
        ("from torch import load as read\nread('a')\n", 2, "torch.load"),
        ("import torch\ntorch.save(1, 'a')\n", 2, "torch.save"),
        ("\nimport pickle\n", 2, "pickle"),
        ("def f():\n    from pickle import loads\n", 2, "pickle"),
        ("import dill.source\n", 1, "dill"),
        ("f(a,\n  trust_remote_code=True)\n", 1, "trust_remote_code=True"),
        ("x = {'trust_remote_code': True}\n", 1, "trust_remote_code=True"),
        ("options['trust_remote_code'] = True\n", 1, "trust_remote_code=True"),
        ("def f():\n    config.trust_remote_code = True\n", 2, "trust_remote_code=True"),
        ("import numpy\nnumpy.load(f, allow_pickle=True)\n", 2, "allow_pickle=True"),
        ("import os\nx = os.environ['A']\n", 2, "os.environ"),
        ("import os\nx = os.getenv('A')\n", 2, "os.getenv"),
        ("from os import environ\nprint(environ)\n", 2, "os.environ"),
        ("x = 1\nroot = '/workspace/shared'\n", 2, "/workspace/ is a path of one machine"),
        ("# as in /home/somebody/model\n", 1, "/home/ is a path of one machine"),
        ('"""See (/tmp/x)."""\n', 1, "/tmp/ is a path of one machine"),
        ("x = 1\n" * 501, 501, "501 lines"),
        ("def f(:\n", 1, "is not Python"),
    ],
)
def test_planted_violation_is_found(
    root: Path, capsys: pytest.CaptureFixture[str], source: str, line: int, words: str
) -> None:
    write(root, "planted.py", source)
    assert lint_project.main([str(root)]) == 1
    findings = capsys.readouterr().out.splitlines()[:-1]
    assert len(findings) == 1
    assert findings[0].startswith(f"src/finescale/planted.py:{line}: ")
    assert words in findings[0]


def test_500_lines_are_allowed(root: Path) -> None:
    write(root, "long.py", "x = 1\n" * 500)
    assert lint_project.check(root) == ([], 3)


def test_one_file_may_read_the_environment(root: Path) -> None:
    name = Path(lint_project.ENVIRONMENT_FILE).name
    write(root, name, "import os\nrank = os.environ.get('RANK')\n")
    assert lint_project.check(root)[0] == []


def test_paths_are_found_outside_python_too(root: Path) -> None:
    write(root, "recipes/mine.yaml", "name: mine\ncalibration: /mnt/data/text.txt\n")
    (finding,) = lint_project.check(root)[0]
    assert (finding.path, finding.line) == ("src/finescale/recipes/mine.yaml", 2)


def test_package_without_init_is_found(root: Path) -> None:
    write(root, "grid/packing.py", "x = 1\n")
    (finding,) = lint_project.check(root)[0]
    assert finding.path == "src/finescale/grid"
    assert "__init__.py" in finding.sentence


@pytest.mark.parametrize("source", ["import finescale.cli.main\n", "def f():\n    from finescale.models import Step\n"])
def test_a_room_uses_only_rooms_above_it(root: Path, source: str) -> None:
    (root / "CONTRIBUTING.md").write_text("| room |\n|---|\n| `grid/` | a |\n| `models/` | b |\n| `cli/` | c |\n")
    for room in ("grid", "models", "cli"):
        write(root, f"{room}/__init__.py", "from finescale.grid import Grid\nfrom finescale import errors\n")
    write(root, "demo.py", source)  # in no room
    write(root, "cli/main.py", source)
    assert lint_project.check(root)[0] == []
    write(root, "grid/fit.py", source)
    (finding,) = lint_project.check(root)[0]
    assert finding.path == "src/finescale/grid/fit.py" and finding.line == source.count("\n")
    assert "grid may not use" in finding.sentence


def test_rooms_are_read_from_the_guide() -> None:
    guide = Path(lint_project.__file__).resolve().parents[1] / "CONTRIBUTING.md"
    rooms = lint_project.ROOM.findall(guide.read_text(encoding="utf-8"))
    assert rooms[0] == "grid" and rooms[-1] == "cli" and "recipe" in rooms and len(rooms) == 17


def test_wrong_root_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lint_project.main([str(tmp_path)]) == 2
    assert "has no folder src" in capsys.readouterr().err
