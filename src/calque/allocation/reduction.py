"""Which choices can be in a best answer at all, decided in whole numbers before a solver sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]  # (layers, choices); layers with fewer choices are padded
Mask = NDArray[np.bool_]  # (layers, choices): which choices are open


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The costs of the chosen entries, one per layer, must not add up to more than `limit`."""

    costs: Whole
    limit: int


def total(costs: Whole, choice: Sequence[int]) -> int:
    """The sum over layers of the chosen costs, in Python's integers."""
    return sum(int(costs[layer, chosen]) for layer, chosen in enumerate(choice))


def lowest(costs: Whole, is_open: Mask) -> Whole:
    """The least open cost of each layer, (layers,)."""
    least: Whole = np.where(is_open, costs, np.iinfo(np.int64).max).min(axis=1)
    return least


def highest(costs: Whole, is_open: Mask) -> Whole:
    """The greatest open cost of each layer, (layers,)."""
    greatest: Whole = np.where(is_open, costs, np.iinfo(np.int64).min).max(axis=1)
    return greatest


def slack(row: Row, is_open: Mask) -> int:
    """What the limit leaves over the cheapest choices; negative where nothing is feasible."""
    return row.limit - int(lowest(row.costs, is_open).sum())


def narrow(objective: Whole, rows: Sequence[Row], is_open: Mask) -> tuple[list[Row], Mask] | None:
    """The rows that can bind and the choices that may be in a best answer; None where nothing is feasible.

    A best answer of what is left is a best answer of the whole.
    """
    left = list(rows)
    while True:
        before = int(is_open.sum())
        left = [row for row in left if int(highest(row.costs, is_open).sum()) > row.limit]
        for row in left:
            room = slack(row, is_open)
            if room < 0:
                return None
            is_open = is_open & (row.costs - lowest(row.costs, is_open)[:, None] <= room)
        dominated = _dominated([objective, *(row.costs for row in left)], is_open)
        is_open = is_open & ~dominated
        if int(is_open.sum()) == before:
            return left, is_open


def _dominated(tables: Sequence[Whole], is_open: Mask) -> Mask:
    """Choices that another open choice of the layer equals or betters everywhere; of equals the first stays."""
    choices = is_open.shape[1]
    betters: Mask = is_open[:, :, None] & is_open[:, None, :]  # (layers, by, dominated)
    equal = betters.copy()
    for table in tables:
        betters &= table[:, :, None] <= table[:, None, :]
        equal &= table[:, :, None] == table[:, None, :]
    later = np.triu(np.ones((choices, choices), dtype=bool), k=1)  # by < dominated
    return np.asarray((betters & (~equal | later)).any(axis=1), dtype=np.bool_)
