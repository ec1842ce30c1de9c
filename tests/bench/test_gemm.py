import pytest

from finescale.bench.gemm import bench_gemm
from finescale.errors import InputError


@pytest.mark.parametrize("shape, tokens", [((100, 64), 1), ((0, 64), 1), ((128, 0), 1), ((128, 64), 0)])
def test_sizes_that_are_none_are_refused_first(shape, tokens):
    with pytest.raises(InputError, match="multiples of the group"):
        bench_gemm((shape,), (tokens,))
