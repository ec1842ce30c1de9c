"""The vLLM plugin: finescale's checkpoints on finescale's kernels.

Installed as an entry point of ``vllm.general_plugins``. It claims checkpoints of finescale whose inputs are rounded or
rearranged; all others, finescale's own weight-only ones among them, are left to vLLM, which serves them well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from finescale.errors import InputError
from finescale.formats import compressed_tensors
from finescale.runtime.serving import claims, refusal
from finescale.runtime.vllm_fusion import Ancestry
from finescale.runtime.vllm_layer import LayerDescription
from finescale.runtime.vllm_linear import FinescaleLinearMethod

METHOD = "finescale"
EXPERT_NAMES = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
"""Gate, up and down of an expert in checkpoints."""


@register_quantization_config(METHOD)
class FinescaleVllmConfig(QuantizationConfig):
    """What vLLM asks about a claimed checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.ancestry: Ancestry | None = None

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
            quantized = [name for name in names if compressed_tensors.layer_scheme(self.config, name) is not None]
            if not quantized:
                return UnquantizedLinearMethod()
            if quantized != names:
                raise InputError(f"{prefix}: of its parts only {', '.join(quantized)} are quantized; vLLM fuses them.")
            return FinescaleLinearMethod(self._describe(prefix, names), self._noted_ancestry())
        # RoutedExperts in newer versions, below a FusedMoE that has no method of its own.
        if {base.__name__ for base in type(layer).__mro__} & {"FusedMoE", "RoutedExperts"}:
            return self._experts_method(layer, prefix)
        return None

    def _experts_method(self, layer: Any, prefix: str) -> Any:
        from finescale.runtime.vllm_experts import FinescaleMoEMethod

        experts = self._experts(prefix.removesuffix(".routed_experts"))
        # No experts of this block in the file: they are not quantized.
        return FinescaleMoEMethod(layer.moe_config, experts, layer) if experts else None

    def _experts(self, prefix: str) -> list[tuple[LayerDescription, LayerDescription]]:
        """Of each expert gate and up, then down; empty where they are not quantized."""
        layers = self.config["finescale"]["layers"]
        for gate, up, down in EXPERT_NAMES:
            found: list[tuple[LayerDescription, LayerDescription]] = []
            while f"{prefix}.{len(found)}.{gate}" in layers:
                name = f"{prefix}.{len(found)}"
                pair = [f"{name}.{gate}", f"{name}.{up}"], [f"{name}.{down}"]
                found.append((self._describe(name, pair[0]), self._describe(name, pair[1])))
            if found:
                return found
        return []

    def _describe(self, prefix: str, names: list[str]) -> LayerDescription:
        schemes = {compressed_tensors.layer_scheme(self.config, name) for name in names}
        inputs = {compressed_tensors.layer_activations(self.config, name) for name in names}
        scheme = schemes.pop()
        if schemes or len(inputs) > 1 or scheme is None:
            raise InputError(f"{prefix}: its parts {', '.join(names)} are quantized differently; vLLM fuses them.")
        facts = [self._facts(name) for name in names]
        return LayerDescription(prefix, self.config["format"], scheme, inputs.pop(), facts)

    def _noted_ancestry(self) -> Ancestry | None:
        """Notes who holds whom from the first layer on; not with LoRA, whose layers read the inputs too."""
        if self.ancestry is None and get_current_vllm_config().lora_config is None:
            self.ancestry = Ancestry()
        return self.ancestry

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM may have fused into one."""
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def _facts(self, name: str) -> dict[str, Any]:
        layers: dict[str, dict[str, Any]] = self.config["finescale"]["layers"]
        if name in layers:
            return layers[name]
        # Models may be nested one deeper in vLLM, or one less, than in the file.
        for key, facts in layers.items():
            if key.endswith("." + name) or name.endswith("." + key):
                return facts
        raise InputError(f"{name} is unknown to the finescale key of config.json; quantize again.")


def register() -> None:
    """The entry point. Importing this module has registered the method already; more than once is fine."""
