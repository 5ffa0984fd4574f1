"""What the terminal shows: notes, warnings and errors on stderr."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from calque.cli.signals import EndedError
from calque.errors import CalibrationWarning, CaptureWarning


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
    """Prints one line on stderr, where there still is one."""
    with suppress(OSError):
        print(f"{kind}: {text}", file=sys.stderr, flush=True)


@contextmanager
def visible_warnings() -> Iterator[None]:
    """Shows calque's warnings as one line each, and no other library's, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for category in (CalibrationWarning, CaptureWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = lambda message, *_, **__: complain("warning", " ".join(str(message).split()))
        yield


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain("note", record.getMessage())


@contextmanager
def notes(module: str, *, quiet: bool = False) -> Iterator[None]:
    """Shows what a module logs: a run's time and disk before it starts, or what the installed runtime cannot read."""
    log, handler = logging.getLogger(module), _Notes(logging.INFO)
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
def advice(command: str, kept: Callable[[], bool]) -> Iterator[None]:
    """Says how to go on where Ctrl-C or a signal ends a run of which pieces are kept."""
    try:
        yield
    except (KeyboardInterrupt, EndedError):
        if kept():
            complain("note", f"finished pieces are kept. Go on with: {command}")
        raise
