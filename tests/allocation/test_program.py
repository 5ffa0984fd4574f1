"""The integer program against brute force, at its edges, and in time."""

import ctypes
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from calque.allocation import Allocation, Constraint, Costs, allocate
from calque.allocation.highs import own_output
from calque.errors import InfeasibleBudgetError, SpecError

SEED = 11
BITS = [(weight, activation) for weight in range(2, 9) for activation in range(2, 9)]


def cost_of(costs: Costs, choice: Sequence[int]) -> int:
    return sum(layer[chosen] for layer, chosen in zip(costs, choice, strict=True))


def brute_force(
    objective: Costs, constraints: Sequence[Constraint], forbidden: Sequence[tuple[int, ...]], distance: int
) -> int | None:
    """The least objective over every choice there is; None where nothing is feasible."""
    feasible = [
        cost_of(objective, choice)
        for choice in itertools.product(*(range(len(layer)) for layer in objective))
        if all(cost_of(row.costs, choice) <= row.limit for row in constraints)
        and all(sum(map(int.__ne__, choice, earlier)) >= distance for earlier in forbidden)
    ]
    return min(feasible, default=None)


def random_costs(generator: random.Random, widths: list[int], largest: int) -> list[list[int]]:
    return [[generator.randint(0, largest) for _ in range(width)] for width in widths]


def random_program(number: int) -> tuple[Costs, list[Constraint], list[tuple[int, ...]], int]:
    """Small numbers give ties, large ones strain the solver's tolerances; limits are near what can be kept."""
    generator = random.Random(SEED + number)
    widths = [generator.randint(1, 6) for _ in range(generator.randint(1, 6))]
    largest = generator.choice([3, 100, 10**9, 10**13])
    objective = random_costs(generator, widths, largest)
    constraints = []
    for name in ("size", "bops", "memory")[: generator.randint(1, 3)]:
        costs = random_costs(generator, widths, generator.choice([3, 100, 10**9, 10**13]))
        somewhere = cost_of(costs, [generator.randrange(width) for width in widths])
        constraints.append(Constraint(name, costs, somewhere + generator.choice([-1, 0, 0, 1])))
    forbidden = [tuple(map(generator.randrange, widths)) for _ in range(generator.choice([0, 0, 1, 3]))]
    return objective, constraints, forbidden, generator.randint(1, 2)


@pytest.mark.parametrize("number", range(200))
def test_the_answer_equals_brute_force(number: int) -> None:
    objective, constraints, forbidden, distance = random_program(number)
    expected = brute_force(objective, constraints, forbidden, distance)

    if expected is None:
        with pytest.raises(InfeasibleBudgetError):
            allocate(objective, constraints, forbidden=forbidden, distance=distance)
        return
    answer = allocate(objective, constraints, forbidden=forbidden, distance=distance)

    assert answer.objective == expected == cost_of(objective, answer.choice)
    assert all(cost_of(row.costs, answer.choice) <= row.limit for row in constraints)
    assert all(sum(map(int.__ne__, answer.choice, earlier)) >= distance for earlier in forbidden)


@pytest.mark.parametrize("number", range(200))
def test_the_smallest_feasible_limit_is_feasible_and_one_less_is_not(number: int) -> None:
    objective, constraints, *_ = random_program(number)
    least = min(cost_of(constraints[0].costs, choice) for choice in itertools.product(*map(range, map(len, objective))))
    alone = Constraint("size", constraints[0].costs, least)

    assert cost_of(alone.costs, allocate(objective, [alone]).choice) == least
    with pytest.raises(InfeasibleBudgetError, match=f"smallest feasible is {least:,} with"):
        allocate(objective, [Constraint("size", alone.costs, least - 1)])


def test_an_allocation_is_as_worked_by_hand() -> None:
    # 8 + 2 = 10 keeps the limit for (7, 0) and (0, 9); 4 + 4 for 1 + 2 = 3, the least
    assert allocate([[9, 1, 0], [7, 2, 0]], [Constraint("size", [[2, 4, 8], [2, 4, 8]], 10)]) == Allocation((1, 1), 3)


def test_without_constraints_each_layer_takes_its_best() -> None:
    assert allocate([[3, 1], [2], [5, 5, 4]], []) == Allocation((1, 0, 2), 7)


def test_no_layers_cost_nothing() -> None:
    assert allocate([], []) == Allocation((), 0)


def test_a_violation_below_the_solvers_tolerance_is_not_accepted() -> None:
    # one unit too much is 1e-13 of the largest cost
    half = 5 * 10**12
    costs = [[0, half], [0, half + 1], [0, half]]

    answer = allocate([[10, 0], [11, 0], [10, 0]], [Constraint("size", costs, 2 * half)])

    assert answer == Allocation((1, 0, 1), 11)


def test_a_difference_of_one_in_1e13_is_seen_in_the_objective() -> None:
    large = 10**13

    assert allocate([[large, large - 1], [0, 1]], [Constraint("size", [[1, 1], [1, 1]], 2)]).objective == large - 1


def test_a_dominated_choice_is_used_where_the_better_one_is_forbidden() -> None:
    objective, size = [[0, 5], [0, 5]], Constraint("size", [[1, 9], [1, 9]], 20)

    second = allocate(objective, [size], forbidden=[(0, 0)])
    third = allocate(objective, [size], forbidden=[(0, 0), second.choice])
    opposite = allocate(objective, [size], forbidden=[(0, 0)], distance=2)

    assert {second.choice, third.choice} == {(0, 1), (1, 0)}
    assert opposite.choice == (1, 1)


def test_an_infeasible_budget_names_the_smallest_feasible_one() -> None:
    with pytest.raises(InfeasibleBudgetError) as raised:
        allocate([[0, 1], [0, 1]], [Constraint("size", [[80_000, 40_000], [45_000, 22_500]], 50_000)])

    assert str(raised.value) == (
        "size at most 50,000: the smallest feasible is 62,500 with these bits. Raise the budget or allow other bits."
    )


def test_each_of_two_constraints_is_named_with_its_smallest_value_given_the_other() -> None:
    size = Constraint("size", [[1, 4], [1, 4]], 2)  # the first choices, then bops is 18
    bops = Constraint("bops", [[9, 2], [9, 2]], 11)  # one second choice, then size is 5

    with pytest.raises(InfeasibleBudgetError, match=r"size at most 2: .* is 5 .*; bops at most 11: .* is 18 with"):
        allocate([[0, 0], [0, 0]], [size, bops])


def test_constraints_that_exclude_everything_are_priced_alone() -> None:
    size, bops = Constraint("size", [[5, 9]], 4), Constraint("bops", [[7, 6]], 3)

    with pytest.raises(InfeasibleBudgetError, match=r"taken alone, is 5 .* taken alone, is 6 with"):
        allocate([[0, 0]], [size, bops])


def test_constraints_of_one_name_are_one_maximum() -> None:
    # maxima of the sums: (0, 0) 9, (0, 1) 8, (1, 0) 7, (1, 1) 10
    first = Constraint("peak", [[9, 1], [0, 0]], 3)
    second = Constraint("peak", [[0, 4], [3, 6]], 3)
    third = Constraint("peak", [[8, 0], [0, 0]], 3)

    with pytest.raises(
        InfeasibleBudgetError, match=r"^peak at most 3: the smallest feasible is 7 with these bits\. Raise"
    ):
        allocate([[0, 0], [0, 0]], [first, second, third])


def test_an_exhausted_list_of_choices_says_so() -> None:
    with pytest.raises(InfeasibleBudgetError, match="differs enough from each of the 2 earlier ones"):
        allocate([[0, 1]], [], forbidden=[(0,), (1,)])


@pytest.mark.parametrize(
    ("constraints", "forbidden", "distance", "message"),
    [
        ([Constraint("size", [[1]], 3)], [], 1, "size must have one cost per layer and choice"),
        ([], [(0, 0)], 1, "one choice per layer"),
        ([], [(2,)], 1, "one choice per layer"),
        ([], [(0,)], 0, "distance must be an int >= 1. Got 0"),
    ],
)
def test_a_program_that_does_not_fit_together_is_refused(
    constraints: list[Constraint], forbidden: list[tuple[int, ...]], distance: int, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        allocate([[1, 2]], constraints, forbidden=forbidden, distance=distance)


def test_a_layer_without_choices_is_refused() -> None:
    with pytest.raises(SpecError, match="layer 1 has no choice"):
        allocate([[1], []], [])


def large_program(seed: int) -> tuple[Costs, Constraint, Constraint]:
    """200 layers of 49 choices: losses fall about 4 times per bit, with noise; sizes are proportional to bits."""
    generator = np.random.default_rng(seed)
    losses, sizes, operations = [], [], []
    for _ in range(200):
        codes, products = int(math.exp(generator.uniform(7.5, 14.5))), int(math.exp(generator.normal(17.7, 0.8)))
        noise = np.exp(generator.normal(0, 0.3, (2, len(BITS)))) * math.exp(generator.normal())
        losses.append([int(1e12 * (4.0**-w * noise[0, i] + 4.0**-a * noise[1, i])) for i, (w, a) in enumerate(BITS)])
        sizes.append([codes * w // 8 + 3000 for w, _ in BITS])
        operations.append([products * w * a for w, a in BITS])
    size = Constraint("size", sizes, sum(map(max, sizes)) * 45 // 100)
    return losses, size, Constraint("bops", operations, sum(map(max, operations)) * 30 // 100)


# Seconds of the processor, which others beside the test do not lengthen: medians are near 0.15 and 0.6.
@pytest.mark.parametrize(("count", "seconds"), [(1, 5), (2, 30)])
def test_200_layers_of_49_choices_are_solved_quickly(count: int, seconds: float) -> None:
    losses, *constraints = large_program(0)
    started = time.process_time()

    answer = allocate(losses, constraints[:count])

    assert time.process_time() - started < seconds
    assert all(cost_of(row.costs, answer.choice) <= row.limit for row in constraints[:count])


@pytest.mark.skipif(os.name != "posix", reason="C's buffer is flushed by the C library of a POSIX system")
def test_the_solver_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with own_output():  # other tests may have left threads
        for seed in range(4):  # HiGHS 1.12 prints a line on many programs of this kind
            losses, size, _ = large_program(seed)
            allocate(losses, [size])

    ctypes.CDLL(None).fflush(None)  # else the line would come after the test
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="file descriptors of a POSIX system")
def test_the_solver_leaves_standard_output_alone_where_other_threads_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    redirected: list[int] = []
    dup2 = os.dup2

    def noted(source: int, target: int) -> int:
        redirected.append(target)
        return dup2(source, target)

    monkeypatch.setattr(os, "dup2", noted)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        losses, size, _ = large_program(0)
        allocate(losses, [size])
        alone = list(redirected)
        with own_output():  # as the command line
            allocate(losses, [size])
    finally:
        done.set()
        other.join()

    assert (alone, redirected) == ([], [1, 1])
