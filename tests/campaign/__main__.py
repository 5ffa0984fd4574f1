"""Everything that may never go wrong, tried for some minutes: a table of tried, right and wrong, and docs/reliability.md.

python -m tests.campaign [--minutes 10] [--seed 0] [--only kills,pieces,...] [--no-page]
"""

import argparse
import contextlib
import multiprocessing.util
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from . import disk, forged, inputs, kills, pieces, threads

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HOW = "Written by the campaign, which anybody can repeat: `make campaign`. A part of it is in `make test`."
PASSES = """A bad input passes where the command ends with 1 or 2 and one line `error: ...` that names the file, the option or
the value; or where the call raises a `CalqueError` or an `OSError` that does. It takes at most 5 seconds of the processor, and
no file is changed."""
UNTRIED = """Not tried: other systems than Linux, network file systems, loss of power; and memory, of which
`python -m benchmarks.memory` gives the figures."""
MOST_WRONG = 20  # that the page names of each part
THREAD_TRIALS = 10  # a minute, about


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the campaign found.

    Attributes:
        what: was tried, in words.
        wrong: how what went wrong did.
    """

    what: str
    tried: int
    right: int
    wrong: tuple[str, ...]


def _kills(seconds: float, seed: int) -> Part:
    found = kills.campaign(10_000, seed, seconds)
    wrong = list(found.wrong)
    wrong += [f"{found.left} files were left after the runs that went on"] if found.left else []
    wrong += [f"{found.processes} processes outlived a kill by {kills.PATIENCE:.0f} s"] if found.processes else []
    what = f"runs killed at random moments ({found.kills} of SIGKILL) and resumed: tensors, plan, prices, report as undisturbed"
    return Part(what, found.tried, found.right, tuple(wrong))


def _pieces(seconds: float, seed: int) -> Part:
    counts, wrong = pieces.campaign(seconds)
    right, tried = sum(n for (_, good), n in counts.items() if good), counts.total()
    told = tuple(f"{trial.case}: {trial.piece} {trial.damage}: {', '.join(trial.wrong[:3])}" for trial in wrong)
    return Part(
        "pieces of a run removed, cut, emptied or with one bit flipped: the run ends as undisturbed", tried, right, told
    )


def _forged(seconds: float, seed: int) -> Part:
    counts, wrong = forged.campaign(seconds, seed)
    what = "`q.safetensors` with a right checksum and one field or tensor changed: refused by name, or an equal network"
    return Part(what, counts.total(), counts[True], tuple(wrong))


def _commands(seconds: float, seed: int) -> Part:
    counts, wrong = inputs.command_campaign(seconds, seed=seed)
    return Part(
        "bad command lines and files: one line of error that names it, nothing written",
        counts.total(),
        counts[True],
        tuple(wrong),
    )


def _calls(seconds: float, seed: int) -> Part:
    counts, wrong = inputs.call_campaign(seconds, seed=seed)
    what = "bad arguments of every function of the API: one of our exceptions, which names it"
    return Part(what, counts.total(), counts[True], tuple(wrong))


def _threads(seconds: float, seed: int) -> Part:
    found = threads.campaign(max(2, int(THREAD_TRIALS * seconds / 60)), seed=seed)
    what = (
        "pieces of work in two or three threads at once: the results of one thread alone, the process's state unchanged"
    )
    return Part(what, found.tried, found.right, found.wrong)


def _disk(seconds: float, seed: int) -> Part:
    counts, wrong, kind = disk.campaign(seconds, seed=seed)
    return Part(
        f"commands on a full disk ({kind}): whole files or none, the path named",
        counts.total(),
        counts[True],
        tuple(wrong),
    )


# Each with its share of the time; what one leaves over goes to those behind it.
PARTS: dict[str, tuple[float, Callable[[float, int], Part]]] = {
    "commands": (0.3, _commands), "calls": (0.18, _calls), "disk": (0.04, _disk), "threads": (0.05, _threads),
    "forged": (0.06, _forged), "pieces": (0.07, _pieces), "kills": (0.3, _kills),
}  # fmt: skip


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A temporary folder of the campaign's own, so that what is left in it is certainly calque's."""
    multiprocessing.util.get_temp_dir()  # made now, elsewhere: it is deleted when the process ends
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        tempfile.tempdir = os.environ["TMPDIR"] = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = before[0]
            del os.environ["TMPDIR"]
            if before[1] is not None:
                os.environ["TMPDIR"] = before[1]


def table(found: dict[str, Part]) -> list[str]:
    """The figures as a table of Markdown."""
    rows = [(part.what, part.tried, part.right, len(part.wrong)) for part in found.values()]
    lines = ["| What | Tried | Right | Wrong |", "|---|---:|---:|---:|"]
    return lines + [f"| {what} | {tried:,} | {right:,} | {wrong:,} |" for what, tried, right, wrong in rows]


def page(found: dict[str, Part], *, command: str, seconds: float, peak: int) -> str:
    """docs/reliability.md."""
    named = [
        f"- {name}: `{' '.join(text.split())[:200].replace('`', '')}`"
        for name, part in found.items()
        for text in part.wrong[:MOST_WRONG]
    ]
    where = f"{platform.system()}, {os.cpu_count()} processors, Python {platform.python_version()}, torch {torch.__version__}"
    head = f"`{command}`, {seconds / 60:.0f} minutes, calque {version('calque')}, {where}."
    lines = [
        "# What was tried to break it",
        "",
        HOW,
        "",
        f"{head} The process itself took {peak // 1024:,} MB at most.",
        "",
    ]
    lines += [
        *table(found),
        "",
        PASSES,
        "",
        "## What is left wrong",
        "",
        *(named or ["Nothing that was tried."]),
        "",
        UNTRIED,
    ]
    return "\n".join([*lines, ""])


def tried(names: list[str], seconds: float, seed: int) -> dict[str, Part]:
    """What each part finds, in so many seconds together; printed as it comes."""
    found, started = dict[str, Part](), time.monotonic()
    for position, name in enumerate(names):
        share, run = PARTS[name]
        rest = sum(PARTS[other][0] for other in names[position:])
        found[name] = run(max(1.0, seconds - (time.monotonic() - started)) * share / rest, seed)
        print(
            f"{name}: tried {found[name].tried}, right {found[name].right}, wrong {len(found[name].wrong)}", flush=True
        )
        for text in found[name].wrong:
            print(f"  {text}".encode("utf-8", "backslashreplace").decode(), flush=True)
    return found


def main() -> None:
    """Runs the parts, prints the table, writes the page; exit code 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--no-page", action="store_true", help="leave docs/reliability.md as it is")
    given = parser.parse_args()
    names = given.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}. They are {', '.join(PARTS)}.")
    torch.set_num_threads(1)
    started = time.monotonic()
    with temporary() as folder:
        found = tried(names, 60 * given.minutes, given.seed)
        left = sorted(path.name for path in folder.iterdir() if path.name != kills.FOREIGN)
    found["leftovers"] = Part(
        "the temporary folder after all of this: nothing is left in it", 1, int(not left), tuple(left)
    )
    print("\n".join([*(f"left: {name}" for name in left), *table(found)]))
    if not given.no_page:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        command = " ".join(["python -m tests.campaign", *sys.argv[1:]])
        PAGE.write_text(page(found, command=command, seconds=time.monotonic() - started, peak=peak), encoding="utf-8")
    sys.exit(int(any(part.wrong for part in found.values())))


if __name__ == "__main__":
    main()
