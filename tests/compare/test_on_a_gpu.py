"""A comparison and a measurement on a GPU: the numbers are close to those of a CPU."""

import pytest
import torch

from finescale.compare.grid import cells_of, make_grid
from finescale.compare.run import Options, compare
from finescale.mixed.sensitivity import measure, prepare_measurement
from tests.helpers import recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_two_processes_share_a_gpu(tiny, text, tmp_path):
    given = {"recipes": ["rtn", "gptq"], "bits": [4, 8], "set": ["calibration.samples=4", "calibration.length=48"]}
    cells = cells_of([make_grid(given, "x")])
    options = {"calibration": str(text), "text": str(text), "windows": 3, "length": 60}
    gpu = compare(tiny("llama"), cells, tmp_path / "gpu", Options(**options, devices=("cuda",), jobs=2))
    cpu = compare(tiny("llama"), cells, tmp_path / "cpu", Options(**options))
    for own, other in zip(gpu["rows"], cpu["rows"], strict=True):
        assert own["key"] == other["key"] and own["perplexity"] == pytest.approx(other["perplexity"], rel=0.02)


def test_divergences_are_those_of_a_cpu(tiny, text):
    given = (tiny("llama"), recipe("rtn", group=32), ((2, None), (4, None)), str(text))
    gpu, cpu = (measure(prepare_measurement(*given, device=device, windows=2)) for device in ("cuda", "cpu"))
    for own, other in zip(gpu.units, cpu.units, strict=True):
        assert own.layers == other.layers
        for one, two in zip(own.options, other.options, strict=True):
            assert one.stored_bits == two.stored_bits and one.kl == pytest.approx(two.kl, rel=0.02)
