"""What `bench gemm` times on a GPU: each product with its weights, its call and what it should give.

Shape legend: T tokens, I inputs, O outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from finescale.kernels import layout
from finescale.kernels.dispatch import has_hopper_kernels
from finescale.kernels.hopper import gemm
from finescale.kernels.reference import grouped_int32_product

GROUP = 128
AMPLIFIER = 1024
SEED = 0
CACHE_BYTES = 300 * 2**20
"""Copies of what is read together fill the last-level cache several times over."""


class Layer:
    """Random weights of one shape: codes with scales of 10 bits, and with scales small enough to be folded."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.inputs, self.outputs, self.device = inputs, outputs, device
        generator = torch.Generator(device).manual_seed(SEED)
        shape = (outputs, inputs)
        self.codes_OI = torch.randint(-8, 8, shape, dtype=torch.int8, device=device, generator=generator)
        groups = (outputs, inputs // GROUP)
        self.scale_OG = torch.randint(100, 1024, groups, dtype=torch.int32, device=device, generator=generator)
        self.small_scale_OG = torch.randint(1, 16, groups, dtype=torch.int32, device=device, generator=generator)

    def copies(self, weight: Tensor) -> list[Tensor]:
        """As many of a weight as leave the cache."""
        count = max(3, -(-CACHE_BYTES // (weight.numel() * weight.element_size())))
        return [weight, *(weight.clone() for _ in range(count - 1))]


@dataclass(frozen=True)
class Tokens:
    """Inputs of all products: int8 with scales, also as the Hopper kernel reads them; bfloat16 and fp8.

    ``padded_TI`` is ``x_TI`` with rows of zeros up to 32, since torch's int8 product takes more than 16 only.
    """

    x_TI: Tensor
    padded_TI: Tensor
    scale_T: Tensor
    packed: Tensor
    sum_T: Tensor
    x_bf16_TI: Tensor
    x_fp8_TI: Tensor


def tokens_of(layer: Layer, count: int) -> Tokens:
    """Random ones."""
    x_TI = torch.randint(-127, 128, (count, layer.inputs), dtype=torch.int8, device=layer.device)
    x_bf16_TI = torch.randn(count, layer.inputs, device=layer.device, dtype=torch.bfloat16)
    return Tokens(
        x_TI,
        torch.cat([x_TI, x_TI.new_zeros(max(0, 32 - count), layer.inputs)]),
        torch.rand(count, device=layer.device) + 0.5,
        layout.pack_tokens(x_TI),
        x_TI.sum(1, dtype=torch.int32),
        x_bf16_TI,
        x_bf16_TI.to(torch.float8_e4m3fn),
    )


@dataclass(frozen=True)
class Product:
    """One way to multiply.

    Attributes:
        weights: copies of the weight.
        call: (weight, tokens) -> Y [T, O].
        expected: tokens -> Y [T, O], by other means.
        tolerance: largest difference over the largest expected value; 0 where all bits must agree.
        most_tokens: not timed beyond, since it is far behind from there on.
    """

    weights: list[Any]
    call: Callable[[Any, Tokens], Tensor]
    expected: Callable[[Tokens], Tensor]
    tolerance: float = 0.0
    most_tokens: int = 1 << 30

    def difference(self, tokens: Tokens) -> float:
        """Largest difference to what is expected, over the largest expected value."""
        expected = self.expected(tokens).float()
        return float((self.call(self.weights[0], tokens).float() - expected).abs().max() / expected.abs().max())


def exact_output(layer: Layer, scale_OG: Tensor, tokens: Tokens) -> Tensor:
    """The exact product rounded once to bfloat16."""
    sums_TO = grouped_int32_product(tokens.x_TI, layer.codes_OI, scale_OG, GROUP)
    return (sums_TO.float() * (tokens.scale_T[:, None] / AMPLIFIER)).bfloat16()


def hopper_variant(
    inputs: int, outputs: int, device: torch.device, count: int, folded: bool, float_scales: bool
) -> gemm.Variant:
    """The variant of our kernel that runs for so many tokens."""
    variant = gemm.choose(count, outputs, inputs // layout.BLOCK, 1, folded, 0, gemm.capacity(device.index))
    return replace(variant, float_scales=float_scales)


def hopper(layer: Layer, folded: bool = False, float_scales: bool = False) -> Product | None:
    """Our kernel for Hopper: integer scales, small ones folded into the weights, or bfloat16 ones to compare with."""
    if not has_hopper_kernels(layer.device):
        return None
    exact_OG = scale_OG = layer.small_scale_OG if folded else layer.scale_OG
    if float_scales:
        exact_OG = scale_OG.bfloat16().to(torch.int32)
        scale_OG = scale_OG.bfloat16().view(torch.int16).to(torch.int32)
    packed = layout.pack_weight(layer.codes_OI, scale_OG, GROUP)

    def call(weight: Tensor, tokens: Tokens) -> Tensor:
        count = tokens.x_TI.shape[0]
        variant = hopper_variant(layer.inputs, layer.outputs, layer.device, count, folded, float_scales)
        return gemm.run(
            tokens.packed, tokens.scale_T, tokens.sum_T, weight, count, layer.outputs, AMPLIFIER, None, torch.bfloat16,
            folded, variant,
        )  # fmt: skip

    # float32 sums of bfloat16 scales round, a step of bfloat16 at most.
    return Product(
        layer.copies(packed), call, lambda t: exact_output(layer, exact_OG, t), 2**-7 if float_scales else 0.0
    )  # fmt: skip


def triton(layer: Layer) -> Product | None:
    """Our kernel for other GPUs, on quantized tokens too."""
    if find_spec("triton") is None:
        return None
    from finescale.kernels import triton_gemm

    weight = triton_gemm.pack_weight(layer.codes_OI, layer.scale_OG, GROUP)

    def call(weight: triton_gemm.TritonWeight, tokens: Tokens) -> Tensor:
        return triton_gemm.product(
            tokens.x_TI, tokens.scale_T, weight, GROUP, False, AMPLIFIER, None, None, torch.bfloat16
        )  # fmt: skip

    copies = [triton_gemm.TritonWeight(packed, weight.scale_GO.clone()) for packed in layer.copies(weight.packed_COH)]
    return Product(copies, call, lambda t: exact_output(layer, layer.scale_OG, t))


def bf16(layer: Layer) -> Product:
    """torch's bfloat16 product (cuBLAS)."""
    weight_OI = torch.randn(layer.outputs, layer.inputs, device=layer.device, dtype=torch.bfloat16)
    return Product(
        layer.copies(weight_OI),
        lambda w, t: t.x_bf16_TI @ w.T,
        lambda t: t.x_bf16_TI.float() @ weight_OI.float().T,
        0.02,
    )


def int8(layer: Layer) -> Product:
    """torch's int8 product, without scales and without groups; it takes more than 16 tokens only."""

    def call(weight: Tensor, tokens: Tokens) -> Tensor:
        return torch._int_mm(tokens.padded_TI, weight.T)[: tokens.x_TI.shape[0]]

    one_OG = torch.ones(layer.outputs, 1, dtype=torch.int32, device=layer.device)
    sums = lambda t: grouped_int32_product(t.x_TI, layer.codes_OI, one_OG, -1)  # noqa: E731
    return Product(layer.copies(layer.codes_OI), call, sums)


def fp8(layer: Layer) -> Product:
    """torch's fp8 product, one scale for all."""
    one = torch.ones((), device=layer.device)
    weight_OI = torch.randn(layer.outputs, layer.inputs, device=layer.device).to(torch.float8_e4m3fn)

    def call(weight: Tensor, tokens: Tokens) -> Tensor:
        return torch._scaled_mm(tokens.x_fp8_TI, weight.T, one, one, out_dtype=torch.bfloat16)

    return Product(layer.copies(weight_OI), call, lambda t: t.x_fp8_TI.float() @ weight_OI.float().T, 0.02)


def tinygemm(layer: Layer) -> Product:
    """torch's 4-bit product with bfloat16 inputs and scales."""
    nibbles_OI = layer.codes_OI + 8
    # Two codes a byte, the first in the high half.
    bytes_OI = (nibbles_OI[:, ::2] << 4 | nibbles_OI[:, 1::2]).view(torch.uint8)
    weight = torch._convert_weight_to_int4pack(bytes_OI.contiguous(), 8)
    scale_OG = layer.scale_OG.bfloat16() / AMPLIFIER
    scale_GO2 = torch.stack([scale_OG.T, torch.zeros_like(scale_OG.T)], 2).contiguous()
    dense_OI = layer.codes_OI.float() * scale_OG.float().repeat_interleave(GROUP, 1)
    return Product(
        layer.copies(weight),
        lambda w, t: torch._weight_int4pack_mm(t.x_bf16_TI, w, GROUP, scale_GO2),
        lambda t: t.x_bf16_TI.float() @ dense_OI.T,
        0.03,
        64,
    )


def humming(layer: Layer) -> Product | None:
    """The W4A8 product of the package humming-kernels, with its own integer scales, if it is installed."""
    if find_spec("humming") is None:
        return None
    from humming.layer import HummingLayer

    dense_OI = layer.codes_OI.float() * (layer.scale_OG.float() / AMPLIFIER).repeat_interleave(GROUP, 1)
    copies = len(layer.copies(layer.codes_OI[:, ::2]))

    def packed() -> Any:
        weights = {"dtype": "int4", "group_size": GROUP}
        one = HummingLayer(
            shape_n=layer.outputs, shape_k=layer.inputs, weight_config=weights, input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).to(layer.device)  # fmt: skip
        one.load_from_unquantized(dense_OI.bfloat16())
        one.transform()
        return one

    return Product(
        [packed() for _ in range(copies)],
        lambda w, t: w(inputs=t.x_TI, input_scale=t.scale_T[:, None]),
        lambda t: (t.x_TI.float() @ dense_OI.T) * t.scale_T[:, None],
        0.05,
    )


OURS: dict[str, Callable[[Layer], Product | None]] = {
    "integer": hopper,
    "folded": lambda layer: hopper(layer, folded=True),
    "float_scale": lambda layer: hopper(layer, float_scales=True),
    "triton": triton,
}
PEERS: dict[str, Callable[[Layer], Product | None]] = {
    "int8": int8,
    "fp8": fp8,
    "tinygemm": tinygemm,
    "humming": humming,
}
