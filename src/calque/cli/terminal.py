"""What the terminal shows: progress bars, warnings and errors on stderr."""

import _thread
import logging
import multiprocessing.resource_tracker
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from calque.errors import CalibrationWarning, CaptureWarning

PAUSE = 0.1  # seconds between two looks
Counter = Callable[[str, int, int], None]  # phase, steps done, steps in all


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    else:
        format_message = getattr(error, "format_message", None)  # of typer's usage errors
        text = format_message() if callable(format_message) else str(error)
    return " ".join(text.split()) or type(error).__name__


def complain(kind: str, text: str) -> None:
    """Prints one line on stderr."""
    print(f"{kind}: {text}", file=sys.stderr)


@contextmanager
def visible_warnings() -> Iterator[None]:
    """Shows calque's warnings as one line each, and no other library's, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (CalibrationWarning, CaptureWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = lambda message, *_, **__: complain("warning", " ".join(str(message).split()))
        yield


@contextmanager
def bars(quiet: bool) -> Iterator[Counter]:
    """A callback that draws a bar with the time left for each phase, on stderr; or one that draws nothing."""
    if quiet:
        yield lambda phase, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def count(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)

        yield count


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain("note", record.getMessage())


@contextmanager
def estimates(quiet: bool) -> Iterator[None]:
    """Shows what the pipeline says of a run before it starts: its time and disk."""
    log, handler = logging.getLogger("calque.pipeline"), _Notes(logging.INFO)
    level = log.level
    if not quiet:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextmanager
def shielded_workers(workers: int | None) -> Iterator[None]:
    """Keeps Ctrl-C from worker processes, each of which would print a traceback; this process still obeys it.

    They inherit that the signal is blocked, and end with this process. A thread waits for the signal meanwhile.
    """
    if workers is None or not hasattr(signal, "sigtimedwait"):  # which Linux has
        yield
        return
    finished = threading.Event()

    def pass_on() -> None:
        while not finished.is_set():
            if signal.sigtimedwait([signal.SIGINT], PAUSE) is not None:
                _thread.interrupt_main()

    multiprocessing.resource_tracker.ensure_running()  # started later, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    waiting = threading.Thread(target=pass_on, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        finished.set()
        waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def advice(command: str) -> Iterator[None]:
    """Says how to go on where Ctrl-C interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        complain("note", f"finished pieces are kept. Go on with: {command}")
        raise
