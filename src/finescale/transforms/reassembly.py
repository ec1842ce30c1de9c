"""Channel reassembly (QLLM, arXiv 2310.08041, section 3): outlier channels are split, similar ones merged.

A channel whose largest magnitude is m becomes T = ceil(m / theta) copies of x / T, and its column of the weight is
copied: the product stays, the range of the input shrinks. To get back to the old width the most similar other channels
are merged in pairs: (x_i + x_j) / 2 meets W_i + W_j, which changes the product by (x_i - x_j) (W_i - W_j) / 2.

Shape legend: O outputs, I channels before, E channels after splitting, J channels in the end, K members of the largest
merged channel, A and B the even and odd of E.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from finescale.grid import Gather

Distance = Literal["exact", "public"]


@dataclass(frozen=True)
class Reassembly:
    """How channels are split and merged.

    Attributes:
        source_E: int64 [E], the channel before of each one after splitting.
        share_E: float64 [E], 1 / T.
        group_E: int64 [E], the final channel; -1 for one that is dropped.
        width: number of final channels.
    """

    source_E: Tensor
    share_E: Tensor
    group_E: Tensor
    width: int

    def weight(self, weight_OI: Tensor) -> Tensor:
        """The weight that meets the gathered input, float [O, J]: columns copied and summed, in their order."""
        gather = self.gather()
        out_OJ = weight_OI[:, gather.index_KJ[0]]
        for some_M, index_M, _ in gather.further_members:  # not scattered: a GPU would add them in any order
            out_OJ[:, some_M] += weight_OI[:, index_M]
        return out_OJ

    def gather(self) -> Gather:
        """The input's side: shares of the members, averaged over each merged channel."""
        return self._gather

    @cached_property
    def _gather(self) -> Gather:
        kept = (self.group_E >= 0).nonzero().squeeze(1)
        group = self.group_E[kept]
        size_J = torch.bincount(group, minlength=self.width)
        order = torch.argsort(group, stable=True)
        first_J = size_J.cumsum(0) - size_J
        place = torch.arange(kept.shape[0], device=group.device) - first_J[group[order]]
        members = int(size_J.max())
        index_KJ = torch.zeros(members, self.width, dtype=torch.int64, device=group.device)
        gain_KJ = torch.zeros(members, self.width, dtype=torch.float32, device=group.device)
        ordered = kept[order]
        index_KJ[place, group[order]] = self.source_E[ordered]
        gain_KJ[place, group[order]] = (self.share_E[ordered] / size_J[group[order]]).float()
        return Gather(index_KJ, gain_KJ)


def splits(absmax_I: Tensor, theta: float) -> Tensor:
    """T = ceil(max|x| / theta), at least 1, int64 [I] (QLLM, equation 3)."""
    return torch.ceil(absmax_I.double() / theta).long().clamp(min=1)


def disassemble(split_I: Tensor) -> Reassembly:
    """Split channels only: the product is the same, the width grows to the sum of ``split_I`` (int64 [I])."""
    source_E = torch.repeat_interleave(torch.arange(split_I.shape[0], device=split_I.device), split_I)
    share_E = 1.0 / split_I[source_E].double()
    width = source_E.shape[0]
    return Reassembly(source_E, share_E, torch.arange(width, device=split_I.device), width)


def merge_scores(hessian_II: Tensor, weight_OI: Tensor, distance: Distance) -> Tensor:
    """How much merging two channels costs, float [I, I].

    Args:
        hessian_II: sums (or means) of x x^T over tokens.
        weight_OI: float [O, I], the weights of all linears that share the input, stacked.
        distance: ``exact`` is ||x_i - x_j||^2 ||W_i - W_j||^2 / 4, the squared change of the output (QLLM, equation 5);
            ``public`` what the authors' code computes, ||x_i - x_j||^2 (sum_o W_oi + sum_o W_oj)^2.
    """
    input_II = _squared_distances(hessian_II)
    weight_OI = weight_OI.to(input_II.dtype)
    if distance == "exact":
        return input_II * _squared_distances(weight_OI.T @ weight_OI) / 4
    sum_I = weight_OI.sum(0)
    return input_II * (sum_I[:, None] + sum_I).square()


def _squared_distances(gram_II: Tensor) -> Tensor:
    diagonal_I = gram_II.diagonal()
    return (diagonal_I[:, None] + diagonal_I - 2 * gram_II).clamp(min=0)


def assemble(parts: Reassembly, score_II: Tensor) -> Reassembly:
    """Merge the most similar channels until the width is the old one again (QLLM, section 3.2).

    Even channels choose their nearest odd one (bipartite soft matching), and the links of least cost are merged.
    Several may choose the same. Channels that were split take no part. Where more would have to be merged than can be,
    the result is wider than the input was.

    Args:
        parts: split channels.
        score_II: `merge_scores` of the channels before.
    """
    channels, extra = score_II.shape[0], parts.width - score_II.shape[0]
    if extra <= 0:
        return parts
    free_E = parts.share_E == 1.0
    even_A = torch.arange(0, parts.width, 2, device=score_II.device)
    odd_B = torch.arange(1, parts.width, 2, device=score_II.device)
    score_AB = score_II[parts.source_E[even_A]][:, parts.source_E[odd_B]].clone()
    score_AB[~free_E[even_A]] = torch.inf
    score_AB[:, ~free_E[odd_B]] = torch.inf
    least_A, nearest_A = score_AB.min(1)
    chosen = torch.argsort(least_A, stable=True)[:extra]
    chosen = chosen[torch.isfinite(least_A[chosen])]
    leader_E = torch.arange(parts.width, device=score_II.device)
    leader_E[even_A[chosen]] = odd_B[nearest_A[chosen]]
    heads, group_E = torch.unique(leader_E, return_inverse=True)
    assert heads.shape[0] == parts.width - chosen.shape[0] and heads.shape[0] >= channels
    return Reassembly(parts.source_E, parts.share_E, group_E, heads.shape[0])


def prune(parts: Reassembly, hessian_II: Tensor, weight_OI: Tensor) -> Reassembly:
    """Instead of merging, drop the channels whose loss changes the output least, ||x_i||^2 ||W_i||^2 (the ablation of
    QLLM, section 4.2); channels that were split stay."""
    extra = parts.width - hessian_II.shape[0]
    cost_E = (hessian_II.diagonal() * weight_OI.to(hessian_II.dtype).square().sum(0))[parts.source_E]
    cost_E = torch.where(parts.share_E == 1.0, cost_E, torch.inf)
    dropped = torch.argsort(cost_E, stable=True)[: max(extra, 0)]
    dropped = dropped[torch.isfinite(cost_E[dropped])]
    kept_E = torch.ones(parts.width, dtype=torch.bool, device=cost_E.device)
    kept_E[dropped] = False
    group_E = torch.where(kept_E, kept_E.long().cumsum(0) - 1, -1)
    return Reassembly(parts.source_E, parts.share_E, group_E, int(kept_E.sum()))
