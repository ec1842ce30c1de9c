"""Decoder blocks of few kernels: one product for query, key and value, one for gate and up, norms in the rounding.

`fuse` takes the decoder of a loaded transformers model apart and puts it together again as one module that computes the
same. Everything around it stays transformers' own: embeddings, head, caches, generation. A block then is nine kernels
for one token: add, norm and round; q, k, v; rotary embedding, cache and attention; round; output product; add, norm and
round; gate and up; silu, product and round; down product. The sum that follows a block is part of the next one's first.

Shape legend: B sequences, T tokens (of all sequences where there is no B), W width of the hidden states, C channels of
all heads, H heads of queries, K heads of keys and values, D channels of a head, S slots of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from finescale.errors import InputError
from finescale.kernels.attention import attend_token, dequantized, reserve_workspaces, rotate_heads
from finescale.kernels.norms import add_rms_norm, rotary_tables
from finescale.models.skeleton import find_blocks
from finescale.runtime.cache import RoundedLayer, scales_of
from finescale.runtime.packed import PackedLinear
from finescale.runtime.products import Product, check_fusable, fused

NAME = "finescale-fused"
BLOCKS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "MixtralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
)
"""Blocks of transformers whose computation is the one written down here."""
STATIC = (StaticLayer, RoundedLayer)
"""Layers of caches that the fused kernels fill themselves."""
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length."""


class FusedBlock(nn.Module):
    """The parts of one decoder block.

    Args:
        block: a block of transformers; its norms (and its experts, if it has any) are kept.
        qkv, out: the products of its attention.
        gate_up, down: the products of its MLP; None for a mixture of experts.
    """

    def __init__(
        self, block: Any, qkv: Product, out: Product, gate_up: Product | None = None, down: Product | None = None
    ) -> None:
        super().__init__()
        attention = block.self_attn
        self.qkv, self.out, self.gate_up, self.down = qkv, out, gate_up, down
        self.experts: Any = block.mlp if gate_up is None else None
        self.attention_gain_W, self.mlp_gain_W = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.epsilon = float(block.input_layernorm.variance_epsilon)
        self.mlp_epsilon = float(block.post_attention_layernorm.variance_epsilon)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.q_gain_D = None if q_norm is None else q_norm.weight
        self.k_gain_D = None if k_norm is None else k_norm.weight
        self.head_epsilon = 0.0 if q_norm is None else float(q_norm.variance_epsilon)
        self.head_dim, self.scaling = int(attention.head_dim), float(attention.scaling)
        self.heads = int(attention.config.num_attention_heads)
        self.kv_heads = int(attention.config.num_key_value_heads)

    def rotary_facts(self) -> tuple[Tensor | None, Tensor | None, float, int, int]:
        """What ``rotate_heads`` and ``attend_token`` want to know of the heads."""
        return self.q_gain_D, self.k_gain_D, self.head_epsilon, self.heads, self.kv_heads


class FusedDecoder(nn.Module):
    """All blocks and the norm behind them, called as one block of transformers is.

    Args:
        blocks: the blocks.
        norm: the norm behind the last one.
    """

    def __init__(self, blocks: list[FusedBlock], norm: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.gain_W, self.epsilon = norm.weight, float(norm.variance_epsilon)
        self.register_buffer("start", torch.zeros((), dtype=torch.int64, device=norm.weight.device), persistent=False)
        reserve_workspaces(norm.weight.device)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, W] -> [B, T, W], the hidden states behind the last norm; see a decoder layer of transformers.

        Raises:
            InputError: outputs of inner layers are asked for.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise InputError("a fused model has no inner outputs; load it by finescale.load(..., fuse=False).")
        assert position_embeddings is not None
        batch, tokens, width = hidden_states.shape
        cos, sin = (table.contiguous() for table in position_embeddings)
        residual_TW = hidden_states.reshape(-1, width).clone()
        change_TW: Tensor | None = None
        for index, block in enumerate(self.blocks):
            assert isinstance(block, FusedBlock)
            first = (residual_TW, None) if change_TW is None else (change_TW, residual_TW)
            qkv_TC = block.qkv(first[0], "rms", first[1], block.attention_gain_W, block.epsilon)
            qkv_BTC = qkv_TC.view(batch, tokens, -1)
            change_TW = self._attention(block, index, qkv_BTC, cos, sin, attention_mask, past_key_values)
            if block.gate_up is None or block.down is None:
                inputs_TW = add_rms_norm(change_TW, residual_TW, block.mlp_gain_W, block.mlp_epsilon)
                change_TW = block.experts(inputs_TW.view(batch, tokens, width)).view(-1, width)
            else:
                both_TC = block.gate_up(change_TW, "rms", residual_TW, block.mlp_gain_W, block.mlp_epsilon)
                change_TW = block.down(both_TC, "silu")
        static = [] if past_key_values is None else [x for x in past_key_values.layers if type(x) in STATIC]
        if static:
            torch._foreach_add_([layer.cumulative_length for layer in static], tokens)
        assert change_TW is not None
        out_BTW: Tensor = add_rms_norm(change_TW, residual_TW, self.gain_W, self.epsilon).view(batch, tokens, width)
        return out_BTW

    def _attention(
        self,
        block: FusedBlock,
        index: int,
        qkv_BTC: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """[B * T, W]: attention to the cache and the tokens themselves, which go into it, and the product behind it."""
        batch, tokens, _ = qkv_BTC.shape
        facts = block.rotary_facts()
        shape = (batch, block.kv_heads, tokens, block.head_dim)
        layer: Any = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        if type(layer) in STATIC:
            if not layer.is_initialized:
                empty = qkv_BTC.new_empty(shape)
                layer.lazy_initialization(empty, empty)
            place, scales = (layer.keys, layer.values, layer.cumulative_length), scales_of(layer)
            if tokens == 1 and (mask is None or mask.dim() == 2):
                # What is in the cache is from earlier steps, and this one began with a copy that waits for all of them.
                given = (qkv_BTC[:, 0], cos[:, 0], sin[:, 0], *facts, *place, mask, block.scaling, *scales, True)
                return block.out(attend_token(*given))
            query_BTHD = rotate_heads(qkv_BTC, cos, sin, *facts, *place, *scales)
            keys, values = layer.keys, layer.values
            if mask is None:  # these tokens are the first ones
                keys, values = keys[:, :, :tokens], values[:, :, :tokens]
            keys, values = (
                dequantized(x, scale, qkv_BTC.dtype) for x, scale in zip((keys, values), scales, strict=True)
            )
        else:
            keys, values = qkv_BTC.new_empty(shape), qkv_BTC.new_empty(shape)
            query_BTHD = rotate_heads(qkv_BTC, cos, sin, *facts, keys, values, self.start)
            if cache is not None:
                keys, values = cache.update(keys, values, index)
        groups = block.heads // block.kv_heads
        if groups > 1 and mask is not None:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        out_BHTD = nn.functional.scaled_dot_product_attention(
            query_BTHD.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None and tokens > 1,
            scale=block.scaling, enable_gqa=groups > 1 and mask is None,
        )  # fmt: skip
        return block.out(out_BHTD.transpose(1, 2).reshape(batch * tokens, -1))


class FusedRotary(nn.Module):
    """Rotary tables of fixed frequencies in one kernel; called as transformers' own module.

    Args:
        rotary: that module.
    """

    inv_freq: Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.float().contiguous(), persistent=False)
        self.factor = float(rotary.attention_scaling)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, D] in the type of x."""
        cos, sin = rotary_tables(position_ids.reshape(-1).contiguous(), self.inv_freq, self.factor, x.dtype)
        shape = (*position_ids.shape, -1)
        return cos.view(shape), sin.view(shape)


def fused_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Which keys count, for ``FusedDecoder``: for one token and a static cache only the slots without padding, bool
    [B, S], or None; else as transformers' ``sdpa_mask`` has it, whose arguments these are."""
    if mask_function is causal_mask_function and attention_mask is None and q_length == kv_length:
        return None  # tokens that fill the cache are the first ones
    if mask_function is causal_mask_function and q_length == 1 and isinstance(q_offset, Tensor):
        if attention_mask is None:
            return None
        valid_BS = attention_mask.bool()[:, :kv_length]
        return nn.functional.pad(valid_BS, (0, kv_length - valid_BS.shape[1])).contiguous()
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    return mask


def products_of(block: Any) -> list[list[nn.Module]]:
    """Layers of a block of transformers that share their input, in order; without those of a mixture of experts."""
    attention, mlp = block.self_attn, block.mlp
    layers = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
    if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
        layers += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    return layers


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the decoder of a model cannot be fused, in a few words; None if it can be."""
    config, core = model.config, model.base_model
    if any(isinstance(module, FusedDecoder) for module in core.modules()):
        return "it is fused already"
    _, blocks = find_blocks(model)
    first: Any = blocks[0]
    if type(first).__name__ not in BLOCKS or not type(first).__module__.startswith("transformers."):
        return f"{type(first).__name__} is not among the blocks that can be fused"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    width = int(first.self_attn.head_dim)
    if width < 16 or width & (width - 1):
        return f"its heads have {width} channels"
    if 2 * core.rotary_emb.inv_freq.numel() != width:
        return "it rotates only a part of each head"
    return None


def fuse(model: PreTrainedModel) -> str | None:
    """Fuses the decoder of a model in place, freeing each block's layers as it goes.

    Returns:
        None when it is done; else why it could not be, the model being as it was.
    """
    reason = obstacle(model)
    if reason is not None:
        return reason
    _, blocks = find_blocks(model)
    try:
        for block in blocks:  # before anything is changed
            for layers in products_of(block):
                check_fusable(layers)
    except InputError as error:
        return str(error)
    parts = []
    for index in range(len(blocks)):
        block = blocks[index]
        parts.append(FusedBlock(block, *(fused(layers) for layers in products_of(block))))
        blocks[index] = nn.Identity()
    install(model, parts)
    return None


def fuse_on_kernels(model: PreTrainedModel) -> None:
    """Fuses the decoder of a model whose layers run on the fused kernels, if it can be; others are left alone."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        fuse(model)


def install(model: PreTrainedModel, blocks: list[FusedBlock]) -> None:
    """Puts fused blocks into a model in the place of its own."""
    core: Any = model.base_model
    core.layers = nn.ModuleList([FusedDecoder(blocks, core.norm)])
    core.norm = nn.Identity()
    if getattr(core.rotary_emb, "rope_type", None) in FIXED_ROTARY:
        core.rotary_emb = FusedRotary(core.rotary_emb)
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, fused_mask)
    model.config._attn_implementation = NAME
