"""Reading a model checkpoint tensor by tensor, never whole: a local folder of safetensors or a hub name."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finescale.errors import CheckpointError, InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ALLOWED_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*"]
LEFT_ON_THE_HUB = ["consolidated*", "*/*.safetensors"]
"""A second copy of the weights, as Mistral's repositories have one, and files of other tools in subfolders."""
_OPEN_FILES = 2
"""Mapped at a time; what was read of a mapped file counts as memory of the process."""
_PIECE = 4096
"""Bytes of each tensor that the fingerprint looks at, out of its middle."""


@dataclass
class SourceCheckpoint:
    """An opened safetensors checkpoint.

    Attributes:
        path: the folder.
        config: the parsed ``config.json``.
        files: tensor name -> file name.
        name: what the user called it, for messages and the report.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, str]
    name: str
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def keys(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, key: str) -> Tensor:
        """One tensor in its stored type. Raises CheckpointError when it is missing or its file is damaged."""
        try:
            return self._open(key).get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.files[key]} is damaged at {key} ({error}); download it again.") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header only; raises like ``read``."""
        return tuple(self._header(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """Stored type of a tensor, read from the header only; raises like ``read``, and for a type torch lacks."""
        name = self._header(key).get_dtype()
        if name not in _DTYPES:
            raise CheckpointError(
                f"{key} in {self.files[key]} is of type {name}, which finescale does not read; "
                "give the model as float32, float16 or bfloat16."
            )
        return _DTYPES[name]

    def float_dtype(self) -> torch.dtype:
        """The type of most of the floating-point values: what new scales are stored in. Raises CheckpointError when
        there are none."""
        counts: dict[torch.dtype, int] = {}
        for key in self.files:
            dtype = self.dtype(key)
            if dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + torch.Size(self.shape(key)).numel()
        if not counts:
            raise CheckpointError(f"{self.name} holds no floating-point tensors; give the unquantized model.")
        return max(counts, key=lambda dtype: counts[dtype])

    def total_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum((self.path / file).stat().st_size for file in set(self.files.values()))

    def fingerprint(self) -> str:
        """SHA-256 over the config and each shard's size, header and a piece of every tensor: enough to notice another
        model, also one of which few layers were trained further."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(set(self.files.values())):
            path = self.path / file
            digest.update(f"{file}:{path.stat().st_size}".encode())
            header, ends = _read_header(path)
            digest.update(header)
            with path.open("rb") as stream:
                for begin, end in ends:
                    middle = (begin + end) // 2
                    stream.seek(max(begin, middle - _PIECE // 2))
                    digest.update(stream.read(min(_PIECE, end - begin)))
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the shards."""
        self._handles.clear()
        self._stack.close()

    def _header(self, key: str) -> Any:
        try:
            return self._open(key).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.files[key]} is damaged at {key} ({error}); download it again.") from error

    def _open(self, key: str) -> Any:
        if key not in self.files:
            raise CheckpointError(f"{self.name} has no tensor {key}; the checkpoint does not fit its config.json.")
        file = self.files[key]
        if file not in self._handles:
            if len(self._handles) >= _OPEN_FILES:
                self.close()
            self._handles[file] = self._stack.enter_context(_open_file(self.path / file))
        return self._handles[file]


_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def open_checkpoint(model: str | Path) -> SourceCheckpoint:
    """Open a model folder, or a hub name through huggingface_hub.

    Every shard's header is checked against the file's length, so that a truncated download is found before work starts.

    Raises:
        InputError: nothing is there, or it is not a model folder.
        CheckpointError: a shard is missing, truncated or damaged, or the weights are pickled.
    """
    path = _resolve(str(model))
    config = read_json(path / "config.json", f"{model} has no config.json; give a Hugging Face model folder.")
    files = _tensor_files(path, str(model))
    for file in sorted(set(files.values())):
        check_shard(path / file)
    return SourceCheckpoint(path, config, files, str(model))


def _resolve(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file; give a model folder, a hub name or a .gguf file.")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model:
        raise InputError(f"{model} does not exist; check the path.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=ALLOWED_HUB_FILES, ignore_patterns=LEFT_ON_THE_HUB))
    except Exception as error:  # the hub client raises many types; each means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{model} is neither a folder here nor reachable on the hub ({reason}).") from error


def read_utf8(path: Path) -> str:
    """The text of a file; a byte order mark, with which some editors begin, is none of it. Raises InputError for text
    in another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError with ``missing`` when absent, CheckpointError when not JSON."""
    if not path.is_file():
        raise InputError(missing)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again.")
    return value


def _tensor_files(path: Path, name: str) -> dict[str, str]:
    index = path / INDEX_NAME
    if index.is_file():
        weight_map = read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map; download it again.")
        for file in dict.fromkeys(map(str, weight_map.values())):
            # Names come from a downloaded file: they must stay inside the folder.
            if Path(file).name != file:
                raise CheckpointError(f"{index} points outside its folder ({file!r}); do not trust this checkpoint.")
            if not (path / file).is_file():
                raise CheckpointError(f"{name} lacks its shard {file}; download it again.")
        return dict(weight_map)
    single = path / SINGLE_NAME
    if single.is_file():
        check_shard(single)
        with _open_file(single) as handle:
            return dict.fromkeys(handle.keys(), SINGLE_NAME)
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise CheckpointError(
            f"{name} holds pickled weights only; convert it to safetensors first (pickles can run code)."
        )
    raise InputError(f"{name} holds no {SINGLE_NAME} and no {INDEX_NAME}; give a model folder with safetensors.")


def check_shard(path: Path) -> None:
    """Raises CheckpointError unless the file is as long as its safetensors header says."""
    size = path.stat().st_size
    header, ends = _read_header(path)
    expected = max((end for _, end in ends), default=8 + len(header))
    if size != expected:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header promises {expected}; it is truncated, download it again."
        )


def _read_header(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """A safetensors file's header, and where its tensors begin and end in the file, in order.

    Raises:
        CheckpointError: it is cut off, or not a safetensors file's.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{path.name} is truncated or not a safetensors file; download it again.")
        header = stream.read(length)
    try:
        entries = [value for key, value in json.loads(header).items() if key != "__metadata__"]
        offsets = sorted((int(begin), int(end)) for begin, end in (entry["data_offsets"] for entry in entries))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged header; download it again.") from error
    return header, [(8 + length + begin, 8 + length + end) for begin, end in offsets]


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be opened ({error}); download it again.") from error
