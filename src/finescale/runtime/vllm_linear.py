"""Linear layers of vLLM on finescale's kernels: loading, proof, product.

Shape legend: T tokens, O outputs, I inputs, G groups, J inputs after a gather, K channels that are summed into one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from finescale.errors import CheckpointError, InputError
from finescale.formats.compressed_tensors import INT8
from finescale.grid import Grid, InputRule, QuantizedWeight, contiguous_groups, input_rule, number_of_groups
from finescale.grid.inputs import SUFFIXES
from finescale.grid.packing import packed_words, to_signed, unpack_rows
from finescale.kernels.direct import linear, product
from finescale.kernels.dispatch import choose_kernel
from finescale.kernels.hopper import gemm
from finescale.kernels.layout import LARGEST_FOLDED_SCALE, pack_weight
from finescale.kernels.portable import PORTABLE, PortableProduct
from finescale.runtime.vllm_fusion import Ancestry, QuantizedTokens, quantize_on_the_way
from finescale.runtime.vllm_layer import LayerDescription

logger = init_logger("vllm.finescale")
Loader = Callable[..., Any]
PARAMETERS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", *SUFFIXES)


class FinescaleLinearMethod(LinearMethodBase):
    """Loads codes and scales of one layer, or of several fused ones, and multiplies.

    Args:
        layer: what the file says.
        ancestry: of the model under construction, to find what stands before the layer; None to leave that alone.
    """

    def __init__(self, layer: LayerDescription, ancestry: Ancestry | None) -> None:
        self.description, self.ancestry = layer, ancestry

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        scheme, columns, rows = self.description.scheme, input_size_per_partition, sum(output_partition_sizes)
        cut = columns != input_size
        if cut:
            self.description.check_cut(columns, input_size // columns)
        loader: Loader = extra_weight_attrs["weight_loader"]
        gather = bool(self.description.inputs.get("gather"))
        loader = _any_width(loader) if gather else loader
        groups = number_of_groups(columns, scheme.group_size)
        layer.finescale_loaded = Counter()
        # float32 holds every stored scale exactly, whatever the type of the activations.
        scale_OG, both = torch.empty(rows, groups, dtype=torch.float32), scheme.group_size != -1
        _register(layer, "weight_scale", scale_OG, loader, both)
        if self.description.layout == INT8:
            _register(layer, "weight", torch.empty(rows, columns, dtype=torch.int8), loader)
        else:
            packed = torch.empty(rows, packed_words(columns, scheme.bits), dtype=torch.int32)
            _register(layer, "weight_packed", packed, loader)
            shape = _shape(self.description.name, None if gather else input_size)
            _register(layer, "weight_shape", torch.zeros(2, dtype=torch.int64), shape)
        if not scheme.symmetric:
            zero_OG = torch.empty(rows, groups, dtype=torch.int8)
            _register(layer, "weight_zero_point", zero_OG, _unpacked_zeros(loader, scheme.bits), both)
        for suffix in self._input_tensors():
            _register(layer, suffix, torch.empty(0), _same_for_all(f"{self.description.name}.{suffix}"))
        layer.finescale_partitions = output_partition_sizes
        layer.finescale_columns = None if gather else columns
        layer.finescale_whole = not cut and rows == output_size
        layer.finescale_dtype = params_dtype

    def _input_tensors(self) -> list[str]:
        activations, gather = self.description.activations, bool(self.description.inputs.get("gather"))
        static = activations is not None and not activations.dynamic
        wanted = {
            "input_scale": static,
            "input_zero_point": static and activations is not None and not activations.symmetric,
            "input_index": gather,
            "input_gain": gather,
        }
        return [suffix for suffix in SUFFIXES if wanted[suffix]]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Recover the integers, prove again that int32 cannot overflow, and pack for the device's kernel."""
        if self.ancestry is not None:
            self.ancestry.close()
        scheme, name = self.description.scheme, self.description.name
        names = [parameter for parameter in PARAMETERS if parameter in layer._parameters]
        missing = [parameter for parameter in names if layer.finescale_loaded[parameter] < len(self.description.parts)]
        if missing:
            raise CheckpointError(f"{name} lacks {', '.join(missing)}; the checkpoint is incomplete.")
        inputs, weight = self._inputs(layer), self._weight(layer)
        for parameter in names:
            delattr(layer, parameter)
        layer.finescale_inputs = inputs
        bias = getattr(layer, "bias", None)
        layer.register_buffer("finescale_bias", None if bias is None else bias.data.float(), persistent=False)
        layer.finescale_outputs = weight.codes_OI.shape[0]
        device = weight.codes_OI.device
        scale_OG, factor_O, largest = None, None, 0
        if self.description.integer:
            partitions = layer.finescale_partitions
            scale_OG, factor_O = self.description.integers(weight.grid.scale_OG, partitions)
            self.description.prove(weight.codes_OI, scale_OG, partitions, layer.finescale_whole)
            largest = int(scale_OG.abs().max())
        choice = choose_kernel(self.description.facts(largest), device)
        layer.register_buffer("finescale_factor_O", factor_O, persistent=False)
        if scale_OG is None or choice.kernel == "float":
            dense_OI = weight.dequantize().to(layer.finescale_dtype)
            layer.register_buffer("finescale_dense_OI", dense_OI, persistent=False)
            logger.warning_once("finescale: %s.", choice.why)
        elif choice.kernel in PORTABLE:
            assert inputs.scheme is not None
            layer.finescale_product = PortableProduct(
                choice, weight.codes_OI, scale_OG, scheme.group_size, 1, factor_O, inputs.scheme.bits
            )
        else:
            packed = pack_weight(weight.codes_OI, scale_OG, scheme.group_size)
            layer.register_buffer("finescale_packed", packed, persistent=False)
            gemm.WORKSPACES.reserve(packed.device)
            layer.finescale_folded = largest <= LARGEST_FOLDED_SCALE
            if self.ancestry is not None and inputs.is_plain:
                quantize_on_the_way(layer, self.ancestry)
        logger.debug("finescale: %s: %s", name, choice.why)

    def _inputs(self, layer: Any) -> InputRule:
        activations = self.description.activations
        tensors = {suffix: getattr(layer, suffix).data for suffix in self._input_tensors()}
        facts = self.description.inputs | {"scheme": None if activations is None else asdict(activations)}
        device = layer.weight_scale.device
        return input_rule(facts, tensors, self.description.name).to(device)

    def _weight(self, layer: Any) -> QuantizedWeight:
        """Codes and grid of what was loaded; the grid's amplifier is left out, since parts have their own."""
        scheme = self.description.scheme
        if self.description.layout == INT8:
            codes_OI = layer.weight.data
        else:
            columns = layer.finescale_columns or int(layer.weight_shape[1])
            codes_OI = to_signed(unpack_rows(layer.weight_packed.data, scheme.bits, columns), scheme.bits)
        scale_OG = layer.weight_scale.data
        zero_OG = None if scheme.symmetric else layer.weight_zero_point.data
        group_of_I = contiguous_groups(codes_OI.shape[1], scheme.group_size, codes_OI.device)
        return QuantizedWeight(codes_OI, Grid(scheme, scale_OG, zero_OG, group_of_I))

    def apply(self, layer: Any, x: Tensor | QuantizedTokens, bias: Tensor | None = None) -> Tensor:
        """float [..., I], or quantized tokens -> [..., O]."""
        bias = None if bias is None else layer.finescale_bias
        outputs, factor_O = layer.finescale_outputs, layer.finescale_factor_O
        if isinstance(x, QuantizedTokens):
            return product(
                x.codes, x.scale_T, x.sum_T, layer.finescale_packed, bias, factor_O, outputs,
                layer.finescale_folded, x.dtype,
            )  # fmt: skip
        inputs: InputRule = layer.finescale_inputs
        x = inputs.rearrange(x)
        if hasattr(layer, "finescale_packed"):
            return linear(x, layer.finescale_packed, bias, factor_O, outputs, layer.finescale_folded)
        if hasattr(layer, "finescale_dense_OI"):
            bias = None if bias is None else bias.to(x.dtype)
            return nn.functional.linear(inputs.round(x), layer.finescale_dense_OI, bias)
        return layer.finescale_product(x, bias)


def _register(layer: Any, name: str, data: Tensor, loader: Loader, cut_inputs: bool = True) -> None:
    """A parameter that vLLM's loader cuts along the outputs, and along the inputs where a layer is cut there."""
    parameter = nn.Parameter(data, requires_grad=False)
    if data.dim() == 2:
        parameter.output_dim = 0  # type: ignore[attr-defined]
        if cut_inputs:
            parameter.input_dim = 1  # type: ignore[attr-defined]

    def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        loader(parameter, loaded, *args, **kwargs)
        layer.finescale_loaded[name] += 1

    parameter.weight_loader = load  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)


def _any_width(loader: Loader) -> Loader:
    """A gather may widen a layer: its inputs are as many as the file has."""

    def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        if loaded.dim() == 2 and loaded.shape[1] != parameter.shape[1]:
            parameter.data = parameter.data.new_empty(parameter.shape[0], loaded.shape[1])
        loader(parameter, loaded, *args, **kwargs)

    return load


def _unpacked_zeros(loader: Loader, bits: int) -> Loader:
    """Zero points are packed along the outputs, where fused layers and ranks are cut: unpacked before that."""

    def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        if loaded.dtype == torch.int32:
            if 32 % bits and (loaded.shape[0] * 32) % bits:
                raise InputError(f"{loaded.shape[0] * 32} bits of zero points are no whole number of {bits} bits.")
            zero_GO = unpack_rows(loaded.t().contiguous(), bits, loaded.shape[0] * 32 // bits)
            loaded = to_signed(zero_GO, bits).t().contiguous()
        loader(parameter, loaded, *args, **kwargs)

    return load


def _same_for_all(name: str) -> Loader:
    """For what all fused parts, and all ranks, share: the first is kept, the others must equal it."""

    def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        loaded = loaded.to(parameter.device)
        if parameter.numel() == 0:
            parameter.data = loaded.clone()
        elif not torch.equal(parameter.data, loaded):
            raise InputError(f"{name} differs between layers that vLLM fuses; use finescale.load.")

    return load


def _shape(name: str, inputs: int | None) -> Loader:
    """For shapes: their number of inputs, the same for all fused parts, must be that of the model."""

    def load(parameter: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        if inputs is not None and int(loaded[1]) != inputs:
            raise CheckpointError(f"{name} has {int(loaded[1])} inputs in the file and {inputs} in the model.")
        parameter.data.copy_(loaded)

    return load
