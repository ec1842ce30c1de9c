"""Hidden states kept on disk, one file per batch, for runs whose activations do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SpilledTensors(MutableSequence[Tensor]):
    """Like a list of CPU tensors, but only what is being used is in memory.

    Args:
        folder: made when needed; the files in it are overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.bin"

    def _write(self, index: int, value: Tensor) -> None:
        value.contiguous().view(-1).view(torch.uint8).numpy().tofile(self._file(index))

    def insert(self, index: int, value: Tensor) -> None:
        if index != len(self):
            raise IndexError("tensors are appended or replaced only")
        self._write(index, value)
        self.shapes.append(value.shape)
        self.dtypes.append(value.dtype)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        data = np.fromfile(self._file(range(len(self))[index]), dtype=np.uint8)
        return torch.from_numpy(data).view(self.dtypes[index]).view(self.shapes[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(range(len(self))[index], value)
        self.shapes[index], self.dtypes[index] = value.shape, value.dtype

    def __delitem__(self, index: Any) -> None:
        raise IndexError("tensors are appended or replaced only")

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class Batches(Sequence[tuple[Tensor, dict[str, Any]]]):
    """(hidden states, keyword arguments) of each batch, read when it is its turn; may be gone through many times."""

    def __init__(self, hidden: MutableSequence[Tensor], arguments: list[dict[str, Any]]) -> None:
        self.hidden, self.arguments = hidden, arguments

    def __len__(self) -> int:
        return len(self.arguments)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Batches(self.hidden[index], self.arguments[index])
        return self.hidden[index], self.arguments[index]

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return (self[index] for index in range(len(self)))
