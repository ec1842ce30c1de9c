"""What a run has already done, on disk, so that a killed run goes on where it stopped.

A block is done when its journal entry exists; the entry is written after the block's shard, both by atomic rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finescale.errors import CheckpointError, InputError
from finescale.formats.source import INDEX_NAME

FOLDER = ".finescale"
REPORT = "report.json"
_OWN_NAMES = ("config.json", INDEX_NAME, REPORT, "run.json", "report.html")


def signature(facts: dict[str, Any]) -> str:
    """Hash of everything that decides the bytes of the result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence, an InputError; what is already written stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"the disk of {path} is full; free some space and start again, finished blocks are kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
        raise
    except Exception as error:
        # safetensors wraps the system's error in its own type.
        if "No space left" in str(error):
            raise InputError(
                f"the disk of {path} is full; free some space and start again, finished blocks are kept."
            ) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON by atomic rename."""
    partial = path.with_name(path.name + ".partial")
    with full_disk_explained(path.parent):
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by atomic rename, tensors sorted by name."""
    partial = path.with_name(path.name + ".partial")
    with full_disk_explained(path.parent):
        ordered = {name: tensors[name].contiguous() for name in sorted(tensors)}
        save_file(ordered, partial, metadata={"format": "pt"} | (metadata or {}))
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Journal:
    """The journal of one output folder; every change to it, and to the folder, happens while it is locked."""

    def __init__(self, out: Path, run_signature: str) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.signature = run_signature

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder. Raises InputError when it is not ours or another process writes to it."""
        check_free(self.out)
        with full_disk_explained(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"another run is writing to {self.out}; wait for it or choose another --out."
                ) from error
            yield

    def begin(self, files: Iterable[str]) -> None:
        """Claim the folder for this run, or go on with it.

        Args:
            files: names of all files that will be written to the folder, which --fresh may remove again.

        Raises:
            InputError: the folder belongs to a run with other settings.
        """
        claim = self.folder / "run.json"
        if claim.is_file():
            if json.loads(claim.read_text())["signature"] != self.signature:
                raise InputError(
                    f"{self.out} holds an unfinished run with another model, recipe, solver code or calibration; "
                    "give the same settings to go on, --fresh to start over, or another --out."
                )
        else:
            write_json(claim, {"signature": self.signature, "files": sorted(files)})

    def block_done(self, block: int) -> dict[str, Any] | None:
        """The entry of a finished block, or None."""
        path = self.folder / f"block-{block:05d}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish_block(self, block: int, entry: dict[str, Any]) -> None:
        write_json(self.folder / f"block-{block:05d}.json", entry)

    def close(self) -> None:
        """Remove the journal of a complete run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def finished_signature(out: Path) -> str | None:
    """Signature of the complete run in a folder, None when there is none.

    Raises:
        CheckpointError: there is a report, and it is damaged.
    """
    report = out / REPORT
    if not report.is_file() or not (out / "config.json").is_file():
        return None
    try:
        facts = json.loads(report.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{report} is damaged; remove the folder or choose another --out.") from error
    value = facts.get("signature") if isinstance(facts, dict) and "finescale" in facts else None
    return None if value is None else str(value)


def clear_output(out: Path) -> None:
    """Remove the files that a run wrote, or was going to write, into ``out``, and nothing else.

    The folder must be locked; the lock itself stays.
    """
    names = set(_OWN_NAMES)
    for record in (out / REPORT, out / FOLDER / "run.json"):
        if record.is_file():
            files = json.loads(record.read_text(encoding="utf-8")).get("files")
            names.update(files if isinstance(files, list | dict) else ())
    for name in map(str, names):
        if Path(name).name == name:
            (out / name).unlink(missing_ok=True)
            (out / f"{name}.partial").unlink(missing_ok=True)
    for path in (out / FOLDER).glob("*.json*"):
        path.unlink()


def check_apart(out: Path, source: Path) -> None:
    """Raises InputError when ``out`` is the folder that is read: --fresh would empty it first."""
    if out.exists() and out.samefile(source):
        raise InputError(f"--out {out} is the folder of the model itself; choose another --out.")


def check_files(out: Path, report: Mapping[str, Any]) -> None:
    """Raises CheckpointError when a file that a complete run wrote to ``out`` is not there any more."""
    missing = [name for name in report.get("files", ()) if not (out / name).is_file()]
    if missing:
        raise CheckpointError(f"{out} lacks {missing[0]}, which an earlier run wrote; use --fresh to make it again.")


def check_free(out: Path) -> None:
    """Raises InputError when ``out`` is no folder, or lies below something that is none, or holds files that are not
    ours."""
    for path in (out, *out.parents):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to nothing; give a folder for --out.")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; give a folder for --out.")
    if out.is_dir() and not (out / FOLDER).is_dir() and finished_signature(out) is None and any(out.iterdir()):
        raise InputError(f"{out} holds files that finescale did not write; choose an empty or new folder for --out.")
