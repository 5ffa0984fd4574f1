"""The best choice: an exact lower bound says which choices matter, HiGHS chooses among them."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calque.allocation.highs import multipliers, solve_integer
from calque.allocation.reduction import Mask, Row, Whole, narrow, total

BITS = 80  # multipliers are whole numbers of 2^-80: exact sums, and fine enough for costs of 1e13
CORE = (
    2  # choices per layer, on average, of the first program; 200 layers of 49 choices took least with 2, of 1.75 to 4
)
GROWTH = 2  # of a program that was too small: a better answer found on the way needs fewer choices for its proof


def best_choice(objective: Whole, rows: Sequence[Row], is_open: Mask) -> tuple[int, ...] | None:
    """The open choice per layer with the least objective that keeps every row; None where there is none.

    A choice whose presence costs more than the answer found, by the Lagrangian bound in whole numbers, is in no better
    answer. The program is small without these; it is solved again if the answer turns out to need some of them.
    """
    narrowed = narrow(objective, rows, is_open)
    if narrowed is None:
        return None
    binding, is_open = narrowed
    if is_open.sum() == len(is_open):
        return tuple(int(index) for index in is_open.argmax(axis=1))
    worth = multipliers(objective, binding, is_open)
    if worth is None:
        return None
    bound, gaps = _lagrangian(objective, binding, is_open, worth)
    ordered = sorted(gaps)
    size = CORE * len(is_open)
    while True:
        limit = ordered[min(size, len(ordered)) - 1]
        core = is_open.copy()
        core[is_open] = (gaps <= limit).astype(bool)
        choice = solve_integer(objective, binding, core)
        if choice is None and not (gaps > limit).any():
            return None
        reach = ordered[-1] if choice is None else ((total(objective, choice) - 1) << BITS) - bound
        wanted = bisect_right(ordered, reach)  # so many choices can be in a better answer
        if wanted <= core.sum():
            return choice
        size = min(GROWTH * size, wanted)


def _lagrangian(
    objective: Whole, rows: Sequence[Row], is_open: Mask, worth: Sequence[float]
) -> tuple[int, NDArray[np.object_]]:
    """A lower bound of the objective, and what each open choice adds to it, both times 2^BITS, in Python's integers.

    Any multipliers that are not negative give a bound: min over choices of objective + worth * (cost - limit).
    """
    priced: NDArray[np.object_] = objective[is_open].astype(object) * 2**BITS
    bound = 0
    for row, value in zip(rows, worth, strict=True):
        multiplier = int(value * 2.0**BITS)
        if multiplier:
            priced = priced + multiplier * row.costs[is_open].astype(object)
            bound -= multiplier * row.limit
    layers, _ = np.nonzero(is_open)
    starts = np.flatnonzero(np.diff(layers, prepend=-1))
    least = np.minimum.reduceat(priced, starts)
    return bound + sum(least), priced - least[layers]
