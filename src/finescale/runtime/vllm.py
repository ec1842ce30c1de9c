"""The vLLM plugin: W4A8 checkpoints with integer scales on finescale's kernels.

Installed as an entry point of ``vllm.general_plugins``. It claims checkpoints whose layers have integer scales and
8-bit inputs; all others, finescale's own weight-only ones among them, are left to vLLM, which serves them well.

Shape legend: T tokens, O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from finescale.errors import InputError
from finescale.formats import compressed_tensors
from finescale.grid import WeightScheme, contiguous_groups, number_of_groups
from finescale.grid.integer_scale import common_factor, prove_no_overflow
from finescale.kernels.dispatch import LayerFacts, choose_kernel
from finescale.kernels.layout import LARGEST_FOLDED_SCALE, pack_weight
from finescale.kernels.linear import w4a8_linear
from finescale.kernels.portable import PortableProduct
from finescale.runtime.serving import claims, refusal

METHOD = "finescale"


@register_quantization_config(METHOD)
class FinescaleVllmConfig(QuantizationConfig):
    """What vLLM asks about a claimed checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return METHOD if hf_quant_cfg and claims(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FinescaleVllmConfig:
        reason = refusal(config)
        if reason is not None:
            raise InputError(reason)
        return cls(config)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            names = self._checkpoint_names(prefix)
            schemes = {compressed_tensors.layer_scheme(self.config, name) for name in names}
            if schemes == {None}:
                return UnquantizedLinearMethod()
            if None in schemes or len(schemes) > 1:
                raise InputError(f"{prefix}: its parts {', '.join(names)} are quantized differently; vLLM fuses them.")
            facts = [self._facts(name) for name in names]
            return FinescaleLinearMethod(schemes.pop(), facts, prefix)  # type: ignore[arg-type]
        if "FusedMoE" in {base.__name__ for base in type(layer).__mro__}:
            raise InputError("finescale's vLLM plugin does not serve mixtures of experts yet; use finescale.load.")
        return None

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM may have fused into one."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _facts(self, name: str) -> dict[str, Any]:
        layers: dict[str, dict[str, Any]] = self.config["finescale"]["layers"]
        # Models may be nested one deeper in vLLM, or one less, than in the file.
        for key, facts in layers.items():
            if key == name or key.endswith("." + name) or name.endswith("." + key):
                return facts
        raise InputError(f"{name} has no amplifier in the checkpoint; quantize again.")


class FinescaleLinearMethod(LinearMethodBase):
    """Loads packed codes and scales of one layer, or of several fused ones, and multiplies.

    Args:
        scheme: bits and groups.
        facts: what the checkpoint says of each of the fused parts, in their order: amplifier and proved bound.
        name: for messages.
    """

    def __init__(self, scheme: WeightScheme, facts: list[dict[str, Any]], name: str) -> None:
        self.scheme, self.facts, self.name = scheme, facts, name

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
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        size, in_word = self.scheme.group_size, 32 // self.scheme.bits
        cut = input_size_per_partition != input_size
        if cut and size != -1 and (input_size_per_partition % size or input_size_per_partition % in_word):
            ranks = input_size // input_size_per_partition
            raise InputError(
                f"{self.name}: {input_size} inputs over {ranks} ranks would cut groups of {size}; "
                f"use fewer ranks, or quantize with --tp {ranks}."
            )
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        packed = torch.empty(rows, -(-columns // in_word), dtype=torch.int32)
        # float32 holds every stored scale exactly, whatever the type of the activations.
        scale = torch.empty(rows, number_of_groups(columns, size), dtype=torch.float32)
        layer.register_parameter(
            "weight_packed",
            PackedvLLMParameter(
                data=packed, input_dim=1, output_dim=0, packed_dim=1, packed_factor=in_word, weight_loader=loader
            ),
        )
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=loader)
            if size == -1
            else GroupQuantScaleParameter(data=scale, output_dim=0, input_dim=1, weight_loader=loader),
        )
        shape = torch.empty(2, dtype=torch.int64)
        layer.register_parameter("weight_shape", BasevLLMParameter(data=shape, weight_loader=loader))
        layer.finescale_partitions = output_partition_sizes
        layer.finescale_inputs = columns
        layer.finescale_whole = not cut and rows == output_size

    def process_weights_after_loading(self, layer: Any) -> None:
        """Recover the integers, prove again that int32 cannot overflow, and pack for the device's kernel."""
        device = layer.weight_packed.device
        rows, columns = layer.weight_packed.shape[0], layer.finescale_inputs
        tensors = {
            "weight_packed": layer.weight_packed.data,
            "weight_scale": layer.weight_scale.data,
            "weight_shape": torch.tensor([rows, columns]),
        }
        weight = compressed_tensors.unpack(tensors, self.scheme)
        partitions = layer.finescale_partitions
        factor_O1 = self._factors(weight.grid.scale_OG, partitions)
        exact_OG = weight.grid.scale_OG.double() / factor_O1.double()
        scale_OG = exact_OG.round().to(torch.int32)
        if not torch.equal(scale_OG.double(), exact_OG):
            raise InputError(f"{self.name}: scales are not integers over the stored amplifier; the file was changed.")
        group_of_I = contiguous_groups(columns, self.scheme.group_size, device)
        self._prove(weight.codes_OI, scale_OG, group_of_I, partitions, layer.finescale_whole)
        for name in ("weight_packed", "weight_scale", "weight_shape"):
            delattr(layer, name)
        largest = int(scale_OG.abs().max())
        facts = LayerFacts(self.scheme.bits, self.scheme.group_size, True, True, largest, 8, True, False)
        choice = choose_kernel(facts, device)
        layer.finescale_folded = largest <= LARGEST_FOLDED_SCALE
        layer.register_buffer("channel_scale_O", factor_O1[:, 0].contiguous(), persistent=False)
        if choice.kernel in ("hopper", "hopper-folded"):
            packed = pack_weight(weight.codes_OI, scale_OG, self.scheme.group_size)
            layer.register_buffer("packed", packed, persistent=False)
        else:
            layer.finescale_product = PortableProduct(
                choice, weight.codes_OI, scale_OG, self.scheme.group_size, 1, layer.channel_scale_O
            )

    def _factors(self, scale_OG: Tensor, partitions: list[int]) -> Tensor:
        """What each output's scales are integers times, float32 [O, 1]: one over the amplifier, or its own (folded)."""
        # One layer in the file may be several parts of vLLM's (Falcon's query_key_value).
        facts = self.facts * len(partitions) if len(self.facts) == 1 else self.facts
        parts = [
            common_factor(rows)[:, None]
            if part.get("folded")
            else torch.full_like(rows[:, :1], 1 / int(part["amplifier"]))
            for rows, part in zip(scale_OG.split(partitions), facts, strict=True)
        ]
        return torch.cat(parts).float()

    def _prove(
        self, codes_OI: Tensor, scale_OG: Tensor, group_of_I: Tensor, partitions: list[int], whole: bool
    ) -> None:
        """The bound of each part is below 2^31 and what the checkpoint says; a rank's share may have a lower one.

        Raises:
            NumericsError, InputError: it is not.
        """
        sizes = [sum(partitions)] if len(self.facts) == 1 else partitions
        start = 0
        for size, facts in zip(sizes, self.facts, strict=True):
            rows = slice(start, start + size)
            bound = prove_no_overflow(self.name, codes_OI[rows], scale_OG[rows], group_of_I)
            if bound > int(facts["bound"]) or (whole and bound != int(facts["bound"])):
                raise InputError(f"{self.name}: its overflow bound is not the stored one; the file was changed.")
            start += size

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """float [..., I] -> [..., O]."""
        bias = None if bias is None else bias.float()
        if hasattr(layer, "packed"):
            outputs = layer.channel_scale_O.shape[0]
            return w4a8_linear(x, layer.packed, bias, layer.channel_scale_O, outputs, 1, layer.finescale_folded)
        return layer.finescale_product(x, bias)


def register() -> None:
    """The entry point. Importing this module has registered the method already; more than once is fine."""
