import pytest

from finescale.errors import InputError
from finescale.models import FAMILIES, find_family
from tests.helpers import CONFIGS, assert_sentence


def test_every_family_has_a_tiny_model_in_the_tests():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


def test_an_unknown_family_is_refused_with_the_flag_that_allows_it():
    with pytest.raises(InputError, match="--allow-unknown-family") as caught:
        find_family({"model_type": "gpt_neox"})
    assert "gpt_neox" in str(caught.value)
    assert_sentence(str(caught.value))


def test_an_unknown_family_is_taken_when_allowed_and_named():
    assert find_family({"model_type": "gpt_neox"}, allow_unknown=True).model_type == "gpt_neox"
    with pytest.raises(InputError):
        find_family({}, allow_unknown=True)
