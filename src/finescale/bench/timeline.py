"""What a GPU did in which time: kernels of a trace, their shares of it, and when it stood idle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

Event = tuple[str, float, float]
"""Name, start and end in microseconds."""
KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def start_tracing() -> Any:
    """A running trace of this process's GPU, for ``traced``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    trace = profile(activities=[ProfilerActivity.CUDA])
    trace.start()
    return trace


def traced(trace: Any) -> list[Event]:
    """Kernels and copies since ``start_tracing``, by their start; a kernel's name is followed by its grid."""
    import torch

    torch.cuda.synchronize()
    trace.stop()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        rows = json.loads(path.read_text())["traceEvents"]
    events = [(_name(row), row["ts"], row["ts"] + row["dur"]) for row in rows if row.get("cat") in KINDS]
    return sorted(events, key=lambda event: event[1])


def _name(row: dict[str, Any]) -> str:
    name, grid = row["name"].removeprefix("void "), row.get("args", {}).get("grid")
    return f"{name[:100]} {grid[0]}x{grid[1]}x{grid[2]}" if grid else name[:100]


def shares(events: Iterable[Event]) -> dict[str, tuple[float, int]]:
    """Time and number of each kernel in a stream, the times adding up to that of all.

    Kernels may start while the one before them still runs (programmatic dependent launch), and then wait for it: each
    one is given what passes between the end of the one before and its own.

    Args:
        events: name, start and end of each, in any order.
    """
    found: dict[str, tuple[float, int]] = {}
    before: float | None = None
    for name, start, end in sorted(events, key=lambda event: event[2]):
        passed = end - (start if before is None else before)
        before = end
        time_before, count = found.get(name, (0.0, 0))
        found[name] = (time_before + passed, count + 1)
    return found


def idle(events: Sequence[Event]) -> list[tuple[str, str, float]]:
    """When nothing ran: the kernel before, the kernel after, and microseconds; in the order of time.

    Args:
        events: name, start and end of each, by their start.
    """
    found: list[tuple[str, str, float]] = []
    if not events:
        return found
    last, until = events[0][0], events[0][2]
    for name, start, end in events[1:]:
        if start > until:
            found.append((last, name, start - until))
        if end >= until:
            last, until = name, end
    return found


def between(events: Sequence[Event], mark: str) -> list[list[Event]]:
    """Events cut into steps, each of which ends with a kernel whose name contains ``mark``; what follows the last one
    is left out."""
    steps: list[list[Event]] = [[]]
    for event in events:
        steps[-1].append(event)
        if mark in event[0]:
            steps.append([])
    return steps[:-1]


def summary(steps: Sequence[Sequence[Event]], largest: int = 24) -> dict[str, Any]:
    """Microseconds of an average step: all of it, idle ones, kernels that take most, and after which the GPU waits.

    Args:
        steps: neighbouring ones; idle time between two of them counts.
        largest: kernels and waits that are listed.
    """
    events = [event for step in steps for event in step]
    if not events:
        return {}
    count = len(steps)
    waits = idle(events)
    kernels: dict[str, list[float]] = {}
    busy = without_idle(events)
    for name, (time, launches) in shares(busy).items():
        kernels[name] = [round(time / count, 2), round(launches / count, 2)]
    pairs: dict[str, float] = {}
    for before, after, time in waits:
        key = f"{before[:60]} -> {after[:60]}"
        pairs[key] = pairs.get(key, 0.0) + time / count
    total = max(end for _, _, end in events) - events[0][1]
    return {
        "step_us": round(total / count, 1),
        "idle_us": round(sum(time for *_, time in waits) / count, 1),
        "launches": round(len(events) / count, 1),
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:largest]),
        "waits": {
            key: round(time, 1) for key, time in sorted(pairs.items(), key=lambda item: -item[1])[: largest // 3]
        },
    }


def without_idle(events: Sequence[Event]) -> list[Event]:
    """The same events moved together, so that nothing stands idle between them."""
    moved: list[Event] = []
    until, saved = float("inf"), 0.0
    for name, start, end in events:
        saved += max(0.0, start - until)
        until = end if until == float("inf") else max(until, end)
        moved.append((name, start - saved, end - saved))
    return moved
