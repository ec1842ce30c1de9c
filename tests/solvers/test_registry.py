"""Solvers by name, and those of a user's own module."""

import sys

import pytest

from finescale.errors import InputError
from finescale.recipe import Recipe
from finescale.solvers import SOLVERS, find_solver
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
