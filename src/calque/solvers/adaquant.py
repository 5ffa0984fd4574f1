"""AdaQuant: a layer's weights, scales, zero point and bias fitted to its float output by gradient descent.

Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets",
ICML 2021, section 3 (equation 2), the sequential flavour. Deviations: step sizes are relative (weights and the zero point in
levels of their grid, scales by their logarithm, the bias in standard deviations of the output); rows are sampled output
positions; the rate decays by a cosine; the best iterate on held-out rows is kept, the start included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calque.arithmetic import SMALLEST_SCALE, learned_fake_quantize, round_through, weight_limits
from calque.solvers.problem import Fit, Grid, LayerProblem, correct_bias

CHECKS = 8  # times that the iterate is judged on held-out rows
BATCH_VALUES = 2**17  # patch values per step at most
BATCH_ROWS = (32, 512)  # rows per step


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Adam's rates at the start of the cosine: weights and zero point in levels, scales relative, bias in deviations."""

    weight: float
    weight_scale: float
    bias: float
    activation_scale: float
    zero_point: float


class _Parameters:
    """The unknowns of one layer as leaf tensors, and the layer that they stand for."""

    def __init__(self, problem: LayerProblem, start: Fit, bits: int, *, codes: Tensor | None, learn_grid: bool):
        self.problem = problem
        self.limits = weight_limits(bits)
        self.fixed_codes = codes
        self.levels = (problem.weight / start.scale[..., None]).clone()
        self.start_scale = start.scale
        self.log_scale = torch.zeros_like(start.scale)
        # Adam's epsilon must be small beside the gradients of any layer, whatever its unit
        self.power = problem.activation(problem.targets).var().clamp(min=1e-30)
        self.bias_unit = problem.targets.std(1, keepdim=True).clamp(min=1e-12)
        self.bias = start.bias / self.bias_unit
        self.start_grid = start.grid
        self.learn_grid = learn_grid and start.grid is not None
        self.log_input = torch.zeros(())
        self.zero_point = start.grid.zero_point.float() if start.grid is not None else torch.zeros(())
        self.signed = start.grid is not None and int(start.grid.zero_point) > 0

    def groups(self, rates: StepSizes) -> list[dict[str, object]]:
        """Adam's parameter groups; fixed codes and fixed grids have none."""
        chosen = [(self.log_scale, rates.weight_scale), (self.bias, rates.bias)]
        if self.fixed_codes is None:
            chosen.append((self.levels, rates.weight))
        if self.learn_grid:
            chosen.append((self.log_input, rates.activation_scale))
            if self.signed:  # after a ReLU the zero point is 0 and stays
                chosen.append((self.zero_point, rates.zero_point))
        return [{"params": [tensor.requires_grad_()], "lr": rate, "initial_lr": rate} for tensor, rate in chosen]

    def inputs(self, rows: Tensor) -> Tensor:
        x = self.problem.patches[:, rows]
        if self.start_grid is None:
            return x
        if not self.learn_grid:
            return self.start_grid.quantize(x)
        scale = self.start_grid.scale * self.log_input.exp()
        return learned_fake_quantize(x, scale, self.zero_point, 0, self.start_grid.qmax)

    def weight(self) -> Tensor:
        scale = (self.start_scale * self.log_scale.exp())[..., None]
        if self.fixed_codes is not None:
            return self.fixed_codes.float() * scale
        return torch.clamp(round_through(self.levels), *self.limits) * scale

    def loss(self, rows: Tensor) -> Tensor:
        problem = self.problem
        output = self.inputs(rows) @ self.weight().transpose(1, 2) + self.bias * self.bias_unit
        error = problem.activation(output) - problem.activation(problem.targets[:, rows])
        return error.square().mean() / self.power

    @torch.no_grad()
    def fit(self, before: float) -> Fit:
        """The layer that these values stand for, judged on the held-out rows."""
        scale = (self.start_scale * self.log_scale.exp()).clamp(min=SMALLEST_SCALE)
        codes = self.fixed_codes if self.fixed_codes is not None else self.levels.round().clamp(*self.limits)
        grid = self.start_grid
        if grid is not None and self.learn_grid:
            zero_point = self.zero_point.round().clamp(0, grid.qmax).to(torch.int32)
            grid = Grid(grid.scale * self.log_input.exp(), zero_point, grid.qmax)
        x = self.problem.patches[:, self.problem.held_out]
        inputs = x if grid is None else grid.quantize(x)
        bias = self.bias * self.bias_unit
        held_out = self.problem.held_out
        view = LayerProblem(inputs, self.problem.targets[:, held_out], self.problem.weight, bias, held_out, held_out,
                            self.problem.activation)  # fmt: skip
        after = view.error(inputs, codes.float() * scale[..., None], bias, torch.arange(len(held_out)))
        return Fit(codes.to(torch.int8).clone(), scale.clone(), bias.clone(), grid, before, after)


def fit_layer(
    problem: LayerProblem,
    start: Fit,
    bits: int,
    *,
    steps: int,
    rates: StepSizes,
    generator: torch.Generator,
    codes: Tensor | None = None,
    learn_grid: bool = True,
) -> Fit:
    """The layer fitted to its float output; never worse than `start` on the held-out rows.

    Args:
        steps: of Adam.
        codes: int8 (groups, O, K) that must stay as they are (a layer that shares its weights), or None.
        learn_grid: whether the input's scale and zero point may move (nothing else reads them).
    """
    best = start
    for candidate in _iterates(problem, start, bits, steps, rates, generator, codes, learn_grid):
        if candidate.after < best.after and math.isfinite(candidate.after):
            best = candidate
    return best


def _iterates(
    problem: LayerProblem,
    start: Fit,
    bits: int,
    steps: int,
    rates: StepSizes,
    generator: torch.Generator,
    codes: Tensor | None,
    learn_grid: bool,
) -> Iterator[Fit]:
    """The start with its bias corrected, then the iterates at CHECKS moments of the descent."""
    corrected = correct_bias(problem, start)
    parameters = _Parameters(problem, corrected, bits, codes=codes, learn_grid=learn_grid)
    yield corrected
    optimizer = torch.optim.Adam(parameters.groups(rates))
    rows = max(BATCH_ROWS[0], min(BATCH_ROWS[1], BATCH_VALUES // problem.patches[:, 0].numel()))
    checks = {round(steps * (k + 1) / CHECKS) for k in range(CHECKS)}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        picked = torch.randint(len(problem.fitted), (rows,), generator=generator).to(problem.fitted.device)
        loss = parameters.loss(problem.fitted[picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step + 1 in checks:
            yield parameters.fit(start.before)
