"""One bar for a whole run, its phases weighted by a forecast of their seconds: on a terminal, in a notebook, or as lines."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from calque.errors import SpecError
from calque.run.fields import shown

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all

LINES = 10  # in all, where neither a terminal nor a notebook can draw a bar


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run: its name as `progress` is told it, and the seconds that each of its steps will take."""

    name: str
    steps: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return sum(self.steps)

    def after(self, done: int, total: int) -> float:
        """Seconds of the first `done` of `total` steps, which need not be as many as were foreseen.

        >>> Phase("fit", (1.0, 3.0)).after(3, 4)
        2.5
        """
        whole, part = divmod(len(self.steps) * done, max(1, total))
        partial = self.steps[whole] * part / max(1, total) if whole < len(self.steps) else 0.0
        return sum(self.steps[:whole]) + partial


class Watch(Protocol):
    """What a run tells of itself, besides that it is called with the phase, the steps done and the steps in all."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...

    def begin(self, phase: str) -> None:
        """A phase without steps begins."""

    def expect(self, phases: Sequence[Phase]) -> None:
        """What is to come, in this order; some of it may be left out."""

    def section(self, start: float, end: float) -> None:
        """What comes is the run between these two shares of 1."""


class Told:
    """Passes the steps on to a callback, which alone they concern."""

    def __init__(self, callback: Progress):
        self._callback = callback

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._callback(phase, done, total)

    def begin(self, phase: str) -> None:
        pass

    def expect(self, phases: Sequence[Phase]) -> None:
        pass

    def section(self, start: float, end: float) -> None:
        pass


class Bar:
    """Draws how much of the run is done; what is drawn never falls."""

    def __init__(self, draw: Callable[[str, float], None], clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            draw: of a description, and the share that is done; 0 as long as nothing is foreseen.
        """
        self._draw, self._clock = draw, clock
        self._drawn = 0.0
        self.section(0.0, 1.0)

    def section(self, start: float, end: float) -> None:
        self._share = start, end
        self._phases: Sequence[Phase] = ()
        self._at, self._last = 0, 0
        self._spent, self._started = 0.0, self._clock()

    def expect(self, phases: Sequence[Phase]) -> None:
        self._spent = self._clock() - self._started
        self._phases, self._at, self._last = tuple(phases), 0, 0
        self._show(phases[0].name if phases else "", 0.0)

    def begin(self, phase: str) -> None:
        self._draw(phase, self._drawn)

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._enter(phase, done)
        current = self._phases[self._at] if self._phases else None
        ready = current.after(done, total) if current is not None and current.name == phase else 0.0
        self._show(f"{phase} {done}/{total}", ready)

    def _enter(self, phase: str, done: int) -> None:
        """Moves on to the next phase of that name, if the present one has another name or has begun anew."""
        names = [each.name for each in self._phases]
        known = self._at < len(names) and names[self._at] == phase
        if (not known or done <= self._last) and phase in names[self._at + known :]:
            self._at = names.index(phase, self._at + known)
        self._last = done

    def _show(self, text: str, ready: float) -> None:
        seconds = [each.seconds for each in self._phases]
        whole = self._spent + sum(seconds)
        if whole > 0:
            start, end = self._share
            done = (self._spent + sum(seconds[: self._at]) + ready) / whole
            self._drawn = max(self._drawn, start + (end - start) * min(1.0, done))
        self._draw(text, self._drawn)


def check_progress(progress: object) -> None:
    """Raises SpecError where `progress` is neither a function, nor True, False or None."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise SpecError(
            f"progress is a function of (phase, steps done, steps in all), True, False or None. Got {shown(progress)}."
        )


@contextmanager
def watched(progress: Progress | bool | None) -> Iterator[Watch]:
    """What a run tells of itself to: a callback; a bar where one can be drawn (None, True), or lines of text (True); nothing."""
    if isinstance(progress, Bar):  # of the run that this one is a part of
        yield progress
    elif callable(progress):
        yield Told(progress)
    elif progress is False:
        yield Told(silent)
    elif _in_notebook() and importlib.util.find_spec("ipywidgets") is None:  # without which rich draws nothing there
        yield Bar(_line)
        print(file=sys.stderr)
    elif _in_notebook() or _on_terminal():
        with _drawn() as bar:
            yield bar
    else:
        yield Bar(_Lines()) if progress else Told(silent)


def silent(phase: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _on_terminal() -> bool:
    from rich.console import Console  # here: nobody who draws nothing waits for it

    console = Console(stderr=True)
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def _drawn() -> Iterator[Bar]:
    """A bar with the phase, the share and the time left, on stderr; it goes when the run ends."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Columns

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    plain = not sys.stdout.isatty()  # what is printed meanwhile belongs into a file or pipe, not above the bar
    with Columns(*columns, console=Console(stderr=True), transient=True, redirect_stdout=not plain) as progress:
        task = progress.add_task("", total=None)

        def draw(text: str, share: float) -> None:
            progress.update(task, description=text, total=1.0 if share else None, completed=share)

        yield Bar(draw)


def _line(text: str, share: float) -> None:
    """One line that is written over."""
    print(f"\r{text:<28} {share:4.0%}", end="", file=sys.stderr, flush=True)


class _Lines:
    """A line for each tenth of the run."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, text: str, share: float) -> None:
        if share >= self._next:
            print(f"{text}, {share:.0%}" if share else text, file=sys.stderr, flush=True)
            self._next = (int(share * LINES) + 1) / LINES
