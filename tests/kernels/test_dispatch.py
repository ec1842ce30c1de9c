from dataclasses import replace

import pytest
import torch

from finescale.kernels.dispatch import LayerFacts, choose_kernel

W4A8 = LayerFacts(4, 128, True, True, 400, 8, True, False)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    "layer, device, capability, kernel, why",
    [
        (W4A8, CUDA, (9, 0), "hopper", "exactly"),
        (replace(W4A8, largest_scale=15), CUDA, (9, 0), "hopper-folded", "up to 15"),
        (W4A8, CUDA, (8, 0), "reference", "capability 8.0"),
        (W4A8, CUDA, (10, 0), "reference", "capability 10.0"),
        (W4A8, CPU, None, "reference", "no CUDA device"),
        (replace(W4A8, bits=8), CUDA, (9, 0), "reference", "W8A8"),
        (replace(W4A8, activation_bits=6), CUDA, (9, 0), "reference", "W4A6"),
        (replace(W4A8, group_size=48), CUDA, (9, 0), "reference", "groups of 48"),
        (replace(W4A8, contiguous_groups=False), CUDA, (9, 0), "reference", "scattered"),
        (replace(W4A8, largest_scale=40000), CUDA, (9, 0), "reference", "16 bits"),
        (replace(W4A8, activation_bits=None), CUDA, (9, 0), "float", "not quantized"),
        (replace(W4A8, integer_scales=False), CUDA, (9, 0), "float", "floats"),
        (replace(W4A8, outliers=True), CUDA, (9, 0), "float", "outliers"),
        (replace(W4A8, symmetric_activations=False), CPU, None, "float", "asymmetric"),
    ],
)
def test_table(layer, device, capability, kernel, why):
    choice = choose_kernel(layer, device, capability)
    assert choice.kernel == kernel and why in choice.why
