"""Unpacking a GGUF file into a float safetensors folder, through transformers' own reader."""

from __future__ import annotations

import hashlib
import io
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path

import torch

from finescale.errors import InputError

_PIECES = 256
"""Places of a GGUF file that are looked at to tell it from others."""


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
        import accelerate  # noqa: F401
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own for each process: several may unpack the same file at once, and the first one's stays.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial") as own:
        partial = Path(own) / folder.name
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(partial)
        if not done.is_file():
            with suppress(OSError):  # another process was faster
                partial.rename(folder)
    if not done.is_file():
        raise InputError(f"{folder} holds something else than the model of {file.name}; remove that folder.")
    return folder


def local_folder(model: str | Path) -> str | Path:
    """The argument itself, or for a GGUF file the folder it is unpacked to, once, in the user's cache. Raises like
    ``unpack_gguf``."""
    if not is_gguf(model):
        return model
    file = Path(model).expanduser()
    if not file.is_file():
        raise InputError(f"{file} does not exist; check the path.")
    return unpack_gguf(file, Path.home() / ".cache" / "finescale" / f"{file.stem}-{_mark(file)}")


def _mark(file: Path) -> str:
    """A hash of the file's size and pieces: models of one shape have files of one size, often of one name too."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for piece in range(_PIECES):
            stream.seek(size * piece // _PIECES)
            digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
