"""What finescale says to libraries through the environment. The only file that may touch it."""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep where they wait for each other; to be called before torch is loaded.

    They spin otherwise, which gains microseconds on an idle machine, and on one that other programs use keeps the core
    from the very thread that is waited for: products of matrices took 2.6 times as long beside two busy programs. Who
    has set the policy keeps it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
