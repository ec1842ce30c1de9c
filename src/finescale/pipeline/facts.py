"""What is told of a run besides its result: machine, versions, time, memory."""

from __future__ import annotations

import platform
import resource
import sys
import time
from typing import Any

import torch

from finescale._version import __version__


def run_facts(
    device: torch.device, entries: list[dict[str, Any]], started: float, seconds: float, resumed: int | None
) -> dict[str, Any]:
    """The contents of run.json.

    Args:
        device: where the work was done.
        entries: the journal's, one for each block.
        started: seconds since the epoch.
        seconds: of the whole run.
        resumed: number of the first block that was not replayed, None when none was.
    """
    import safetensors
    import transformers

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": seconds,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "machine": {
            "system": platform.system(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        },
        "versions": {
            "finescale": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "resumed_from_block": resumed,
        "blocks": [
            {"block": index, "seconds": entry["seconds"], **entry["phases"]} for index, entry in enumerate(entries)
        ],
    }
