"""Several processes at one model: which part is whose, and putting the parts together (torch.distributed).

Calibration samples are dealt out batch by batch, layers whole where that is even and cut by rows where it is not. Sums
over processes are either as the library reduces them, or, when asked to be deterministic, made batch by batch in the
order of the text, so that the result has the same bytes for any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finescale.environment import launch
from finescale.errors import InputError

T = TypeVar("T")
DETERMINISTIC_ROWS = 512
"""Rows of a piece in deterministic runs, whatever the number of processes: matrix products of other sizes sum in
another order."""
HALVINGS = 40
"""Steps of the search for the evenest shares."""


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

    def pieces(self, rows: slice) -> list[slice]:
        """Rows that are this process's as they are solved: together, or in pieces of one size."""
        if not self.deterministic:
            return [rows] if rows.stop > rows.start else []
        starts = range(rows.start, rows.stop, DETERMINISTIC_ROWS)
        return [slice(start, min(start + DETERMINISTIC_ROWS, rows.stop)) for start in starts]

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

    def tell(self, value: Any, source: int = 0) -> Any:
        """What process ``source`` has (anything that JSON holds), in all processes."""
        if self.count == 1:
            return value
        tells = self.rank == source
        data = torch.tensor(list(json.dumps(value).encode()) if tells else [], dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        dist.broadcast(size, source)
        buffer = data.to(self.device) if tells else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(buffer, source)
        return json.loads(bytes(buffer.tolist()))

    def pass_on(self, tensors: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
        """The tensors of process ``source``, in all processes; what the others give does not count."""
        if self.count == 1:
            return dict(tensors)
        if self.rank == source:
            tensors = {name: tensor.to(self.device).contiguous() for name, tensor in tensors.items()}
        kinds = {name: (str(tensor.dtype).removeprefix("torch."), tensor.shape) for name, tensor in tensors.items()}
        found = {}
        for name, (dtype, shape) in self.tell(kinds, source).items():
            if self.rank == source:
                found[name] = tensors[name]
            else:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            if found[name].numel():  # as bytes: NCCL does not know all types
                dist.broadcast(found[name].view(-1).view(torch.uint8), source)
        return found


ALONE = Ranks()


class Load(NamedTuple):
    """What a job costs that processes may share by rows, in any one unit.

    Attributes:
        rows: of the job.
        piece: rows that stay together, all of them where rows are not apart; the last piece may have fewer.
        once: for each process that has any row.
        row: for each row.
    """

    rows: int
    piece: int
    once: float
    row: float

    def cost(self, rows: int) -> float:
        """Of so many rows for one process."""
        return self.once + rows * self.row if rows else 0.0


def shares(loads: Sequence[Load], count: int) -> list[list[slice]]:
    """The rows of each job (first index) that are each process's (second), as even as can be with few cuts.

    All jobs are laid on one line, which is cut into ``count`` parts, so that at most ``count - 1`` jobs are cut, each
    between two or more neighbours. The order on the line is that of a deal of whole jobs, the largest first, each to
    whom has the least so far: the parts are at least as even as this deal.
    """
    line = _line(loads, count)
    best = _filled(loads, line, count, float("inf"))
    assert best is not None
    high = sum(load.cost(load.rows) for load in loads)
    low = high / count
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = _filled(loads, line, count, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _line(loads: Sequence[Load], count: int) -> list[int]:
    """Jobs in the order of a deal: the least laden process first, as it takes what the next one has too much, and of
    each process first the job that is cheapest to cut."""
    hands: list[list[int]] = [[] for _ in range(count)]
    laden = [0.0] * count
    for job in sorted(range(len(loads)), key=lambda job: -loads[job].cost(loads[job].rows)):
        process = laden.index(min(laden))
        hands[process].append(job)
        laden[process] += loads[job].cost(loads[job].rows)
    of_cut = [load.once + load.piece * load.row for load in loads]
    return [
        job
        for process in sorted(range(count), key=laden.__getitem__)
        for job in sorted(hands[process], key=of_cut.__getitem__)
    ]


def _filled(loads: Sequence[Load], line: Sequence[int], count: int, bound: float) -> list[list[slice]] | None:
    """One process after the other gets what costs ``bound`` at most; None when something is left."""
    found = [[slice(0, 0)] * count for _ in loads]
    process, left = 0, bound
    for job in line:
        load, done = loads[job], 0
        while done < load.rows:
            rest = load.rows - done
            if load.cost(rest) > left:
                rest = max(int((left - load.once) / load.row), 0) // load.piece * load.piece
            if rest:
                found[job][process] = slice(done, done + rest)
                left -= load.cost(rest)
                done += rest
            if done < load.rows:
                process, left = process + 1, bound
                if process == count:
                    return None
    return found


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
