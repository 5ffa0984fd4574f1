"""What the steps of a run cost in arithmetic, and how fast this machine is at it: what a forecast is made of.

Three things take time: operators as such, however small their tensors are; passes over values; multiply-accumulates of matrix
products. Their numbers follow from the algorithms, their speed is measured on the spot.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from calque.calibration.holdout import held_out_count
from calque.fitting.adaquant import rows_per_step
from calque.fitting.closed_form import CLIP_STEPS, FACTORS, RIDGES, TOGETHER
from calque.fitting.descent import CHECKS
from calque.fitting.grids import SAMPLED_VALUES
from calque.fitting.problem import SEARCHED
from calque.fitting.rounding import BLOCK, FRACTIONS
from calque.grid.ranges import CLIP_CANDIDATES, TIE_STEPS, WEIGHT_CANDIDATES

REPEATS = 5  # of each measurement, of which the median counts
CALLS, SIDE = 200, 384  # of one measurement: a few milliseconds
FRESH = 2**20  # values of a tensor from which on allocators map new memory each time
JUDGED = 2048, 4096  # rows at most that judge a range, and that a covariance or a mean is taken of
SIGNED = 2.4  # times the candidates of a range with two ends, over those of one end
GRID = 10  # passes of putting values on a grid


@dataclass(frozen=True, slots=True)
class Effort:
    """Operators; values read or written; those of tensors so large that each is fresh memory; and multiply-accumulates."""

    calls: float = 0.0
    values: float = 0.0
    fresh: float = 0.0
    products: float = 0.0

    @classmethod
    def passes(cls, times: float, size: float) -> "Effort":
        """So many passes over a tensor of that size."""
        return cls(fresh=times * size) if size >= FRESH else cls(values=times * size)

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(
            self.calls + other.calls,
            self.values + other.values,
            self.fresh + other.fresh,
            self.products + other.products,
        )

    def __mul__(self, times: float) -> "Effort":
        return Effort(times * self.calls, times * self.values, times * self.fresh, times * self.products)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one of each kind in an `Effort`."""

    call: float
    value: float
    fresh: float
    product: float

    def seconds(self, effort: Effort) -> float:
        values = effort.values * self.value + effort.fresh * self.fresh
        return effort.calls * self.call + values + effort.products * self.product

    @classmethod
    @torch.no_grad()
    def measured(cls, device: torch.device) -> "Speed":
        """The speed of this machine with its present load; takes some hundredths of a second."""
        single, square = torch.ones(8, device=device), torch.ones(SIDE, SIDE, device=device)

        def calls() -> None:
            for _ in range(CALLS):
                single.add(1.0)
            single.sum().item()  # waits for a device that computes by itself

        def value(size: int) -> float:
            tensor = torch.ones(size, device=device)
            return _seconds(lambda: tensor.add(1.0).sum().item()) / (3 * size)  # two passes, and that of the sum

        return cls(
            _seconds(calls) / CALLS,
            value(FRESH // 4),
            value(2 * FRESH),
            _seconds(lambda: (square @ square).sum().item()) / SIDE**3,
        )


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer's problem in numbers.

    Attributes:
        groups, outputs, inputs: of its weight, (groups, O, K).
        rows: sampled ones.
        signed: whether its inputs are on both sides of 0.  clipped: whether its activation clips.
    """

    groups: int
    outputs: int
    inputs: int
    rows: int
    signed: bool
    clipped: bool

    @property
    def weights(self) -> int:
        return self.groups * self.outputs * self.inputs

    @property
    def judging(self) -> int:
        """Held-out rows."""
        return held_out_count(self.rows) or self.rows

    def layer(self, rows: int) -> Effort:
        """The layer on so many rows, its inputs put on their grid, its outputs compared."""
        inputs, outputs = (rows * self.groups * size for size in (self.inputs, self.outputs))
        return Effort(40, products=rows * self.weights) + Effort.passes(GRID, inputs) + Effort.passes(8, outputs)


def sampling(shape: Shape) -> Effort:
    """Taking the rows of a problem from the values of its layer."""
    return Effort(60) + Effort.passes(6, shape.rows * shape.groups * (shape.inputs + shape.outputs))


def range_search(shape: Shape) -> Effort:
    """The input's grid by the error of the outputs."""
    rows = max(1, min(JUDGED[0], shape.rows, SEARCHED // (shape.groups * shape.inputs)))
    return shape.layer(rows) * (len(CLIP_CANDIDATES) * (SIGNED if shape.signed else 1))


def rounding(shape: Shape, *, by_output: bool) -> Effort:
    """Weight scales by search, weights rounded to nearest, the bias corrected."""
    found = table(shape.weights)
    rows = min(JUDGED[1], shape.rows)
    if by_output:
        power = shape.inputs * shape.groups * shape.inputs
        found += Effort(5, products=rows * power + len(WEIGHT_CANDIDATES) * power * shape.outputs)
    return found + shape.layer(shape.judging) * 2 + shape.layer(rows) * 2


def descent(shape: Shape, steps: int) -> Effort:
    """Steps of AdaQuant on sampled rows."""
    rows = rows_per_step(shape.groups * shape.inputs)
    patches, outputs = (rows * shape.groups * size for size in (shape.inputs, shape.outputs))
    step = Effort(450, products=7 * rows * shape.weights) + Effort.passes(75, shape.weights)
    step += Effort.passes(40, patches) + Effort.passes(30, outputs)
    return step * steps + shape.layer(shape.judging) * (len(CHECKS) + 1)


def closed_form(shape: Shape, rounds: int, fits: int = 1, moments: int = 1) -> Effort:
    """Fits in closed form, which share the moments of the inputs and the factorizations for the ridges.

    Args:
        moments: how many sets of them there are: one for each grid of the inputs.
    """
    size, power = shape.inputs, shape.groups * shape.inputs**2
    together = len(RIDGES) * power <= TOGETHER
    trials = len(RIDGES) if together else len(RIDGES) // 2 + 1
    factored = Effort(20, products=power * size) + Effort.passes(4, power)
    shared = Effort(40, products=shape.rows * (power + shape.weights)) + factored * trials
    shared += Effort.passes(6, shape.rows * shape.groups * (size + shape.outputs))
    widest = (Effort(12) + Effort.passes(8, shape.weights)) * len(FRACTIONS)
    trial = widest + _sweep(shape, 1) + shape.layer(shape.judging)
    searched = trial * trials
    if together:  # the operators serve all trials
        searched = replace(searched, calls=trial.calls)
    last = factored + widest + _sweep(shape, len(FACTORS)) + _sweep(shape, 1) * rounds
    followed = Effort(20, products=2 * shape.rows * shape.weights)
    followed += Effort.passes(8, shape.rows * shape.groups * shape.outputs)
    clipped = followed * (CLIP_STEPS + 1) + trial if shape.clipped else Effort()
    return shared * moments + (searched + last + clipped + shape.layer(shape.judging)) * fits


def _sweep(shape: Shape, copies: int) -> Effort:
    """GPTQ or coordinate descent over the columns of so many copies of the weights."""
    inside = Effort.passes((BLOCK + 10) * shape.inputs, copies * shape.groups * shape.outputs)  # in slices of a column
    return Effort(16 * shape.inputs, products=copies * shape.weights * shape.inputs) + inside


def table(weights: int) -> Effort:
    """The scales and codes of an embedding."""
    return (Effort(24) + Effort.passes(8, weights)) * len(WEIGHT_CANDIDATES)


def tensor_range(values: int, *, signed: bool) -> Effort:
    """The grid of a tensor that no layer owns, by the error of its own values."""
    candidates = len(CLIP_CANDIDATES) * (SIGNED if signed else 1)
    judged = (Effort(12) + Effort.passes(GRID + 3, min(values, SAMPLED_VALUES))) * (candidates + TIE_STEPS)
    return judged + Effort(20) + Effort.passes(2, values)
