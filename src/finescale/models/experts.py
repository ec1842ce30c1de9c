"""Fused experts taken apart, so that each expert's projections are ordinary linear layers with their own statistics.

transformers 5 keeps all experts of a layer in 3-D parameters. Checkpoints, and every engine, name them one by one.
Shape legend: T tokens, I inputs, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finescale.models.families import ExpertNames


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``, its layers named as in the checkpoint."""

    def __init__(
        self, hidden: int, intermediate: int, names: ExpertNames, act: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names = names
        self.act = act
        self.add_module(names.gate, nn.Linear(hidden, intermediate, bias=False, dtype=dtype))
        self.add_module(names.up, nn.Linear(hidden, intermediate, bias=False, dtype=dtype))
        self.add_module(names.down, nn.Linear(intermediate, hidden, bias=False, dtype=dtype))

    def forward(self, x_TI: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in (self.names.gate, self.names.up, self.names.down))
        out: Tensor = down(self.act(gate(x_TI)) * up(x_TI))
        return out


class UnfusedExperts(nn.ModuleList):
    """Drop-in for the fused experts of transformers: same call, one module per expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, each times its routing weight.

        Args:
            hidden_states: float [T, I].
            top_k_index: int64 [T, K].
            top_k_weights: float [T, K].
        """
        out_TI = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token_n, choice_n = torch.where(top_k_index == index)
            if token_n.numel() == 0:
                continue
            routed_nI = expert(hidden_states[token_n]) * top_k_weights[token_n, choice_n, None]
            out_TI.index_add_(0, token_n, routed_nI.to(out_TI.dtype))
        return out_TI


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds 3-D ``gate_up_proj`` and ``down_proj`` parameters."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.dim() == down.dim() == 3


def unfuse_experts(root: nn.Module, names: ExpertNames) -> None:
    """Replace every fused-experts module below ``root`` by ``UnfusedExperts`` on the same device, weights unset."""
    for name, module in list(root.named_modules()):
        if not is_fused_experts(module):
            continue
        gate_up: Tensor = module.gate_up_proj
        count, _, hidden = gate_up.shape
        intermediate = module.down_proj.shape[2]
        act: Callable[[Tensor], Tensor] = module.act_fn
        with torch.device(gate_up.device):
            experts = UnfusedExperts(Expert(hidden, int(intermediate), names, act, gate_up.dtype) for _ in range(count))
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, experts)
