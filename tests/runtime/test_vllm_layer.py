"""What the vLLM plugin makes of a layer's stored scales; no vLLM is needed."""

from dataclasses import replace

import pytest
import torch

from finescale.errors import InputError
from finescale.grid import ActivationScheme, WeightScheme, contiguous_groups
from finescale.grid.integer_scale import prove_no_overflow
from finescale.runtime.vllm_layer import LayerDescription

SCHEME = WeightScheme(4, 32, True)


def layer(seed=0):
    """Two fused parts of 16 outputs with amplifiers of their own, 64 inputs."""
    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(-8, 8, (32, 64), generator=generator).to(torch.int8)
    integer_OG = torch.randint(1, 60, (32, 2), generator=generator).int()
    parts, scales = [], []
    for rows, amplifier in ((slice(0, 16), 256), (slice(16, 32), 1024)):
        bound = prove_no_overflow("part", codes_OI[rows], integer_OG[rows], contiguous_groups(64, 32))
        parts.append({"amplifier": amplifier, "bound": bound})
        scales.append(integer_OG[rows] / amplifier)
    return LayerDescription("qkv", "pack-quantized", SCHEME, ActivationScheme(8), parts), codes_OI, integer_OG, scales


def test_integers_of_each_part_come_back():
    description, codes_OI, integer_OG, scales = layer()
    found_OG, factor_O = description.integers(torch.cat(scales), [16, 16])
    assert torch.equal(found_OG, integer_OG)
    assert factor_O.tolist() == [1 / 256] * 16 + [1 / 1024] * 16
    description.prove(codes_OI, found_OG, [16, 16], whole=True)


def test_folded_scales_have_a_factor_for_each_output():
    description, _, _, _ = layer()
    folded = replace(description, parts=[{"amplifier": 1, "folded": True, "bound": 1}])
    integer_OG = torch.tensor([[15, 7], [4, 9]])
    factor_O = torch.tensor([0.25, 0.0625])
    found_OG, found_O = folded.integers((integer_OG * factor_O[:, None]).float(), [2])
    assert torch.equal(found_OG.long(), integer_OG) and torch.equal(found_O, factor_O)


def test_changed_scales_are_refused():
    description, codes_OI, integer_OG, scales = layer()
    with pytest.raises(InputError, match="not integers over the stored amplifier"):
        description.integers(torch.cat(scales) * 0.77, [16, 16])
    with pytest.raises(InputError, match="not the stored one"):
        description.prove(codes_OI, integer_OG * 2, [16, 16], whole=True)
    with pytest.raises(InputError, match="not the stored one"):
        description.prove(codes_OI, (integer_OG // 2).clamp(min=1), [16, 16], whole=True)
    # A rank's share of the inputs has a lower bound, and may.
    description.prove(codes_OI[:, :32], integer_OG[:, :1], [16, 16], whole=False)


@pytest.mark.parametrize(
    "changes, inputs, words",
    [
        ({}, 48, "96 inputs over 2 ranks would cut groups of 32"),
        ({"scheme": WeightScheme(3, -1, True)}, 72, "would cut groups of -1"),
        ({"parts": [{"inputs": {"gather": True, "rotation": None}}]}, 64, "cannot be cut; use one rank"),
        ({}, 64, None),
    ],
)
def test_cuts(changes, inputs, words):
    description = replace(layer()[0], **changes)
    if words is None:
        description.check_cut(inputs, 2)
        return
    with pytest.raises(InputError, match=words):
        description.check_cut(inputs, 2)


def test_parts_that_rearrange_differently_are_refused():
    parts = [{"inputs": {"gather": True, "rotation": None}}, {"inputs": {"gather": False, "rotation": [8, 1]}}]
    with pytest.raises(InputError, match="differently"):
        _ = replace(layer()[0], parts=parts).inputs


def test_the_exact_product_needs_symmetric_tokens_and_integers():
    description = layer()[0]
    assert description.integer
    assert not replace(description, activations=ActivationScheme(8, symmetric=False)).integer
    assert not replace(description, activations=None).integer
    assert not replace(description, parts=[{"amplifier": None}]).integer
