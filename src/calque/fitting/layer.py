"""One layer from its problem to its fit: scales, rounding, then AdaQuant, the closed forms or the bias correction alone."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from calque.fitting.adaquant import Draw, Linear, fit_layer
from calque.fitting.closed_form import ClosedFormSolver
from calque.fitting.problem import Fit, Grid, LayerProblem, correct_bias, covariance, round_to_nearest
from calque.fitting.units import Units
from calque.grid.arithmetic import SMALLEST_SCALE, smallest_weight_scale, weight_codes
from calque.grid.ranges import WeightRange, weight_scale
from calque.network import Geometry
from calque.quantized.modules import QuantizedLayer
from calque.run.checkpoint import Piece
from calque.settings import AdaQuant, ClosedForm, Method


def reads_whole_inputs(method: Method) -> bool:
    """Whether the steps of a fit see all output positions of some inputs, and not the sampled ones."""
    return isinstance(method, AdaQuant) and method.patches == "all"


def solve_(
    problem: LayerProblem,
    grid: Grid | None,
    bits: int,
    method: Method,
    generator: torch.Generator,
    *,
    weight_range: WeightRange,
    learn_grid: bool = True,
    tied: tuple[Tensor, Tensor] | None = None,
    rows: tuple[Draw, Linear] | None = None,
) -> Fit:
    """The layer at `bits`, on held-out rows never worse than with its weights rounded to nearest.

    Args:
        problem: its rows are left in the layer's own units.
        grid: where the fit of the input's grid starts; None where the input is float.
        weight_range: estimator of the scales that are rounded on, and that AdaQuant starts from.
        learn_grid: whether the grid may move.
        tied: codes (groups, O, K) and scales of an earlier call of the same module; its codes are kept.
        rows: what each step of AdaQuant sees; see `fit_layer`.
    """
    units = Units.of(problem)
    problem, grid, rows = units.problem_(problem), units.grid(grid), units.rows(rows)
    if tied is not None:
        tied = tied[0], units.weights(tied[1])
    if isinstance(method, ClosedForm) and tied is None:
        return units.real(ClosedFormSolver(problem, grid, rounds=method.rounds).fit(bits))
    start, codes = _rounded(problem, grid, bits, weight_range, tied)
    return units.real(_fitted(problem, start, bits, method, generator, codes=codes, learn_grid=learn_grid, rows=rows))


def _rounded(
    problem: LayerProblem, grid: Grid | None, bits: int, weight_range: WeightRange, tied: tuple[Tensor, Tensor] | None
) -> tuple[Fit, Tensor | None]:
    """The layer with its weights rounded to nearest, and the codes that must stay."""
    if tied is not None:
        codes, scale = tied
        return round_to_nearest(problem, scale, grid, bits, codes), codes
    moments = covariance(problem) if weight_range == "output" else None
    scale = weight_scale(problem.weight, bits, weight_range, moments, problem.group)
    return round_to_nearest(problem, scale, grid, bits), None


def _fitted(
    problem: LayerProblem,
    start: Fit,
    bits: int,
    method: Method,
    generator: torch.Generator,
    *,
    codes: Tensor | None,
    learn_grid: bool,
    rows: tuple[Draw, Linear] | None,
) -> Fit:
    """The rounded layer after AdaQuant; by the other methods, with its bias corrected where that helps."""
    if isinstance(method, AdaQuant):
        return fit_layer(
            problem, start, bits, steps=method.steps, rates=method.rates, generator=generator, codes=codes,
            learn_grid=learn_grid, rows=rows,
        )  # fmt: skip
    corrected = correct_bias(problem, start)
    return corrected if corrected.after < start.after else start


def solve_each_(
    problem: LayerProblem,
    grid: Grid | None,
    generators: Mapping[int, torch.Generator],
    method: Method,
    *,
    weight_range: WeightRange,
    rows: tuple[Draw, Linear] | None = None,
) -> dict[int, Fit]:
    """The layer at each of the bits that `generators` names, as `solve_` fits it; the closed forms share their moments."""
    units = Units.of(problem)
    problem, grid, rows = units.problem_(problem), units.grid(grid), units.rows(rows)
    if isinstance(method, ClosedForm):
        shared = ClosedFormSolver(problem, grid, rounds=method.rounds)
        return {bits: units.real(shared.fit(bits)) for bits in generators}
    found = {}
    for bits, generator in generators.items():
        start, _ = _rounded(problem, grid, bits, weight_range, None)
        fit = _fitted(problem, start, bits, method, generator, codes=None, learn_grid=True, rows=rows)
        found[bits] = units.real(fit)
    return found


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
