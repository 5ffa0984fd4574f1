"""Runs that are killed and go on: the same result as without, and no piece made twice."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calque
import networks
from calque.errors import SpecError
from calque.quantized.model import QuantizedModel
from calque.recipe import ADVANCED, SEQUENTIAL, AdaQuant, Blocks, Nearest, Parallel, Search, Tuning
from slow import slow

QUICK = replace(SEQUENTIAL, name="quick", fit=AdaQuant(steps=20))
SEARCH = replace(
    ADVANCED, name="search", fit=AdaQuant(steps=8), tuning=Tuning(steps=5),
    search=Search(AdaQuant(steps=5), priced_inputs=64, finalists=2),
)  # fmt: skip
CANDIDATES, BUDGET = ("w8a8", "w4a4", "w2a4"), calque.Budget(size=0.83)
BLOCKS = replace(QUICK, blocks=Blocks(steps=5), tuning=Tuning(steps=5))
CASES: dict[str, dict[str, Any]] = {
    "fixed bits": {"bits": "w4a4", "recipe": QUICK},
    "blocks and biases": {"bits": "w4a4", "recipe": BLOCKS},
    "budget": {"bits": CANDIDATES, "budget": BUDGET, "recipe": SEARCH},
    "budget, parallel": {"bits": CANDIDATES, "budget": BUDGET, "recipe": replace(SEARCH, flavour=Parallel())},
    "workers": {"bits": CANDIDATES, "budget": BUDGET, "recipe": SEARCH, "workers": 2},
}
INPUTS = networks.images(48, seed=0)


def network() -> nn.Module:
    return networks.seeded(networks.Residual())


def quantized(case: str, run: Path | None) -> QuantizedModel:
    return calque.quantize(network(), INPUTS, run=run, **CASES[case])


def result(q: QuantizedModel) -> dict[str, Any]:
    """Everything that two equal runs agree in."""
    report = json.loads(q.report.to_json())
    del report["phases"]
    for layer in report["layers"]:
        del layer["seconds"]
    prices = None if q.prices is None else q.prices.to_json()
    return {"tensors": dict(q.state_dict()), "plan": q.plan.to_toml(), "prices": prices, "report": report}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, value in one["tensors"].items():
        assert value.dtype == other["tensors"][name].dtype
        assert torch.equal(value, other["tensors"][name]), name
    assert {name: one[name] for name in one if name != "tensors"} == {
        name: other[name] for name in other if name != "tensors"
    }


def pieces(run: Path) -> dict[str, tuple[int, int]]:
    """The files of a run with what tells one writing of them from another."""
    files = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(run)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def work(case: str, run: Path, output: Path) -> None:
    """In a process of its own: one run, its result in a file."""
    torch.set_num_threads(1)
    q = quantized(case, run)
    draft = output.with_suffix(".draft")
    torch.save(result(q), draft)
    os.replace(draft, output)


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Starts processes that have torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["calque", "networks"])
    first = context.Process(target=len, args=("",))  # so that the time of loading is in no measurement
    first.start()
    first.join()
    return context


def start(server: ForkServerContext, case: str, run: Path, output: Path) -> ForkServerProcess:
    process = server.Process(target=work, args=(case, run, output))
    process.start()
    return process


def survives_kills(server: ForkServerContext, folder: Path, case: str, *, kills: int, seed: int) -> None:
    chance = random.Random(f"{case} {seed}")
    run, output = folder / "run", folder / "result.pt"
    started = time.monotonic()
    whole = start(server, case, folder / "whole", folder / "whole.pt")
    whole.join()
    duration = time.monotonic() - started
    assert whole.exitcode == 0
    for _ in range(kills):
        process = start(server, case, run, output)
        process.join(duration * chance.uniform(0.05, 0.9))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)

    last = start(server, case, run, output)
    last.join()

    assert last.exitcode == 0
    expected = torch.load(folder / "whole.pt", weights_only=True)
    assert_same(torch.load(output, weights_only=True), expected)
    assert pieces(run).keys() == pieces(folder / "whole").keys()
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]  # no drafts
    before = pieces(run)
    q = quantized(case, run)
    assert_same(result(q), expected)
    assert pieces(run) == before


@pytest.mark.parametrize(
    "case", [slow("budget"), slow("fixed bits"), slow("blocks and biases"), slow("budget, parallel")]
)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    server: ForkServerContext, tmp_path: Path, case: str
) -> None:
    survives_kills(server, tmp_path, case, kills=3, seed=0)


@pytest.mark.slow
def test_a_killed_run_with_workers_ends_as_if_it_had_not_been(server: ForkServerContext, tmp_path: Path) -> None:
    survives_kills(server, tmp_path, "workers", kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("case", [*CASES])
def test_many_kills_do_not_change_the_result(server: ForkServerContext, tmp_path: Path, case: str, seed: int) -> None:
    survives_kills(server, tmp_path, case, kills=6, seed=seed)


class _KilledError(BaseException):
    """Not an Exception, so that nothing in between catches it."""


@pytest.mark.parametrize(
    ("case", "after"),
    [
        ("fixed bits", False),
        slow("budget, parallel", True),
        slow("fixed bits", True),
        slow("budget, parallel", False),
    ],
)
def test_a_run_may_end_before_or_after_any_of_its_files_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, after: bool
) -> None:
    expected = result(quantized(case, None))
    replace_file: Callable[[Any, Any], None] = os.replace
    left = 0

    def ending(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise _KilledError
        replace_file(source, target)
        if left == 0:
            raise _KilledError

    deaths = 0
    step = 1 if case == "fixed bits" else 5
    while True:  # each life writes a few files more
        left = step + deaths % 2 + (not after)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", ending)
            try:
                found = quantized(case, tmp_path / "run")
                break
            except _KilledError:
                deaths += 1

    assert deaths >= 3
    assert_same(result(found), expected)


def test_a_finished_run_is_not_fitted_or_priced_again(tmp_path: Path) -> None:
    shown: list[str] = []
    quantized("budget", tmp_path)
    before = pieces(tmp_path)

    calque.quantize(
        network(), INPUTS, run=tmp_path, progress=lambda phase, done, total: shown.append(phase), **CASES["budget"]
    )

    assert pieces(tmp_path) == before
    assert shown == []


@pytest.mark.parametrize("case", [slow(case) if case == "workers" else case for case in CASES])
def test_a_finished_run_returns_its_result(tmp_path: Path, case: str) -> None:
    first = quantized(case, tmp_path)

    again = quantized(case, tmp_path)

    assert_same(result(again), result(first))
    assert again.report.to_json() == first.report.to_json()  # the seconds, too
    x = INPUTS[:5]
    assert torch.equal(again(x), first(x))


def test_each_budget_has_its_own_result(tmp_path: Path) -> None:
    other = {**CASES["budget"], "budget": calque.Budget(bops=0.03)}
    plans = []
    for _ in range(2):
        plans.append(quantized("budget", tmp_path).plan)
        plans.append(calque.quantize(network(), INPUTS, run=tmp_path, **other).plan)

    assert plans[0] == plans[2] != plans[1] == plans[3]


def test_a_damaged_result_is_assembled_again_from_its_pieces(tmp_path: Path) -> None:
    first = quantized("budget", tmp_path)
    for path in tmp_path.glob("result*"):
        path.write_bytes(b"half")

    assert_same(result(quantized("budget", tmp_path)), result(first))


def test_pieces_that_are_missing_or_damaged_are_made_again_and_no_others(tmp_path: Path) -> None:
    expected = result(quantized("budget", tmp_path))
    before = pieces(tmp_path)
    gone, damaged = sorted(name for name in before if name.startswith("fits-"))[:2]
    for kept in tmp_path.glob("result*"):  # which would be returned as it is
        kept.unlink()
    (tmp_path / gone).unlink()
    (tmp_path / damaged).write_bytes(b"half")

    again = result(quantized("budget", tmp_path))

    assert_same(again, expected)
    after = pieces(tmp_path)
    remade = {name for name in after if after[name] != before[name] and "result" not in name}
    assert remade == {gone, damaged}


def test_another_budget_goes_on_from_the_same_prices(tmp_path: Path) -> None:
    quantized("budget", tmp_path)
    before = pieces(tmp_path)

    other = {**CASES["budget"], "budget": calque.Budget(bops=0.03)}
    again = calque.quantize(network(), INPUTS, run=tmp_path, **other)

    assert_same(result(again), result(calque.quantize(network(), INPUTS, **other)))
    assert {name: pieces(tmp_path)[name] for name in before} == before


class _Loss:
    """A loss that is an object: its repr has an address."""

    def __call__(self, reference: object, output: object) -> Tensor:
        assert isinstance(reference, Tensor)
        assert isinstance(output, Tensor)
        return (reference - output).square().mean()


def test_a_loss_that_is_an_object_is_recognized_again(tmp_path: Path) -> None:
    for _ in range(2):
        calque.quantize(network(), INPUTS, bits="w4a4", recipe="nearest", run=tmp_path, loss=_Loss())


def _other_stride() -> nn.Module:
    changed = networks.Residual()
    changed.down.stride = (1, 1)
    return networks.seeded(changed)


def _other_weights() -> nn.Module:
    return networks.seeded(networks.Residual(), seed=1)


STARTED: dict[str, Any] = {
    "model": network, "calibration": INPUTS, "bits": "w4a4", "recipe": replace(QUICK, fit=Nearest()),
}  # fmt: skip


def call(folder: Path, *, model: Callable[[], nn.Module], calibration: object, **options: Any) -> QuantizedModel:
    return calque.quantize(model(), calibration, run=folder, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    call(folder, **STARTED)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "light"}, "recipe"),
        ({"recipe": replace(QUICK, fit=AdaQuant(steps=21))}, "recipe"),
        ({"seed": 1}, "seed"),
        ({"model": _other_weights}, "weights"),
        ({"model": _other_stride}, "network"),
        ({"calibration": networks.images(48, seed=1)}, "calibration"),
        ({"calibration": INPUTS[:47]}, "calibration"),
        ({"bits": "w4a8"}, "bits"),
        ({"bits": CANDIDATES, "budget": BUDGET}, "bits"),
        ({"override": {"down": "w8a8"}}, "override"),
        ({"first_last": None}, "first_last"),
        ({"placement": "inputs"}, "placement"),
        ({"loss": "mse"}, "loss"),
        ({"dynamic": {"image": {2: torch.export.Dim.AUTO}}}, "dynamic"),
        ({"loss": _Loss()}, "loss"),
        ({"workers": 2}, "threads"),
        ({"seed": 1, "bits": "w4a8"}, "bits, seed"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name_and_left_as_it_is(
    tmp_path: Path, finished: Path, change: dict[str, Any], named: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    before = pieces(folder)

    with pytest.raises(SpecError, match=rf"was started with other settings \({named}\)"):
        call(folder, **{**STARTED, **change})

    assert pieces(folder) == before


def test_a_folder_that_refused_other_settings_takes_its_own(tmp_path: Path, finished: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(SpecError, match="was started with other settings"):
        call(folder, **{**STARTED, "seed": 1})

    assert_same(result(call(folder, **STARTED)), result(call(tmp_path / "other", **STARTED)))


def test_two_processes_in_one_folder_are_kept_apart(server: ForkServerContext, tmp_path: Path) -> None:
    first = start(server, "blocks and biases", tmp_path / "run", tmp_path / "result.pt")
    while not list((tmp_path / "run").rglob("*.safetensors")):
        time.sleep(0.01)
        assert first.exitcode is None
    os.kill(first.pid or 0, signal.SIGSTOP)  # so that it cannot finish meanwhile

    with pytest.raises(SpecError, match="run is in use by another process"):
        quantized("blocks and biases", tmp_path / "run")

    first.kill()
    first.join()
    quantized("blocks and biases", tmp_path / "run")


def test_an_option_that_is_refused_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="loss is"):
        calque.quantize(network(), INPUTS, run=tmp_path, loss="hinge")  # type: ignore[arg-type]  # on purpose

    assert not list(tmp_path.iterdir())
