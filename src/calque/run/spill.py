"""Tensors kept within a memory budget, on disk past it."""

import ctypes
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calque.errors import SpecError
from calque.run.fields import shown
from calque.run.files import PREFIX, cannot_write

SPACE = ". Values past the memory budget go there: set TMPDIR to a folder with more space, or raise the budget"
MOST_MEMORY = 10**15  # bytes
SMALL = 2**10  # bytes of a tensor that stays in memory: on disk it would hardly take less of it
FREE = 2**27  # bytes that the allocator may hold free between two values: to map them anew takes time
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


def _resident() -> int:
    """Bytes of the process in memory; 0 where nothing can be given back."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class _OnDisk:
    start: int  # byte in the file
    size: int  # bytes
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class _Held:
    """The memory of one or several tensors that are views of it: how many are kept, and the bytes that are counted for it."""

    tensors: int
    size: int


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

    Counted is memory, not tensors: views of one tensor are counted once, and a view of a part counts as the whole.
    On disk they are in one file of the temporary folder, which has no name there: nothing is left of it after a kill.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self.resident = 0
        self._held: dict[int, _Held] = {}  # by address
        self._least = _resident()  # bytes of the process since the allocator was last asked to give some back
        self._spill: _Spill | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._spill is not None:
            self._spill.close()
            _trim()

    def lend(self, value: object) -> None:
        """Says that a tensor is someone else's, who keeps it longer than the store: views of it count as nothing."""
        if isinstance(value, Tensor):
            self._held.setdefault(_address(value), _Held(0, 0)).tensors += 1

    def put(self, value: object) -> object:
        """What to keep in place of `value`: itself, or where it is in the file; of a list or tuple, of each of its parts.

        Raises:
            OSError: the temporary folder, which is named, cannot hold it.
        """
        if isinstance(value, (list, tuple)):
            return type(value)([*map(self.put, value)])
        if not isinstance(value, Tensor):
            return value
        held, size = self._held.get(_address(value)), value.untyped_storage().nbytes()
        if held is None and self.resident + size > self.memory and size >= SMALL:
            return self._spilled(value)
        if held is None:
            held = self._held[_address(value)] = _Held(0, size)
            self.resident += size
        held.tensors += 1
        self._trim_beyond(self.memory)
        return value

    def _spilled(self, value: Tensor) -> _OnDisk:
        if self._spill is None:
            self._spill = _Spill()
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        if not value.permute(order).is_contiguous():  # holes or overlaps
            value, order = value.contiguous(), list(range(value.dim()))
        start = self._spill.write(_bytes(value.permute(order).cpu()))
        return _OnDisk(start, value.nbytes, value.shape, value.stride(), value.dtype, value.device)

    def get(self, kept: object) -> Any:
        """The value that `put` was given."""
        if isinstance(kept, (list, tuple)):
            return type(kept)([*map(self.get, kept)])
        if not isinstance(kept, _OnDisk):
            return kept
        assert self._spill is not None
        self._trim_beyond(self.memory)
        memory = torch.empty(kept.size, dtype=torch.uint8)
        self._spill.read(kept.start, _bytes(memory))
        return memory.view(kept.dtype).as_strided(kept.shape, kept.stride).to(kept.device)

    def drop(self, kept: object) -> None:
        """Frees what `put` kept."""
        if isinstance(kept, (list, tuple)):
            for part in kept:
                self.drop(part)
        elif isinstance(kept, _OnDisk):
            assert self._spill is not None
            self._spill.free(kept.start, kept.size)
        elif isinstance(kept, Tensor):
            held = self._held[_address(kept)]
            held.tensors -= 1
            if not held.tensors:
                del self._held[_address(kept)]
                self.resident -= held.size

    def give_back(self) -> None:
        """Returns what the allocator holds free to the system, once the process has grown by a good part of the budget."""
        self._trim_beyond(self.memory // 4)

    def _trim_beyond(self, growth: int) -> None:
        """The same once it has grown by so many bytes, or by FREE.

        The place of a freed tensor is often a few bytes too small for the next of its size, and stays free beside it.
        """
        now = _resident()
        if now - self._least > min(growth, FREE):
            _trim()
            self._least = now = _resident()
        self._least = min(self._least, now)


class Kept(Sequence[Any]):
    """Values that a store keeps, each read anew whenever it is asked for."""

    def __init__(self, store: Store, values: Iterable[object]):
        self._store = store
        self._kept = [store.put(value) for value in values]
        store.give_back()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._store.get(self._kept[index])


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.detach().reshape(-1).view(torch.uint8).numpy().data
