"""Signals that end a command; the library itself has no handlers."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import calque
from calque.cli import signals
from calque.cli.signals import EndedError, ending_signals
from calque.cli.terminal import advice

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_raises_once_and_its_handler_goes_with_the_command(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # where tests run in the background, it may be ignored
    with ending_signals():
        with (
            pytest.raises(EndedError, match=f"ended by {number.name}") as raised,
            advice("calque quantize --resume", lambda: True),
        ):
            os.kill(os.getpid(), number)
        assert raised.value.code == code
        os.kill(os.getpid(), number)  # while it is tidied
        monkeypatch.setattr(signals, "GRACE", 0.0)
        with pytest.raises(EndedError):
            os.kill(os.getpid(), number)

    assert signal.signal(number, outside) == signal.SIG_DFL
    assert capsys.readouterr().err == "note: finished pieces are kept. Go on with: calque quantize --resume\n"


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_printed_to_a_terminal_that_is_gone_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, there = os.openpty()
    with open(there, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        os.close(terminal)

        signals._leave_lost_terminal()

        assert sys.stderr is not stream
        print("nobody reads it", file=sys.stderr, flush=True)
        sys.stderr.close()


@pytest.mark.parametrize("kind", ["a file", "no file"])
def test_what_is_printed_elsewhere_is_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") if kind == "a file" else io.StringIO() as stream:
        monkeypatch.setattr(sys, "stderr", stream)

        signals._leave_lost_terminal()

        assert sys.stderr is stream


def test_the_library_has_no_signal_handler() -> None:
    numbers = sorted(signal.valid_signals())
    before = [signal.getsignal(number) for number in numbers]
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.append([signal.getsignal(number) for number in numbers] == before)

    calque.quantize(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4), recipe="nearest", progress=look)

    assert seen
    assert all(seen)
