"""``finescale serve``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finescale.cli.common import stderr
from finescale.errors import InputError


def serve(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A checkpoint; all further options go to vLLM.")],
) -> None:
    """Serve a checkpoint by vLLM with finescale's kernels: an OpenAI-compatible HTTP server."""
    from finescale.formats.source import open_checkpoint
    from finescale.runtime.serving import claims, refusal

    model = open_checkpoint(folder).config
    config = model.get("quantization_config") or {}
    if claims(config):
        reason = refusal(config, model.get("model_type"))
        if reason is not None:
            raise InputError(reason)
    else:
        stderr.print("This checkpoint has no integer scales: vLLM's own kernels serve it.")
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serving needs vLLM; install finescale[serve] in an environment of its own.")
    # vLLM takes this process's place: signals, exit code and output are its own.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    os.execv(sys.executable, [*server, *context.args])
