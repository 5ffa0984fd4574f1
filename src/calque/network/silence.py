"""Warnings and log lines of one thread kept off the terminal: filters, levels and streams of the process stay as they are."""

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any


class _Silence(logging.Filter):
    """Drops what one thread logs under these names, and matches what it warns of.

    Warnings come by with their text, whatever it is: a filter of the `warnings` module asks an object that has `match`.
    """

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.own = threading.local()  # a thread's number may come again in a forked process; its memory may not
        self.own.silent = True

    def match(self, text: str) -> bool:
        return getattr(self.own, "silent", False)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.match("") or not any(f"{record.name}.".startswith(f"{name}.") for name in self.names)


@contextmanager
def silent_thread(*names: str) -> Iterator[None]:
    """Keeps warnings of this thread, and what it logs under these names, from whoever listens; other threads are heard.

    Another thread may enter or leave `warnings.catch_warnings`, which replaces the list of filters, at any moment meanwhile.
    """
    silence = _Silence(names)
    with ExitStack() as stack:
        for handler in _handlers(names):
            handler.addFilter(silence)
            stack.callback(handler.removeFilter, silence)
        entry = ("ignore", silence, Warning, None, 0)
        before = warnings.filters
        before.insert(0, entry)  # type: ignore[attr-defined]  # typed as a sequence; it is a list
        stack.callback(_remove, entry, before)
        yield


def _remove(entry: object, before: object) -> None:
    """Takes the filter out of the list that it was put into, and of the list that another thread has put in its place."""
    for filters in (before, warnings.filters):
        assert isinstance(filters, list)
        if entry in filters:
            filters.remove(entry)


def _handlers(names: Sequence[str]) -> list[logging.Handler]:
    """Where lines that are logged under these names may end."""
    registered = logging.Logger.manager.loggerDict.copy()
    loggers = [
        logger for name, logger in registered.items() if f"{name}.".startswith(tuple(f"{each}." for each in names))
    ]
    found = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    found += [*logging.root.handlers, *([logging.lastResort] if logging.lastResort is not None else [])]
    return list(dict.fromkeys(found))


@contextmanager
def silent_prints(module: ModuleType) -> Iterator[None]:
    """Keeps what a module prints from the terminal where this thread makes it, by a `print` that is its own for so long.

    For one thread at a time.
    """
    thread, own = threading.get_ident(), vars(module)

    def quiet(*values: object, **options: Any) -> None:
        if threading.get_ident() != thread:
            print(*values, **options)

    own["print"] = quiet
    try:
        yield
    finally:
        del own["print"]
