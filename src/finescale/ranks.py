"""Several processes at one model: which part is whose, and putting the parts together (torch.distributed).

Calibration samples are dealt out batch by batch, the rows of a layer in pieces. Sums over processes are either as the
library reduces them, or, when asked to be deterministic, made batch by batch in the order of the text, so that the
result has the same bytes for any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finescale.environment import launch
from finescale.errors import InputError

T = TypeVar("T")
DETERMINISTIC_ROWS = 512
"""Rows of a piece in deterministic runs, whatever the number of processes: matrix products of other sizes sum in
another order."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this one; 0 writes all files.
        count: how many there are.
        deterministic: the same bytes for any ``count``.
        device: where tensors must lie to be exchanged, as ``torch.device`` takes it.
    """

    rank: int = 0
    count: int = 1
    deterministic: bool = False
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list; the others get the ones in between."""
        return list(items[self.rank :: self.count])

    def pieces(self, rows: int) -> list[tuple[slice, bool]]:
        """The rows of a layer cut into pieces, and whether each is this process's."""
        if self.count == 1 and not self.deterministic:
            return [(slice(0, rows), True)]
        size = DETERMINISTIC_ROWS if self.deterministic else -(-rows // self.count)
        starts = range(0, rows, max(size, 1))
        return [(slice(s, min(s + size, rows)), n % self.count == self.rank) for n, s in enumerate(starts)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def add_in_order_(self, total: Tensor, tensor: Tensor) -> None:
        """``total`` + the tensor of process 0 + that of process 1 + ..., one after the other."""
        if self.count == 1:
            total.add_(tensor)
            return
        mine = tensor.to(self.device).contiguous()
        for rank in range(self.count):
            other = mine.clone() if rank == self.rank else torch.empty_like(mine)
            dist.broadcast(other, rank)
            total.add_(other.to(total.device))

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.count == 1:
            return number
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def tell(self, value: Any) -> Any:
        """What process 0 has (anything that JSON holds), in all processes."""
        if self.count == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()) if self.leads else [], dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        dist.broadcast(size, 0)
        buffer = data.to(self.device) if self.leads else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(buffer, 0)
        return json.loads(bytes(buffer.tolist()))


ALONE = Ranks()


def join(device: torch.device, deterministic: bool) -> tuple[Ranks, torch.device]:
    """The processes that torchrun started (this one alone when it did not), and the device of this one.

    Raises:
        InputError: fewer GPUs than processes on this host.
    """
    here = launch()
    if device.type == "cuda" and here.count > 1:
        if here.local_count > torch.cuda.device_count():
            raise InputError(
                f"{here.local_count} processes and {torch.cuda.device_count()} GPUs; give --nproc-per-node the number "
                "of GPUs."
            )
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    if here.count > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(here.rank, here.count, deterministic, str(device)), device


def leave() -> None:
    """End what ``join`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
