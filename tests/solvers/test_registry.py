"""Solvers by name, and those of a user's own module."""

import sys

import pytest

from finescale.errors import InputError
from finescale.recipe import Recipe
from finescale.solvers import SOLVERS, code_of, find_solver
from tests.helpers import assert_sentence

PLUGIN = """
from finescale.solvers import SolverEntry, SolverOptions
class Options(SolverOptions):
    strength: int = 1
MINE = SolverEntry(None, Options, False, "mine")
SOMETHING = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "registry_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "registry_test_plugin"
    sys.modules.pop("registry_test_plugin", None)


def test_a_solver_of_another_module(module):
    entry = find_solver(f"{module}:MINE")
    assert entry.summary == "mine" and entry not in SOLVERS.values()
    recipe = Recipe.load("rtn", (f"solver.name={module}:MINE", "solver.strength=2"))
    assert recipe.to_dict()["solver"] == {"name": f"{module}:MINE", "strength": 2}


def test_an_unknown_option_of_it_is_refused(module):
    with pytest.raises(InputError, match="strngth"):
        Recipe.load("rtn", (f"solver.name={module}:MINE", "solver.strngth=2"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("annealing", "or module:NAME"),
        ("no_such_module:MINE", "cannot be imported"),
        ("registry_test_plugin:YOURS", "cannot be imported"),
        ("registry_test_plugin:SOMETHING", "no SolverEntry"),
        (":MINE", "cannot be imported"),
    ],
)
def test_refused(module, name, words):
    with pytest.raises(InputError, match=words) as caught:
        find_solver(name)
    assert_sentence(str(caught.value))


def test_the_code_of_a_module_tells_its_versions_apart(module, tmp_path):
    name, file = f"{module}:MINE", tmp_path / f"{module}.py"
    first = code_of(name)
    assert first == code_of(name) and len(first) == 64
    file.write_text(PLUGIN + "# changed\n")
    assert code_of(name) != first
    file.write_text(PLUGIN)
    assert code_of(name) == first
    assert code_of("quantease") is None


def test_the_code_of_a_package_is_all_of_its_files(tmp_path, monkeypatch):
    package = tmp_path / "registry_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "solver.py").write_text(PLUGIN)
    (package / "helper.py").write_text("STEP = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        first = code_of("registry_test_package.solver:MINE")
        (package / "helper.py").write_text("STEP = 2\n")
        assert code_of("registry_test_package.solver:MINE") != first
    finally:
        for name in [name for name in sys.modules if name.startswith("registry_test_package")]:
            sys.modules.pop(name)


def test_a_module_without_a_file_is_refused(module, monkeypatch):
    find_solver(f"{module}:MINE")
    monkeypatch.delattr(sys.modules[module], "__file__")
    with pytest.raises(InputError, match="no source file") as caught:
        code_of(f"{module}:MINE")
    assert_sentence(str(caught.value))
