"""A layer's problem in units of its own: powers of two, in which its inputs and outputs are about 1.

Solvers square what they are given, and have constants of their own. In these units neither leaves float32 nor depends on whether
the data come in metres or in nanometres; and as powers of two round nothing, the fit is the same to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from calque.fitting.adaquant import Draw, Linear
from calque.fitting.problem import Fit, Grid, LayerProblem
from calque.grid.arithmetic import binary_unit

Rows = tuple[Draw, Linear]
"""What each step of AdaQuant sees, and how the layer maps it."""


@dataclass(frozen=True, slots=True)
class Units:
    """The real sizes of 1 at the layer's input and at its output."""

    x: float
    y: float

    @classmethod
    def of(cls, problem: LayerProblem) -> "Units":
        """Next to the mean absolute values of the inputs and of the targets."""
        return cls(binary_unit(problem.patches), binary_unit(problem.targets))

    def problem(self, problem: LayerProblem) -> LayerProblem:
        """The problem in these units."""
        patches, targets = self._pair(problem.patches, problem.targets)
        return self._with(problem, patches, targets)

    def problem_(self, problem: LayerProblem) -> LayerProblem:
        """The same with the memory of the problem's rows, which may be a good part of the budget."""
        pairs = (problem.patches, self.x), (problem.targets, self.y)
        return self._with(problem, *(rows if unit == 1 else rows.div_(unit) for rows, unit in pairs))

    def _with(self, problem: LayerProblem, patches: Tensor, targets: Tensor) -> LayerProblem:
        return replace(
            problem, patches=patches, targets=targets, weight=self.weights(problem.weight), bias=_over(problem.bias, self.y),
            activation=self._activation(problem.activation),
        )  # fmt: skip

    def weights(self, weight: Tensor) -> Tensor:
        """Weights, or their scales, in these units."""
        return _over(weight * self.x, self.y)

    def grid(self, grid: Grid | None) -> Grid | None:
        """The input's grid in these units."""
        return None if grid is None else replace(grid, scale=_over(grid.scale, self.x))

    def fit(self, fit: Fit) -> Fit:
        """A fit, given in real units, in these."""
        return replace(fit, scale=self.weights(fit.scale), bias=_over(fit.bias, self.y), grid=self.grid(fit.grid))

    def rows(self, rows: Rows | None) -> Rows | None:
        """What each step sees, in these units; the layer is linear, so that its map stays as it is."""
        if rows is None:
            return None
        draw, linear = rows
        return (lambda generator: self._pair(*draw(generator))), linear

    def real(self, fit: Fit) -> Fit:
        """A fit that was found in these units, in real ones."""
        return Units(1 / self.x, 1 / self.y).fit(fit)

    def _pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _over(x, self.x), _over(y, self.y)

    def _activation(self, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return activation if self.y == 1 else lambda value: activation(value * self.y) / self.y


def _over(value: Tensor, unit: float) -> Tensor:
    return value if unit == 1 else value / unit
