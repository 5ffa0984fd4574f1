"""Tensors kept within a memory budget, on disk past it."""

import ctypes
import errno
import re
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calque.errors import SpecError
from calque.fields import shown
from calque.files import PREFIX, cannot_write

SPACE = ". Values past the memory budget go there: set TMPDIR to a folder with more space, or raise the budget"
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
            'memory: a size is written as a number with a unit, such as "2GB" or "300MB", above 0 and at most 1,000,000 GB. '
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
    start: int  # byte in the file
    size: int  # bytes
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Spill:
    """One file without a name: it ends with the process that has it open, however that ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix=PREFIX, buffering=0)  # noqa: SIM115 - Store closes it
        self._free: list[tuple[int, int]] = []  # start and end of gaps, in order, none beside another
        self._end = 0

    def write(self, content: memoryview) -> int:
        """Where the content is from now on: in the smallest gap that it fits in, or at the end."""
        size = content.nbytes
        gaps = [gap for gap in self._free if gap[1] - gap[0] >= size]
        if gaps:
            start, end = min(gaps, key=lambda gap: gap[1] - gap[0])
            self._free.remove((start, end))
        else:
            start = end = self._end
        try:
            self._file.seek(start)
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self.free(start, max(end - start, 0))
            raise cannot_write(error, tempfile.gettempdir(), SPACE) from error
        self._end = max(self._end, start + size)
        if end > start + size:
            self.free(start + size, end - start - size)
        return start

    def read(self, start: int, into: memoryview) -> None:
        self._file.seek(start)
        while into:
            count = self._file.readinto(into)
            if not count:
                raise OSError(errno.EIO, "ended before what was written to it", tempfile.gettempdir())
            into = into[count:]

    def free(self, start: int, size: int) -> None:
        """Makes a gap; one at the end is given back to the file system."""
        first, last = start, start + size
        apart = []
        for low, high in self._free:
            if low == last or high == first:
                first, last = min(first, low), max(last, high)
            else:
                apart.append((low, high))
        if last < self._end:
            self._free = sorted([*apart, (first, last)]) if last > first else apart
            return
        self._free, self._end = apart, first
        self._file.truncate(first)

    def close(self) -> None:
        self._file.close()


class Store:
    """Keeps tensors in memory up to a budget and on disk past it; a context manager that frees the disk.

    On disk they are in one file of the temporary folder, which has no name there: nothing is left of it after a kill.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self.resident = 0
        self._freed = 0  # bytes since the allocator was last asked to give them back
        self._spill: _Spill | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        if self._spill is not None:
            self._spill.close()

    def put(self, value: object) -> object:
        """What to keep in place of `value`: itself, or where it is in the file.

        Raises:
            OSError: the temporary folder, which is named, cannot hold it.
        """
        if not isinstance(value, Tensor):
            return value
        if self.resident + value.nbytes <= self.memory or value.nbytes < 2**16:
            self.resident += value.nbytes
            return value
        if self._spill is None:
            self._spill = _Spill()
        start = self._spill.write(_bytes(value.contiguous().cpu()))
        return _OnDisk(start, value.nbytes, value.shape, value.dtype, value.device)

    def get(self, kept: object) -> Any:
        """The value that `put` was given."""
        if not isinstance(kept, _OnDisk):
            return kept
        assert self._spill is not None
        value = torch.empty(kept.shape, dtype=kept.dtype)
        self._spill.read(kept.start, _bytes(value))
        return value.to(kept.device)

    def drop(self, kept: object) -> None:
        """Frees what `put` kept."""
        if isinstance(kept, _OnDisk):
            assert self._spill is not None
            self._spill.free(kept.start, kept.size)
        elif isinstance(kept, Tensor):
            self.resident -= kept.nbytes
            self._freed += kept.nbytes

    def give_back(self) -> None:
        """Returns freed memory to the system once it is a good part of the budget."""
        if self._freed > self.memory // 4:
            self._freed = 0
            _trim()


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.detach().reshape(-1).view(torch.uint8).numpy().data
