"""The unknowns of one layer's fit as leaf tensors, and the layer that they stand for; in relative and in absolute units."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from calque.fitting.problem import CONSTANT, Fit, Grid, LayerProblem
from calque.grid.arithmetic import NEGLIGIBLE, by_input, learned_fake_quantize, round_through, weight_limits
from calque.settings import AbsoluteRates, Rates, RelativeRates

SMALLEST_UNIT = 1e-12  # of the layer's outputs: the bias of a channel that is the same everywhere hardly moves


class Parameters(ABC):
    """The unknowns of a layer: weights, their scales, the bias, and the input's grid where it may move."""

    def __init__(self, problem: LayerProblem, start: Fit, bits: int, *, codes: Tensor | None, learn_grid: bool):
        self.problem = problem
        self.limits = weight_limits(bits)
        self.fixed_codes = codes
        self.start = start
        # Adam's epsilon must be small beside the gradients of any layer, whatever its unit
        self.power = problem.activation(problem.targets).var().clamp(min=CONSTANT)
        self.bias_unit = self._bias_unit()
        self.bias = start.bias / self.bias_unit
        self.learn_grid = learn_grid and start.grid is not None
        self.signed = start.grid is not None and int(start.grid.zero_point) > 0

    @abstractmethod
    def _bias_unit(self) -> Tensor: ...

    @abstractmethod
    def leaves(self, rates: Rates) -> list[tuple[Tensor, float]]:
        """The tensors that may move, each with its rate."""

    @abstractmethod
    def scale(self) -> Tensor:
        """The weights' scales, of the start's shape, with gradient."""

    @abstractmethod
    def levels(self, scale: Tensor) -> Tensor:
        """The weights in levels of their grid (groups, O, K), not yet rounded, with gradient."""

    @abstractmethod
    def input_grid(self) -> tuple[Tensor, Tensor]:
        """The scale and the real zero point of the input's grid, with gradient; only where it may move."""

    def inputs(self, x: Tensor) -> Tensor:
        """The layer's input on its activation grid."""
        if self.start.grid is None:
            return x
        if not self.learn_grid:
            return self.start.grid.quantize(x)
        return learned_fake_quantize(x, *self.input_grid(), 0, self.start.grid.qmax)

    def weight(self) -> Tensor:
        """The quantized weights (groups, O, K) in real units."""
        scale = by_input(self.scale(), self.problem.weight)
        if self.fixed_codes is not None:
            return self.fixed_codes.float() * scale
        return torch.clamp(round_through(self.levels(scale)), *self.limits) * scale

    @torch.no_grad()
    def fit(self) -> Fit:
        """The layer that these values stand for, judged on the held-out rows."""
        scale = self.scale().clamp(min=NEGLIGIBLE)
        codes = self.fixed_codes
        if codes is None:
            codes = self.levels(by_input(scale, self.problem.weight)).round().clamp(*self.limits)
        grid = self.start.grid
        if grid is not None and self.learn_grid:
            step, zero_point = self.input_grid()
            grid = Grid(step.clamp(min=NEGLIGIBLE), zero_point.round().clamp(0, grid.qmax).to(torch.int32), grid.qmax)
        x = self.problem.patches[:, self.problem.held_out]
        inputs, bias = x if grid is None else grid.quantize(x), self.bias * self.bias_unit
        after = self.problem.held_out_error(inputs, codes.float() * by_input(scale, codes), bias)
        return Fit(codes.to(torch.int8).clone(), scale.clone(), bias.clone(), grid, self.start.before, after)


class Relative(Parameters):
    """In units of what each layer starts with, so that one rate suits layers of any range."""

    def __init__(self, problem: LayerProblem, start: Fit, bits: int, *, codes: Tensor | None, learn_grid: bool):
        super().__init__(problem, start, bits, codes=codes, learn_grid=learn_grid)
        self._levels = (problem.weight / by_input(start.scale, problem.weight)).clone()
        self._log_scale = torch.zeros_like(start.scale)
        self._log_input = torch.zeros((), device=start.scale.device)
        self._zero_point = start.grid.zero_point.float() if start.grid is not None else torch.zeros(())

    def _bias_unit(self) -> Tensor:
        targets = self.problem.targets
        return targets.std(1, correction=min(1, targets.shape[1] - 1), keepdim=True).clamp(min=SMALLEST_UNIT)

    def leaves(self, rates: Rates) -> list[tuple[Tensor, float]]:
        chosen = [(self._log_scale, rates.weight_scale), (self.bias, rates.bias)]
        if self.fixed_codes is None:
            chosen.append((self._levels, rates.weight))
        if self.learn_grid:
            chosen.append((self._log_input, rates.activation_scale))
            if self.signed:  # after a ReLU the zero point is 0 and stays
                chosen.append((self._zero_point, rates.zero_point))
        return chosen

    def scale(self) -> Tensor:
        return self.start.scale * self._log_scale.exp()

    def levels(self, scale: Tensor) -> Tensor:
        return self._levels

    def input_grid(self) -> tuple[Tensor, Tensor]:
        assert self.start.grid is not None
        return self.start.grid.scale * self._log_input.exp(), self._zero_point


class Absolute(Parameters):
    """In units of the layer: the weights themselves, and ranges in place of scales (the released code of Hubara et al. 2021)."""

    def __init__(self, problem: LayerProblem, start: Fit, bits: int, *, codes: Tensor | None, learn_grid: bool):
        super().__init__(problem, start, bits, codes=codes, learn_grid=learn_grid)
        self._steps = self.limits[1] - self.limits[0]
        self._weight = problem.weight.clone()
        self._range = start.scale * self._steps
        grid = start.grid
        self._input_range = torch.zeros(()) if grid is None else grid.scale * grid.qmax
        self._low = torch.zeros(()) if grid is None else -grid.zero_point * grid.scale

    def _bias_unit(self) -> Tensor:
        return torch.ones_like(self.start.bias)

    def leaves(self, rates: Rates) -> list[tuple[Tensor, float]]:
        chosen = [(self._range, rates.weight_scale), (self.bias, rates.bias)]
        if self.fixed_codes is None:
            chosen.append((self._weight, rates.weight))
        if self.learn_grid:
            chosen.append((self._input_range, rates.activation_scale))
            if self.signed:
                chosen.append((self._low, rates.zero_point))
        return chosen

    def scale(self) -> Tensor:
        return (self._range / self._steps).clamp(min=NEGLIGIBLE)

    def levels(self, scale: Tensor) -> Tensor:
        return self._weight / scale

    def input_grid(self) -> tuple[Tensor, Tensor]:
        assert self.start.grid is not None
        scale = (self._input_range / self.start.grid.qmax).clamp(min=NEGLIGIBLE)
        return scale, -self._low / scale


KINDS: dict[type[Rates], type[Relative] | type[Absolute]] = {RelativeRates: Relative, AbsoluteRates: Absolute}
