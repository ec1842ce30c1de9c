"""What a comparison keeps of the original model: the inputs of its head, from which its logits come back exactly.

A window of 2048 tokens has 2048 x V logits, but only 2048 x I inputs of the head: kept on disk once, they save every
later evaluation the run of the original model.

Shape legend: W windows, T tokens, I hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from finescale.errors import CheckpointError


@dataclass(frozen=True)
class Reference:
    """Inputs of the head, float [W, T, I], on the CPU, and the head, on the device that computes."""

    hidden_WTI: Tensor
    weight_VI: Tensor
    bias_V: Tensor | None = None

    def logits(self, window: int) -> Tensor:
        """Logits of a window without those of its last token, float [T - 1, V]."""
        hidden_TI = self.hidden_WTI[window, :-1].to(self.weight_VI.device)
        return F.linear(hidden_TI, self.weight_VI, self.bias_V)


def capture_reference(model: PreTrainedModel, windows_WT: Tensor) -> Reference | None:
    """Run a model over windows and keep the inputs of its head.

    Returns:
        None for a model that does more to its logits than multiply by its head (a soft cap, a factor): such a model
        must run again for every evaluation.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    rows: list[Tensor] = []
    try:
        for tokens_T in windows_WT:
            with torch.no_grad():
                logits_TV = model(input_ids=tokens_T[None].to(model.device), use_cache=False).logits[0]
                hidden_TI = seen.pop()[0]
                seen.clear()
                if not rows and not torch.allclose(F.linear(hidden_TI, head.weight, head.bias), logits_TV, 1e-3, 1e-3):
                    return None
            rows.append(hidden_TI.cpu())
    finally:
        handle.remove()
    bias = None if head.bias is None else head.bias.detach()
    return Reference(torch.stack(rows), head.weight.detach(), bias)


def save_reference(reference: Reference, path: Path) -> None:
    """Into a safetensors file, by atomic rename."""
    tensors = {"hidden": reference.hidden_WTI, "head.weight": reference.weight_VI.cpu()}
    if reference.bias_V is not None:
        tensors["head.bias"] = reference.bias_V.cpu()
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)


def load_reference(path: Path, device: torch.device) -> Reference:
    """From such a file. Raises CheckpointError when it is damaged."""
    try:
        tensors = load_file(path)
        bias = tensors.get("head.bias")
        weight_VI = tensors["head.weight"].to(device)
        return Reference(tensors["hidden"], weight_VI, None if bias is None else bias.to(device))
    except Exception as error:  # safetensors raises a type of its own for each kind of damage
        raise CheckpointError(f"{path} is damaged ({error}); remove it and start again.") from error
