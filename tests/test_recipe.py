"""Recipes: the named ones, strictness, settings on the command line, overrides."""

import pytest
import yaml

from finescale.errors import InputError
from finescale.recipe import Recipe, is_ragged, resolve_group_size
from finescale.recipes import recipe_names
from finescale.solvers import SOLVERS

BASE = Recipe.named("gptq")
INTEGER = Recipe.named("w4a8-integer-scale")


def refused(*settings, recipe=BASE):
    """The message with which settings are refused; one line."""
    with pytest.raises(InputError) as caught:
        recipe.with_settings(settings)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


# --- named recipes


def test_the_recipes_that_users_expect_exist():
    expected = {"rtn", "gptq", "quantease", "gptq-quantease", "w4a8-integer-scale", "w4a8-float-scale", "w8a8",
                "w4a8-integer-scale-published", "quantease-published", "w4a8-folded"}  # fmt: skip
    assert expected <= set(recipe_names())
    assert recipe_names() == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_named_recipes_load_and_say_what_they_are(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and len(recipe.description) > 10
    assert recipe.solver.name in SOLVERS
    again = Recipe.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    assert again.solver.options() == recipe.solver.options()
    assert again.weights == recipe.weights and again.integer_scale == recipe.integer_scale


@pytest.mark.parametrize("name", ["rtn", "gptq", "quantease", "gptq-quantease"])
def test_plain_names_are_weight_only_four_bits_asymmetric_per_channel(name):
    recipe = Recipe.named(name)
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.weights.symmetric) == (4, -1, False)
    assert recipe.activations is None and recipe.integer_scale.mode == "off"


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("w4a8")])
def test_w4a8_is_symmetric_fine_grained_with_eight_bit_activations(name):
    recipe = Recipe.named(name)
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.weights.symmetric) == (4, "auto", True)
    assert recipe.activations is not None and recipe.activations.bits == 8


def test_off_is_a_word_though_yaml_reads_it_as_false():
    assert INTEGER.with_settings(("integer_scale.mode=off",)).integer_scale.mode == "off"


def test_published_settings():
    integer = Recipe.named("w4a8-integer-scale-published")
    assert (integer.integer_scale.mode, integer.integer_scale.amplifier) == ("after", 1024)
    options = Recipe.named("quantease-published").solver.options()
    assert (options.sweeps, options.relax_every, options.start, options.damping) == (30, 3, "weight", 0)
    assert Recipe.named("gptq").solver.options().damping == 0.01
    assert (INTEGER.integer_scale.mode, INTEGER.integer_scale.amplifier) == ("before", "auto")
    floating = Recipe.named("w4a8-float-scale").to_dict()
    differing = {key for key, value in INTEGER.to_dict().items() if floating[key] != value}
    assert differing == {"name", "description", "integer_scale"}
    folded = Recipe.named("w4a8-folded").to_dict()
    assert {key for key, value in INTEGER.to_dict().items() if folded[key] != value} == differing
    assert folded["integer_scale"] == {"mode": "folded", "amplifier": "auto"}


def test_unknown_names_list_the_choices():
    with pytest.raises(InputError, match=r"'gtpq'; choose one of .*gptq.*rtn"):
        Recipe.load("gtpq")


# --- files


def test_a_file_is_read_and_named_after_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {bits: 3, group_size: 64}\nsolver: {name: gptq, damping: 0.1}\n")
    recipe = Recipe.load(path, ("weights.bits=2",))
    assert (recipe.name, recipe.weights.bits, recipe.weights.group_size) == ("mine", 2, 64)
    assert recipe.solver.options().damping == 0.1
    path.write_text(yaml.safe_dump(INTEGER.to_dict()))
    assert Recipe.load(path).to_dict() == INTEGER.to_dict()


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "empty.yml"
    path.write_text("")
    assert Recipe.load(path).to_dict() == {**Recipe().to_dict(), "name": "empty"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("weights: {bits: [", "not valid YAML"), ("- a\n- b\n", "must hold keys"), ("weigths: {}", "unknown key weigths")],
)
def test_files_that_cannot_be_used_are_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        Recipe.load(path)
    assert "broken.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml does not exist"):
        Recipe.load(tmp_path / "none.yaml")


# --- strictness


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("bogus=1", "unknown key bogus"),
        ("weights.bogus=1", "unknown key weights.bogus"),
        ("activations.bogus=1", "unknown key activations.bogus"),
        ("integer_scale.bogus=1", "unknown key integer_scale.bogus"),
        ("calibration.bogus=1", "unknown key calibration.bogus"),
        ("solver.bogus=1", "unknown key solver.bogus"),
        ("solver.sweeps=3", "unknown key solver.sweeps"),  # an option of another solver
        ("overrides=[{pattern: x, bogus: 1}]", "unknown key overrides.0.bogus"),
        ("overrides=[{pattern: x, weights: {bogus: 1}}]", "unknown key bogus"),
        ("weights.bits=5", "weights.bits is 5"),
        ("weights.bits=4.5", "weights.bits"),
        ("weights.bits=four", "weights.bits"),
        ("weights.group_size=0", "weights.group_size is 0"),
        ("weights.group_size=1", "weights.group_size is 1"),
        ("weights.symmetric=perhaps", "weights.symmetric"),
        ("weights.clip=mean", "weights.clip"),
        ("activations.bits=5", "activations.bits is 5"),
        ("activations.granularity=tensor", "activations.granularity"),
        ("activations={dynamic: false}", "dynamic true"),
        ("integer_scale.mode=during", "integer_scale.mode"),
        ("integer_scale.amplifier=1000", "integer_scale.amplifier is 1000"),
        ("integer_scale.amplifier=large", "integer_scale.amplifier"),
        ("solver.name=annealing", "solver.name is 'annealing'"),
        ("solver.damping=-1", "solver.damping"),
        ("solver.damping=.nan", "solver.damping"),
        ("solver.damping=.inf", "solver.damping"),
        ("solver={name: spqr, threshold: .inf}", "threshold"),
        ("solver={name: spqr, scale_bits: -1}", "scale_bits"),
        ("transforms=[{name: quarot, options: {seed: -1}}]", "seed"),
        ("tuning={name: rounding, options: {rate: .inf}}", "rate"),
        ("solver.block_size=many", "solver.block_size"),
        ("solver=gptq", "solver"),
        ("calibration.samples=0", "calibration.samples"),
        ("calibration.length=1", "calibration.length"),
        ("calibration.power=0", "calibration.power"),
        ("overrides=[{pattern: x, weights: {bits: 5}}]", "weights.bits is 5"),
        ("overrides=[{skip: true}]", "overrides.0.pattern"),
        ("overrides=[{pattern: 're:('}]", "not a regular expression"),
    ],
)
def test_unknown_keys_and_wrong_values_are_named(setting, words):
    assert words in refused(setting)


def test_a_power_of_moments_that_a_solver_does_not_take():
    assert "leave it out with rtn" in refused("calibration.power=0.5", "solver={name: rtn}")
    assert BASE.with_settings(("calibration.power=0.5",)).calibration.power == 0.5


def test_all_mistakes_are_told_at_once():
    message = refused("weights.bogus=1", "calibration.samples=0")
    assert "weights.bogus" in message and "calibration.samples" in message


def test_a_list_has_no_dotted_parts():
    recipe = BASE.with_settings(("overrides=[{pattern: x, skip: true}]",))
    assert "overrides has no parts" in refused("overrides.0.skip=false", recipe=recipe)


def test_combinations_that_cannot_work_are_refused():
    assert "symmetric" in refused("integer_scale.mode=before", "activations.bits=8")
    assert "activations.bits" in refused("integer_scale.mode=after", "weights.symmetric=true")
    message = refused("overrides=[{pattern: '*.down_proj', weights: {symmetric: false}}]", recipe=INTEGER)
    assert "*.down_proj" in message
    INTEGER.with_settings(("overrides=[{pattern: '*.down_proj', skip: true, weights: {symmetric: false}}]",))


def test_recipes_are_immutable():
    with pytest.raises(Exception, match="frozen"):
        BASE.weights.bits = 3


# --- settings


def test_settings_descend_by_dots_and_are_read_as_yaml():
    recipe = BASE.with_settings(
        ("weights.bits=3", "weights.group_size=auto", "weights.symmetric=true", "solver.damping=0.05",
         "activations.bits=8", "calibration={samples: 4, length: 64}", "integer_scale.amplifier=heuristic")
    )  # fmt: skip
    weights = recipe.weights
    assert (weights.bits, weights.group_size, weights.symmetric) == (3, "auto", True)
    assert weights.clip == BASE.weights.clip, "what is not set stays"
    assert recipe.solver.options().damping == 0.05
    assert recipe.activations is not None and recipe.activations.bits == 8
    assert (recipe.calibration.samples, recipe.calibration.length) == (4, 64)
    assert recipe.integer_scale.amplifier == "heuristic"
    assert recipe.name == "gptq" and recipe.description == BASE.description
    assert BASE.with_settings(()) is BASE


def test_later_settings_win():
    assert BASE.with_settings(("weights.bits=3", "weights.bits=2")).weights.bits == 2


def test_another_solver_leaves_the_options_of_the_first_behind():
    recipe = Recipe.named("quantease").with_settings(("solver.name=gptq", "solver.act_order=true"))
    assert recipe.solver.options().model_dump()["act_order"] is True
    # The same solver keeps what the recipe says.
    kept = Recipe.named("quantease").with_settings(("solver.name=quantease", "solver.sweeps=4"))
    assert (kept.solver.options().start, kept.solver.options().sweeps) == ("gptq", 4)
    assert BASE.with_settings(("solver=gptq", "solver.name=rtn")).solver.name == "rtn"


@pytest.mark.parametrize("written", ["rounding", "[rounding]", "{name: rounding, options: {batch_size: 4}}"])
def test_options_of_a_single_tuner(written):
    recipe = BASE.with_settings((f"tuning={written}", "tuning.options.iterations=64"))
    (part,) = recipe.tuning
    assert part.name == "rounding" and part.options_model().iterations == 64
    assert part.options_model().batch_size == (4 if "batch" in written else 2)
    assert Recipe.load("w4-best", ("tuning.options.iterations=7",)).tuning[0].options_model().iterations == 7


def test_a_part_can_be_taken_away():
    assert Recipe.named("w8a8").with_settings(("activations=null",)).activations is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [("weights.bits", "key=value"), ("=3", "key=value"), ("weights.bits.low=3", "bits has no parts"),
     ("overrides.0.skip=true", "overrides"), ("weights.bits=[3", "not valid YAML")],
)  # fmt: skip
def test_settings_that_are_no_settings(setting, words):
    message = refused(setting)
    assert words in message and setting in message


# --- overrides


def test_the_last_matching_override_wins():
    recipe = Recipe.from_dict({
        "weights": {"bits": 4, "group_size": 128, "symmetric": True},
        "overrides": [
            {"pattern": "*.mlp.*", "weights": {"bits": 3}},
            {"pattern": "*.mlp.down_proj", "weights": {"bits": 8}},
            {"pattern": r"re:layers\.[01]\.", "skip": True},
            {"pattern": "model.layers.1.self_attn.q_proj", "weights": {"group_size": -1}},
        ],
    })  # fmt: skip

    def bits(layer):
        part = recipe.weights_of(layer)
        return None if part is None else (part.bits, part.group_size, part.symmetric)

    assert bits("model.layers.2.self_attn.q_proj") == (4, 128, True)
    assert bits("model.layers.2.mlp.up_proj") == (3, 128, True)
    assert bits("model.layers.2.mlp.down_proj") == (8, 128, True)
    assert bits("model.layers.1.mlp.down_proj") is None
    assert bits("model.layers.1.self_attn.q_proj") == (4, -1, True)
    assert bits("model.layers.11.mlp.up_proj") == (3, 128, True), "the expression must not match layer 11"


def test_patterns_are_shell_style_on_the_whole_name_and_expressions_anywhere():
    recipe = BASE.with_settings(("overrides=[{pattern: q_proj, skip: true}, {pattern: 're:v_proj$', skip: true}]",))
    assert recipe.weights_of("model.layers.0.q_proj") is not None
    assert recipe.weights_of("q_proj") is None
    assert recipe.weights_of("model.layers.0.v_proj") is None
    assert recipe.weights_of("model.layers.0.V_PROJ") is not None


def test_overrides_survive_the_round_trip():
    recipe = INTEGER.with_settings(("overrides=[{pattern: '*.down_proj', weights: {bits: 8}}]",))
    again = Recipe.from_dict(recipe.to_dict())
    part = again.weights_of("a.down_proj")
    assert part is not None and (part.bits, part.group_size, part.clip) == (8, "auto", "mse")


@pytest.mark.parametrize(
    ("part", "words"),
    [("weights: {symmetric: false}", "symmetric weights"), ("weights: {clip: signed}", "clip mse"),
     ("activations: {symmetric: false}", "symmetric activations")],
)  # fmt: skip
def test_overrides_keep_what_integer_scales_need(part, words):
    override = "overrides=[{pattern: '*.down_proj', " + part + "%s}]"
    assert f"{words}, also in the override of *.down_proj" in refused(override % "", recipe=INTEGER)
    assert INTEGER.with_settings((override % ", skip: true",)).overrides[0].skip


# --- group sizes


@pytest.mark.parametrize(
    ("columns", "size"),
    [([4096, 11008], 128), ([4096, 960], 64), ([96, 256], 32), ([2048, 100], None), ([48], None), ([128], 128)],
)
def test_auto_is_the_largest_standard_group_that_divides_all(columns, size):
    assert resolve_group_size(columns) == size


def test_ragged():
    assert [is_ragged(*case) for case in ((100, 32), (96, 32), (100, -1), (10, 32))] == [True, False, False, True]


def test_what_folded_scales_need():
    folded = Recipe.named("w4a8-folded")
    assert INTEGER.with_settings(("integer_scale.mode=folded",)).integer_scale == folded.integer_scale
    for amplifier in (1024, "heuristic"):
        assert "no amplifier" in refused(f"integer_scale.amplifier={amplifier}", recipe=folded)
    assert "at most 4 bits" in refused("weights.bits=8", recipe=folded)
    assert "static_groups" in refused("solver.static_groups=false", recipe=folded)
    assert "symmetric" in refused("weights.symmetric=false", recipe=folded)
    override = "overrides=[{pattern: '*down_proj', weights: {bits: 6}}]"
    assert "at most 4 bits, also in the override of *down_proj" in refused(override, recipe=folded)
    for allowed in ("weights.bits=3", "overrides=[{pattern: '*down_proj', weights: {bits: 8}, skip: true}]"):
        assert folded.with_settings((allowed,)).integer_scale.mode == "folded"
