"""One bar for a whole run: its share never falls, and who gets a bar, lines, or nothing."""

import importlib.util
import io
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import calque
import networks
from calque.errors import SpecError
from calque.quantized.partly import PartlyQuantized
from calque.recipe import NEAREST
from calque.run.progress import Bar, Phase, Told, watched

INPUTS = networks.images(20, seed=0)


class Drawn:
    """What a bar draws."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.shares: list[float] = []

    def __call__(self, text: str, share: float) -> None:
        self.texts.append(text)
        self.shares.append(share)


def at_rest() -> float:
    return 0.0


def test_phases_weigh_what_is_foreseen_and_steps_what_they_take() -> None:
    drawn = Drawn()
    bar = Bar(drawn, at_rest)

    bar.expect([Phase("fit", (1.0, 3.0)), Phase("statistics", (4.0,))])
    for phase, done, total in [("fit", 1, 2), ("fit", 2, 2), ("statistics", 1, 4), ("statistics", 4, 4)]:
        bar(phase, done, total)

    assert drawn.texts[1:] == ["fit 1/2", "fit 2/2", "statistics 1/4", "statistics 4/4"]
    assert drawn.shares[1:] == pytest.approx([1 / 8, 4 / 8, 5 / 8, 1.0])


def test_what_was_spent_before_the_forecast_counts() -> None:
    drawn, times = Drawn(), iter([0.0, 6.0])
    bar = Bar(drawn, lambda: next(times))

    bar.begin("capture")
    bar.expect([Phase("fit", (2.0,))])

    assert drawn.shares == pytest.approx([0.0, 0.75])
    assert drawn.texts[0] == "capture"


def test_a_phase_that_comes_again_is_the_next_of_its_name_and_one_left_out_is_passed_over() -> None:
    drawn = Drawn()
    bar = Bar(drawn, at_rest)

    bar.expect([Phase("fit", (1.0,)), Phase("prices", (1.0,)), Phase("fit", (1.0,)), Phase("fit", (1.0,))])
    for done in (1, 2):
        bar("fit", done, 2)
    for done in (1, 2):
        bar("fit", done, 2)  # the prices were there already

    assert drawn.shares[1:] == pytest.approx([0.125, 0.25, 0.625, 0.75])


@given(
    phases=st.lists(
        st.builds(Phase, st.sampled_from("abc"), st.lists(st.floats(0, 10), max_size=3).map(tuple)), max_size=5
    ),
    calls=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.integers(0, 5)), max_size=20),
    sections=st.integers(1, 3),
)
def test_whatever_is_told_the_bar_never_goes_back_and_never_past_its_end(
    phases: list[Phase], calls: list[tuple[str, int, int]], sections: int
) -> None:
    drawn = Drawn()
    bar = Bar(drawn, at_rest)

    for number in range(sections):
        bar.section(number / sections, (number + 1) / sections)
        bar.expect(phases)
        for phase, done, total in calls:
            bar(phase, min(done, total), total)

    assert drawn.shares == sorted(drawn.shares)
    assert all(0 <= share <= 1 for share in drawn.shares)


class Branch(nn.Module):
    """Two parts that can be captured, behind control flow that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.second(x if x.sum() > 0 else -x)
        return y


@pytest.mark.filterwarnings("ignore::calque.errors.CaptureWarning")
@pytest.mark.parametrize("build", [lambda: networks.small(), Branch])
def test_a_run_moves_its_bar_to_the_end(build: Callable[[], nn.Module]) -> None:
    drawn = Drawn()

    q = calque.quantize(networks.seeded(build()), INPUTS, recipe=NEAREST, progress=Bar(drawn))

    assert isinstance(q, PartlyQuantized) == (build is Branch)
    assert drawn.shares == sorted(drawn.shares)
    assert drawn.shares[-1] == pytest.approx(1.0)
    assert [text for text in drawn.texts if text.startswith("fit 1/")]


def test_a_function_is_called_with_steps_alone() -> None:
    calls: list[tuple[Any, ...]] = []

    with watched(lambda *call: calls.append(call)) as watch:
        assert isinstance(watch, Told)
        watch.begin("capture")
        watch.expect([Phase("fit", (1.0,))])
        watch.section(0.0, 1.0)
        watch("fit", 1, 2)

    assert calls == [("fit", 1, 2)]


@pytest.mark.parametrize("progress", ["yes", 1, [], 0.5])
def test_what_is_neither_a_function_nor_a_switch_is_refused(progress: Any) -> None:
    with pytest.raises(SpecError, match=r"progress is a function of \(phase, .* Got"):
        calque.quantize(networks.small(), INPUTS, progress=progress)


def shown(progress: bool | None, *, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What stderr receives of one small run of three steps."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    with watched(progress) as watch:
        watch.begin("capture")
        watch.expect([Phase("fit", (1.0, 1.0))])
        watch("fit", 1, 2)
        watch("fit", 2, 2)
    return stream.getvalue()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable that speaks of terminals, and a terminal that can draw."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    return monkeypatch


def test_a_terminal_gets_a_bar_and_a_file_nothing_unless_asked(plain: pytest.MonkeyPatch) -> None:
    assert "fit 2/2" in shown(None, terminal=True, monkeypatch=plain)
    assert "fit 2/2" in shown(True, terminal=True, monkeypatch=plain)
    assert shown(None, terminal=False, monkeypatch=plain) == ""
    assert shown(False, terminal=True, monkeypatch=plain) == ""
    assert shown(False, terminal=False, monkeypatch=plain) == ""


def test_lines_are_written_where_no_bar_can_be_drawn(plain: pytest.MonkeyPatch) -> None:
    lines = shown(True, terminal=False, monkeypatch=plain).splitlines()

    assert lines[0] == "capture"
    assert lines[-1] == "fit 2/2, 100%"


def test_a_terminal_that_draws_nothing_gets_none(plain: pytest.MonkeyPatch) -> None:
    plain.setenv("TERM", "dumb")

    assert shown(None, terminal=True, monkeypatch=plain) == ""


def test_a_notebook_without_widgets_gets_a_line_that_is_written_over(plain: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    shell = SimpleNamespace(kernel=object())
    plain.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    plain.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "ipywidgets" else find(name))

    written = shown(None, terminal=False, monkeypatch=plain)

    assert written.endswith("fit 2/2                      100%\n")
    assert written.count("\r") == 4
    assert shown(False, terminal=False, monkeypatch=plain) == ""
