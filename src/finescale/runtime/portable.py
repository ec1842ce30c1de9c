"""Quantized linear layers on the kernels that are no device's own (``kernels/portable.py``).

Shape legend: T tokens (any leading dimensions), O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finescale.errors import InputError
from finescale.formats.engines import SAME_INPUT
from finescale.grid import InputRule, QuantizedWeight
from finescale.kernels.cpu_int8 import CpuWeight, cpu_linear, joined, rows_of
from finescale.kernels.dispatch import choose_kernel, layer_facts
from finescale.kernels.portable import PORTABLE, PortableProduct


class PortableLinear(nn.Module):
    """A layer with integer scales on a CPU, on a GPU through Triton, or in parts.

    Args:
        weight: codes and a grid with integer scales; moved to ``device`` and packed there.
        bias: float [O] or None.
        inputs: rounding of the inputs, with what stands before it.
        device: where it runs.

    Raises:
        InputError: a layer that none of these kernels runs; says why.
    """

    bias_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, inputs: InputRule, device: torch.device) -> None:
        super().__init__()
        choice = choose_kernel(layer_facts(weight, inputs), device)
        grid = weight.grid
        if choice.kernel not in PORTABLE or grid.amplifier is None or inputs.scheme is None:
            raise InputError(f"this layer runs on none of {', '.join(PORTABLE)} here: {choice.why}.")
        self.inputs = inputs.to(device)
        own_O = grid.channel_scale_O
        self.product: nn.Module = PortableProduct(
            choice,
            weight.codes_OI.to(device),
            grid.integer_scale_OG().to(device),
            grid.scheme.group_size,
            grid.amplifier,
            None if own_O is None else own_O.to(device, torch.float32),
            inputs.scheme.bits,
            grid.group_of_I.to(device),
        )
        self.register_buffer("bias_O", None if bias is None else bias.to(device, torch.float32), persistent=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """float [..., I] -> [..., O], in the type of the input."""
        return self.product(self.inputs.rearrange(x_TI), self.bias_O)


class JoinedProduct(nn.Module):
    """Layers of one input as one product on a CPU, where each call costs what a small layer does.

    The layers stay where they are and ask for their outputs one by one. Whichever comes first multiplies for all; the
    others find theirs there as long as they bring the same values, each of them once.

    Args:
        weight: of all layers, ``cpu_int8.joined``.
        products: of the layers, in order.
        biases: float32 [O] or None.
    """

    bias_O: Tensor | None
    factor_O: Tensor | None

    def __init__(self, weight: CpuWeight, products: Sequence[PortableProduct], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.amplifier = max(product.amplifier for product in products)
        self.activation_bits = products[0].activation_bits
        self.sizes = [product.out_features for product in products]
        factors = []
        for product in products:
            # Powers of two, which round nothing.
            factor_O = torch.full((product.out_features,), self.amplifier / product.amplifier)
            factors.append(factor_O if product.channel_scale_O is None else factor_O * product.channel_scale_O)
        factor_O = torch.cat(factors)
        offsets = [torch.zeros(n) if bias is None else bias for n, bias in zip(self.sizes, biases, strict=True)]
        none = all(bias is None for bias in biases)
        tensors = weight._asdict() | {
            "factor_O": None if bool((factor_O == 1).all()) else factor_O,
            "bias_O": None if none else torch.cat(offsets),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self._last: tuple[Tensor, Sequence[Tensor], set[int]] | None = None

    def multiply(self, x_TI: Tensor, rows: slice = slice(None)) -> Tensor:
        """float [..., I] -> [..., O] of all layers, or some of these outputs, in the type of the input."""
        weight = rows_of(_weight_of(self), rows)
        flat_TI = x_TI.reshape(-1, x_TI.shape[-1])
        bias_O = None if self.bias_O is None else self.bias_O[rows]
        factor_O = None if self.factor_O is None else self.factor_O[rows]
        out_TO = cpu_linear(flat_TI, weight, bias_O, factor_O, self.amplifier, self.activation_bits)
        return out_TO.reshape(*x_TI.shape[:-1], out_TO.shape[1])

    def outputs_of(self, index: int, x_TI: Tensor) -> Tensor:
        """[..., O] of one layer."""
        if torch.compiler.is_compiling() or x_TI.requires_grad:
            # Nothing is kept between calls that are traced, and each would multiply for all.
            start = sum(self.sizes[:index])
            return self.multiply(x_TI, slice(start, start + self.sizes[index]))
        last = self._last
        if last is None or index in last[2] or not _same(last[0], x_TI):
            self._last = last = (x_TI.clone(), self.multiply(x_TI).split(self.sizes, -1), set())
        _, outputs, taken = last
        taken.add(index)
        if len(taken) == len(self.sizes):
            self._last = None
        return outputs[index]


def _weight_of(product: nn.Module) -> CpuWeight:
    """The packed weight among the buffers of a product on the CPU's int8 instructions."""
    return CpuWeight(*(product._buffers[name] for name in CpuWeight._fields))


def _same(kept: Tensor, given: Tensor) -> bool:
    """Whether outputs for the one are outputs for the other, in type and mode too."""
    alike = kept.dtype == given.dtype and kept.is_inference() == torch.is_inference_mode_enabled()
    return alike and torch.equal(kept, given)


class PartOfProduct(nn.Module):
    """One layer of a `JoinedProduct`, in the place of its own product."""

    def __init__(self, whole: JoinedProduct, index: int, own: PortableProduct) -> None:
        super().__init__()
        self.whole, self.index = whole, index
        self.kernel, self.why = own.kernel, own.why
        self.out_features, self.in_features = own.out_features, own.in_features

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """float [..., I] -> [..., O]; the bias is that of the joined product."""
        return self.whole.outputs_of(self.index, x_TI)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.kernel}: {self.why}, joined with others of its input"


def join_same_inputs(model: nn.Module) -> None:
    """Makes layers that stand beside each other and have one input (queries, keys and values; gate and up) one product
    where all of them run on the CPU's int8 instructions; their outputs stay the same bits."""
    for parent in list(model.modules()):
        for names in SAME_INPUT:
            layers = [getattr(parent, name, None) for name in names]
            found = [layer for layer in layers if isinstance(layer, PortableLinear)]
            products = [layer.product for layer in found if isinstance(layer.product, PortableProduct)]
            if len(products) == len(names) and _joinable(found, products):
                _join(found, products)


def _joinable(layers: Sequence[PortableLinear], products: Sequence[PortableProduct]) -> bool:
    return all(
        product.kernel == "cpu-int8"
        and layer.inputs == InputRule(layers[0].inputs.scheme)
        and product.in_features == products[0].in_features
        for layer, product in zip(layers, products, strict=True)
    )


def _join(layers: Sequence[PortableLinear], products: Sequence[PortableProduct]) -> None:
    weight = joined([_weight_of(product) for product in products])
    if weight is None:
        return
    whole = JoinedProduct(weight, products, [layer.bias_O for layer in layers])
    for index, (layer, product) in enumerate(zip(layers, products, strict=True)):
        layer.product, layer.bias_O = PartOfProduct(whole, index, product), None
