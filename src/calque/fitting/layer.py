"""One layer from its problem to its fit: scales, rounding, then AdaQuant, the closed forms or the bias correction alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calque.fitting.adaquant import Draw, Linear, fit_layer
from calque.fitting.closed_form import ClosedForm
from calque.fitting.problem import Fit, Grid, LayerProblem, correct_bias, covariance, round_to_nearest
from calque.fitting.units import Units
from calque.grid.arithmetic import SMALLEST_SCALE, smallest_weight_scale, weight_codes
from calque.grid.ranges import WeightRange, weight_scale
from calque.network import Geometry
from calque.quantized.modules import QuantizedLayer
from calque.recipe import Recipe
from calque.run.checkpoint import Piece
from calque.settings import Solver, StepSizes


@dataclass(frozen=True, slots=True)
class Settings:
    """What a fit reads from a recipe."""

    weight_range: WeightRange
    steps: int  # of AdaQuant, or rounds of the closed form
    rates: StepSizes
    solver: Solver = "adaquant"

    @classmethod
    def of(cls, recipe: Recipe, steps: int) -> "Settings":
        """What a fit of so many steps reads."""
        return cls(recipe.weight_range, steps, recipe.rates, recipe.solver)


def solve_(
    problem: LayerProblem,
    grid: Grid | None,
    bits: int,
    settings: Settings,
    generator: torch.Generator,
    *,
    learn_grid: bool = True,
    tied: tuple[Tensor, Tensor] | None = None,
    rows: tuple[Draw, Linear] | None = None,
) -> Fit:
    """The layer at `bits`, on held-out rows never worse than with its weights rounded to nearest.

    Args:
        problem: its rows are left in the layer's own units.
        grid: where the fit of the input's grid starts; None where the input is float.
        learn_grid: whether the grid may move.
        tied: codes (groups, O, K) and scales of an earlier call of the same module; its codes are kept.
        rows: what each step of AdaQuant sees; see `fit_layer`.
    """
    units = Units.of(problem)
    problem, grid, rows = units.problem_(problem), units.grid(grid), units.rows(rows)
    if tied is not None:
        tied = tied[0], units.weights(tied[1])
    return units.real(_solve(problem, grid, bits, settings, generator, learn_grid=learn_grid, tied=tied, rows=rows))


def _solve(
    problem: LayerProblem,
    grid: Grid | None,
    bits: int,
    settings: Settings,
    generator: torch.Generator,
    *,
    learn_grid: bool,
    tied: tuple[Tensor, Tensor] | None,
    rows: tuple[Draw, Linear] | None,
) -> Fit:
    """`solve_` in the layer's own units."""
    if settings.solver == "closed_form" and tied is None and settings.steps:
        return ClosedForm(problem, grid, rounds=settings.steps).fit(bits)
    if tied is None:
        moments = covariance(problem) if settings.weight_range == "output" else None
        codes, scale = None, weight_scale(problem.weight, bits, settings.weight_range, moments, problem.group)
    else:
        codes, scale = tied
    start = round_to_nearest(problem, scale, grid, bits, codes)
    if not settings.steps or settings.solver == "closed_form":
        corrected = correct_bias(problem, start)
        return corrected if corrected.after < start.after else start
    return fit_layer(
        problem, start, bits, steps=settings.steps, rates=settings.rates, generator=generator, codes=codes,
        learn_grid=learn_grid, rows=rows,
    )  # fmt: skip


def solve_each_(
    problem: LayerProblem,
    grid: Grid | None,
    generators: Mapping[int, torch.Generator],
    settings: Settings,
    *,
    rows: tuple[Draw, Linear] | None = None,
) -> dict[int, Fit]:
    """The layer at each of the bits that `generators` names, as `solve_` fits it; the closed forms share their moments."""
    units = Units.of(problem)
    problem, grid, rows = units.problem_(problem), units.grid(grid), units.rows(rows)
    if settings.solver == "closed_form" and settings.steps:
        shared = ClosedForm(problem, grid, rounds=settings.steps)
        return {bits: units.real(shared.fit(bits)) for bits in generators}
    return {
        bits: units.real(_solve(problem, grid, bits, settings, generator, learn_grid=True, tied=None, rows=rows))
        for bits, generator in generators.items()
    }


def placed(problem: LayerProblem, ready: Fit, grid: Grid | None, bits: int, weight: tuple[Tensor, Tensor]) -> Fit:
    """A fit on float inputs, with these codes and scales, on another grid; the bias corrected where that helps."""
    units = Units.of(problem)
    problem, grid, bias = units.problem(problem), units.grid(grid), units.fit(ready).bias
    moved = round_to_nearest(replace(problem, bias=bias), units.weights(weight[1]), grid, bits, weight[0])
    moved = replace(moved, before=ready.before)
    corrected = correct_bias(problem, moved)
    return units.real(corrected if corrected.after < moved.after else moved)


def fit_to_piece(fit: Fit) -> Piece:
    """The fit as tensors and facts that a checkpoint keeps."""
    tensors = {"codes": fit.codes, "scale": fit.scale, "bias": fit.bias}
    facts: dict[str, object] = {"before": fit.before, "after": fit.after, "qmax": None}
    if fit.grid is not None:
        tensors |= {"grid_scale": fit.grid.scale, "grid_zero_point": fit.grid.zero_point}
        facts["qmax"] = fit.grid.qmax
    return Piece(tensors, facts)


def fit_from_piece(piece: Piece, device: torch.device) -> Fit:
    """The fit that `fit_to_piece` described."""
    tensors = {name: value.to(device) for name, value in piece.tensors.items()}
    grid = None
    if piece.facts["qmax"] is not None:
        grid = Grid(tensors["grid_scale"], tensors["grid_zero_point"], piece.facts["qmax"])
    return Fit(tensors["codes"], tensors["scale"], tensors["bias"], grid, piece.facts["before"], piece.facts["after"])


def integer_layer(
    geometry: Geometry, weight: Tensor, fit: Fit, input_scale: Tensor | None, bits: int
) -> tuple[QuantizedLayer, str]:
    """The fitted layer with an int32 bias; a channel whose bias code would leave int32 gets a larger weight scale.

    So does one whose s_x s_w would be no normal float32.

    Args:
        input_scale: of the grid that the input is on; None where it is float, and then the bias stays float.

    Returns the layer and a sentence about such channels ("" if there are none).
    """
    codes, scale, bias = fit.codes.reshape(weight.shape), fit.scale.flatten(0, 1), fit.bias.reshape(-1)
    if input_scale is None:
        return QuantizedLayer.from_real(geometry, codes, scale.clamp(min=SMALLEST_SCALE), bias, None, bits=bits), ""
    smallest = smallest_weight_scale(bias, input_scale)
    wide = smallest > scale
    note = ""
    if wide.any():
        anew = weight_codes(weight, torch.where(wide, smallest, scale), bits)
        codes = torch.where(wide.reshape(-1, *[1] * (weight.dim() - 1)), anew, codes)
        count = int((wide & weight.flatten(1).any(1)).sum())  # where no weight is lost, nothing is to be said
        if count:
            note = (
                f"{count} channels got a larger weight scale: their bias would not fit 32 bits, or the scale of their sums "
                "would be no normal float32 number."
            )
    return QuantizedLayer.from_real(geometry, codes, scale, bias, input_scale, bits=bits), note
