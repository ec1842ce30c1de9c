"""Which kernel runs a quantized layer on which device, and why: one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from finescale.errors import InputError
from finescale.grid import InputRule, QuantizedWeight, contiguous_groups
from finescale.kernels.cpu_int8 import int8_product_is_exact
from finescale.kernels.layout import LARGEST_FOLDED_SCALE, LARGEST_SCALE, groups_in_block

Kernel = Literal["hopper-grouped", "hopper-folded", "hopper", "triton", "cpu-int8", "reference", "float"]
"""From the fastest to what runs anything."""


@dataclass(frozen=True)
class LayerFacts:
    """What decides which kernel can run a layer.

    Attributes:
        bits: of the weights.
        group_size: inputs of a group, -1 for all.
        contiguous_groups: groups are neighbouring inputs (not so with act-order without static groups).
        integer_scales: scales are integers over an amplifier.
        largest_scale: largest integer scale in magnitude, 0 without.
        activation_bits: of the inputs, None for float inputs.
        symmetric_activations: inputs are rounded without zero point, one scale a token, found at run time.
        outliers: some weights are added in full precision.
    """

    bits: int
    group_size: int
    contiguous_groups: bool
    integer_scales: bool
    largest_scale: int
    activation_bits: int | None
    symmetric_activations: bool
    outliers: bool


@dataclass(frozen=True)
class Choice:
    """A kernel and one sentence about the choice."""

    kernel: Kernel
    why: str


def layer_facts(weight: QuantizedWeight, inputs: InputRule) -> LayerFacts:
    """What decides about a layer of these weights and inputs."""
    grid = weight.grid
    columns = grid.group_of_I.shape[0]
    expected_I = contiguous_groups(columns, grid.scheme.group_size, grid.group_of_I.device)
    scheme = inputs.scheme
    return LayerFacts(
        bits=grid.scheme.bits,
        group_size=grid.scheme.group_size,
        contiguous_groups=bool((grid.group_of_I == expected_I).all()),
        integer_scales=grid.amplifier is not None,
        largest_scale=0 if grid.amplifier is None else int(grid.integer_scale_OG().abs().max()),
        activation_bits=None if scheme is None else scheme.bits,
        symmetric_activations=scheme is not None and scheme.symmetric and scheme.dynamic,
        outliers=weight.outliers is not None,
    )


@torch.compiler.assume_constant_result
def has_hopper_kernels(device: torch.device) -> bool:
    """Whether the kernels of kernels/hopper run on a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def choose_kernel(layer: LayerFacts, device: torch.device, capability: tuple[int, int] | None = None) -> Choice:
    """The kernel for a layer on a device.

    Args:
        layer: the layer.
        device: where it is.
        capability: compute capability, read from the device if None.
    """
    if layer.activation_bits is None:
        return Choice("float", "inputs are not quantized: weights are dequantized and multiplied in floating point")
    if not layer.integer_scales:
        return Choice("float", "scales are floats: weights are dequantized and multiplied in floating point")
    if layer.outliers or not layer.symmetric_activations:
        what = "outliers" if layer.outliers else "static or asymmetric activations"
        return Choice("float", f"{what} have no integer kernel: multiplied in floating point")
    if device.type == "cpu":
        if int8_product_is_exact():
            return Choice("cpu-int8", "no CUDA device: int8 products of the CPU, added exactly in int32")
        if not layer.contiguous_groups:
            return Choice(
                "float", "groups of scattered inputs have no integer kernel here: multiplied in floating point"
            )
        return Choice("reference", "this CPU has no exact int8 products: the int32 product runs in parts")
    if not layer.contiguous_groups:
        return Choice("float", "groups of scattered inputs have no integer kernel: multiplied in floating point")
    if device.type != "cuda":
        return Choice("reference", f"no kernel for {device.type}: the exact int32 product runs in parts")
    capability = capability or torch.cuda.get_device_capability(device)
    obstacle = _hopper_obstacle(layer, capability)
    if obstacle is None and layer.largest_scale <= LARGEST_FOLDED_SCALE:
        return Choice("hopper-folded", f"scales up to {layer.largest_scale} are multiplied into int8 weights")
    if obstacle is None:
        return Choice("hopper", "int32 sums of groups are scaled and added exactly")
    other = _triton_obstacle(layer, capability)
    if other is None:
        return Choice("triton", f"{obstacle}: exact in Triton")
    return Choice("reference", f"{other}: the exact int32 product runs in parts")


def choose_experts_kernel(
    gate_up: Sequence[LayerFacts],
    down: Sequence[LayerFacts],
    device: torch.device,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """Whether all experts of a block run in grouped products (``hopper-grouped``), or each of their layers by itself.

    Args:
        gate_up, down: layers of all experts, of the one product and of the other; silu * up and rounding are all that
            stands between them.
        device, capability: see ``choose_kernel``.
    """
    layers = [*gate_up, *down]
    for layer in layers:
        choice = choose_kernel(layer, device, capability)
        if choice.kernel not in ("hopper", "hopper-folded"):
            return choice
    if any(len({layer.group_size for layer in product}) > 1 for product in (gate_up, down)):
        return Choice("hopper", "experts with groups of different sizes run layer by layer")
    if all(layer.largest_scale <= LARGEST_FOLDED_SCALE for layer in layers):
        return Choice("hopper-grouped", "all experts in one product, scales multiplied into int8 weights")
    return Choice("hopper-grouped", "all experts in one product, int32 sums of groups scaled and added exactly")


def _hopper_obstacle(layer: LayerFacts, capability: tuple[int, int]) -> str | None:
    """Why the Hopper kernel cannot run a layer with contiguous groups, None if it can."""
    if capability != (9, 0):
        return f"no kernel of its own for compute capability {capability[0]}.{capability[1]}"
    if layer.bits != 4 or layer.activation_bits != 8:
        return f"W{layer.bits}A{layer.activation_bits} has no fused kernel, only W4A8"
    if layer.largest_scale > LARGEST_SCALE:
        return f"a scale of {layer.largest_scale} exceeds 16 bits"
    try:
        groups_in_block(layer.group_size)
    except InputError:
        return f"groups of {layer.group_size} have no Hopper kernel"
    return None


def _triton_obstacle(layer: LayerFacts, capability: tuple[int, int]) -> str | None:
    """Why the Triton kernel cannot run a layer with contiguous groups, None if it can."""
    if layer.bits != 4 or layer.activation_bits != 8:
        return f"W{layer.bits}A{layer.activation_bits} has no fused kernel, only W4A8"
    if capability < (8, 0):
        return f"no kernel for compute capability {capability[0]}.{capability[1]}, only from 8.0 on"
    if layer.group_size != -1 and layer.group_size % 32:
        return f"groups of {layer.group_size} have no fused kernel"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None
