"""A run whose pieces were lost, damaged or exchanged ends as the undisturbed one; the campaign tries more of it."""

import shutil
from pathlib import Path

import pytest

from campaign.pieces import CASES, DAMAGES, differences, killed, quantized, trials
from slow import slow


@pytest.mark.parametrize(("case", "after"), [("sequential", 3), slow("budget", 5)])
def test_a_run_that_was_killed_and_damaged_ends_as_if_it_had_not_been(tmp_path: Path, case: str, after: int) -> None:
    found = list(trials(case, tmp_path, after=after, damages=("removed", "flipped at 98%")))

    assert len(found) >= 4
    assert [trial for trial in found if trial.wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES])
def test_any_damage_to_any_piece_does_not_change_the_result(tmp_path: Path, case: str) -> None:
    assert [trial for trial in trials(case, tmp_path, damages=tuple(DAMAGES)) if trial.wrong] == []


def test_a_layer_that_another_network_in_front_was_fitted_to_is_fitted_again(tmp_path: Path) -> None:
    killed("sequential", tmp_path / "run", 0)
    expected = quantized("sequential", None)
    (network,) = (tmp_path / "run").glob("network-*")
    before = {path.name: path.read_bytes() for path in network.iterdir()}
    first, second, *_ = sorted(network.glob("layer_*"))
    shutil.copy(second, first)  # whole, of the same run, but of another layer

    assert differences(quantized("sequential", tmp_path / "run"), expected) == []

    assert {path.name: path.read_bytes() for path in network.iterdir()} == before
