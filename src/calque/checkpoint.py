"""Finished pieces of a run, kept in a folder so that a run that was killed goes on where it was.

Every piece is a safetensors file with JSON beside its tensors, written whole: under another name first, then renamed. A run is
deterministic, so a piece that is there stands for the work that made it.
"""

import errno
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calque.errors import SpecError

FilePath = str | os.PathLike[str]

if sys.platform != "win32":
    import fcntl

FACTS = "facts"  # the key in the metadata
IDENTITY, LOCK = "identity.json", ".lock"
RUN = "run.json"  # of a run that the command line finished, whose pieces are deleted
PROBLEMS = "problems"  # what workers read while they fit; of no use afterwards


def write_whole(path: FilePath, content: bytes) -> None:
    """Writes a file that is never seen half-written: under another name first, then renamed."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a run left: tensors by name, and facts that JSON can carry."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of pieces by key; None keeps nothing. Workers on other machines see the same folder.

    >>> import tempfile
    >>> kept = Checkpoint(tempfile.mkdtemp())
    >>> kept.put("layer conv1", Piece({"scale": torch.ones(2)}, {"error": 0.5}))
    >>> kept.get("layer conv1").facts
    {'error': 0.5}
    """

    folder: FilePath | None

    def path(self, key: str) -> Path:
        """Where the piece of that key is, or would be."""
        assert self.folder is not None
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)[:80]
        return Path(self.folder) / f"{readable}-{zlib.crc32(key.encode()):08x}.safetensors"

    def get(self, key: str) -> Piece | None:
        """The piece, or None if it was not finished."""
        if self.folder is None or not self.path(key).is_file():
            return None
        return read_piece(self.path(key))

    def put(self, key: str, piece: Piece) -> None:
        if self.folder is not None:
            write_piece(self.path(key), piece)

    def has_pieces(self) -> bool:
        """Whether anything is finished, here or in a folder inside."""
        return self.folder is not None and any(Path(self.folder).rglob("*.safetensors"))

    def within(self, name: str) -> "Checkpoint":
        """A folder inside this one, for the pieces of one part of the run."""
        if self.folder is None:
            return self
        folder = Path(self.folder) / name
        folder.mkdir(parents=True, exist_ok=True)
        return Checkpoint(folder)


def write_piece(path: Path, piece: Piece) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in piece.tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, {FACTS: json.dumps(dict(piece.facts))}))


def read_piece(path: Path) -> Piece | None:
    """The piece in a file; None where the file is damaged, so that it is made again."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            # a copy: what is mapped from a file may be aligned otherwise, and kernels may then sum in another order
            return Piece({key: file.get_tensor(key).clone() for key in file.keys()}, facts)  # noqa: SIM118 - no mapping
    except (SafetensorError, KeyError, ValueError):
        return None


def open_run(run: FilePath, identity: Mapping[str, str]) -> Checkpoint:
    """The folder of a run's pieces, made or found again.

    Args:
        identity: what the pieces depend on, by name: fingerprints of the weights and inputs, options, versions.

    Raises:
        SpecError: the folder has the pieces of another run; what differs is named.
        OSError: the folder cannot be made.
    """
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder.absolute())  # workers may have been started in another working directory
    path = folder / IDENTITY
    known = _identity(path)
    if known is None:
        if (folder / RUN).is_file():
            raise SpecError(
                f"run {folder} is the folder of a finished calque quantize, which keeps no pieces. Load its q.safetensors with "
                "calque.load, or choose another folder."
            )
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):  # drafts of a killed run are hidden
            raise SpecError(f"run {folder} is a folder with other files. Choose a new or an empty one.")
        write_whole(path, json.dumps(dict(identity), indent=1).encode())
        return checkpoint
    changed = [name for name in sorted({*known, *identity}) if known.get(name) != identity.get(name)]
    if changed:
        raise SpecError(
            f"run {folder} was started with other settings ({', '.join(changed)}), so its pieces do not fit. Choose another "
            "folder, or delete this one."
        )
    return checkpoint


@contextmanager
def alone(checkpoint: Checkpoint) -> Iterator[None]:
    """Keeps other processes out of a run's folder, until this one ends in whatever way; removes what a kill left half-made.

    Where the system or the file system has no locks, others are not kept out.

    Raises:
        SpecError: another process is at work in the folder.
    """
    if checkpoint.folder is None:
        yield
        return
    folder = Path(checkpoint.folder)
    with (folder / LOCK).open("w") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SpecError(
                    f"run {folder} is in use by another process. Wait for it, or choose another folder."
                ) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
        _tidy(folder)
        try:
            yield
        finally:
            _tidy(folder)
            if not checkpoint.has_pieces():
                _abandon(folder)


def _tidy(folder: Path) -> None:
    """Removes drafts and problems."""
    for draft in folder.rglob(".*.[0-9]*"):
        draft.unlink(missing_ok=True)
    for problems in [*folder.rglob(PROBLEMS)]:
        shutil.rmtree(problems, ignore_errors=True)


def _abandon(folder: Path) -> None:
    """Leaves nothing that looks like an unfinished run; for one that ended before its first piece."""
    (folder / IDENTITY).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        path.rmdir()


def _identity(path: Path) -> dict[str, str] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of tensors and their names, in hexadecimal."""
    total = 0
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"", total)
    return f"{total:08x}"
