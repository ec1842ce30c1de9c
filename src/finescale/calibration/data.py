"""Texts to token batches.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finescale.errors import CheckpointError, InputError
from finescale.formats.source import read_utf8

BUILTIN = "builtin"
"""Name of the text that every Python installation holds: its language reference."""


@dataclass(frozen=True)
class CalibrationData:
    """Windows of tokens and where they came from.

    Attributes:
        tokens_BT: int64 [samples, length].
        source: file or data set name.
        sha256: hash of the tokens, for the report.
        seed: of the choice of windows.
    """

    tokens_BT: Tensor
    source: str
    sha256: str
    seed: int

    def batches(self, size: int) -> list[Tensor]:
        """Batches of at most ``size`` windows, in order."""
        return list(self.tokens_BT.split(size))

    def facts(self) -> dict[str, Any]:
        samples, length = self.tokens_BT.shape
        return {
            "source": Path(self.source).name,
            "sha256": self.sha256,
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "seed": self.seed,
        }


def builtin_text(part: str = "all") -> str:
    """Python's language reference out of ``pydoc_data``; ``calibration`` and ``evaluation`` are disjoint parts of it.

    Raises:
        InputError: no such part.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    parts = {
        "all": names,
        "calibration": [name for index, name in enumerate(names) if index % 4 != 3],
        "evaluation": [name for index, name in enumerate(names) if index % 4 == 3],
    }
    if part not in parts:
        raise InputError(f"{BUILTIN}:{part} is no text; use {BUILTIN}, {BUILTIN}:calibration or {BUILTIN}:evaluation.")
    return "\n\n".join(topics[name] for name in parts[part])


def read_text(source: str) -> str:
    """Text of a plain file, of the ``text`` fields of a jsonl file, of a hub data set, or ``builtin``.

    Raises:
        InputError: no such file, not text, or a data set that cannot be had.
    """
    if source == BUILTIN or source.startswith(BUILTIN + ":"):
        return builtin_text(source.partition(":")[2] or "all")
    path = Path(source).expanduser()
    if not path.is_file():
        if path.is_dir() or path.suffix in (".txt", ".jsonl", ".raw", ".json"):
            raise InputError(f"the text {source} does not exist or is a folder; give a plain text or jsonl file.")
        return _hub_text(source)
    text = read_utf8(path)
    return _jsonl_text(text, source) if path.suffix == ".jsonl" else text


def _jsonl_text(text: str, source: str) -> str:
    documents = []
    # Not splitlines: JSON strings may hold U+2028 and other separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{source}, line {number}: each line must be an object with a field text.") from error
        if not isinstance(document, str):
            raise InputError(f"{source}, line {number}: the field text must be a string.")
        documents.append(document)
    return "\n\n".join(documents)


def _hub_text(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"the text {name} is no file here; for a hub data set install pip install 'finescale[eval]'."
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        return "\n\n".join(row["text"] for _, row in zip(range(20000), rows, strict=False))
    except Exception as error:  # the hub client raises many types; each means the same to the user
        raise InputError(f"{name} is neither a file here nor a hub data set with a field text ({error}).") from error


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises CheckpointError when it cannot be read."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        encode(tokenizer, "a")  # some settings fail only now
    except Exception as error:  # a damaged file fails in many ways, each of which means the same to the user
        raise CheckpointError(f"{path} has no tokenizer that transformers can read; add tokenizer.json.") from error
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a whole text, int64 [T], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(tokens_T: Tensor, samples: int, length: int, seed: int, source: str) -> CalibrationData:
    """``samples`` non-overlapping windows of ``length`` tokens, chosen by ``seed``, in the order of the text.

    Raises:
        InputError: the text is too short, or a seed that torch has no place for.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}; use a whole number from 0 to 2^63 - 1.")
    available = tokens_T.shape[0] // length
    if available < samples:
        raise InputError(
            f"{source} holds {tokens_T.shape[0]} tokens, {samples} x {length} are asked for; "
            f"use --samples {available} or a shorter --length or more text."
            if available
            else f"{source} holds {tokens_T.shape[0]} tokens, fewer than one window of {length}; give more text."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen_B = torch.randperm(available, generator=generator)[:samples].sort().values
    tokens_BT = tokens_T[: available * length].view(available, length)[chosen_B]
    digest = hashlib.sha256(tokens_BT.numpy().tobytes()).hexdigest()
    return CalibrationData(tokens_BT, source, digest, seed)
