"""Prices and what is solved from them, against brute force and sums by hand."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calque.allocation.budget import Budget, nanoseconds
from calque.allocation.plans import Solution, pareto, priced, solve
from calque.errors import InfeasibleBudgetError, SpecError
from calque.quantized.prices import Prices

BITS = ("w8a8", "w4a4", "w2a4")
PRICES = Prices(
    loss="kl",
    base="w8a8",
    base_loss=0.01,
    groups=(("conv1",), ("conv2", "conv3"), ("linear",)),
    choices=(BITS, BITS, ("w8a8", "w2a4")),
    increases=((0.0, 0.1, 0.5), (-0.001, 0.05, 0.4), (0.0, 0.9)),
    costs={
        "size": ((80, 40, 20), (160, 80, 40), (400, 100)),
        "bops": ((6400, 1600, 800), (6400, 1600, 800), (640, 80)),
    },
    fixed={"size": 10, "bops": 0},
    floats={"size": 2600, "bops": 300_000, "activation_memory": 4000},
    steps=(
        (100, {0: (80, 40, 40)}),
        (0, {1: (200, 100, 100), 2: (8, 4)}),
        (0, {1: (200, 100, 100), 2: (8, 4)}),
        (5, {}),
    ),
)
TABLE = {(layer, bits): 0.1 * int(bits[1]) for group in PRICES.groups for layer in group for bits in BITS}


def every_plan(prices: Prices, table: dict[tuple[str, str], float] | None = None) -> list[Solution]:
    """Each choice of finite price with its costs, by loops over Python's integers."""
    found = []
    for choice in itertools.product(*map(range, map(len, prices.choices))):
        increases = [row[index] for row, index in zip(prices.increases, choice, strict=True)]
        if not all(map(math.isfinite, increases)):
            continue
        plan = {layer: prices.choices[g][c] for g, c in enumerate(choice) for layer in prices.groups[g]}
        costs = {
            name: prices.fixed[name] + sum(rows[g][c] for g, c in enumerate(choice))
            for name, rows in prices.costs.items()
        }
        if prices.steps:
            costs["activation_memory"] = max(
                fixed + sum(row[choice[group]] for group, row in rows.items()) for fixed, rows in prices.steps
            )
        if table is not None:
            costs["latency"] = sum(nanoseconds(table[key]) for key in plan.items())
        found.append(Solution(plan, math.fsum(max(0.0, value) for value in increases), costs))
    return found


def within(solution: Solution, limits: dict[str, int]) -> bool:
    return all(solution.costs[name] <= limit for name, limit in limits.items())


@st.composite
def random_prices(draw: st.DrawFn) -> Prices:
    groups = draw(st.integers(1, 4))
    widths = [draw(st.integers(1, 3)) for _ in range(groups)]

    def table(values: st.SearchStrategy[Any]) -> Any:
        return tuple(tuple(draw(values) for _ in range(width)) for width in widths)

    price = st.floats(-0.01, 10) | st.sampled_from([0.0, 1e-9, 0.25])
    step = st.integers(0, 300)
    return Prices(
        "mse", "w8a8", 0.0, tuple((f"layer{g}",) for g in range(groups)), tuple(BITS[:width] for width in widths),
        table(price), {"size": table(st.integers(1, 500)), "bops": table(st.integers(1, 10**12))},
        {"size": draw(st.integers(0, 100)), "bops": 0}, {"size": 3000, "bops": 10**13, "activation_memory": 2000},
        tuple((draw(step), {g: tuple(draw(step) for _ in range(widths[g])) for g in range(groups)}) for _ in range(3)),
    )  # fmt: skip


@settings(deadline=None)
@given(random_prices(), st.integers(1, 2000), st.integers(1, 10**13), st.integers(1, 1500))
def test_the_plan_equals_brute_force(prices: Prices, size: int, bops: int, memory: int) -> None:
    budget = Budget(size=size, bops=bops, activation_memory=memory)
    feasible = [plan for plan in every_plan(prices) if within(plan, budget.limits(prices.floats))]

    if not feasible:
        with pytest.raises(InfeasibleBudgetError):
            solve(prices, budget)
        return
    (answer,) = solve(prices, budget)

    assert answer in feasible
    # prices are rounded up to units of 2^-40 of the largest, one rounding per group
    unit = max(0.0, *itertools.chain(*prices.increases)) * 2.0**-40
    assert answer.increase <= min(plan.increase for plan in feasible) + len(prices.groups) * unit


@settings(deadline=None, max_examples=50)
@given(random_prices(), st.floats(0, 20), st.sampled_from(["size", "bops"]))
def test_the_dual_form_equals_brute_force(prices: Prices, loss: float, name: Any) -> None:
    # all choices are feasible whose prices, rounded up, stay within the limit
    unit = max(0.0, *itertools.chain(*prices.increases)) * 2.0**-40
    plans = every_plan(prices)
    surely = [plan.costs[name] for plan in plans if plan.increase <= loss - len(prices.groups) * unit]
    possibly = [plan.costs[name] for plan in plans if plan.increase <= loss]

    (result,) = pareto(prices, [Budget(loss=loss, minimize=name)])

    if isinstance(result, InfeasibleBudgetError):
        assert not surely
    else:
        assert result.increase <= loss
        assert min(possibly) <= result.costs[name] <= min(surely, default=result.costs[name])


@settings(deadline=None, max_examples=50)
@given(random_prices(), st.integers(1, 2000), st.integers(0, 500))
def test_a_bigger_budget_is_never_worse(prices: Prices, size: int, more: int) -> None:
    small, large = pareto(prices, [Budget(size=size), Budget(size=size + more)])

    if isinstance(small, Solution):
        assert isinstance(large, Solution)
        unit = max(0.0, *itertools.chain(*prices.increases)) * 2.0**-40
        assert large.increase <= small.increase + len(prices.groups) * unit


@given(random_prices())
def test_prices_survive_json(prices: Prices) -> None:
    assert Prices.from_json(prices.to_json()) == prices


def test_prices_that_are_not_finite_survive_json() -> None:
    prices = replace(
        PRICES, base_loss=math.inf, increases=((0.0, math.inf, -math.inf), (0.0, 1.0, math.nan), (0.0, 1e-300))
    )

    restored = Prices.from_json(prices.to_json())

    assert repr(restored) == repr(prices)
    assert "NaN" not in prices.to_json()  # which is not JSON


def test_costs_of_a_plan_are_as_added_by_hand() -> None:
    (answer,) = solve(PRICES, Budget(size=0.21, latency=(TABLE, 9.0)))  # 546 bytes

    assert answer == Solution(
        {"conv1": "w4a4", "conv2": "w4a4", "conv3": "w4a4", "linear": "w8a8"},
        0.15000000000000002,  # 0.1 + 0.05
        {
            "size": 10 + 40 + 80 + 400,
            "bops": 1600 + 1600 + 640,
            "activation_memory": 100 + 40,  # 140, 100 + 8, 5
            "latency": 400_000 + 2 * 400_000 + 800_000,  # of each layer of a group
        },
    )


def test_a_negative_price_counts_as_none() -> None:
    (answer,) = solve(PRICES, Budget(size=1.0))

    assert answer.increase == 0.0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_choice_without_a_finite_price_is_forbidden(broken: float) -> None:
    prices = replace(PRICES, increases=((0.0, broken, 0.5), *PRICES.increases[1:]))

    plans = solve(prices, Budget(size=1.0), count=99)

    assert len(plans) == 2 * 3 * 2
    assert all(solution.plan["conv1"] != "w4a4" for solution in plans)


def test_a_layer_without_any_finite_price_is_named() -> None:
    with pytest.raises(SpecError, match="layer linear: no choice has a finite price"):
        solve(replace(PRICES, increases=(*PRICES.increases[:2], (math.nan, math.inf))), Budget(size=1.0))


def test_several_plans_come_best_first_and_differ() -> None:
    budget = Budget(size=600)
    plans = solve(PRICES, budget, count=5)
    expected = sorted(plan.increase for plan in every_plan(PRICES) if plan.costs["size"] <= 600)

    assert [plan.increase for plan in plans] == pytest.approx(expected[:5], abs=1e-11)  # units of 2^-40
    assert len({tuple(plan.plan.items()) for plan in plans}) == 5


def test_distance_is_counted_in_groups() -> None:
    first, second = solve(PRICES, Budget(size=1.0), count=2, distance=3)

    assert all(first.plan[layer] != second.plan[layer] for layer in first.plan)


def test_there_are_no_more_plans_than_there_are() -> None:
    assert len(solve(PRICES, Budget(size=1.0), count=99)) == 3 * 3 * 2


def test_the_least_latency_within_a_loss_is_found() -> None:
    (answer,) = solve(PRICES, Budget(latency=(TABLE, math.inf), loss=0.2, minimize="latency"))

    # linear may not go to 2 bits (0.9); of conv1 and the pair both to 4 bits is 0.15, the pair at 2 bits is too dear
    assert answer.costs["latency"] == 3 * 400_000 + 800_000


def test_a_peak_of_memory_is_kept_at_every_step() -> None:
    (answer,) = solve(PRICES, Budget(activation_memory=150))

    assert answer.costs["activation_memory"] == 140
    assert answer.plan["linear"] == "w8a8"  # 100 + 8 at the second step


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(size=0.05),
            r"file size at most 130 bytes \(0.05 of float32\): the smallest feasible is 170 bytes \(0.0653847 of float32\)",
        ),
        (
            Budget(activation_memory=103),
            r"activation memory at most 103 .* is 140 \(0.035 of float32\) with these bits",
        ),
        (Budget(latency=(TABLE, 0.5)), "latency at most 0.5 ms: the smallest feasible is 0.8 ms"),
        (
            Budget(size=200, loss=0.5, minimize="bops"),
            r"size at most 200 .* is 530 .*; loss increase at most 0.5: .* is 1.40001 ",
        ),
    ],
)
def test_an_infeasible_budget_names_the_smallest_in_the_users_units(budget: Budget, message: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=message):
        solve(PRICES, budget)


def test_a_sweep_marks_what_is_infeasible() -> None:
    results = pareto(PRICES, [Budget(size=0.05), Budget(size=0.3)])

    assert isinstance(results[0], InfeasibleBudgetError)
    assert results[1] == solve(PRICES, Budget(size=0.3))[0]


def test_a_gap_in_the_latency_table_is_named() -> None:
    table = {key: value for key, value in TABLE.items() if key != ("conv3", "w4a4")}

    with pytest.raises(SpecError, match="layer conv3: the latency table has no entry for w4a4"):
        solve(PRICES, Budget(latency=(table, 1.0)))


def test_a_quantity_that_was_not_measured_is_named() -> None:
    without_steps = replace(PRICES, steps=())

    with pytest.raises(SpecError, match=r"the prices have no activation_memory\. They have size, bops"):
        solve(without_steps, Budget(activation_memory=100))


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_count_below_one_is_refused(count: Any) -> None:
    with pytest.raises(SpecError, match="count must be an int from 1 to 1,000"):
        solve(PRICES, Budget(size=1.0), count=count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (("conv1",), (), ("linear",))}, "a group has at least one layer"),
        ({"groups": (("conv1",), ("conv1",), ("linear",))}, "a layer is in one group only"),
        ({"choices": (BITS, BITS)}, "every group has choices"),
        ({"choices": (BITS, BITS, ("w8a8", "w8a8"))}, "choices differ"),
        ({"choices": (BITS, BITS, ("w8a8", "w02a4"))}, "short form"),
        ({"choices": (BITS, BITS, ("w8a8", "8"))}, "bits are written"),
        ({"increases": ((0.0,), (0.0,), (0.0,))}, "increases has one number"),
        ({"costs": {"weight": ((1, 1, 1),) * 3}}, "costs are size and bops"),
        ({"costs": {"size": ((1, 1, 1), (1, 1, 1), (1, 1, 1))}}, "size has one cost"),
        ({"costs": {"size": ((1, 1, 1), (1, 1, 1), (1, -1))}}, "size is in whole numbers"),
        ({"fixed": {"size": 10}}, "fixed has a whole number >= 0 for bops"),
        ({"floats": {"size": 1.5}}, "floats are whole numbers"),
        ({"steps": ((-1, {}),)}, "step 0 has fixed bytes"),
        ({"steps": ((0, {3: (1, 1)}),)}, "step 0 names groups by their index"),
        ({"steps": ((0, {2: (1,)}),)}, "bytes for every choice of group 2"),
        ({"steps": ((0, {2: (1, -1)}),)}, "step 0 has whole bytes"),
    ],
)
def test_prices_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(PRICES, **changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"steps": 3}), PRICES.to_json().replace("kl", "kl\t")])
def test_a_damaged_file_of_prices_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="not a file of prices"):
        Prices.from_json(text)


def test_sizes_of_an_older_version_are_refused_and_other_costs_are_not() -> None:
    sizes = json.loads(PRICES.to_json())
    others = {**sizes, "costs": {"bops": sizes["costs"]["bops"]}}
    del sizes["version"], others["version"]

    with pytest.raises(SpecError, match="of version 1 are not bytes of the file"):
        Prices.from_json(json.dumps(sizes))
    assert Prices.from_json(json.dumps(others)).costs == {"bops": PRICES.costs["bops"]}


def test_the_costs_of_a_given_plan_are_those_that_the_program_counts() -> None:
    for solution in solve(PRICES, Budget(size=300, activation_memory=400), count=4):
        assert priced(PRICES, solution.plan) == solution


def test_a_plan_of_other_choices_has_no_price() -> None:
    plan = dict(solve(PRICES, Budget(size=300))[0].plan)

    with pytest.raises(SpecError, match=r"layer linear: the prices have w8a8, w2a4\. Got w4a4\."):
        priced(PRICES, {**plan, "linear": "w4a4"})
