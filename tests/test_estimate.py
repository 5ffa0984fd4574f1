"""The forecast of a run: never shorter for more work, and disk where the memory is small."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import networks
from calque.estimate import estimate
from calque.graph import Network, capture
from calque.job import Job
from calque.parallel import Choices
from calque.recipe import ADVANCED, RECIPES, Recipe
from calque.spec import Bits

PASS = 0.01  # seconds of the float network for one input


@pytest.fixture(scope="module")
def network() -> Network:
    return capture(networks.seeded(networks.Residual()), {"image": networks.images(4, seed=0)}, {})


def forecast(
    network: Network,
    *,
    recipe: Recipe = ADVANCED,
    inputs: int = 100,
    candidates: int = 3,
    memory: int = 10**9,
    workers: int | None = None,
    search: bool = True,
) -> tuple[float, float]:
    """Seconds and gigabytes of disk, out of the sentence."""
    batches = [{"image": networks.images(1, seed=0).expand(inputs, 1, networks.SIDE, networks.SIDE)}]
    job = Job(network, batches, recipe, memory=memory, workers=workers)  # type: ignore[arg-type]  # of tensors
    choices: Choices = dict.fromkeys(network.layers, tuple(Bits(8 - index, 8) for index in range(candidates)))
    text = estimate(job, choices, PASS * inputs, search=search)
    match = re.fullmatch(
        rf"about (\d+) (minutes|seconds) for {inputs} inputs, up to ([\d.]+) GB of disk beside ([\d.]+) GB of memory",
        text,
    )
    assert match is not None, text
    assert float(match[4]) == round(memory / 1e9, 1)
    return int(match[1]) * (60 if match[2] == "minutes" else 1), float(match[3])


@given(
    name=st.sampled_from(sorted(RECIPES)), inputs=st.sampled_from([1, 20, 49, 50, 300, 2000]),
    more=st.integers(1, 1000), search=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_more_images_never_take_less_time(network: Network, name: str, inputs: int, more: int, search: bool) -> None:
    less, longer = (
        forecast(network, recipe=RECIPES[name], inputs=n, search=search)[0] for n in (inputs, inputs + more)
    )

    assert longer >= less - 60 * (less >= 120)  # minutes are rounded


WORK: dict[str, Callable[[Recipe, int], Recipe]] = {
    "steps": lambda recipe, n: replace(recipe, steps=4000 * n),
    "search_steps": lambda recipe, n: replace(recipe, search_steps=4000 * n),
    "finalists": lambda recipe, n: replace(recipe, finalists=3 * n),
    "tuning": lambda recipe, n: replace(recipe, tuning=replace(recipe.tuning, steps=400 * n)),
    "priced_inputs": lambda recipe, n: replace(recipe, priced_inputs=30 * n),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("field", WORK)
def test_more_work_takes_longer(network: Network, name: str, field: str) -> None:
    seconds = [forecast(network, recipe=WORK[field](RECIPES[name], n), inputs=1000)[0] for n in (1, 4, 16)]

    assert seconds == sorted(seconds)
    assert seconds[2] > seconds[0]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_more_candidates_take_longer_and_more_workers_do_not(network: Network, name: str) -> None:
    recipe = replace(RECIPES[name], search_steps=20_000)

    by_candidates = [forecast(network, recipe=recipe, candidates=n)[0] for n in (1, 3, 7)]
    by_workers = [forecast(network, recipe=recipe, workers=n)[0] for n in (None, 1, 4)]

    assert by_candidates[0] < by_candidates[1] < by_candidates[2]
    assert by_workers[0] == by_workers[1] > by_workers[2]


def test_a_budget_takes_longer_than_fixed_bits(network: Network) -> None:
    assert forecast(network, search=True)[0] > forecast(network, search=False)[0]


def test_disk_appears_when_the_memory_is_small(network: Network) -> None:
    # the residual add has three tensors of 512 floats alive: 6,144 bytes an input, in the float and the quantized network
    inputs = 10**5
    alive = 2 * 6144 * inputs

    disk = {
        memory: forecast(network, inputs=inputs, memory=memory, search=False)[1] for memory in (10**8, alive, 10**10)
    }

    assert disk == {10**8: round((alive - 10**8) / 1e9, 1), alive: 0.0, 10**10: 0.0}
