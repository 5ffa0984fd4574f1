"""HiGHS in scipy. What it answers is added up again in whole numbers; its status is never taken for the truth."""

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calque.allocation.reduction import Mask, Row, Whole, lowest, slack, total

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# HiGHS stops at an absolute gap of 1e-6, which scipy cannot change: below one unit of an objective of this size.
LARGEST_OBJECTIVE = 1e6
INFEASIBLE = 2  # scipy's status
STRAY_LINE = b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n"  # printf left in HiGHS 1.12

_OWN_OUTPUT: ContextVar[bool] = ContextVar("own_output", default=False)
Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """The program in HiGHS's form: variables are the open choices, all numbers of order one.

    Attributes:
        layers: of each variable.  objective, objective_scale: scaled is true times scale.
        rows, limits, row_scales: (rows, variables), (rows,), (rows,).
    """

    layers: NDArray[np.intp]
    objective: Reals
    objective_scale: float
    rows: Reals
    limits: Reals
    row_scales: Reals
    one_each: "csr_array"


def _scaled(objective: Whole, rows: Sequence[Row], is_open: Mask) -> _Scaled:
    from scipy.sparse import csr_array  # in functions: a run without a budget does not wait for scipy

    layers, _ = np.nonzero(is_open)
    variables = np.arange(len(layers))

    def above_lowest(costs: Whole) -> Reals:
        return (costs - lowest(costs, is_open)[:, None])[is_open].astype(np.float64)

    values = above_lowest(objective)
    scale = min(1.0, LARGEST_OBJECTIVE / max(values.max(), 1.0))
    tables = np.array([above_lowest(row.costs) for row in rows]).reshape(len(rows), len(layers))
    row_scales = 1 / np.maximum(tables.max(axis=1), 1.0)
    limits = np.array([slack(row, is_open) for row in rows], dtype=np.float64) * row_scales
    one_each = csr_array((np.ones(len(layers)), (layers, variables)), shape=(len(is_open), len(layers)))
    return _Scaled(layers, values * scale, scale, tables * row_scales[:, None], limits, row_scales, one_each)


def multipliers(objective: Whole, rows: Sequence[Row], is_open: Mask) -> list[float] | None:
    """What one unit of each row's limit is worth where choices may be mixed; None where even that is infeasible."""
    from scipy.optimize import linprog

    program = _scaled(objective, rows, is_open)
    result = linprog(
        program.objective, A_ub=program.rows, b_ub=program.limits, A_eq=program.one_each,
        b_eq=np.ones(len(is_open)), bounds=(0, None), method="highs-ds",
    )  # fmt: skip
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise RuntimeError(f"HiGHS stopped without an answer to a linear program: {result.message}")
    worth = -result.ineqlin.marginals * program.row_scales / program.objective_scale
    return [max(0.0, float(value)) for value in worth]


def solve_integer(objective: Whole, rows: Sequence[Row], is_open: Mask) -> tuple[int, ...] | None:
    """The best open choice per layer that keeps every row exactly; None where there is none.

    HiGHS allows violations of 1e-6 of a row's largest cost. An answer that uses that is cut off, and the rest solved again.
    """
    rows = list(rows)
    while True:
        choice = _solve_once(objective, rows, is_open)
        if choice is None:
            return None
        violated = [row for row in rows if total(row.costs, choice) > row.limit]
        if not violated:
            return choice
        rows += [_cover(row, choice) for row in violated]


def _cover(row: Row, choice: Sequence[int]) -> Row:
    """Some layer must choose something cheaper than in `choice`, which costs too much."""
    chosen = row.costs[np.arange(len(choice)), list(choice)]
    return Row((row.costs >= chosen[:, None]).astype(np.int64), len(choice) - 1)


def _solve_once(objective: Whole, rows: Sequence[Row], is_open: Mask) -> tuple[int, ...] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    program = _scaled(objective, rows, is_open)
    constraints = [LinearConstraint(program.one_each, 1, 1)]
    if rows:
        constraints.append(LinearConstraint(program.rows, -np.inf, program.limits))
    with _without_stray_lines() if _OWN_OUTPUT.get() or threading.active_count() == 1 else nullcontext():
        result = milp(
            program.objective,
            constraints=constraints,
            integrality=np.ones(len(program.layers)),
            bounds=Bounds(0, 1),
            options={
                "mip_rel_gap": 0,
                "presolve": False,
            },  # `narrow` has done it, and the answers come 1.3 times as fast
        )
    if result.x is None:
        if result.status == INFEASIBLE:
            return None
        raise RuntimeError(f"HiGHS stopped without an answer to an integer program: {result.message}")
    chosen = np.full(is_open.shape, -1.0)
    chosen[is_open] = result.x
    return tuple(int(index) for index in chosen.argmax(axis=1))


@contextmanager
def own_output() -> Iterator[None]:
    """Says that standard output is the caller's alone, as a program's is: stray lines are kept off it though it has threads."""
    token = _OWN_OUTPUT.set(True)
    try:
        yield
    finally:
        _OWN_OUTPUT.reset(token)


@contextmanager
def _without_stray_lines() -> Iterator[None]:
    """Keeps a line that HiGHS 1.12 prints by mistake off standard output; all else that is written meanwhile follows.

    No option of HiGHS silences it. Standard output is the process's: where other threads may write to it, or fork, it is
    left alone, and the line is printed.
    """
    try:
        library, original = ctypes.CDLL(None), os.dup(1)
    except (OSError, TypeError):  # no standard output; no C library to flush (Windows)
        yield
        return
    with tempfile.TemporaryFile() as kept:
        if sys.stdout is not None:
            sys.stdout.flush()
        library.fflush(None)
        os.dup2(kept.fileno(), 1)
        try:
            yield
        finally:
            library.fflush(None)
            os.dup2(original, 1)
            os.close(original)
            kept.seek(0)
            rest = kept.read().replace(STRAY_LINE, b"")
            while rest:
                rest = rest[os.write(1, rest) :]
