"""Torch operators of the kernels, without the price that ``torch.library.custom_op`` puts on every call.

A call through ``custom_op`` costs as much of the host's time as several kernel launches, most of all where an argument
is written to. An operator defined here goes straight to its kernel. It has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("finescale", "FRAGMENT")
Function = Callable[..., Any]


def operator(name: str, fake: Function, mutates: Sequence[str] = (), cpu: Function | None = None) -> Any:
    """A decorator that makes a function the operator ``torch.ops.finescale.NAME`` and gives that.

    The schema is that of the function's annotations (``torch.library.infer_schema``).

    Args:
        name: of the operator.
        fake: gives empty tensors of the shapes and types that the function gives; its parameters are the same.
        mutates: arguments that are written to.
        cpu: what runs on a CPU, where the function runs on CUDA devices; None for a function of all devices.
    """

    def define(function: Function) -> Any:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        if cpu is None:
            LIBRARY.impl(name, function, "CPU")
        else:
            LIBRARY.impl(name, cpu, "CPU")
        LIBRARY.impl(name, function, "CUDA")
        torch.library.register_fake(f"finescale::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.finescale, name).default

    return define
