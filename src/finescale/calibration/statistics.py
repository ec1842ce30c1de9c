"""Second moments of layer inputs, H = X X^T / tokens, accumulated while a block runs.

Shape legend: I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finescale.errors import NumericsError
from finescale.finite import all_finite
from finescale.kernels.half import add_half_product_
from finescale.ranks import ALONE, Ranks

TOKENS_TOGETHER = 4096
"""Tokens whose products are summed on tensor cores at a time."""


@dataclass
class Moments:
    """Running sum of x x^T of one layer input.

    Attributes:
        sum_II: float32 [I, I].
        tokens: tokens seen.
    """

    sum_II: Tensor
    tokens: int = 0

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        self.tokens += x_TI.shape[0]
        if x_TI.is_cuda and x_TI.dtype in (torch.float16, torch.bfloat16):
            # Tensor cores cut sums off instead of rounding them: few tokens at a time.
            for part_TI in x_TI.split(TOKENS_TOGETHER):
                add_half_product_(self.sum_II, part_TI.T, part_TI)
        else:
            x_TI = x_TI.float()
            self.sum_II.addmm_(x_TI.T, x_TI)

    def hessian(self) -> Tensor:
        """Mean of x x^T over the tokens, float32 [I, I]; zero when no token came."""
        return self.sum_II / max(self.tokens, 1)

    def hessian_(self) -> Tensor:
        """The same in the place of the sum, which it uses up: these are among the largest matrices of a run."""
        return self.sum_II.div_(max(self.tokens, 1))


def matrix_power(hessian_II: Tensor, power: float) -> Tensor:
    """A symmetric positive semidefinite matrix [I, I] with its eigenvalues to ``power``, of the same mean diagonal, so
    that a damping means the same; the matrix itself for 1. Decomposed in float64. Inputs that were never active keep
    their zeros: solvers know them by these.

    A layer's squared output error does not know how much each output and token counts, and seems to overrate the
    largest eigenvalues: with their roots solutions come closer to the original's predictions, though the output error
    is larger (docs/quantease.md).

    Raises:
        NumericsError: it cannot be decomposed.
    """
    if power == 1:
        return hessian_II
    mean = hessian_II.diagonal().double().mean()
    try:
        value_I, vector_II = torch.linalg.eigh(hessian_II.double() / mean.clamp(min=torch.finfo(torch.float32).tiny))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericsError("the Hessian cannot be decomposed; set calibration.power 1.") from error
    vector_II.mul_((hessian_II.diagonal() != 0)[:, None])  # rounding errors would have brought them to life
    powered_II = (vector_II * value_I.clamp_(min=0).pow_(power)) @ vector_II.T
    return powered_II.mul_(mean / powered_II.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)).float()


def collect_moments(
    block: nn.Module,
    leaders: Mapping[str, str],
    batches: Collection[tuple[Tensor, dict[str, Any]]],
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, Moments]:
    """Run a block over all batches and accumulate the moments of some layers' inputs.

    Args:
        block: filled with weights.
        leaders: layer paths inside the block, one for each distinct input, with their full names for messages.
        batches: (hidden states [B, T, I], keyword arguments) pairs.
        device: where the block lives.
        ranks: processes that have other batches; the moments are those of all of them.

    Raises:
        NumericsError: an input is NaN or Inf.
    """
    modules = {name: block.get_submodule(name) for name in leaders}
    moments: dict[str, Moments] = {}
    handles = []
    for name, module in modules.items():
        weight: Any = module.weight
        width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        moments[name] = Moments(torch.zeros(width, width, dtype=torch.float32, device=device))
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: moments[name].add(args[0])))
    try:
        with torch.no_grad():
            if ranks.deterministic:
                _in_order(block, batches, moments, device, ranks)
            else:
                for hidden_BTI, kwargs in batches:
                    block(hidden_BTI.to(device), **kwargs)
                for moment in moments.values():
                    ranks.sum_(moment.sum_II)
                    moment.tokens = int(ranks.sum_(torch.tensor([moment.tokens])))
    finally:
        for handle in handles:
            handle.remove()
    for name, moment in moments.items():
        if not all_finite(moment.sum_II):
            raise NumericsError(
                f"the input of {leaders[name]} holds NaN or Inf; the checkpoint is damaged, or the model overflows on "
                "this text."
            )
    return moments


@dataclass
class InputRange:
    """Running range per channel of one layer input.

    Attributes:
        min_I, max_I: float [I]; zero before the first token.
        sum_abs_I: float64 [I], sum of |x|.
        tokens: tokens seen.
    """

    min_I: Tensor
    max_I: Tensor
    sum_abs_I: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> InputRange:
        zeros_I = torch.zeros(width, device=device)
        return cls(zeros_I, zeros_I.clone(), zeros_I.double())

    def add(self, x_TI: Tensor) -> None:
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        if x_TI.shape[0] == 0:
            return
        self.min_I = torch.minimum(self.min_I, x_TI.amin(0)) if self.tokens else x_TI.amin(0)
        self.max_I = torch.maximum(self.max_I, x_TI.amax(0)) if self.tokens else x_TI.amax(0)
        self.sum_abs_I = self.sum_abs_I + x_TI.abs().sum(0, dtype=torch.float64)
        self.tokens += x_TI.shape[0]

    @property
    def absmax_I(self) -> Tensor:
        """Largest magnitude per channel, float [I]."""
        return torch.maximum(self.min_I.abs(), self.max_I.abs())

    @property
    def mean_abs_I(self) -> Tensor:
        """Mean magnitude per channel, float [I]; zero when no token came."""
        return (self.sum_abs_I / max(self.tokens, 1)).to(self.min_I.dtype)


def collect_ranges(
    block: nn.Module,
    outputs_of: Iterable[str],
    inputs_of: Iterable[str],
    batches: Collection[tuple[Tensor, dict[str, Any]]],
    device: torch.device,
) -> dict[str, InputRange]:
    """Run a block over all batches and note the range per channel of some modules' outputs and of others' inputs.

    Args:
        block: filled with weights.
        outputs_of: modules (norms) by path whose output counts.
        inputs_of: modules (linears) by path whose input counts.
        batches: (hidden states [B, T, I], keyword arguments) pairs.
        device: where the block lives.

    Returns:
        Ranges by path; a module that is never called (an expert without tokens) has an empty one.
    """
    ranges: dict[str, InputRange] = {}
    handles = []

    def note(name: str, x_TI: Tensor) -> None:
        if name not in ranges:
            ranges[name] = InputRange.empty(x_TI.shape[-1], x_TI.device)
        ranges[name].add(x_TI.detach())

    for name in outputs_of:
        module = block.get_submodule(name)
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: note(name, output)))
    for name in inputs_of:
        module = block.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
        weight: Any = module.weight
        width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        ranges[name] = InputRange.empty(width, device)
    try:
        with torch.no_grad():
            for hidden_BTI, kwargs in batches:
                block(hidden_BTI.to(device), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def _in_order(
    block: nn.Module,
    batches: Collection[tuple[Tensor, dict[str, Any]]],
    moments: Mapping[str, Moments],
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Add the moments batch by batch in the order of the text: float sums depend on their order.

    Batches are dealt out in turn, so that in each round the processes have consecutive ones.
    """
    mine = iter(batches)
    rounds = int(ranks.largest(len(batches)))
    totals = {name: Moments(torch.zeros_like(moment.sum_II)) for name, moment in moments.items()}
    for _ in range(rounds):
        for moment in moments.values():
            moment.sum_II.zero_()
            moment.tokens = 0
        batch = next(mine, None)
        if batch is not None:
            block(batch[0].to(device), **batch[1])
        for name, moment in moments.items():
            ranks.add_in_order_(totals[name].sum_II, moment.sum_II)
            totals[name].tokens += int(ranks.sum_(torch.tensor([moment.tokens])))
    for name, moment in moments.items():
        moment.sum_II, moment.tokens = totals[name].sum_II, totals[name].tokens
