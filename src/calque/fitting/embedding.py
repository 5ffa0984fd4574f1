"""Embeddings: rows of a table rounded to nearest on scales of their own; nothing is summed, so nothing else is to be fitted."""

import torch
from torch import Tensor

from calque.fitting.problem import CONSTANT, Fit
from calque.grid.arithmetic import binary_unit, weight_limits
from calque.grid.ranges import WeightRange, weight_scale


@torch.no_grad()
def fit_table(weight: Tensor, bits: int, weight_range: WeightRange, tied: tuple[Tensor, Tensor] | None = None) -> Fit:
    """The table (rows, width) with a scale per row, by least squares unless the recipe's range is "minmax".

    Args:
        tied: codes (1, rows, width) and scales (1, rows) that it must have.
    """
    rows = weight[None]
    largest = weight_scale(rows, bits, "minmax")
    before = _error(rows, _codes(rows, largest, bits), largest)
    if tied is not None:
        codes, scale = tied
    elif weight_range == "minmax":
        codes, scale = _codes(rows, largest, bits), largest
    else:
        scale = weight_scale(rows, bits, "least_squares")
        codes = _codes(rows, scale, bits)
    return Fit(codes.to(torch.int8), scale, weight.new_zeros(1, 1, 0), None, before, _error(rows, codes, scale))


def _codes(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (rows / scale[..., None]).round().clamp(*weight_limits(bits))


def _error(rows: Tensor, codes: Tensor, scale: Tensor) -> float:
    """Squared error over the power of the rows about their mean."""
    unit = binary_unit(rows)
    error = ((codes * scale[..., None] - rows) / unit).square().mean(dtype=torch.float64)
    power = ((rows - rows.mean(1, keepdim=True)) / unit).square().mean(dtype=torch.float64)
    return (error / power.clamp(min=CONSTANT)).item()
