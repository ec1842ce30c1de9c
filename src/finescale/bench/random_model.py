"""A model of a named shape with random weights, made directly on the device, on the fused decoder that users get.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from finescale.bench.shapes import shape_config
from finescale.errors import InputError
from finescale.kernels.experts import PackedExperts
from finescale.kernels.hopper import gemm
from finescale.kernels.layout import pack_weight
from finescale.runtime.experts import PackedMixture
from finescale.runtime.fused import FusedBlock, install
from finescale.runtime.products import DenseProduct, PackedProduct, Product

ROUNDED_CACHE = {"w4a8-kv8": "w4a8", "w4a8-folded-kv8": "w4a8-folded"}
"""Arms whose keys and values are int8 as well, and the one whose layers they have."""
USUAL_ARMS = ("bf16", "w4a8", "w4a8-folded", "w4a8-float")
"""bfloat16; any integer scales; folded ones; float scales and sums on the same kernel."""
ARMS = (*USUAL_ARMS, *ROUNDED_CACHE)
GROUP = 128
DEVIATION = 0.02
"""Of the weights, so that activations keep their size."""
DTYPE = torch.bfloat16


class FloatScaleProduct(PackedProduct):
    """The same kernel with bfloat16 scales and float32 sums, to compare with."""

    def multiply(self, codes: Tensor, scale_T: Tensor, sum_T: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``PackedProduct.multiply``."""
        return gemm.run(
            codes, scale_T, sum_T, self.packed, scale_T.shape[0], self.outputs, self.amplifier, self.bias_O, dtype,
            False, kernel_of(self, scale_T.shape[0], dtype), self.channel_scale_O,
        )  # fmt: skip


def kernel_of(product: PackedProduct, tokens: int, dtype: torch.dtype) -> gemm.Variant:
    """The form of the kernel that runs a product on its GPU; float scales take the one that integers would."""
    _, blocks, slab_bytes = product.packed.shape
    chosen = gemm.choose(
        tokens, product.outputs, blocks, (slab_bytes - 4096) // 128, product.folded, gemm.OUT_TYPES[dtype],
        gemm.capacity(product.packed.device.index),
    )  # fmt: skip
    return replace(chosen, float_scales=True) if isinstance(product, FloatScaleProduct) else chosen


def random_packed(inputs: int, outputs: int, arm: str, device: torch.device) -> PackedProduct:
    """A W4A8 product of random codes and scales, whose weights deviate by about ``DEVIATION``."""
    codes_OI = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device=device)
    groups = (outputs, -(-inputs // GROUP))
    folded = arm == "w4a8-folded"
    low, high = (1, 16) if folded else (100, 1024)
    scale_OG = torch.randint(low, high, groups, dtype=torch.int32, device=device)
    amplifier = 2**11 if folded else 2**17
    if arm == "w4a8-float":
        scale_OG = scale_OG.bfloat16().view(torch.int16).to(torch.int32)
        return FloatScaleProduct(pack_weight(codes_OI, scale_OG, GROUP), None, None, outputs, amplifier, False)
    channel_scale_O = torch.full((outputs,), 1 / amplifier, device=device) if folded else None
    packed = pack_weight(codes_OI, scale_OG, GROUP)
    return PackedProduct(packed, None, channel_scale_O, outputs, 1 if folded else amplifier, folded)


def product_maker(arm: str, device: torch.device) -> Callable[[int, int], Product]:
    """A function of inputs and outputs that gives random products, each in memory of its own."""
    made: dict[tuple[int, int], PackedProduct] = {}

    def make(inputs: int, outputs: int) -> Product:
        if arm == "bf16":
            weight_OI = torch.empty(outputs, inputs, dtype=DTYPE, device=device)
            return DenseProduct(weight_OI.normal_(0, DEVIATION), None)
        key = (inputs, outputs)
        if key not in made:
            made[key] = random_packed(inputs, outputs, arm, device)
            return made[key]
        one = made[key]
        return type(one)(one.packed.clone(), None, one.channel_scale_O, outputs, one.amplifier, one.folded)

    return make


def random_experts(count: int, inputs: int, outputs: int, arm: str, device: torch.device) -> PackedExperts:
    """One layer of ``count`` experts: the same random weights for each, in memory of its own."""
    one = random_packed(inputs, outputs, arm, device)
    packed = one.packed.expand(count, *one.packed.shape).clone()
    factor_O = one.channel_scale_O
    if factor_O is None:
        factor_O = torch.full((outputs,), 1 / one.amplifier, device=device)
    return PackedExperts(packed, factor_O.repeat(count, 1), one.folded)


def fill_mixture(mlp: Any, config: Any, arm: str, device: torch.device) -> None:
    """Random experts and router in the place of those of a mixture of experts; bfloat16 ones stay transformers' own,
    in grouped products on a GPU.

    Raises:
        InputError: an arm without experts of its kind.
    """
    if arm == "w4a8-float":
        raise InputError("mixtures of experts have no kernel of float scales to compare with.")
    router = torch.empty_like(mlp.gate.weight, device=device).normal_(0, DEVIATION)
    mlp.gate.weight = nn.Parameter(router, requires_grad=False)
    if arm == "bf16":
        for leaf, weight in list(mlp.experts.named_parameters()):
            filled = torch.empty_like(weight, device=device).normal_(0, DEVIATION)
            setattr(mlp.experts, leaf, nn.Parameter(filled, requires_grad=False))
        return
    count = getattr(config, "num_local_experts", None) or config.num_experts
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    gate_up = random_experts(count, config.hidden_size, 2 * width, arm, device)
    mlp.experts = PackedMixture(gate_up, random_experts(count, width, config.hidden_size, arm, device), "random")


def random_model(name: str, arm: str, device: torch.device, layers: int | None = None) -> PreTrainedModel:
    """A fused model of a shape.

    Args:
        name: of a shape (``shapes.SHAPES``).
        arm: how its layers multiply (``ARMS``).
        device: where it is made.
        layers: blocks, instead of those of the shape.

    Raises:
        InputError: an unknown shape or arm, float scales without a GPU, or an arm that experts do not have.
    """
    if arm not in ARMS:
        raise InputError(f"no arm is called {arm}; use some of {', '.join(ARMS)}.")
    if arm == "w4a8-float" and device.type != "cuda":
        raise InputError("float scales on the kernel's skeleton need a Hopper GPU; leave out w4a8-float.")
    arm, config = ROUNDED_CACHE.get(arm, arm), shape_config(name, layers)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.eval().requires_grad_(False)
    core: Any = model.base_model
    make = product_maker(arm, device)
    hidden = config.hidden_size
    blocks = []
    for block in core.layers:
        attention = block.self_attn
        for norm in [m for m in block.modules() if isinstance(getattr(m, "variance_epsilon", None), float)]:
            norm.weight = nn.Parameter(torch.ones_like(norm.weight, device=device), requires_grad=False)
        heads = config.num_attention_heads * attention.head_dim
        both = 2 * config.num_key_value_heads * attention.head_dim
        mlp: tuple[Product, ...] = ()
        if hasattr(block.mlp, "experts"):
            fill_mixture(block.mlp, config, arm, device)
        else:
            mlp = (make(hidden, 2 * config.intermediate_size), make(config.intermediate_size, hidden))
        blocks.append(FusedBlock(block, make(hidden, heads + both), make(heads, hidden), *mlp))
    core.norm.weight = nn.Parameter(torch.ones_like(core.norm.weight, device=device), requires_grad=False)
    core.rotary_emb = type(core.rotary_emb)(config).to(device)
    for module in (core.embed_tokens, model.lm_head):
        weight = torch.empty_like(module.weight, device=device).normal_(0, DEVIATION)
        module.weight = nn.Parameter(weight, requires_grad=False)
    install(model, blocks)
    left = [key for key, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    assert not left, left
    return model


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
