"""Unpacking a GGUF file into a float safetensors folder, through transformers' own reader."""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch

from finescale.errors import InputError


def is_gguf(model: str | Path) -> bool:
    """Whether the argument names a GGUF file."""
    return str(model).lower().endswith(".gguf")


def unpack_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the model of a GGUF file as a Hugging Face folder with safetensors, once; later calls find it there.

    Needs memory for the whole float model. ``dtype`` float16 holds the block scales of GGUF without loss of range.

    Raises:
        InputError: no such file, or the packages gguf and accelerate are missing.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; check the path.")
    done = folder / "config.json"
    if done.is_file():
        return folder
    try:
        import accelerate  # type: ignore[import-untyped]  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError("reading GGUF needs two more packages: pip install 'finescale[demo]'.") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()):  # a progress bar of its own, which no setting switches off
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        ).to(dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def local_folder(model: str | Path) -> str | Path:
    """The argument itself, or for a GGUF file the folder it is unpacked to, once, in the user's cache."""
    if not is_gguf(model):
        return model
    file = Path(model).expanduser()
    if not file.is_file():
        raise InputError(f"{file} does not exist; check the path.")
    return unpack_gguf(file, Path.home() / ".cache" / "finescale" / f"{file.stem}-{file.stat().st_size}")
