"""Device memory that kernels keep between calls, one piece for each stream, since two streams may run at once.

CUDA graphs hold on to its address, so a piece never moves. Nor may it be made while a graph is recorded or warmed up by
torch.compile: what is allocated then belongs to the graph. Hence some pieces are made ahead of time (`reserve`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

SPARE = 6
"""Pieces made ahead for a device: for the usual stream, for those of graphs and their warming up, and some more."""
Piece = TypeVar("Piece")


class Workspaces(Generic[Piece]):
    """Pieces by device and stream.

    Args:
        make: allocates one on a device.
    """

    def __init__(self, make: Callable[[torch.device], Piece]) -> None:
        self._make = make
        self._of: dict[tuple[torch.device, int], Piece] = {}
        self._spare: dict[torch.device, list[Piece]] = {}

    def reserve(self, device: torch.device) -> None:
        """Make some pieces on a GPU, if that was not done before; to be called where models are put together."""
        if device.type == "cuda" and device not in self._spare:
            self._spare[device] = [self._make(device) for _ in range(SPARE)]
            torch.cuda.current_stream(device).synchronize()  # they are filled before another stream uses them

    def of(self, device: torch.device, stream: int) -> Piece:
        """The piece of a stream."""
        found = self._of.get((device, stream))
        if found is None:
            spare = self._spare.get(device)
            found = self._of[device, stream] = spare.pop() if spare else self._make(device)
        return found
