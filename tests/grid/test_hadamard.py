"""Hadamard matrices and the fast rotation, against their definition."""

import math

import pytest
import torch

from finescale.errors import InputError
from finescale.grid.hadamard import hadamard_factors, hadamard_matrix, has_hadamard, largest_rotation, rotate

# Hidden and intermediate sizes of Llama, Mistral, Qwen, Falcon, OPT, BLOOM, GPT-2, SmolLM2, TinyLlama, Phi, Yi.
LLM_SIZES = [80, 96, 128, 576, 768, 896, 960, 1024, 1280, 1408, 1536, 1600, 1792, 2048, 2304, 2560, 2688, 2816, 3072,
             3200, 3584, 4096, 4480, 4544, 4864, 5120, 5376, 5504, 5632, 6144, 6656, 6912, 7168, 8192, 8640, 8960, 9216,
             9728, 10240, 11008, 11264, 12288, 13824, 14336, 14784, 14848, 16384, 17408, 17920, 18176, 18432,
             18944, 20480, 21504, 22016, 24576, 25600, 27648, 28672, 29568, 32768, 53248]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 52, 68, 76, 100, 108, 140, 148, 344, 576, 1536])
def test_entries_are_signs_and_rows_are_orthogonal(size):
    matrix = hadamard_matrix(size).double()
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
    assert bool((matrix[0] == 1).all()) and bool((matrix[:, 0] == 1).all())


@pytest.mark.parametrize("size", LLM_SIZES)
def test_every_size_of_language_models_has_one(size):
    assert has_hadamard(size)
    assert math.prod(hadamard_factors(size)) == size


@pytest.mark.parametrize(("size", "inner"), [(1, 1), (8, 1), (12, 1), (96, 1), (344, 1), (9 * 64, 1), (8, 5), (12, 7)])
def test_rotation_is_the_product_with_the_matrix(size, inner):
    x_TI = torch.randn(3, 2, 2 * size * inner, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    matrix = hadamard_matrix(size).double() / math.sqrt(size)
    parts = x_TI.reshape(3, 2, 2, size, inner)
    expected_TI = torch.einsum("abokn,kl->aboln", parts, matrix).reshape(x_TI.shape)
    torch.testing.assert_close(rotate(x_TI, size, inner), expected_TI, rtol=1e-12, atol=1e-12)


def test_one_outlier_is_spread_evenly():
    x_TI = torch.zeros(1, 576)
    x_TI[0, 17] = 100.0
    torch.testing.assert_close(rotate(x_TI, 576).abs(), torch.full((1, 576), 100 / math.sqrt(576)))


@pytest.mark.parametrize(
    ("channels", "expected"), [(576, (576, 1)), (13696, (128, 107)), (172, (4, 43)), (7, (1, 7)), (90, (2, 45))]
)
def test_channels_without_a_matrix_are_rotated_in_parts(channels, expected):
    assert largest_rotation(channels) == expected


@pytest.mark.parametrize("size", [0, 3, 6, 9, 172])
def test_sizes_without_a_construction_are_refused(size):
    assert not has_hadamard(size)
    with pytest.raises(InputError, match=f"size {size}"):
        hadamard_matrix(size)
