"""A step of tuning that a GPU repeats by itself.

A step over one block is hundreds of small kernels, and their launches take longer than they do. On a GPU the step is
therefore recorded once (a CUDA graph) and then replayed on new inputs. What is recorded must do the same work each
time, without asking the GPU for a value: experts that choose their tokens do not, and are run step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finescale.models.experts import UnfusedExperts

Step = Callable[[Tensor, Tensor, Any], None]
"""``(input, target, left)``; ``left``, a number or on a GPU a tensor of one, falls from 1 to 0 over all steps."""
RECORDS = True
"""Whether steps are recorded at all."""
WARM = 3
"""Steps before the recording: what is made at first use must be there."""


def replayed(step: Step, block: nn.Module, device: torch.device) -> Step:
    """``step``, replayed from a recording where that can be done; all its state must be updated in place."""
    if not RECORDS or device.type != "cuda" or any(isinstance(module, UnfusedExperts) for module in block.modules()):
        return step
    static: list[Tensor] = []
    recorded: list[torch.cuda.CUDAGraph] = []
    calls, failed = 0, False

    def run(input_BTC: Tensor, target_BTC: Tensor, left: float) -> None:
        nonlocal calls, failed
        if not static:
            static.extend((input_BTC.clone(), target_BTC.clone(), torch.ones((), device=device)))
        static[0].copy_(input_BTC)
        static[1].copy_(target_BTC)
        static[2].fill_(left)
        calls += 1
        if not recorded and not failed and calls > WARM:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    step(static[0], static[1], static[2])
                recorded.append(graph)
            except RuntimeError:  # the block asks for a value: nothing was run
                failed = True
        if recorded:
            recorded[0].replay()
        else:
            step(static[0], static[1], static[2])

    return run


def adamw(parts: Sequence[tuple[Sequence[Tensor], float]], device: torch.device) -> torch.optim.AdamW:
    """AdamW without decay for some parameters, each part with its first rate, that can be recorded on a GPU."""
    on_gpu = device.type == "cuda"
    groups: list[dict[str, Any]] = [
        {"params": list(values), "lr": torch.tensor(rate, device=device) if on_gpu else rate, "first": rate}
        for values, rate in parts
        if values
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, capturable=on_gpu)


def set_rates(optimizer: torch.optim.AdamW, left: Any) -> None:
    """Each part's rate at ``left`` of its first one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(left * group["first"])
        else:
            group["lr"] = left * group["first"]
