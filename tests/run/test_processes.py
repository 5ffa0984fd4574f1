"""Which process is alive, and workers that end with the one that started them."""

import os
import subprocess
import sys
import threading
import time

import pytest

from calque.run import processes
from calque.run.processes import Owner, end_with, host, is_alive

LOAD = f"""
import importlib.util, sys  # without the package, which takes seconds to load
spec = importlib.util.spec_from_file_location("processes", {processes.__file__!r})
sys.modules["processes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["processes"])
"""
WORKER = f"""{LOAD}
import time
from processes import Owner, end_with
end_with(Owner(sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
time.sleep(300)
"""
PARENT = f"""{LOAD}
import os, subprocess, time
from processes import host
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}, host(), str(os.getpid())], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(300)
"""


def dead_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def ended(process: int, within: float = 60.0) -> bool:
    """Whether the process has ended, or does so soon."""
    limit = time.monotonic() + within
    while is_alive(process) and time.monotonic() < limit:
        time.sleep(0.05)
    return not is_alive(process)


def test_this_process_is_alive_and_one_that_ended_is_not() -> None:
    assert is_alive(os.getpid())
    assert is_alive(os.getppid())
    assert not is_alive(dead_process())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_worker_ends_when_the_process_that_started_it_is_killed() -> None:
    parent = started(PARENT)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert is_alive(worker)

    parent.kill()
    parent.communicate()

    assert ended(worker)


def test_a_worker_whose_owner_is_dead_already_ends_at_once() -> None:
    worker = started(WORKER, host(), dead_process())

    assert worker.wait(timeout=120) == 1
    worker.communicate()


@pytest.mark.parametrize("owner", ["another machine's", "a process that did not start it"])
def test_others_go_on(owner: str) -> None:
    names = {
        "another machine's": ("00000000", dead_process()),
        "a process that did not start it": (host(), os.getppid()),
    }

    worker = started(WORKER, *names[owner])
    assert worker.stdout is not None
    worker.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=0.6)

    worker.kill()
    worker.communicate()


def test_a_thread_of_the_owner_goes_on() -> None:
    before = threading.active_count()
    end_with(Owner.current())
    assert threading.active_count() == before
