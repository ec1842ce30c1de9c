"""Norms and gated activations of vLLM's models that quantize for the W4A8 layer behind them, in one kernel.

vLLM's linear layers hand their input to the quantization method untouched, so a norm may give the next layer integers
instead of floats. Where nothing else reads that input, said below class by class, the norm is replaced. Everywhere else
layers quantize by themselves, with the same integers.

Shape legend: T tokens, I inputs.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from finescale.kernels.direct import quantized
from finescale.runtime.vllm_rotary import rotate_on_the_way

_ATTENTION = {"self_attn.qkv_proj": "input_layernorm"}
_BLOCK = _ATTENTION | {"mlp.gate_up_proj": "post_attention_layernorm"}
NORMS = {
    "LlamaDecoderLayer": _BLOCK,
    "MistralDecoderLayer": _BLOCK,
    "Qwen2DecoderLayer": _BLOCK,
    "Qwen3DecoderLayer": _BLOCK,
    "MixtralDecoderLayer": _ATTENTION,
    "Qwen3MoeDecoderLayer": _ATTENTION,
}
"""By class of vLLM's decoder layers: linear layers whose only input is the output of which norm."""
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes whose ``act_fn`` (silu of the gate, times up) is read by ``down_proj`` alone."""


class QuantizedTokens(NamedTuple):
    """What `finescale.kernels.linear.quantize_tokens` gives, on its way to a layer."""

    codes: Tensor
    scale_T: Tensor
    sum_T: Tensor
    dtype: torch.dtype


class QuantizingNorm(nn.Module):
    """Stands where vLLM's RMSNorm stood."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(
        self, x_TI: Tensor, residual_TI: Tensor | None = None
    ) -> QuantizedTokens | tuple[QuantizedTokens, Tensor]:
        """The rounded norm of x, or of x + residual, together with that sum (which overwrites the residual)."""
        codes, scale_T, sum_T = quantized(x_TI.contiguous(), "rms", residual_TI, self.weight, self.variance_epsilon)
        rounded = QuantizedTokens(codes, scale_T, sum_T, x_TI.dtype)
        return rounded if residual_TI is None else (rounded, residual_TI)


class QuantizingSilu(nn.Module):
    """Stands where vLLM's SiluAndMul stood."""

    def forward(self, x_TI: Tensor) -> QuantizedTokens:
        """silu(gate) * up of [T, 2 * I], rounded."""
        codes, scale_T, sum_T = quantized(x_TI.contiguous(), "silu", None, None, 0.0)
        return QuantizedTokens(codes, scale_T, sum_T, x_TI.dtype)


class Ancestry:
    """Who holds whom in a model under construction: a layer does not know its neighbours, its parent does."""

    def __init__(self) -> None:
        self._holders: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[nn.Module], str]]
        self._holders = weakref.WeakKeyDictionary()
        self._hook = register_module_module_registration_hook(self._note)

    def _note(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            self._holders[module] = weakref.ref(holder), name

    def holder(self, module: nn.Module | None) -> tuple[nn.Module | None, str]:
        """The module that holds this one, and under which name; (None, "") where that is not known."""
        reference, name = self._holders.get(module, (None, "")) if module is not None else (None, "")
        return (None if reference is None else reference()), name

    def close(self) -> None:
        """The model is complete: nothing is noted any more."""
        self._hook.remove()


def quantize_on_the_way(linear: nn.Module, ancestry: Ancestry) -> None:
    """Let the norm or activation in front of a W4A8 layer quantize for it, where it serves this layer alone."""
    parent, leaf = ancestry.holder(linear)
    block, parent_name = ancestry.holder(parent)
    if parent is not None and type(parent).__name__ in GATED and leaf == "down_proj":
        if type(getattr(parent, "act_fn", None)).__name__ == "SiluAndMul":
            parent.act_fn = QuantizingSilu()
        return
    if block is None or getattr(block, "ada_rms_norm_t_cond", None) is not None:
        return
    if type(block).__name__ in NORMS and leaf == "qkv_proj" and parent is not None:
        rotate_on_the_way(parent)
    name = NORMS.get(type(block).__name__, {}).get(f"{parent_name}.{leaf}")
    norm = None if name is None else getattr(block, name, None)
    if name is not None and _is_plain_norm(norm):
        setattr(block, name, QuantizingNorm(norm))


def _is_plain_norm(norm: Any) -> bool:
    return (
        type(norm).__name__ == "RMSNorm"
        and norm.has_weight
        and norm.variance_size_override is None
        and norm.weight.dim() == 1
    )
