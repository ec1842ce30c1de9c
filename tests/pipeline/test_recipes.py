"""Every recipe on every family: it runs, is proved and loads, or says in a sentence why it is not for this one."""

from pathlib import Path

import pytest

from finescale.errors import InputError
from finescale.pipeline.verify import verify
from finescale.recipe import Recipe
from finescale.recipes import recipe_names
from finescale.runtime.load import load
from tests.helpers import KINDS, assert_same_logits, assert_sentence, logits_of, quantize, some_tokens

SETTINGS = ("calibration.samples=4", "calibration.length=32", "calibration.batch_size=4")
ROTATED = ("llama3-w4a8-integer-scale", "quarot-w4a4", "quarot-w4a8", "w4a4-best")
REFUSED = {(name, "bloom"): "quarot cannot rotate bloom: 2 norms stand outside its blocks" for name in ROTATED}
"""Words of the reason, by recipe and family."""


def shortened(name: str) -> Recipe:
    """The recipe with few windows, sweeps and steps."""
    recipe = Recipe.load(name, SETTINGS)
    if recipe.solver.name == "quantease":
        recipe = recipe.with_settings(("solver.sweeps=2",))
    parts = {
        key: tuple(
            part.model_copy(update={"options": part.options | {"iterations": 2}})
            if "iterations" in type(part.options_model()).model_fields
            else part
            for part in getattr(recipe, key)
        )
        for key in ("transforms", "tuning")
    }
    return recipe.model_copy(update=parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_on_a_family_or_says_why_not(name, kind, tiny, text, tmp_path: Path):
    words = REFUSED.get((name, kind))
    if words is not None:
        with pytest.raises(InputError) as caught:
            quantize(tiny(kind), tmp_path / "out", shortened(name), text)
        assert_sentence(str(caught.value))
        assert words in str(caught.value)
        return
    chosen = shortened(name)
    quantize(tiny(kind), tmp_path / "out", chosen, text)
    verify(tmp_path / "out", tiny(kind))
    if chosen.activations is None and not chosen.transforms:
        assert_same_logits(tiny(kind), tmp_path / "out")
    else:  # that rounded and rearranged inputs are right is shown elsewhere
        assert logits_of(load(tmp_path / "out"), some_tokens()).isfinite().all()
