"""Splitting and merging channels against loops over channels in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.transforms.reassembly import assemble, disassemble, merge_scores, prune, splits


def problem(channels=12, outputs=5, tokens=30, seed=0, outliers=(3,), size=9.0):
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    x_TI[:, list(outliers)] *= size
    return x_TI, torch.randn(outputs, channels, generator=generator, dtype=torch.float64)


def slow_splits(absmax, theta):
    counts = []
    for value in absmax:
        count = 1
        while value / count > theta:
            count += 1
        counts.append(count)
    return counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0.5, 50))
def test_a_channel_is_split_until_it_stays_below_the_threshold(values, theta):
    absmax_I = torch.tensor(values, dtype=torch.float64)
    assert splits(absmax_I, theta).tolist() == slow_splits(values, theta)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 30))
def test_splitting_keeps_the_product_and_bounds_the_input(seed, theta):
    x_TI, weight_OI = problem(seed=seed)
    absmax_I = x_TI.abs().amax(0)
    parts = disassemble(splits(absmax_I, theta))
    gathered_TJ = parts.gather().apply(x_TI)
    torch.testing.assert_close(gathered_TJ @ parts.weight(weight_OI).T, x_TI @ weight_OI.T, rtol=1e-6, atol=1e-6)
    assert float(gathered_TJ.abs().max()) <= theta * (1 + 1e-6)
    assert parts.width == sum(slow_splits(absmax_I.tolist(), theta))


def slow_merge(x_TE, weight_OE, i, j):
    """The change of the product when two channels become their mean and their sum."""
    merged = (x_TE[:, i] + x_TE[:, j])[:, None] / 2 * (weight_OE[:, i] + weight_OE[:, j])
    kept = x_TE[:, i, None] * weight_OE[:, i] + x_TE[:, j, None] * weight_OE[:, j]
    return merged - kept


def test_exact_score_is_the_squared_change_of_the_output():
    x_TI, weight_OI = problem()
    score_II = merge_scores(x_TI.T @ x_TI, weight_OI, "exact")
    for i in range(12):
        for j in range(12):
            if i != j:
                assert float(score_II[i, j]) == pytest.approx(float(slow_merge(x_TI, weight_OI, i, j).square().sum()))


def test_public_score_is_that_of_the_authors_code():
    x_TI, weight_OI = problem()
    score_II = merge_scores(x_TI.T @ x_TI, weight_OI, "public")
    for i, j in ((0, 1), (4, 7), (3, 10)):
        distance = torch.dist(x_TI[:, i], x_TI[:, j])
        sums = weight_OI[:, i].sum() + weight_OI[:, j].sum()
        assert float(score_II[i, j]) == pytest.approx(float((distance * sums) ** 2))


def slow_assembly(x_TI, weight_OI, split):
    """Gathered input and merged weight, channel by channel: each even one looks for its nearest odd one."""
    source = [i for i, count in enumerate(split) for _ in range(count)]
    x = [x_TI[:, i] / split[i] for i in source]
    columns = [weight_OI[:, i] for i in source]
    extra = len(source) - len(split)
    links = []
    for a in range(0, len(source), 2):
        costs = []
        for b in range(1, len(source), 2):
            free = split[source[a]] == 1 and split[source[b]] == 1
            cost = (x[a] - x[b]).square().sum() * (columns[a] - columns[b]).square().sum() / 4
            costs.append((float(cost) if free else float("inf"), b))
        links.append((*min(costs), a))
    members = {e: [e] for e in range(len(source))}
    for cost, b, a in sorted(links, key=lambda link: link[0])[:extra]:
        if cost < float("inf"):
            members[b] += members.pop(a)
    inputs = torch.stack([sum(x[e] for e in group) / len(group) for group in members.values()], 1)
    weight = torch.stack([sum(columns[e] for e in group) for group in members.values()], 1)
    return inputs, weight


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(3,), (0, 7), (2, 5, 11)]), st.floats(2, 20))
def test_assembly_equals_the_loop(seed, outliers, theta):
    x_TI, weight_OI = problem(channels=16, seed=seed, outliers=outliers)
    split_I = splits(x_TI.abs().amax(0), theta)
    score_II = merge_scores(x_TI.T @ x_TI, weight_OI, "exact")
    found = assemble(disassemble(split_I), score_II)
    inputs_TJ, weight_OJ = slow_assembly(x_TI, weight_OI, split_I.tolist())
    torch.testing.assert_close(found.weight(weight_OI), weight_OJ)
    torch.testing.assert_close(found.gather().apply(x_TI), inputs_TJ, rtol=1e-6, atol=1e-6)
    assert found.width >= 16


def test_the_width_is_the_old_one_while_enough_channels_can_be_merged():
    x_TI, weight_OI = problem(channels=64, outliers=(5, 40), size=20)
    score_II = merge_scores(x_TI.T @ x_TI, weight_OI, "exact")
    absmax_I = x_TI.abs().amax(0)
    few, many = (assemble(disassemble(splits(absmax_I, theta)), score_II) for theta in (6.0, 0.01))
    assert few.width == 64 and disassemble(splits(absmax_I, 6.0)).width > 64
    assert many.width > 64  # every channel is split: none is left to merge


def test_no_split_changes_nothing():
    x_TI, weight_OI = problem()
    parts = assemble(disassemble(torch.ones(12, dtype=torch.int64)), merge_scores(x_TI.T @ x_TI, weight_OI, "exact"))
    assert torch.equal(parts.weight(weight_OI), weight_OI)
    assert torch.equal(parts.gather().apply(x_TI), x_TI)


def test_pruning_drops_the_channels_that_matter_least():
    x_TI, weight_OI = problem(channels=16)
    split_I = splits(x_TI.abs().amax(0), 8.0)
    extra = int(split_I.sum()) - 16
    costs = {i: float((x_TI[:, i, None] * weight_OI[:, i]).square().sum()) for i in range(16) if int(split_I[i]) == 1}
    gone = sorted(costs, key=costs.__getitem__)[:extra]
    kept = [i for i in range(16) if i not in gone]
    found = prune(disassemble(split_I), x_TI.T @ x_TI, weight_OI)
    assert extra > 0 and found.width == 16
    expected_TO = x_TI[:, kept] @ weight_OI[:, kept].T
    torch.testing.assert_close(
        found.gather().apply(x_TI) @ found.weight(weight_OI).T, expected_TO, rtol=1e-6, atol=1e-6
    )
