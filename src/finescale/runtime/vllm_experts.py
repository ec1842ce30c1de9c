"""Mixtures of experts of vLLM on finescale's kernels: loading, proof, product.

Shape legend: T tokens, K choices of a token, E experts of this rank, O outputs, I inputs, F width between the two
products, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from finescale.errors import CheckpointError, InputError
from finescale.formats.compressed_tensors import PACKED
from finescale.grid import number_of_groups
from finescale.grid.packing import packed_words, to_signed, unpack_rows
from finescale.kernels.dispatch import choose_experts_kernel, has_hopper_kernels
from finescale.kernels.experts import PackedExperts, pack_experts, w4a8_experts
from finescale.kernels.layout import LARGEST_FOLDED_SCALE
from finescale.runtime.vllm_layer import LayerDescription

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


class FinescaleMoEMethod(FusedMoEMethodBase):
    """Loads codes and scales of all experts of a block, and runs their whole feed-forward in one call.

    Args:
        moe: vLLM's settings of the block.
        experts: of each expert of the model, gate and up as one layer of two parts, and down.

    Raises:
        InputError: experts that the kernels cannot run, or that are computed otherwise than by silu and gate.
    """

    def __init__(self, moe: Any, experts: Sequence[tuple[LayerDescription, LayerDescription]], layer: Any) -> None:
        super().__init__(moe)
        self.experts = experts
        self.enforce_eager = bool(get_current_vllm_config().model_config.enforce_eager)
        name = experts[0][0].name
        layers = [part for pair in experts for part in pair]
        if len({gate_up.scheme for gate_up, _ in experts}) > 1 or len({down.scheme for _, down in experts}) > 1:
            raise InputError(f"{name}: experts are quantized differently; vLLM fuses them.")
        bits = {(each.scheme.bits, each.activations.bits if each.activations else 16) for each in layers}
        if not all(each.integer for each in layers) or bits != {(4, 8)} or layers[0].layout != PACKED:
            raise InputError(f"{name}: finescale serves experts of W4A8 with integer scales only; use finescale.load.")
        if any(each.inputs.get("gather") or each.inputs.get("rotation") for each in layers):
            raise InputError(f"{name} gathers or rotates the inputs of experts; use finescale.load.")
        if "silu" not in str(getattr(layer, "activation", "silu")).lower():
            raise InputError(f"{name}: experts with {layer.activation} have no kernel here; use finescale.load.")
        if getattr(layer, "apply_router_weight_on_input", False):
            raise InputError(f"{name}: experts whose inputs are weighted have no kernel here; use finescale.load.")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        loader: Callable[..., Any] = extra_weight_attrs["weight_loader"]
        gate_up, down = self.experts[0]
        width, bits = intermediate_size_per_partition, gate_up.scheme.bits
        ranks = int(self.moe.moe_parallel_config.tp_size)
        if ranks > 1:
            down.check_cut(width, ranks)
        gate_up_size, down_size = gate_up.scheme.group_size, down.scheme.group_size
        kinds = (("w13", 2 * width, hidden_size, gate_up_size), ("w2", hidden_size, width, down_size))
        for kind, outputs, inputs, size in kinds:
            # NaN stays where the checkpoint has no scale, zeros where it has no shape.
            scale = torch.full((num_experts, outputs, number_of_groups(inputs, size)), torch.nan, dtype=torch.float32)
            packed = torch.zeros(num_experts, outputs, packed_words(inputs, bits), dtype=torch.int32)
            shape = torch.zeros(num_experts, 2, dtype=torch.int64)
            for suffix, data in zip(SUFFIXES, (packed, scale, shape), strict=True):
                parameter = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = loader  # type: ignore[attr-defined]
                parameter.quant_method = "channel" if size == -1 else "group"  # type: ignore[attr-defined]
                layer.register_parameter(f"{kind}_{suffix}", parameter)
        layer.finescale_whole = ranks == 1
        layer.finescale_sizes = (hidden_size, width)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: vLLM's own kernels for experts, which would ask for it, do not run here."""
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Recover the integers of every expert, prove again that int32 cannot overflow, and pack them together."""
        hidden, width = layer.finescale_sizes
        local = self._local_experts(layer)
        gate_up, largest_gate_up = self._packed(layer, "w13", [self.experts[e][0] for e in local], [width, width])
        down, largest_down = self._packed(layer, "w2", [self.experts[e][1] for e in local], [hidden])
        for kind in ("w13", "w2"):
            for suffix in SUFFIXES:
                delattr(layer, f"{kind}_{suffix}")
        for name, packed in (("gate_up", gate_up), ("down", down)):
            layer.register_buffer(f"finescale_{name}", packed.packed, persistent=False)
            layer.register_buffer(f"finescale_{name}_factor_EO", packed.factor_EO, persistent=False)
        layer.finescale_folded = gate_up.folded, down.folded
        device = gate_up.packed.device
        first_gate_up, first_down = self.experts[0]
        choice = choose_experts_kernel([first_gate_up.facts(largest_gate_up)], [first_down.facts(largest_down)], device)
        if device.type == "cuda" and not has_hopper_kernels(device) and not self.enforce_eager:
            raise InputError(
                f"experts run in parts on this GPU ({choice.why}), not in CUDA graphs: add --enforce-eager."
            )

    def _local_experts(self, layer: Any) -> list[int]:
        """Numbers, in the model, of this rank's experts, in their order here."""
        owner = getattr(layer, "expert_map", None)
        if owner is None:
            return list(range(len(self.experts)))
        numbers = [(int(place), number) for number, place in enumerate(owner.tolist()) if place >= 0]
        return [number for _, number in sorted(numbers)]

    def _packed(
        self, layer: Any, kind: str, experts: Sequence[LayerDescription], sizes: list[int]
    ) -> tuple[PackedExperts, int]:
        """One of the two products of all experts, and the largest integer scale."""
        packed, scale, shape = (getattr(layer, f"{kind}_{suffix}").data for suffix in SUFFIXES)
        codes, integers, factors = [], [], []
        for index, expert in enumerate(experts):
            columns = layer.finescale_sizes[0 if kind == "w13" else 1]
            if not bool(shape[index].all()) or not bool(torch.isfinite(scale[index]).all()):
                raise CheckpointError(f"{expert.name} is not whole in the checkpoint; it is incomplete.")
            codes_OI = to_signed(unpack_rows(packed[index], expert.scheme.bits, columns), expert.scheme.bits)
            integer_OG, factor_O = expert.integers(scale[index], sizes)
            expert.prove(codes_OI, integer_OG, sizes, layer.finescale_whole)
            codes.append(codes_OI)
            integers.append(integer_OG)
            factors.append(factor_O)
        largest = max(int(integer_OG.abs().max()) for integer_OG in integers)
        folded = largest <= LARGEST_FOLDED_SCALE
        size = experts[0].scheme.group_size
        return pack_experts(codes, integers, torch.stack(factors), size, folded), largest

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """float [T, I] -> [T, O]; shared experts, in the further arguments, are vLLM's own matter."""
        owner = getattr(layer, "expert_map", None)
        chosen_TK = topk_ids if owner is None else owner[topk_ids.long()]
        gate_up_folded, down_folded = layer.finescale_folded
        gate_up = PackedExperts(layer.finescale_gate_up, layer.finescale_gate_up_factor_EO, gate_up_folded)
        down = PackedExperts(layer.finescale_down, layer.finescale_down_factor_EO, down_folded)
        return w4a8_experts(x.contiguous(), chosen_TK, topk_weights, gate_up, down)
