"""What finescale says to libraries through the environment, and what torchrun says there. The only file that may touch
it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep where they wait for each other; to be called before torch is loaded.

    They spin otherwise, which gains microseconds on an idle machine, and on one that other programs use keeps the core
    from the very thread that is waited for: products of matrices took 2.6 times as long beside two busy programs. Who
    has set the policy keeps it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that torchrun started; alone when it did not."""

    rank: int
    count: int
    local_rank: int
    local_count: int


def launch() -> Launch:
    """What torchrun announced."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    return Launch(*(int(os.environ.get(name, default)) for name, default in names))


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``finescale`` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finescale" / "kernels"
