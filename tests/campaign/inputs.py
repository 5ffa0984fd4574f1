"""Bad input of every kind, each in a call that would succeed without it: one error that names it, and nothing left behind.

python -m tests.campaign.inputs [--limit SECONDS] [--only TEXT]
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import torch

import calque.cli
from calque.errors import CalqueError

from .bad_calls import Call, calls
from .bad_commands import Command, commands, ground

SECONDS = 5.0  # of the processor: an error comes at once
PATIENCE = 15.0  # seconds of the clock, on a machine that others use as well
LONGEST = 1000  # characters of a message
Files = dict[str, tuple[int, int]]


class _StuckError(BaseException):
    """No Exception, so that nothing in between catches it."""


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Ends what waits for something that never comes, such as a pipe's other end."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _StuckError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # once more, where something swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge_command(case: Command, folder: Path) -> str:
    """What is wrong with how a command line ends; "" where it is one line that names what it must."""
    case.prepare()
    before, started = files(folder), time.process_time()
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patience(PATIENCE):
            code = calque.cli.run(list(case.arguments))
    except _StuckError:
        return "never ends"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"[:300]
    seconds, lines = time.process_time() - started, err.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    others = [line for line in lines if not line.startswith(("error:", "note:", "warning:"))]
    problem = ""
    if code not in (1, 2):
        problem = f"exit code {code}"
    elif len(errors) != 1 or others:
        problem = f"{len(errors)} lines of errors, {len(others)} others: {' | '.join(lines)[:300]}"
    else:
        problem = judge_text(errors[0], case.named)
    if not problem and seconds > SECONDS:
        problem = f"took {seconds:.1f} s"
    left = sorted(name for name, state in files(folder).items() if before.get(name) != state)
    left += sorted(before.keys() - files(folder).keys())
    _clear(folder, before)
    return problem or (f"changed files: {left[:3]}" if left else "")


def judge_call(case: Call, folder: Path) -> str:
    """What is wrong with how a call ends; "" where one of our exceptions names what it must."""
    before, started = files(folder), time.process_time()
    problem = "accepted"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), patience(PATIENCE):
            case.call()
    except _StuckError:
        problem = "never ends"
    except (CalqueError, OSError) as error:
        problem = judge_text(str(error), case.named)
    except Exception as error:
        problem = f"raw {type(error).__name__}: {error}"[:300]
    if not problem and time.process_time() - started > SECONDS:
        problem = f"took {time.process_time() - started:.1f} s"
    left = [name for name, state in files(folder).items() if before.get(name) != state]
    _clear(folder, before)
    return problem or (f"changed files: {left[:3]}" if left else "")


def judge_text(text: str, named: tuple[str, ...]) -> str:
    """What is wrong with an error's text."""
    if "error: unexpected" in text or "Traceback" in text:
        return f"not foreseen: {text[:300]}"
    if len(text) > LONGEST + max(map(len, named)):
        return f"{len(text)} characters: {text[:200]}"
    flat = [ascii(way)[1:-1] for name in named if name.strip() for way in (name, " ".join(name.split()))]
    shown = " ".join(f"{text} {text!a}".lower().split())
    return "" if any(name.lower() in shown for name in flat) else f"names none of {flat}: {text}"[:400]


def files(folder: Path) -> Files:
    """What is in the folder, with sizes and times."""
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            state = (Path(root) / name).lstat()
            found[os.path.relpath(Path(root) / name, folder)] = (state.st_size, state.st_mtime_ns)
    return found


def _clear(folder: Path, before: Files) -> None:
    """Removes what a case has left, so that the next one finds the folder as it was."""
    for name in files(folder).keys() - before.keys():
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for name in ("out", "bad run"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """A folder with all that cases read; it is the current folder, and has the temporary one."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="calque-inputs-") as name:
        folder = Path(name).resolve()
        (folder / "temporary").mkdir()
        with contextlib.chdir(folder):
            ground(folder)
            tempfile.tempdir = str(folder / "temporary")
            try:
                yield folder
            finally:
                tempfile.tempdir = before


def command_campaign(
    limit: float, *, seed: int = 0, share: float = 1.0, only: str = ""
) -> tuple[Counter[bool], list[str]]:
    """Command lines in random order until so many seconds are spent: how many end right and wrong, and how the latter do.

    Args:
        share: of the cases, at random.  only: text that the names of cases must have.
    """
    with world() as folder, contextlib.redirect_stdout(io.StringIO()):
        cases = [case for case in commands(folder) if only in case.given]
        return _judged([(case.given, partial(judge_command, case, folder)) for case in cases], limit, seed, share)


def call_campaign(
    limit: float, *, seed: int = 0, share: float = 1.0, only: str = ""
) -> tuple[Counter[bool], list[str]]:
    """The same for calls of the API."""
    with world() as folder:
        cases = [case for case in calls(folder) if only in case.given]
        return _judged([(case.given, partial(judge_call, case, folder)) for case in cases], limit, seed, share)


def _judged(
    cases: list[tuple[str, Callable[[], str]]], limit: float, seed: int, share: float
) -> tuple[Counter[bool], list[str]]:
    counts, wrong, started = Counter[bool](), list[str](), time.monotonic()
    random.Random(seed).shuffle(cases)
    for name, judged in cases[: max(1, round(share * len(cases)))]:
        problem = judged()
        counts[not problem] += 1
        wrong += [f"{name}: {problem}"] if problem else []
        if time.monotonic() - started > limit:
            break
    return counts, wrong


def main() -> None:
    """Prints what went wrong, and counts of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--only", default="", help="text in the names of cases")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for what, campaign in (("command lines", command_campaign), ("calls", call_campaign)):
        counts, wrong = campaign(given.limit, only=given.only)
        print("\n".join(sorted(wrong)).encode("utf-8", "backslashreplace").decode())
        print(f"{what}: tried {counts.total()}, right {counts[True]}, wrong {counts[False]}", flush=True)


if __name__ == "__main__":
    main()
