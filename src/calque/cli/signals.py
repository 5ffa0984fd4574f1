"""Signals that end a command: they raise an error as Ctrl-C does, so that all is tidied on the way out."""

import _thread
import multiprocessing.resource_tracker
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PAUSE = 0.1  # seconds between two looks
GRACE = (
    5.0  # seconds: a signal that comes again so soon must not disturb the tidying; later ones do, as one may be lost
)


class EndedError(BaseException):
    """A signal that ends a command, as text; no Exception, so that nothing in between catches it.

    Attributes:
        code: the exit code that a shell has for the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def ending_signals() -> Iterator[None]:
    """Has SIGTERM and SIGHUP raise EndedError in the main thread; one that is ignored (nohup) stays so."""
    before = {}
    last = -GRACE

    def end(number: int, _: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < GRACE:
            return
        last = now
        _leave_lost_terminal()
        raise EndedError(number)

    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_lost_terminal() -> None:
    """Drops what is printed from now on where the terminal is gone: to write to it would be an error of its own."""
    for name in ("stdout", "stderr"):
        try:
            number = getattr(sys, name).fileno()
            lost = stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number)
        except (OSError, ValueError, AttributeError):  # no file of the system's
            continue
        if lost:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


@contextmanager
def shielded_workers(workers: int | None) -> Iterator[None]:
    """Keeps what a terminal sends to all processes from workers, which would print tracebacks; this process still obeys it.

    They inherit that the signals are blocked, and end with this process. A thread waits for the signals meanwhile.
    """
    if workers is None or not hasattr(signal, "sigtimedwait"):  # which Linux has
        yield
        return
    finished = threading.Event()
    sent = [number for number in (signal.SIGHUP, signal.SIGINT) if callable(signal.getsignal(number))]

    def pass_on() -> None:
        while not finished.is_set():
            found = signal.sigtimedwait(sent, PAUSE)
            if found is not None:
                _thread.interrupt_main(signal.Signals(found.si_signo))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, sent)
    multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, sent)
    waiting = threading.Thread(target=pass_on, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        finished.set()
        waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
