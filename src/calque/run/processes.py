"""Which process owns what it leaves, whether that one is alive, and workers that end with it."""

import os
import platform
import sys
import threading
import time
import zlib
from dataclasses import dataclass

PAUSE = 0.2  # seconds between two looks

_owners: "set[Owner]" = set()  # those that a thread looks after already


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, by its number and what that is valid in: a machine, and on Linux a container."""

    host: str
    process: int

    @classmethod
    def current(cls) -> "Owner":
        return cls(host(), os.getpid())


def host() -> str:
    """What process numbers are valid in, as eight hexadecimal digits."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs; a number that was given to another one is taken for the first."""
    if sys.platform == "win32":
        import ctypes

        kernel, synchronize, waiting, denied = ctypes.windll.kernel32, 0x00100000, 0x102, 5
        handle = kernel.OpenProcess(synchronize, False, process)
        if not handle:
            return bool(kernel.GetLastError() == denied)
        try:
            return bool(kernel.WaitForSingleObject(handle, 0) == waiting)
        finally:
            kernel.CloseHandle(handle)
    try:
        os.kill(process, 0)  # on Windows it would be Ctrl-C
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def end_with(owner: Owner) -> None:
    """Has this process end once its owner has, if that one started it: a killed owner tells nobody.

    A thread looks, as Linux's signal for the purpose is sent when the thread ends that started the process. Workers of a
    cluster, whose parent is another process, and threads of the owner go on.
    """
    if owner == Owner.current() or owner.host != host() or owner in _owners:
        return
    if is_alive(owner.process) and os.getppid() != owner.process:
        return
    _owners.add(owner)
    threading.Thread(target=_outlive, args=(owner,), daemon=True).start()


def _outlive(owner: Owner) -> None:
    # a dead parent that nobody has waited for is alive by its number, but no parent any more
    while is_alive(owner.process) and os.getppid() == owner.process:
        time.sleep(PAUSE)
    os._exit(1)
