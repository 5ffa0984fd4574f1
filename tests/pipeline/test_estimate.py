"""The forecast of a run: never shorter for more work, and disk where the memory is small."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calque
import networks
from calque.calibration.job import Job
from calque.fitting.parallel import Choices
from calque.grid.bits import Bits
from calque.network import Network, capture
from calque.pipeline.effort import Effort, Speed
from calque.pipeline.estimate import Forecast, forecast
from calque.recipe import (
    ADVANCED,
    RECIPES,
    AdaQuant,
    Blocks,
    ClosedForm,
    Distillation,
    Recipe,
    Search,
    Sequential,
    Tuning,
)
from calque.run.progress import Phase
from recipes import shortened

PASS = 0.01  # seconds of the float network for one input
SPEED = Speed(call=3e-6, value=1e-10, fresh=3e-10, product=2e-11)


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(networks.seeded(networks.Residual()), {"image": networks.images(4, seed=0)}, {})


def foreseen(
    network: Network,
    *,
    recipe: Recipe = ADVANCED,
    inputs: int = 100,
    candidates: int = 3,
    memory: int = 10**9,
    workers: int | None = None,
    search: bool = True,
    speed: Speed = SPEED,
    spent: float = 0.0,
) -> Forecast:
    batches = [{"image": networks.images(1, seed=0).expand(inputs, 1, networks.SIDE, networks.SIDE)}]
    job = Job(network, batches, memory=memory, workers=workers)  # type: ignore[arg-type]  # of tensors
    choices: Choices = dict.fromkeys(network.layers, tuple(Bits(8 - index, 8) for index in range(candidates)))
    return forecast(job, choices, recipe, PASS * inputs, search=search, spent=spent, speed=speed)


@given(
    name=st.sampled_from(sorted(RECIPES)), inputs=st.sampled_from([1, 20, 49, 50, 300, 2000]),
    more=st.integers(1, 1000), search=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_more_images_never_take_less_time(network: Network, name: str, inputs: int, more: int, search: bool) -> None:
    less, longer = (
        foreseen(network, recipe=RECIPES[name], inputs=n, search=search).seconds for n in (inputs, inputs + more)
    )

    assert longer >= less


WORK: dict[str, Callable[[Recipe, int], Recipe]] = {
    "steps": lambda recipe, n: replace(recipe, fit=AdaQuant(4000 * n)),
    "whole inputs": lambda recipe, n: replace(recipe, flavour=Sequential(), fit=AdaQuant(4000 * n, patches="all")),
    "rounds": lambda recipe, n: replace(recipe, fit=ClosedForm(4000 * n)),
    "blocks": lambda recipe, n: replace(recipe, flavour=Sequential(), blocks=Blocks(400 * n)),
    "search's steps": lambda recipe, n: replace(recipe, search=replace(recipe.search, fit=AdaQuant(4000 * n))),
    "finalists": lambda recipe, n: replace(recipe, search=replace(recipe.search, finalists=3 * n)),
    "distillation": lambda recipe, n: replace(recipe, distillation=Distillation(minutes=n)),
    "tuning": lambda recipe, n: replace(recipe, tuning=Tuning(steps=400 * n)),
    "priced_inputs": lambda recipe, n: replace(recipe, search=replace(recipe.search, priced_inputs=30 * n)),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("field", WORK)
def test_more_work_takes_longer(network: Network, name: str, field: str) -> None:
    seconds = [foreseen(network, recipe=WORK[field](RECIPES[name], n), inputs=1000).seconds for n in (1, 4, 16)]

    assert seconds == sorted(seconds)
    assert seconds[2] > seconds[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_more_candidates_take_longer_and_more_workers_do_not(network: Network, name: str) -> None:
    recipe = replace(RECIPES[name], search=Search(AdaQuant(20_000)))

    by_candidates = [foreseen(network, recipe=recipe, candidates=n).seconds for n in (1, 3, 7)]
    by_workers = [foreseen(network, recipe=recipe, workers=n).seconds for n in (None, 1, 4)]

    assert by_candidates[0] < by_candidates[1] < by_candidates[2]
    assert by_workers[0] == by_workers[1] > by_workers[2]


def test_a_budget_takes_longer_than_fixed_bits(network: Network) -> None:
    assert foreseen(network, search=True).seconds > foreseen(network, search=False).seconds


def test_disk_appears_when_the_memory_is_small(network: Network) -> None:
    # the residual add has three tensors of 512 floats alive: 6,144 bytes an input, in the float and the quantized network
    inputs = 10**5
    alive = 2 * 6144 * inputs

    disk = {
        memory: foreseen(network, inputs=inputs, memory=memory, search=False).disk for memory in (10**8, alive, 10**10)
    }

    assert disk == {10**8: alive - 10**8, alive: 0, 10**10: 0}


def test_the_sentence_has_the_whole_call_and_only_the_disk_that_is_needed() -> None:
    phases = (Phase("fit", (20.0, 15.0)), Phase("statistics", (5.0,)))
    small = Forecast(8.0, phases, 256, 2 * 10**9, 0, False)

    assert str(small) == "about 48 seconds for 256 inputs"
    assert str(replace(small, spent=320.0, resumed=True)) == "about 6 minutes for 256 inputs, less what is finished"
    assert str(replace(small, disk=3 * 10**9)).endswith(", up to 3.0 GB of disk beside 2.0 GB of memory")


def test_what_was_spent_is_a_part_of_the_whole(network: Network) -> None:
    assert foreseen(network, spent=7.0).seconds == pytest.approx(foreseen(network).seconds + 7.0)


@pytest.mark.parametrize("part", ["call", "value", "product"])
def test_a_slower_machine_takes_longer(network: Network, part: str) -> None:
    slower = replace(SPEED, **{part: 100 * getattr(SPEED, part)})

    assert foreseen(network, speed=slower).seconds > 1.02 * foreseen(network).seconds


def test_the_speed_of_this_machine_is_measured() -> None:
    speed = Speed.measured(torch.device("cpu"))

    work = Effort(calls=10, values=100, fresh=100, products=1000)
    assert 0 < speed.seconds(work) < 0.1
    assert speed.seconds(work * 3) == pytest.approx(3 * speed.seconds(work))


@pytest.mark.parametrize(
    ("name", "search"), [("nearest", False), ("accurate", False), ("fast", True), ("advanced", True)]
)
def test_every_phase_that_a_run_tells_of_is_foreseen(name: str, search: bool) -> None:
    told: list[str] = []
    recipe = shortened(RECIPES[name], steps=2)
    options: dict[str, Any] = {"bits": "w4a4"}
    if search:
        options = {"bits": ("w8a8", "w4a4", "w2a4"), "budget": calque.Budget(size=0.85)}
    network = capture(networks.seeded(networks.Residual()), {"image": networks.images(4, seed=0)}, {})
    calque.quantize(
        networks.seeded(networks.Residual()), networks.images(40, seed=0), recipe=recipe,
        progress=lambda phase, done, total: told.append(phase), **options,
    )  # fmt: skip

    expected = {phase.name for phase in foreseen(network, recipe=recipe, search=search).phases}

    assert set(told) == expected
