"""Tensors kept within a memory budget, on disk past it."""

import ctypes
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calque.errors import SpecError
from calque.fields import shown

MOST_MEMORY = 10**15  # bytes
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str | int) -> int:
    """Bytes of a size with a unit.

    >>> parse_bytes("1.5MB")
    1500000

    Raises:
        SpecError: not a number with B, kB, MB or GB.
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{0,30})?)\s*([kKMG]?B)\s*", text) if isinstance(text, str) else None
    if type(text) is int:
        size: float = text
    else:
        size = 0 if match is None else float(match[1]) * _UNITS[match[2]]
    if not 0 < size <= MOST_MEMORY:
        raise SpecError(
            'a size is written as a number with a unit, such as "2GB" or "300MB", above 0 and at most 1,000,000 GB. '
            f"Got {shown(text)}."
        )
    return int(size)


def _trim() -> None:
    """Has the C library return free memory to the system; glibc keeps large blocks otherwise, others need not be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class _OnDisk:
    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Store:
    """Keeps tensors in memory up to a budget and on disk past it; a context manager that removes its files."""

    def __init__(self, memory: int):
        self.memory = memory
        self.resident = 0
        self._freed = 0  # bytes since the allocator was last asked to give them back
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, value: object) -> object:
        """What to keep in place of `value`: itself, or its file."""
        if not isinstance(value, Tensor):
            return value
        if self.resident + value.nbytes <= self.memory or value.nbytes < 2**16:
            self.resident += value.nbytes
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="calque-")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        value.contiguous().cpu().numpy().tofile(path)
        return _OnDisk(path, value.shape, value.dtype, value.device)

    def get(self, kept: object) -> Any:
        """The value that `put` was given."""
        if not isinstance(kept, _OnDisk):
            return kept
        dtype = torch.empty(0, dtype=kept.dtype).numpy().dtype
        return torch.from_numpy(np.fromfile(kept.path, dtype=dtype)).reshape(kept.shape).to(kept.device)

    def drop(self, kept: object) -> None:
        """Frees what `put` kept."""
        if isinstance(kept, _OnDisk):
            kept.path.unlink(missing_ok=True)
        elif isinstance(kept, Tensor):
            self.resident -= kept.nbytes
            self._freed += kept.nbytes

    def give_back(self) -> None:
        """Returns freed memory to the system once it is a good part of the budget."""
        if self._freed > self.memory // 4:
            self._freed = 0
            _trim()
