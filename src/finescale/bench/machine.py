"""What a benchmark ran on, for its JSON file."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from finescale._version import __version__


def machine_facts() -> dict[str, Any]:
    """Processor, threads, GPU and versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "finescale": __version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
