"""Who computes what: every unit once, at any size."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finescale.kernels.hopper.gemm import SHARED_BYTES, Variant, choose, schedule, variants, workspace_sums


def units_of(shares, blocks):
    """What the kernel's blocks do, as its Schedule walks."""
    done = Counter()
    for block in range(shares.grid):
        if block < (shares.tiles - shares.whole_tiles) * shares.splits:
            tile, part = divmod(block, shares.splits)
            for unit in range(blocks * part // shares.splits, blocks * (part + 1) // shares.splits):
                done[shares.whole_tiles + tile, unit] += 1
        for tile in range(block, shares.whole_tiles, shares.grid):
            for unit in range(blocks):
                done[tile, unit] += 1
    return done


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(1, 700),
    outputs=st.integers(1, 3000),
    blocks=st.integers(1, 40),
    at_once=st.sampled_from([1, 7, 114, 132]),
    cluster=st.sampled_from([1, 2, 4]),
    folded=st.booleans(),
    split=st.booleans(),
)
def test_every_unit_once(tokens, outputs, blocks, at_once, cluster, folded, split):
    at_once = max(at_once // cluster, 1) * cluster
    for width, warpgroups in ((8, 3), (64, 1), (128, 2)):
        variant = Variant(width, warpgroups, 1, folded, 0, split, cluster=cluster)
        shares = schedule(variant, tokens, outputs, blocks, at_once)
        assert shares.grid <= at_once and shares.grid % cluster == 0
        done = units_of(shares, blocks)
        assert set(done.values()) == {1} and len(done) == shares.tiles * blocks
        # A block holds one part at most, and every part has a block.
        assert (shares.tiles - shares.whole_tiles) * shares.splits <= shares.grid
        # The blocks of a cluster share one tile.
        assert cluster == 1 or shares.splits in (1, cluster)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 64, 65, 128, 129, 5000])
def test_variants_fit_the_chip(tokens, groups, folded):
    found = variants(tokens, groups, folded, 0)
    assert found
    for variant in found:
        assert variant.shared_bytes <= SHARED_BYTES and variant.depth >= 4
        assert variant.tokens <= (256 if folded else 128)
    assert choose(tokens, 4096, 32, groups, folded, 0, ((1, 132), (2, 132), (4, 128))) in found


@pytest.mark.parametrize("multiprocessors", [1, 2, 114, 132])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 200, 700])
def test_the_sums_of_split_tiles_fit_the_one_workspace(tokens, multiprocessors):
    for outputs in range(64, 12000, 448):
        for variant in variants(tokens, 1, True, 0) + variants(tokens, 1, False, 0):
            if variant.cluster > 1:  # these need none
                continue
            shares = schedule(variant, tokens, outputs, 32, multiprocessors)
            slots = (shares.tiles - shares.whole_tiles) * variant.warpgroups
            assert slots * variant.tokens * 64 <= workspace_sums(multiprocessors)
