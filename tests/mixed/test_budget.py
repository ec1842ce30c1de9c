"""The budget solver against trying everything."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.errors import InputError
from finescale.mixed import budget as module
from finescale.mixed.budget import Choice, least_cost, least_loss, lower_bound
from tests.helpers import assert_sentence

CHOICE = st.builds(Choice, st.integers(1, 40), st.integers(0, 60).map(float))
UNITS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def everything(units):
    """(cost, loss) of every selection."""
    for picked in product(*units):
        yield sum(choice.cost for choice in picked), sum(choice.loss for choice in picked)


@settings(deadline=None, max_examples=150)
@given(UNITS, st.integers(5, 160))
def test_least_loss_is_the_best_of_all(units, most):
    fitting = [loss for cost, loss in everything(units) if cost <= most]
    if not fitting:
        with pytest.raises(InputError, match="raise the target"):
            least_loss(units, most)
        return
    found = least_loss(units, most)
    assert found.loss == min(fitting) and found.cost <= most and found.gap == 0
    assert lower_bound(units, most) <= found.loss + 1e-9
    picked = [unit[number] for unit, number in zip(units, found.chosen, strict=True)]
    assert (sum(c.cost for c in picked), sum(c.loss for c in picked)) == (found.cost, found.loss)


@settings(deadline=None, max_examples=100)
@given(UNITS, st.integers(0, 200))
def test_least_cost_is_the_cheapest_of_all(units, most):
    fitting = [cost for cost, loss in everything(units) if loss <= most]
    if not fitting:
        with pytest.raises(InputError, match="allow more") as caught:
            least_cost(units, most)
        assert_sentence(str(caught.value))
        return
    found = least_cost(units, most)
    assert found.cost == min(fitting) and found.loss <= most


def large(seed=0, count=200):
    generator = np.random.default_rng(seed)
    units = []
    for _ in range(count):
        size, weight = int(generator.integers(10_000, 90_000)), float(generator.exponential())
        units.append([Choice(bits * size + int(generator.integers(99)), weight * 4.0**-bits) for bits in (2, 3, 4, 6)])
    return units


def test_a_model_of_many_layers_is_solved_within_its_gap(monkeypatch):
    """Thinned out, the result still fits, and the gap that it names holds."""
    monkeypatch.setattr(module, "LIMIT", 2000)
    units = large()
    most = int(3.5 * sum(unit[1].cost for unit in units) / 3)
    found = least_loss(units, most)
    bound = lower_bound(units, most)
    assert found.cost <= most and 0 < found.gap < 3e-3 * found.loss
    assert found.loss == pytest.approx(bound + found.gap)
    uniform = sum(unit[1].loss for unit in units)
    assert found.loss < uniform


def test_a_plain_model_is_solved_exactly():
    """Layers come in a few sizes, so that few different costs occur and nothing is thinned out."""
    weights = np.random.default_rng(1).exponential(size=120)
    units = [
        [Choice(bits * size, weight * 4.0**-bits) for bits in (2, 3, 4, 6)]
        for size, weight in zip([9, 3, 18, 9] * 30, weights, strict=True)
    ]
    found = least_loss(units, int(3.5 * 39 * 30))
    assert found.gap == 0 and found.cost == int(3.5 * 39 * 30)
