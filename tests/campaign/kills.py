"""Runs of the command line that are killed at random moments, resumed, and compared with undisturbed ones.

python -m tests.campaign.kills [--kills 100] [--seed 0] [--limit 600] [--signal SIGKILL|SIGTERM|SIGHUP]
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import calque.cli
from calque.recipe import FAST, SEQUENTIAL, AdaQuant
from calque.shipping.saved.file import read

from . import pieces

MARK = "CALQUE_CAMPAIGN"  # in the environment of every process that a run starts
CHAIN = 3  # kills of one run at most
FOREIGN = ".ses"  # onnxruntime's, one in each temporary folder: the number of its session
PATIENCE = 60.0  # seconds in which workers must have ended
MODULE = f"from {pieces.__name__} import network as build\n"
CASES: dict[str, list[str]] = {
    "fixed bits": ["--bits", "w4a4", "--recipe", "{folder}/fast.toml", "--memory", "1MB"],
    "sequential": ["--bits", "w4a4", "--recipe", "{folder}/steps.toml"],
    "budget, workers": [
        "--bits",
        "w8a8,w4a4,w2a4",
        "--size",
        f"{pieces.SIZE}B",
        "--recipe",
        "{folder}/fast.toml",
        "--workers",
        "2",
    ],
}


@dataclass(slots=True)
class Figures:
    """What became of the runs that were killed.

    Attributes:
        tried, right: runs, each killed once or more, and those that then ended as the undisturbed one did.
        wrong: by run, what differed.
        codes: exit codes of the processes that were sent the signal in time.
        files: in the temporary folder after a kill, the most.  left: after the run that went on.
        processes: that lived PATIENCE seconds after a kill.
    """

    tried: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    kills: int = 0
    codes: set[int] = field(default_factory=set)
    files: int = 0
    left: int = 0
    processes: int = 0

    def __str__(self) -> str:
        lines = [
            f"runs tried {self.tried}, right {self.right}, wrong {len(self.wrong)}; kills {self.kills}",
            f"exit codes {sorted(self.codes)}; temporary files after a kill at most {self.files}, after the next run "
            f"{self.left}; processes that outlived a kill by {PATIENCE:.0f} s: {self.processes}",
        ]
        return "\n".join(lines + self.wrong)


@dataclass(frozen=True, slots=True)
class Ground:
    """Where runs are made: a folder, and a server of processes that have calque loaded."""

    folder: Path
    server: ForkServerContext
    token: str

    @classmethod
    def of(cls, folder: Path, inputs: Tensor) -> "Ground":
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["calque.cli"])
        (folder / "subject.py").write_text(MODULE)
        np.save(folder / "inputs.npy", inputs.numpy())
        (folder / "fast.toml").write_text(FAST.to_toml())
        (folder / "steps.toml").write_text(replace(SEQUENTIAL, name="steps", fit=AdaQuant(steps=40)).to_toml())
        return cls(folder, server, f"{os.getpid()}-{time.time_ns()}")

    def start(self, case: str, run: Path, *, resume: bool) -> Any:
        """A process that runs the command."""
        options = [option.format(folder=self.folder) for option in CASES[case]]
        arguments = [
            "quantize",
            "subject:build",
            "--calibration",
            str(self.folder / "inputs.npy"),
            "-o",
            str(run),
            *options,
        ]
        (run.parent / "temporary").mkdir(parents=True, exist_ok=True)
        process = self.server.Process(
            target=command, args=([*arguments, *["--resume"] * resume], self.folder, run.parent, self.token)
        )
        process.start()
        return process

    def processes(self) -> list[int]:
        """Those that runs have started and that still run, but for the server's own."""
        found = []
        for entry in Path("/proc").iterdir() if sys.platform == "linux" else ():
            if entry.name.isdigit():
                try:
                    environment, state = (entry / "environ").read_bytes(), (entry / "stat").read_text()
                except OSError:
                    continue
                if f"{MARK}={self.token}".encode() in environment and ") Z" not in state:
                    found.append(int(entry.name))
        return found


def command(arguments: list[str], folder: Path, place: Path, token: str) -> None:
    """In a process of its own: the command line, with a temporary folder and an environment that can be told from others."""
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {MARK: token, "TMPDIR": str(place / "temporary")}
    tempfile.tempdir = None
    sys.path.insert(0, str(folder))
    sys.argv = ["calque", *arguments]
    torch.set_num_threads(1)
    try:
        calque.cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))  # multiprocessing would wait for idle workers, which the command's own exit ends


def outcome(run: Path) -> dict[str, Any]:
    """Everything that two equal runs agree in."""
    _, tensors = read(run / "q.safetensors")
    report = json.loads((run / "report.json").read_text())
    del report["phases"]
    for layer in report["layers"]:
        del layer["seconds"]
    prices = run / "prices.json"
    return {
        "tensors": tensors, "plan": (run / "plan.toml").read_text(), "report": report,
        "prices": prices.read_text() if prices.is_file() else None,
    }  # fmt: skip


def campaign(kills: int, seed: int, limit: float, number: int = signal.SIGKILL) -> Figures:
    """Kills runs of each case in turn, until so many kills or seconds are spent.

    Args:
        number: the signal.
    """
    chance, figures = random.Random(seed), Figures()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        ground = Ground.of(Path(name), pieces.inputs())
        whole, durations = {}, {}
        for case in CASES:
            begun, place = time.monotonic(), ground.folder / case
            process = ground.start(case, place / "run", resume=False)
            process.join()
            assert process.exitcode == 0, (place / "log").read_text()
            durations[case], whole[case] = time.monotonic() - begun, outcome(place / "run")
        cases, started = _endless(list(CASES)), time.monotonic()
        while figures.kills < kills and time.monotonic() - started < limit:
            case = next(cases)
            place = ground.folder / f"{case} {figures.tried}"
            _chain(ground, case, place / "run", figures, chance, durations[case], number)
            figures.tried += 1
            wrong = (
                pieces.differences(outcome(place / "run"), whole[case])
                if (place / "run" / "run.json").is_file()
                else ["no run"]
            )
            if wrong:
                figures.wrong.append(f"{place.name}: {wrong[:4]} {(place / 'log').read_text()[-400:]}")
            else:
                figures.right += 1
                shutil.rmtree(place)
    return figures


def _chain(
    ground: Ground, case: str, run: Path, figures: Figures, chance: random.Random, duration: float, number: int
) -> None:
    """Kills one run a few times, then lets it end; counts what is left."""
    for turn in range(chance.randint(1, CHAIN)):
        process = ground.start(case, run, resume=turn > 0)
        process.join(duration * chance.uniform(0.02, 1.0))
        if process.is_alive():
            os.kill(process.pid, number)
            figures.kills += 1
        process.join()
        figures.codes.add(process.exitcode)
        patience = time.monotonic() + PATIENCE
        while ground.processes() and time.monotonic() < patience:
            time.sleep(0.1)
        figures.processes += len(ground.processes())
        figures.files = max(figures.files, len(_files(run.parent / "temporary")))
    last = ground.start(case, run, resume=True)
    last.join()
    left = [path for path in run.rglob("*") if path.name.startswith(".") or path.parent.name == "problems"]
    figures.left += len(_files(run.parent / "temporary")) + len(left)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != FOREIGN]


def _endless(items: list[str]) -> Iterator[str]:
    while True:
        yield from items


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--signal", default="SIGKILL")
    given = parser.parse_args()
    print(campaign(given.kills, given.seed, given.limit, signal.Signals[given.signal]))


if __name__ == "__main__":
    main()
