"""Bad input of every kind: one error that names it, and nothing left behind. A part of the campaign, and what it found."""

import contextlib
import io
import itertools
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import calque
from calque.calibration.samples import MOST_BATCHES, batches_of, unusual
from calque.cli.readers import load_calibration
from calque.errors import CalibrationError, CalqueError
from calque.grid.bits import Bits, Plan
from campaign.bad_calls import calls
from campaign.bad_commands import commands
from campaign.bad_files import claimed, images, npz
from campaign.disk import file_limit
from campaign.inputs import judge_call, judge_command, world

CHOSEN = 40  # of each table, by a fixed seed; the campaign tries all
SLOW = (
    "latency_table",
    "verify",
    "latency ",
    "demo",
)  # which run whole networks


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    tmp_path_factory.getbasetemp()  # now: while these last, the temporary folder is another one
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with world() as folder:
            yield folder


@pytest.mark.filterwarnings("ignore")
def test_bad_command_lines_end_with_one_line_that_names_what_is_wrong(ground: Path) -> None:
    cases = [case for case in commands(ground) if not case.given.startswith(SLOW)]
    assert len(cases) > 600

    wrong = {case.given: judge_command(case, ground) for case in random.Random(0).sample(cases, CHOSEN)}

    assert {name: problem for name, problem in wrong.items() if problem} == {}


@pytest.mark.filterwarnings("ignore")
def test_bad_arguments_of_the_api_raise_one_of_our_errors_that_names_them(ground: Path) -> None:
    cases = [case for case in calls(ground) if not case.given.startswith(SLOW)]
    assert len(cases) > 500

    wrong = {case.given: judge_call(case, ground) for case in random.Random(0).sample(cases, CHOSEN)}

    assert {name: problem for name, problem in wrong.items() if problem} == {}


def test_an_array_is_no_larger_than_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(claimed("(1000000000000,)"))
    (tmp_path / "b.npz").write_bytes(npz({"input.npy": claimed("(1000000000000,)")}))

    for name in ("a.npy", "b.npz"):
        with pytest.raises(CalqueError, match=rf"{name} does not hold .* claims the shape \(1000000000000,\)"):
            load_calibration(tmp_path / name)


def test_arrays_of_every_order_are_read_as_they_were_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "big.npy", array.astype(">f4"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(array))
    np.savez_compressed(tmp_path / "several.npz", x=array, y=array + 1)

    several = load_calibration(tmp_path / "several.npz")

    assert torch.equal(torch.as_tensor(load_calibration(tmp_path / "big.npy")), torch.from_numpy(array))
    assert torch.equal(torch.as_tensor(load_calibration(tmp_path / "columns.npy")), torch.from_numpy(array))
    assert isinstance(several, dict)
    assert torch.equal(several["x"] + 1, several["y"])


def test_what_has_no_length_is_taken_up_to_a_bound() -> None:
    few = list(batches_of(iter([images()] * 3)))

    assert len(few) == 3
    with pytest.raises(CalibrationError, match=r"came to no end: .*islice"):
        list(batches_of(itertools.repeat(torch.zeros(1))))
    with pytest.raises(CalibrationError, match="8 GB are taken"):
        list(batches_of(itertools.repeat(torch.zeros(1).expand(10**9))))
    assert sum(1 for _ in batches_of([torch.zeros(1)] * (MOST_BATCHES + 1))) == MOST_BATCHES + 1  # a list has an end


def test_tensors_that_nothing_computes_with_are_told_apart() -> None:
    assert unusual(torch.zeros(2)) == unusual(torch.zeros(2, dtype=torch.int16)) == ""
    assert unusual(torch.zeros(2).to_sparse()) == "sparse (sparse_coo)"
    assert "meta" in unusual(torch.zeros(2, device="meta"))
    assert unusual(torch.zeros(2, dtype=torch.complex64)) == "of dtype complex64"
    assert unusual(torch.zeros(2).to(torch.float8_e4m3fn)) == "of dtype float8_e4m3fn"


def test_a_write_that_does_not_fit_names_the_path_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    Plan({"a": Bits(8, 8)}).save(path)
    before = path.read_bytes()

    with file_limit(100), pytest.raises(OSError, match=r"plan\.toml"):
        Plan({f"layer{index}": Bits(4, 4) for index in range(100)}).save(path)

    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.toml"]


def test_a_plan_is_names_and_bits() -> None:
    with pytest.raises(calque.errors.SpecError, match=r"a plan is a dict of names and Bits\. Got 'a': 'w8a8'"):
        Plan({"a": "w8a8"})  # type: ignore[dict-item]
