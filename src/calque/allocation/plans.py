"""From prices and a budget to plans: the integer program, and its answers in the units of the user."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

from calque.allocation.budget import NANOSECONDS, Budget, nanoseconds, read_latency
from calque.allocation.program import Allocation, Constraint, Costs, allocate
from calque.errors import InfeasibleBudgetError, SpecError
from calque.quantized.prices import Prices
from calque.run.fields import whole

UNITS = 40  # the largest price is 2^40 to 2^41 units: sums stay exact, and the smallest prices keep their digits
MOST_PLANS = 1000  # of one call
DIGITS = 6  # of a limit in a message
TITLES = {"size": "file size"}  # of a quantity in a message, where that is not its name


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice of bits that keeps a budget.

    Attributes:
        plan: layer -> bits.
        increase: of the loss, predicted: the sum of the prices, each raised to zero where noise made it negative.
        costs: "size" in bytes of the file at most and "bops", with the fixed parts; "activation_memory" in bytes, the peak;
            "latency" in nanoseconds where the budget has a table.
    """

    plan: dict[str, str]
    increase: float
    costs: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Program:
    """The prices as whole numbers, one row per group and a last row with one choice, the fixed parts.

    Attributes:
        candidates: per group, indices of the choices whose price is finite.
        unit: of a price, a power of two.  losses: in units, rounded up.
        costs: by name, one table; "activation_memory" has one per step.
    """

    prices: Prices
    candidates: tuple[tuple[int, ...], ...]
    unit: Fraction
    losses: Costs
    costs: dict[str, list[Costs]]


def solve(prices: Prices, budget: Budget, count: int = 1, distance: int = 1) -> list[Solution]:
    """The `count` best plans within the budget, best first; fewer where no more are.

    Prices become whole numbers of a power of two, at most 2^-40 of the largest finite one, rounded up: what is summed and
    compared is exact, and a limit on the loss holds for the true sum. Negative prices are raised to zero; a choice
    whose price is not finite is forbidden. Sizes, operations and memory enter with what is fixed.

    Args:
        distance: in how many groups at least any two of the plans differ.

    Raises:
        InfeasibleBudgetError: no plan keeps the budget; the message names the smallest feasible one.
        SpecError: a quantity that the prices or the latency table lack, a group without a finite price, or a count below 1.
    """
    whole(1, MOST_PLANS)("count", count)
    program = _program(prices, budget)
    constraints = _constraints(program, budget)
    objective = program.losses if budget.minimize is None else _table(program, budget.minimize)[0]
    found = [allocate(objective, constraints)]
    while len(found) < count:
        try:
            earlier = [allocation.choice for allocation in found]
            found.append(allocate(objective, constraints, forbidden=earlier, distance=distance))
        except InfeasibleBudgetError:  # the first was feasible: there are no more plans
            break
    return [_solution(program, allocation) for allocation in found]


def pareto(prices: Prices, budgets: Sequence[Budget]) -> list[Solution | InfeasibleBudgetError]:
    """The best plan within each budget, in their order, from one measurement; the error in place of an infeasible one's."""
    results: list[Solution | InfeasibleBudgetError] = []
    for budget in budgets:
        try:
            results.append(solve(prices, budget)[0])
        except InfeasibleBudgetError as error:
            results.append(error)
    return results


def priced(prices: Prices, plan: Mapping[str, str]) -> Solution:
    """What a plan costs, and the increase of the loss that is predicted for it; no latency.

    Raises:
        SpecError: a layer that the plan lacks, or bits that are none of its choices.
    """
    chosen = []
    for group, choices in zip(prices.groups, prices.choices, strict=True):
        bits = plan.get(group[0])
        if bits not in choices:
            raise SpecError(f"layer {group[0]}: the prices have {', '.join(choices)}. Got {bits}.")
        chosen.append(choices.index(bits))
    costs = {
        name: prices.fixed[name] + sum(row[index] for row, index in zip(table, chosen, strict=True))
        for name, table in prices.costs.items()
    }
    peaks = [fixed + sum(row[chosen[group]] for group, row in tables.items()) for fixed, tables in prices.steps]
    if peaks:
        costs["activation_memory"] = max(peaks)
    increase = math.fsum(max(0.0, row[index]) for row, index in zip(prices.increases, chosen, strict=True))
    return Solution({layer: plan[layer] for group in prices.groups for layer in group}, increase, costs)


def _program(prices: Prices, budget: Budget) -> _Program:
    candidates = tuple(
        tuple(index for index, price in enumerate(row) if math.isfinite(price)) for row in prices.increases
    )
    for group, kept in zip(prices.groups, candidates, strict=True):
        if not kept:
            raise SpecError(f"layer {group[0]}: no choice has a finite price. Give it more bits to choose from.")
    finite = [max(0.0, row[i]) for row, kept in zip(prices.increases, candidates, strict=True) for i in kept]
    unit = Fraction(2) ** (math.frexp(max(finite, default=0.0))[1] - 1 - UNITS)
    losses = [
        [math.ceil(Fraction(max(0.0, row[i])) / unit) for i in kept]
        for row, kept in zip(prices.increases, candidates, strict=True)
    ]

    def with_fixed(table: Sequence[Sequence[int]], fixed: int) -> Costs:
        return [*([row[i] for i in kept] for row, kept in zip(table, candidates, strict=True)), [fixed]]

    costs = {name: [with_fixed(table, prices.fixed[name])] for name, table in prices.costs.items()}
    nothing = [[0] * len(row) for row in prices.choices]
    steps = [with_fixed([tables.get(g, row) for g, row in enumerate(nothing)], fixed) for fixed, tables in prices.steps]
    if steps:
        costs["activation_memory"] = steps
    if budget.latency is not None:
        costs["latency"] = [with_fixed(_latencies(prices, candidates, budget), 0)]
    return _Program(prices, candidates, unit, [*losses, [0]], costs)


def _latencies(prices: Prices, candidates: tuple[tuple[int, ...], ...], budget: Budget) -> list[list[int]]:
    """Nanoseconds per group and choice: the sum over the group's layers; 0 for choices that are forbidden anyway."""
    assert budget.latency is not None
    table, _ = budget.latency
    known = read_latency(table)
    source = "the latency table" if not isinstance(table, str) else table
    result = []
    for group, choices, kept in zip(prices.groups, prices.choices, candidates, strict=True):
        for layer in group:
            for index in kept:
                if (layer, choices[index]) not in known:
                    raise SpecError(f"layer {layer}: {source} has no entry for {choices[index]}. Measure and add it.")
        result.append([
            sum(nanoseconds(known[layer, bits]) for layer in group) if index in kept else 0
            for index, bits in enumerate(choices)
        ])  # fmt: skip
    return result


def _table(program: _Program, name: str) -> list[Costs]:
    if name not in program.costs:
        raise SpecError(f"the prices have no {name}. They have {', '.join(program.costs) or 'none'}: budget these.")
    return program.costs[name]


def _constraints(program: _Program, budget: Budget) -> list[Constraint]:
    constraints = []
    for name, limit in budget.limits(program.prices.floats).items():
        describe = _description(name, program.prices.floats.get(name))
        title = TITLES.get(name, name.replace("_", " "))
        distinct = {tuple(map(tuple, costs)): costs for costs in _table(program, name)}
        constraints += [Constraint(title, costs, limit, describe) for costs in distinct.values()]
    if budget.loss is not None:
        limit = math.floor(Fraction(budget.loss) / program.unit)
        constraints.append(Constraint("loss increase", program.losses, limit, _in_units(program.unit)))
    return constraints


def _description(name: str, whole: int | None) -> Callable[[int], str]:
    """How a message writes a sum: milliseconds, or the number and its share of float32, rounded up; for size in bytes."""
    if name == "latency":
        in_milliseconds = _in_units(Fraction(1, NANOSECONDS))
        return lambda value: f"{in_milliseconds(value)} ms"
    unit = " bytes" if name == "size" else ""
    if not whole:
        return lambda value: f"{value:,}{unit}"
    share = _in_units(Fraction(1, whole))
    return lambda value: f"{value:,}{unit} ({share(value)} of float32)"


def _in_units(unit: Fraction) -> Callable[[int], str]:
    """A multiple of the unit as a decimal, rounded up: as a limit it is still feasible."""

    def text(value: int) -> str:
        exact = value * unit
        context = Context(prec=DIGITS, rounding=ROUND_CEILING)
        rounded = context.divide(Decimal(exact.numerator), Decimal(exact.denominator))
        return f"{rounded.normalize():g}"

    return text


def _solution(program: _Program, allocation: Allocation) -> Solution:
    prices = program.prices
    chosen = [kept[index] for kept, index in zip(program.candidates, allocation.choice, strict=False)]  # not the fixed
    plan = {
        layer: prices.choices[number][index]
        for number, index in enumerate(chosen)
        for layer in prices.groups[number]
    }  # fmt: skip
    increase = math.fsum(max(0.0, prices.increases[number][index]) for number, index in enumerate(chosen))
    costs = {
        name: max(sum(row[index] for row, index in zip(table, allocation.choice, strict=True)) for table in tables)
        for name, tables in program.costs.items()
    }
    return Solution(plan, increase, costs)
