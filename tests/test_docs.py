"""The documentation says what is true: commands parse, recipes are valid, links exist, the worked example runs."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml

from finescale.cli.main import app
from finescale.pipeline.quantize import prepare
from finescale.recipe import Recipe
from tools.docs_commands import mentions_of, parts_of, words_of
from tools.docs_nav import named, with_the_rest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = ROOT / "examples"


def all_commands(program):
    """``{page: line}``: (words after the program, whether it stands on a line of its own)."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [(part.text, True) for part in parts_of(text) if part.kind == "command"]
        for line, whole in lines + [(line, False) for line in mentions_of(text)]:
            _, words = words_of(line)
            if words[0] == program:
                found[f"{page.name}: {line}"] = (words[1:], whole)
    return found


FINESCALE = all_commands("finescale")


def parse(command, words):
    """The context of the innermost command; raises what click raises for what does not parse."""
    context = command.make_context("finescale", list(words))
    while hasattr(command, "commands"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def dry_run(values, model, text, folder):
    """What ``finescale quantize --dry-run`` does with the recipe and settings of a command."""
    recipe = values["recipe"]
    if recipe.endswith(".yaml"):
        (block,) = re.findall(r"^```yaml\n((?:.*\n)*?)```", (ROOT / "docs" / "choosing.md").read_text(), re.M)
        recipe = folder / recipe
        recipe.write_text(block)
    formats = [f"format={values['format_']}"] if values["format_"] else []
    chosen = Recipe.load(recipe, (*(values["set_"] or ()), *formats))
    job = prepare(model, chosen, folder / "out", str(text), spill=values["spill"])
    assert job.plan.layers


def test_commands_are_found():
    assert len(FINESCALE) > 30 and len(all_commands("make")) > 5


@pytest.mark.parametrize("line", FINESCALE)
def test_a_finescale_command_parses(line, tiny, text, tmp_path, monkeypatch):
    """And one that quantizes is checked with a tiny model in the place of the page's, as by --dry-run."""
    words, whole = FINESCALE[line]
    words = [word.strip("[]") if word.startswith("[") else word for word in words if word != "..."]
    try:
        context = parse(typer.main.get_command(app), words)
    except Exception as error:
        # A mention in a sentence may leave arguments out.
        assert not whole and type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"), f"{line}: {error}"
        return
    if context.info_name == "quantize" and context.params.get("recipe", "NAME") != "NAME":  # not bench quantize
        monkeypatch.syspath_prepend(EXAMPLES)
        dry_run(context.params, tiny("llama", torch.float16), text, tmp_path)


def test_commands_that_are_wrong_do_not_parse():
    for words in (["quantise", "MODEL"], ["quantize", "MODEL", "--recipe", "rtn", "--out", "o", "--bits", "3"]):
        with pytest.raises(Exception, match=r"(?i)no such (command|option)"):
            parse(typer.main.get_command(app), words)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line, (words, _) in all_commands("make").items():
        assert words[0] in targets or "=" in words[0], line


def test_scripts_exist():
    for line, (words, _) in all_commands("python").items():
        script = next((word for word in words if word.endswith(".py")), None)
        assert script is None or (ROOT / script).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_recipes_in_yaml_are_valid(page):
    for block in re.findall(r"^```yaml.*\n((?:.*\n)*?)```", page.read_text(encoding="utf-8"), re.M):
        values = yaml.safe_load(block)
        if set(values) <= set(Recipe.model_fields):
            Recipe.from_dict(values)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


@pytest.fixture(scope="module")
def generated():
    from tools.docs_tables import pages

    return pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_includes_exist(page, generated):
    for target in re.findall(r'^--8<-- "(.+)"$', page.read_text(encoding="utf-8"), re.M):
        assert target.removesuffix(".md") in generated or (ROOT / target).is_file(), f"{page.name}: {target}"


def test_every_generated_table_is_shown(generated):
    shown = {name for page in PAGES for name in re.findall(r'^--8<-- "(.+)\.md"$', page.read_text(), re.M)}
    # Solvers and tuners may have pages of their own, whose options are described there.
    assert {name for name in generated if not re.match("options-(solver|tuner)", name)} <= shown


def test_option_tables_hold_every_option(generated):
    from finescale.solvers import SOLVERS

    for name, entry in SOLVERS.items():
        for option, field in entry.options.model_fields.items():
            (row,) = [line for line in generated[f"options-solver-{name}"].splitlines() if f"| `{option}` |" in line]
            assert str(field.default).lower() in row
            assert len(row.split("|")[-2].strip()) > 10, f"{name}.{option} is not described in the docstring"


def test_the_navigation_holds_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    complete = set(named(with_the_rest(nav, ROOT / "docs")))
    assert complete == {page.name for page in PAGES if page.parent == ROOT / "docs"}


def test_a_page_that_is_not_named_goes_to_methods(tmp_path):
    for name in ("a.md", "b.md", "c.md"):
        (tmp_path / name).touch()
    nav = [{"A": "a.md"}, {"Methods": [{"B": "b.md"}]}]
    assert with_the_rest(nav, tmp_path) == [{"A": "a.md"}, {"Methods": [{"B": "b.md"}, "c.md"]}]


def test_the_worked_example(tmp_path, monkeypatch):
    """The code of docs/adding.md, as it stands there."""
    page = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r'^```[{ .]*python title="(.+)"[ }]*\n((?:.*\n)*?)```', page, re.M))
    assert set(blocks) == {"custom_solver.py", "test_custom_solver.py"}
    included = re.sub(r'--8<-- "(.+)"', lambda match: (ROOT / match[1]).read_text(), blocks["custom_solver.py"])
    (tmp_path / "custom_solver.py").write_text(included)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "custom_solver", raising=False)
    names = {"__name__": "worked_example"}
    exec(compile(blocks["test_custom_solver.py"], "test_custom_solver.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests and sys.modules["custom_solver"].__file__ == str(tmp_path / "custom_solver.py")
    for test in tests:
        test()
    # The test can fail: a solver that does nothing is not better than rounding to nearest.
    from finescale.solvers import find_solver

    names["NUDGE"] = SimpleNamespace(solve=find_solver("rtn").solve, options=find_solver("rtn").options)
    with pytest.raises(AssertionError):
        tests[0]()
    monkeypatch.delitem(sys.modules, "custom_solver")
