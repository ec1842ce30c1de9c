"""Products of a fused decoder block: several layers of one input in one, with what stands before them.

Shape legend: T tokens, I inputs, O outputs of all fused layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finescale.errors import InputError
from finescale.grid import Gather
from finescale.kernels.gather import GatherTable, gather_table, quantize_gathered
from finescale.kernels.layout import BLOCK, LARGEST_FOLDED_SCALE, SLAB, groups_in_block, pack_weight, unpack_weight
from finescale.kernels.linear import quantize_tokens, w4a8_product
from finescale.kernels.norms import add_rms_norm, silu_product
from finescale.runtime.modules import QuantizedLinear
from finescale.runtime.packed import PackedLinear

Before = Literal["plain", "rms", "silu"]
"""What stands before a product: nothing, the RMS norm (after adding to the residual), silu(gate) * up."""


class PackedProduct(nn.Module):
    """W4A8 layers of one input: everything before the product and the rounding is one kernel, the product another.

    Args:
        packed: uint8, ``kernels.layout.pack_weight``.
        bias_O, channel_scale_O: float32 or None.
        outputs, amplifier, folded: see ``kernels.linear.w4a8_product``.
        gather: what channels the weight meets, made of those that stand before it; None for these themselves.
    """

    packed: Tensor
    bias_O: Tensor | None
    channel_scale_O: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        bias_O: Tensor | None,
        channel_scale_O: Tensor | None,
        outputs: int,
        amplifier: int,
        folded: bool,
        gather: GatherTable | None = None,
    ) -> None:
        super().__init__()
        self.gather = gather
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias_O", bias_O, persistent=False)
        self.register_buffer("channel_scale_O", channel_scale_O, persistent=False)
        self.outputs, self.amplifier, self.folded = outputs, amplifier, folded

    def forward(
        self,
        x_TI: Tensor,
        before: Before = "plain",
        residual_TI: Tensor | None = None,
        gain_I: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> Tensor:
        """float [T, I] (twice as wide for ``silu``) -> [T, O] in the same type; the residual becomes the sum."""
        given = (x_TI, before, residual_TI, gain_I, None, epsilon)
        if self.gather is None:
            codes, scale_T, sum_T = quantize_tokens(*given)
        else:
            codes, scale_T, sum_T = quantize_gathered(*given, *self.gather.tensors())
        return self.multiply(codes, scale_T, sum_T, x_TI.dtype)

    def multiply(self, codes: Tensor, scale_T: Tensor, sum_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of activations that are quantized already, [T, O] in ``dtype``."""
        return w4a8_product(
            codes, scale_T, sum_T, self.packed, self.bias_O, self.channel_scale_O, self.outputs, self.amplifier,
            self.folded, dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.packed.shape[1] * BLOCK} -> {self.outputs}, W4A8, {'folded' if self.folded else 'integer'} scales"
        )


class DenseProduct(nn.Module):
    """The same for layers that are not quantized; norm and activation are one kernel each.

    Args:
        weight_OI: float.
        bias_O: float or None.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight_OI = nn.Parameter(weight_OI, requires_grad=False)
        self.bias_O = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(
        self,
        x_TI: Tensor,
        before: Before = "plain",
        residual_TI: Tensor | None = None,
        gain_I: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> Tensor:
        """See ``PackedProduct.forward``."""
        if before == "rms":
            assert gain_I is not None
            x_TI = add_rms_norm(x_TI, residual_TI, gain_I, epsilon)
        elif before == "silu":
            x_TI = silu_product(x_TI)
        return nn.functional.linear(x_TI, self.weight_OI, self.bias_O)

    def extra_repr(self) -> str:
        return f"{self.weight_OI.shape[1]} -> {self.weight_OI.shape[0]}, {self.weight_OI.dtype}"


Product = PackedProduct | DenseProduct


def check_fusable(layers: Sequence[nn.Module]) -> None:
    """Raises InputError when layers of one input cannot be one product; moves no weight."""
    if all(type(layer) is nn.Linear for layer in layers):
        return
    sizes = set()
    for layer in layers:
        if not isinstance(layer, PackedLinear | QuantizedLinear):
            raise InputError(f"a layer is {type(layer).__name__}, beside quantized ones.")
        scheme = layer.inputs.scheme
        if scheme is None or scheme.bits != 8 or not (scheme.dynamic and scheme.symmetric):
            raise InputError("a layer has other inputs than 8 bits with a scale per token.")
        if layer.inputs.rotation is not None:
            raise InputError("a layer rotates its inputs.")
        integer = isinstance(layer, PackedLinear) or (layer.path == "integer" and layer.outlier_value is None)
        if not integer or layer.scheme.bits != 4:
            raise InputError("a layer is not W4A8 with integer scales.")
        sizes.add(groups_in_block(layer.scheme.group_size))
    if len(sizes) > 1:
        raise InputError("layers of one input have scale groups of different sizes.")
    if not all(_same_gather(_gather(layers[0]), _gather(layer)) for layer in layers[1:]):
        raise InputError("layers of one input gather it differently.")


def _gather(layer: nn.Module) -> Gather | None:
    assert isinstance(layer, PackedLinear | QuantizedLinear)
    return layer.inputs.gather


def _same_gather(one: Gather | None, other: Gather | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.index_KJ, other.index_KJ) and torch.equal(one.gain_KJ, other.gain_KJ)


def fused(layers: Sequence[nn.Module]) -> Product:
    """One product that gives the outputs of all layers, one after the other.

    Args:
        layers: all ``nn.Linear``, or all W4A8 layers with integer scales.

    Raises:
        InputError: layers that cannot be one product; says why.
    """
    check_fusable(layers)
    if all(type(layer) is nn.Linear for layer in layers):
        linears: list[Any] = list(layers)
        weights, biases = [layer.weight for layer in linears], [layer.bias for layer in linears]
        return DenseProduct(_joined(weights), None if biases[0] is None else _joined(biases))
    parts = [_packed_part(layer) for layer in layers]
    outputs = sum(part.outputs for part in parts)
    gather = _gather(layers[0])
    same = len({part.amplifier for part in parts}) == 1 and all(part.channel_scale_O is None for part in parts)
    return PackedProduct(
        _stacked(parts),
        _optional([part.bias_O for part in parts], parts, 0.0),
        None if same else torch.cat([_own_factor(part) for part in parts]),
        outputs,
        parts[0].amplifier if same else 1,
        all(part.folded for part in parts),
        None if gather is None else gather_table(gather),
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([tensor.detach() for tensor in tensors])


def _packed_part(layer: nn.Module) -> PackedProduct:
    if isinstance(layer, PackedLinear):
        return PackedProduct(
            layer.packed, layer.bias_O, layer.channel_scale_O, layer.out_features, layer.amplifier, layer.folded
        )
    assert isinstance(layer, QuantizedLinear)
    assert layer.integer_scale_OG is not None and layer.amplifier is not None
    packed = pack_weight(layer.codes_OI, layer.integer_scale_OG, layer.scheme.group_size)
    folded = int(layer.integer_scale_OG.abs().max()) <= LARGEST_FOLDED_SCALE
    bias_O = None if layer.bias is None else layer.bias.float()
    return PackedProduct(packed, bias_O, layer.channel_scale_O, layer.out_features, layer.amplifier, folded)


def _stacked(parts: Sequence[PackedProduct]) -> Tensor:
    """Packed weights one after the other; taken apart only where a part ends inside a slab."""
    if all(part.outputs % SLAB == 0 for part in parts[:-1]):
        return parts[0].packed if len(parts) == 1 else torch.cat([part.packed for part in parts])
    _, blocks, slab_bytes = parts[0].packed.shape
    group_size = BLOCK // ((slab_bytes - 4096) // BLOCK)
    weights = [unpack_weight(part.packed, part.outputs, blocks * BLOCK, group_size) for part in parts]
    codes_OI, scale_OG = (torch.cat([weight[i] for weight in weights]) for i in (0, 1))
    return pack_weight(codes_OI, scale_OG, group_size)


def _own_factor(part: PackedProduct) -> Tensor:
    """What an output's integer scales are multiplied by; a power of two where it is only the amplifier."""
    one_O = torch.full((part.outputs,), 1 / part.amplifier, device=part.packed.device)
    return one_O if part.channel_scale_O is None else one_O * part.channel_scale_O


def _optional(tensors: Sequence[Tensor | None], parts: Sequence[PackedProduct], default: float) -> Tensor | None:
    if all(tensor is None for tensor in tensors):
        return None
    return torch.cat(
        [
            torch.full((part.outputs,), default, device=part.packed.device) if tensor is None else tensor
            for tensor, part in zip(tensors, parts, strict=True)
        ]
    )
