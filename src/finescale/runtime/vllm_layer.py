"""What a checkpoint says of one layer of vLLM, or of several fused ones; their integers and proof. Needs no vLLM.

Shape legend: O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finescale.errors import InputError
from finescale.grid import ActivationScheme, WeightScheme, contiguous_groups
from finescale.grid.integer_scale import common_factor, prove_no_overflow
from finescale.kernels.dispatch import LayerFacts


@dataclass(frozen=True)
class LayerDescription:
    """What the checkpoint says of a layer, or of several that vLLM fuses into one.

    Attributes:
        name: for messages.
        layout: `pack-quantized` or `int-quantized`.
        scheme: bits and groups.
        activations: how the inputs are rounded, None if they are not.
        parts: of each of the fused layers, in their order: amplifier, proved bound, gather, rotation.
    """

    name: str
    layout: str
    scheme: WeightScheme
    activations: ActivationScheme | None
    parts: Sequence[dict[str, Any]]

    @property
    def integer(self) -> bool:
        """Whether the exact int32 product computes it."""
        rounded = self.activations is not None and self.activations.symmetric and self.activations.dynamic
        return rounded and all(part.get("amplifier") for part in self.parts)

    @property
    def inputs(self) -> dict[str, Any]:
        """Gather and rotation, the same for all parts.

        Raises:
            InputError: the parts differ.
        """
        found = [part.get("inputs") or {} for part in self.parts]
        if any(one != found[0] for one in found):
            raise InputError(f"{self.name}: its parts rearrange their inputs differently; vLLM fuses them.")
        return found[0]

    def facts(self, largest: int) -> LayerFacts:
        """What decides about the kernel; ``largest`` is the largest integer scale, 0 where scales are floats."""
        rounded = self.activations
        return LayerFacts(
            bits=self.scheme.bits,
            group_size=self.scheme.group_size,
            contiguous_groups=True,
            integer_scales=all(part.get("amplifier") for part in self.parts),
            largest_scale=largest,
            activation_bits=None if rounded is None else rounded.bits,
            symmetric_activations=rounded is not None and rounded.symmetric and rounded.dynamic,
            outliers=False,
        )

    def integers(self, scale_OG: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the stored scales are made of.

        Args:
            scale_OG: float32, of all parts.
            sizes: outputs of each part here.

        Returns:
            Integer scales, int32 [O, G], and what they are times, float32 [O]: one over the part's amplifier, or each
            output's own factor where scales are folded.

        Raises:
            InputError: they are not integers.
        """
        # One layer in the file may be several parts of vLLM's (Falcon's query_key_value).
        parts = [*self.parts] * len(sizes) if len(self.parts) == 1 else self.parts
        factors = [
            common_factor(rows) if part.get("folded") else torch.full_like(rows[:, 0], 1 / int(part["amplifier"]))
            for rows, part in zip(scale_OG.split(list(sizes)), parts, strict=True)
        ]
        factor_O = torch.cat(factors).float()
        exact_OG = scale_OG.double() / factor_O.double()[:, None]
        integer_OG = exact_OG.round().to(torch.int32)
        if not torch.equal(integer_OG.double(), exact_OG):
            raise InputError(f"{self.name}: scales are not integers over the stored amplifier; the file was changed.")
        return integer_OG, factor_O.contiguous()

    def prove(self, codes_OI: Tensor, scale_OG: Tensor, sizes: Sequence[int], whole: bool) -> None:
        """The bound of each part is below 2^31 and what the checkpoint says; a rank's share may have a lower one.

        Args:
            codes_OI: int8, of all parts.
            scale_OG: int32 from `integers`.
            sizes: outputs of each part here.
            whole: whether these are all rows and columns of the parts.

        Raises:
            NumericsError, InputError: it is not.
        """
        assert self.activations is not None
        group_of_I = contiguous_groups(codes_OI.shape[1], self.scheme.group_size, codes_OI.device)
        start = 0
        for size, part in zip([sum(sizes)] if len(self.parts) == 1 else sizes, self.parts, strict=True):
            rows = slice(start, start + size)
            maximum = self.activations.code_max
            bound = prove_no_overflow(self.name, codes_OI[rows], scale_OG[rows], group_of_I, maximum)
            if bound > int(part["bound"]) or (whole and bound != int(part["bound"])):
                raise InputError(f"{self.name}: its overflow bound is not the stored one; the file was changed.")
            start += size

    def check_cut(self, inputs: int, ranks: int) -> None:
        """Refuse to give each of several ranks ``inputs`` inputs where that cannot be."""
        size = self.scheme.group_size
        if self.inputs.get("gather") or self.inputs.get("rotation"):
            raise InputError(f"{self.name} gathers or rotates its inputs, which cannot be cut; use one rank.")
        if (size != -1 and inputs % size) or inputs * self.scheme.bits % 32:
            raise InputError(
                f"{self.name}: {inputs * ranks} inputs over {ranks} ranks would cut groups of {size}; "
                f"use fewer ranks, or quantize with --tp {ranks}."
            )
