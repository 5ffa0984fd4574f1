"""Finished pieces of a run, kept in a folder so that a run that was killed goes on where it was.

Every piece is a safetensors file with JSON beside its tensors, written whole. It has a checksum, and names the run that it
belongs to and the pieces that it was computed from with theirs: one that is damaged, another run's, or made from pieces that are
others by now is taken for missing. A run is deterministic, so a piece that is there stands for the work that made it.
"""

import errno
import hashlib
import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calque.errors import SpecError
from calque.run.files import FilePath, path_of, replace_file, sweep_drafts, sweep_folders, write_whole

if sys.platform != "win32":
    import fcntl

FACTS = "facts"  # the key in the metadata
IDENTITY, LOCK = "identity.json", ".lock"
RUN = "run.json"  # of a run that the command line finished, whose pieces are deleted
PROBLEMS = "problems"  # what workers read while they fit; of no use afterwards

Needs = Mapping[str, str]
"""By key, the checksums of the pieces that another one is computed from."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a run left: tensors by name, facts that JSON can carry, and the pieces that they were computed from."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    needs: Needs = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """Of everything in it; a piece that needs this one has with it the checksums of all that came before."""
        found = hashlib.blake2b(json.dumps([dict(self.facts), dict(self.needs)]).encode(), digest_size=16)
        for name in sorted(self.tensors):
            value = self.tensors[name].detach().cpu().contiguous()
            found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder of pieces by key; None keeps nothing. Workers on other machines see the same folder.

    Attributes:
        run: what the pieces belong to; those of another run are never taken.

    >>> import tempfile
    >>> kept = Checkpoint(tempfile.mkdtemp())
    >>> kept.put("layer conv1", Piece({"scale": torch.ones(2)}, {"error": 0.5}))
    >>> kept.get("layer conv1").facts
    {'error': 0.5}
    """

    folder: FilePath | None
    run: str = ""

    def path(self, key: str) -> Path:
        """Where the piece of that key is, or would be."""
        assert self.folder is not None
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", key)[:80]
        return Path(self.folder) / f"{readable}-{zlib.crc32(key.encode()):08x}.safetensors"

    def get(self, key: str, needs: Needs | None = None) -> Piece | None:
        """The piece; None if it was not finished, is damaged, or was not computed from `needs`."""
        if self.folder is None:
            return None
        piece = read_piece(self.path(key), f"{self.run} {key}")
        return piece if piece is not None and piece.needs == (needs or {}) else None

    def put(self, key: str, piece: Piece) -> None:
        if self.folder is not None:
            write_piece(self.path(key), piece, f"{self.run} {key}")

    def needs(self, **sources: Piece) -> Needs:
        """What a piece that is computed from these says of them; nothing where nothing is kept."""
        return {} if self.folder is None else {key: piece.checksum for key, piece in sources.items()}

    def has_pieces(self) -> bool:
        """Whether anything is finished, here or in a folder inside."""
        return self.folder is not None and any(Path(self.folder).rglob("*.safetensors"))

    def within(self, name: str) -> "Checkpoint":
        """A folder inside this one, for the pieces of one part of the run."""
        if self.folder is None:
            return self
        folder = Path(self.folder) / name
        folder.mkdir(parents=True, exist_ok=True)
        return Checkpoint(folder, f"{self.run}/{name}")


def write_piece(path: Path, piece: Piece, owner: str) -> None:
    """Writes a piece. Args: owner: whose it is; to be given again when it is read."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in piece.tensors.items()}
    table = {"facts": dict(piece.facts), "needs": dict(piece.needs), "owner": owner, "checksum": piece.checksum}
    replace_file(path, safetensors.torch.save(tensors, {FACTS: json.dumps(table)}), durable=False)


def read_piece(path: Path, owner: str) -> Piece | None:
    """The piece in a file; None where it is missing, damaged or another owner's, so that it is made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            table = json.loads((file.metadata() or {})[FACTS])
            # a copy: what is mapped from a file may be aligned otherwise, and kernels may then sum in another order
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
        piece = Piece(tensors, table["facts"], table["needs"])
        whole = table["owner"] == owner and table["checksum"] == piece.checksum
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError):  # the last two: JSON of other types
        return None
    return piece if whole else None


def open_run(run: FilePath, identity: Mapping[str, str]) -> Checkpoint:
    """The folder of a run's pieces, made or found again.

    Args:
        identity: what the pieces depend on, by name: fingerprints of the weights and inputs, options, versions.

    Raises:
        SpecError: the folder has the pieces of another run; what differs is named.
        OSError: the folder cannot be made.
    """
    folder = path_of(run, "run")
    folder.mkdir(parents=True, exist_ok=True)
    sweep_drafts(folder)
    owner = hashlib.blake2b(json.dumps(dict(identity), sort_keys=True).encode(), digest_size=16).hexdigest()
    checkpoint = Checkpoint(folder.absolute(), owner)  # workers may have been started in another working directory
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
    sweep_folders()
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
    """Removes drafts of dead processes, and problems."""
    for part in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sweep_drafts(part)
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
