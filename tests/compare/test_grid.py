"""Which cells a grid has."""

from pathlib import Path

import pytest

from finescale.compare.grid import cells_of, make_grid, read_grids
from finescale.errors import InputError
from tests.helpers import assert_sentence


def test_a_product_in_its_order():
    grid = make_grid({"recipes": ["rtn", "gptq"], "bits": [4, 3], "groups": [-1, 64]}, "x")
    cells = cells_of([grid], ("calibration.samples=5",))
    assert [cell.key for cell in cells] == [
        "rtn-w4-channel", "rtn-w4-g64", "rtn-w3-channel", "rtn-w3-g64",
        "gptq-w4-channel", "gptq-w4-g64", "gptq-w3-channel", "gptq-w3-g64",
    ]  # fmt: skip
    assert [cell.label for cell in cells] == ["rtn"] * 4 + ["gptq"] * 4
    assert cells[3].recipe.weights.bits == 3 and cells[3].recipe.weights.group_size == 64
    assert all(cell.recipe.calibration.samples == 5 for cell in cells)


def test_recipes_keep_what_is_not_named():
    (cell,) = cells_of([make_grid({"recipes": ["w4a8-integer-scale"]}, "x")])
    assert cell.key == "w4a8-integer-scale-w4a8-auto" and cell.recipe.weights.group_size == "auto"


def test_grids_may_overlap_and_keys_stay_apart():
    grids = [make_grid({"recipes": ["rtn"], "bits": [4]}, "x"), make_grid({"recipes": ["rtn"], "bits": [4, 3]}, "x")]
    assert [cell.key for cell in cells_of(grids)] == ["rtn-w4-channel", "rtn-w3-channel"]
    grids.append(make_grid({"recipes": ["rtn"], "set": ["weights.clip=mse"]}, "x"))
    grids.append(
        make_grid({"recipes": ["rtn"], "set": ["weights.clip=mse"], "label": "clipped", "name": "nearest"}, "x")
    )
    assert [cell.key for cell in cells_of(grids)] == ["rtn-w4-channel", "rtn-w3-channel", "rtn-w4-channel~2"]
    (named,) = cells_of(grids[3:])
    assert (named.key, named.label) == ("nearest-w4-channel-clipped", "nearest clipped")


def test_a_recipe_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("weights: {bits: 3, group_size: 32}\nsolver: {name: rtn}\n")
    (cell,) = cells_of([make_grid({"recipes": [str(tmp_path / "mine.yaml")]}, "x")])
    assert cell.key == "mine-w3-g32" and cell.label == "mine"


def test_a_grid_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("grids:\n  - {recipes: [rtn], bits: [4, 3]}\n  - {recipes: [gptq], set: [weights.bits=2]}\n")
    assert [cell.key for cell in cells_of(read_grids(path))] == ["rtn-w4-channel", "rtn-w3-channel", "gptq-w2-channel"]


@pytest.mark.parametrize(
    "text",
    ["[]", "grids: []", "grids: [{recipes: []}]", "grids: [{recipe: [rtn]}]", "grids: [{recipes: [rtn], bits: [x]}]",
     "a: [", "[" * 5000, "grids: [{recipes: [rtn, gptq], name: both}]"],
)  # fmt: skip
def test_grid_files_that_are_none(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_grids(path)
    assert_sentence(str(caught.value))


def test_recipes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"weights\.bits is 7"):
        cells_of([make_grid({"recipes": ["rtn"], "bits": [7]}, "x")])
    for values, words in (({"bits": [0]}, r"weights\.bits is 0"), ({"groups": [0]}, r"weights\.group_size is 0")):
        with pytest.raises(InputError, match=words):
            cells_of([make_grid({"recipes": ["rtn"]} | values, "x")])
    with pytest.raises(InputError, match="no recipe"):
        cells_of([make_grid({"recipes": ["none"]}, "x")])


def test_the_benchmarks_grids():
    files = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "grids").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert len({cell.key for cell in cells_of(read_grids(file))}) >= 2
