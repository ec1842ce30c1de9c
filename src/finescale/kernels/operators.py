"""Torch operators of the kernels, without the price that ``torch.library.custom_op`` puts on every call.

A call through ``custom_op`` costs as much of the host's time as several kernel launches, most of all where an argument
is written to. An operator defined here goes straight to its kernel. It has no gradient:
torch warns where one would be asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("finescale", "FRAGMENT")
Function = Callable[..., Any]


EVERYWHERE = ("CPU", "CUDA")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def operator(
    name: str,
    fake: Function,
    mutates: Sequence[str] = (),
    devices: Sequence[str] = ("CUDA",),
    cpu: Function | None = None,
) -> Callable[[Function], Any]:
    """A decorator that makes a function the operator ``torch.ops.finescale.NAME`` and gives that.

    The schema is that of the function's annotations (``torch.library.infer_schema``).

    Args:
        name: of the operator.
        fake: gives empty tensors of the shapes and types that the function gives; its parameters are the same.
        mutates: arguments that are written to.
        devices: where the function runs.
        cpu: what runs on a CPU in its place.
    """

    def define(function: Function) -> Any:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates), tags=_TAGS)
        for device in devices:
            LIBRARY.impl(name, function, device)
        if cpu is not None:
            LIBRARY.impl(name, cpu, "CPU")
        torch.library.register_fake(f"finescale::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.finescale, name).default

    return define
