"""The border of the integer program: its data, its answer, and what is said where there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calque.allocation.reduction import Mask, Row, Whole, lowest, total
from calque.allocation.search import best_choice
from calque.errors import InfeasibleBudgetError, SpecError
from calque.run.fields import shown

Costs = Sequence[Sequence[int]]  # [layer][choice], whole numbers


@dataclass(frozen=True, slots=True)
class Constraint:
    """The chosen costs must not add up to more than `limit`.

    Attributes:
        name: what is limited. Constraints of one name and limit bound one quantity, a maximum of their sums.
        describe: a sum in words, for messages.
    """

    name: str
    costs: Costs
    limit: int
    describe: Callable[[int], str] = field(default="{:,}".format, compare=False)


@dataclass(frozen=True, slots=True)
class Allocation:
    """One choice per layer and what it adds up to."""

    choice: tuple[int, ...]
    objective: int


def allocate(
    objective: Costs,
    constraints: Sequence[Constraint],
    *,
    forbidden: Sequence[tuple[int, ...]] = (),
    distance: int = 1,
) -> Allocation:
    """The choice per layer with the least sum of `objective` among those that keep every constraint.

    Sums and limits are compared in whole numbers, never by the solver's word. Source: Hubara et al. 2021, section 3.

    Args:
        objective: per layer, and per choice of that layer; layers may have different numbers of choices.
        constraints: their costs have the form of the objective.
        forbidden: earlier choices, from each of which the answer differs...
        distance: ...in at least that many layers.

    Raises:
        InfeasibleBudgetError: no choice keeps the constraints; the message names the smallest feasible limits.
        SpecError: costs of another form than the objective's, or a forbidden tuple that is no choice.

    >>> allocate([[9, 1, 0], [7, 2, 0]], [Constraint("size", [[2, 4, 8], [2, 4, 8]], 10)])
    Allocation(choice=(1, 1), objective=3)
    """
    widths = [len(layer) for layer in objective]
    _check(widths, constraints, forbidden, distance)
    goal, is_open = _padded(objective, widths), _open(widths)
    rows = [Row(_padded(constraint.costs, widths), constraint.limit) for constraint in constraints]
    apart = [_apart(earlier, goal, distance) for earlier in forbidden]
    choice = best_choice(goal, [*rows, *apart], is_open) if widths else ()
    if choice is None:
        raise InfeasibleBudgetError(_explanation(constraints, rows, apart, is_open))
    return Allocation(choice, total(goal, choice))


def _check(
    widths: list[int], constraints: Sequence[Constraint], forbidden: Sequence[tuple[int, ...]], distance: int
) -> None:
    if not all(widths):
        raise SpecError(f"layer {widths.index(0)} has no choice. Give every layer at least one.")
    for constraint in constraints:
        if [len(layer) for layer in constraint.costs] != widths:
            raise SpecError(f"{constraint.name} must have one cost per layer and choice, as the objective has.")
    for earlier in forbidden:
        fits = len(earlier) == len(widths)
        if not fits or not all(0 <= chosen < width for chosen, width in zip(earlier, widths, strict=True)):
            raise SpecError(f"a forbidden tuple must be one choice per layer. Got {earlier}.")
    if type(distance) is not int or distance < 1:
        raise SpecError(f"distance must be an int >= 1. Got {shown(distance)}.")


def _padded(costs: Costs, widths: list[int]) -> Whole:
    width = max(widths, default=0)
    return np.array([[*layer, *[0] * (width - len(layer))] for layer in costs], dtype=np.int64)


def _open(widths: list[int]) -> Mask:
    is_open: Mask = np.arange(max(widths, default=0)) < np.array(widths, dtype=np.int64)[:, None]
    return is_open


def _apart(earlier: tuple[int, ...], like: Whole, distance: int) -> Row:
    """At most layers - distance layers choose as before."""
    same = np.zeros_like(like)
    same[np.arange(len(earlier)), list(earlier)] = 1
    return Row(same, len(earlier) - distance)


def _explanation(constraints: Sequence[Constraint], rows: list[Row], apart: list[Row], is_open: Mask) -> str:
    """What is infeasible, and the smallest feasible limit of each quantity."""
    if apart and best_choice(np.zeros(is_open.shape, dtype=np.int64), rows, is_open) is not None:
        return (
            f"no choice of bits that keeps the budget differs enough from each of the {len(apart)} earlier ones. "
            "Ask for fewer, or for less distance."
        )
    parts = []
    for name in dict.fromkeys(constraint.name for constraint in constraints):
        members = [index for index, constraint in enumerate(constraints) if constraint.name == name]
        own = [rows[index] for index in members]
        others = [row for index, row in enumerate(rows) if index not in members]
        excess = _least_excess(own, others, is_open)
        alone = excess is None
        if excess is None:
            excess = _least_excess(own, [], is_open)
        assert excess is not None  # alone, some limit always is feasible
        first = constraints[members[0]]
        smallest = first.describe(first.limit + excess)
        by_itself = ", taken alone," if alone else ""
        parts.append((
            excess > 0,
            f"{name} at most {first.describe(first.limit)}: the smallest feasible{by_itself} is {smallest} with these bits",
        ))  # fmt: skip
    hopeless = [part for above, part in parts if above] or [part for _, part in parts]
    return f"{'; '.join(hopeless)}. Raise the budget or allow other bits."


def _least_excess(own: list[Row], others: list[Row], is_open: Mask) -> int | None:
    """How much the limits of `own` must be raised, all by the same (negative: lowered); None where `others` exclude all."""
    choice = best_choice(np.sum([row.costs for row in own], axis=0), others, is_open)
    if choice is None:
        return None
    high = max(total(row.costs, choice) - row.limit for row in own)
    if len(own) == 1:
        return high
    low = max(int(lowest(row.costs, is_open).sum()) - row.limit for row in own)
    nothing = np.zeros(is_open.shape, dtype=np.int64)
    while low < high:
        middle = (low + high) // 2
        raised = [Row(row.costs, row.limit + middle) for row in own]
        choice = best_choice(nothing, [*raised, *others], is_open)
        if choice is None:
            low = middle + 1
        else:
            high = max(total(row.costs, choice) - row.limit for row in own)
    return high
