"""A disk that is full after so many bytes: every write is whole or not at all, and the error names the path.

python -m tests.campaign.disk [--limit SECONDS]
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import calque.cli

from .bad_commands import ground, quantize

MEGABYTE = 1024 * 1024
# What writes, each after a finished run is in the folder; "{}" is the full disk.
COMMANDS: dict[str, tuple[str, ...]] = {
    "quantize": quantize(output="{}/out"),
    "quantize over a run": (*quantize(output="{}/run"), "--overwrite"),
    "budget": (*quantize(output="{}/out"), "--bits", "w8a8,w4a4", "--size", "2600B"),
    "export": ("export", "run", "{}/model.onnx"),
    "plan": ("plan", "{}/run", "--size", "2500B,2600B"),
}  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mounts a file system in memory on `folder`; False where this is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    allowed = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = allowed and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], capture_output=True, check=True)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond so many bytes; the error is another one than a full disk's."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def judge(words: tuple[str, ...], disk: Path, room: int, *, by_limit: bool) -> str:
    """What is wrong with how a command ends on such a disk: it may succeed, or name a path and leave nothing half-made.

    Args:
        by_limit: whether `room` is the most bytes of a file, in place of those of all files.
    """
    before = _finished(disk)
    filler = disk / "filler"
    if not by_limit:
        _fill(filler, room)
    out, err = io.StringIO(), io.StringIO()
    limit = file_limit(room) if by_limit else contextlib.nullcontext()
    with limit, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = calque.cli.run([word.format(disk) for word in words])
    filler.unlink(missing_ok=True)
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    if code == 0:
        return ""
    if code != 1 or len(errors) != 1 or str(disk) not in errors[0] or "unexpected" in errors[0]:
        return f"exit code {code}: {err.getvalue()[:300]}"
    drafts = [path.name for path in disk.rglob("*") if path.name.endswith(".draft")]
    if drafts:
        return f"left drafts: {drafts}"
    changed = [
        name for name, content in before.items() if (disk / name).is_file() and (disk / name).read_bytes() != content
    ]
    broken = [name for name in changed if not (disk / name).stat().st_size]
    return f"left empty files: {broken}" if broken else ""


def _finished(disk: Path) -> dict[str, bytes]:
    return {str(path.relative_to(disk)): path.read_bytes() for path in disk.rglob("*") if path.is_file()}


def _fill(filler: Path, room: int) -> None:
    """Takes all of the disk but so many bytes, by its pages."""
    free = shutil.disk_usage(filler.parent).free
    filler.write_bytes(bytes(max(0, free - room)))


def campaign(limit: float, *, seed: int = 0) -> tuple[Counter[bool], list[str], str]:
    """Every command at many sizes, for so many seconds: how many end right and wrong, how the latter do, and on what disk."""
    counts, wrong, started, chance = Counter[bool](), list[str](), time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="calque-disk-") as name, contextlib.chdir(name):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ground(Path(name))
        disk = Path(name).resolve() / "disk"
        disk.mkdir()
        with small_disk(disk, 2 * MEGABYTE) as mounted:
            while time.monotonic() - started < limit:
                for what, words in COMMANDS.items():
                    room = int(2 ** chance.uniform(0, 13 if not mounted else 18))
                    _fresh(disk, Path(name) / "run")
                    problem = judge(words, disk, room, by_limit=not mounted)
                    counts[not problem] += 1
                    wrong += [f"{what} with room for {room} bytes: {problem}"] if problem else []
    return counts, wrong, "a tmpfs of 2 MB" if mounted else "a limit on the size of files"


def _fresh(disk: Path, run: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(run, disk / "run")


def main() -> None:
    """Prints what went wrong, and counts of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    torch.set_num_threads(1)
    counts, wrong, disk = campaign(parser.parse_args().limit)
    print("\n".join(wrong) or "nothing went wrong")
    print(f"full disk ({disk}): tried {counts.total()}, right {counts[True]}, wrong {counts[False]}")


if __name__ == "__main__":
    main()
