"""Rounding of weight rows in a quadratic metric: GPTQ, coordinate descent on the codes, scales.

All of it minimizes tr (Q - W) M (Q - W)^T over codes and scales, Q = diag(s) codes, for many matrices at once: tensors are
(B, K, R), B matrices M of size K and R rows of weights each, which lie in columns so that one step of a sweep is contiguous.
Scales are (B, 1, R), or (B, K, R) where groups of inputs have scales of their own.

Source: GPTQ (Frantar et al., 2210.17323): columns in the order of the activations' power, errors carried to those that follow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calque.grid.arithmetic import NEGLIGIBLE, weight_limits
from calque.grid.ranges import evenly_spaced

BLOCK = 64  # columns whose changes reach the others in one product
LEAF = 128  # size of the triangles that are inverted at once
FRACTIONS = evenly_spaced(1.0, 0.15, 60)  # of the smallest scale that clips nothing


@dataclass(frozen=True)
class Metric:
    """M, symmetric positive definite (B, K, K), and the upper triangular U with M^-1 = U^T U."""

    matrix: Tensor
    inverse_root: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Metric":
        """M = A A^T with A upper triangular, from a Cholesky factorisation in reverse order; U = A^-1."""
        root: Tensor = torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1)  # the factor before the flip is not kept
        return cls(matrix, _inverse_upper(root))

    def solve(self, right: Tensor) -> Tensor:
        """M^-1 right, (B, K, R)."""
        return self.inverse_root.mT @ (self.inverse_root @ right)

    def error(self, difference: Tensor) -> Tensor:
        """d^T M d of each row of a difference (B, K, R): (B, R)."""
        return ((self.matrix @ difference) * difference).sum(1)


def _inverse_upper(matrix: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix (B, K, K), by halves: half the time of solving for the columns of 1."""
    size = matrix.shape[-1]
    if size <= LEAF:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        leaf: Tensor = torch.linalg.solve_triangular(matrix, eye, upper=True)
        return leaf
    half = size // 2
    inverse = torch.zeros_like(matrix)
    inverse[:, :half, :half] = first = _inverse_upper(matrix[:, :half, :half])
    inverse[:, half:, half:] = second = _inverse_upper(matrix[:, half:, half:])
    inverse[:, :half, half:] = (first @ (matrix[:, :half, half:] @ second)).neg_()
    return inverse


def initial_scale(weight: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    """Scales (B, 1, R) of weights (B, K, R): the fraction of the widest with the least rounding error, weighted by a diagonal.

    Args:
        diagonal: (B, K) of the metric; the whole metric gains nothing here (docs/experiments.md).
    """
    qmin, qmax = weight_limits(bits)
    widest = torch.maximum(weight.amax(1, True) / qmax, weight.amin(1, True) / qmin).clamp(min=NEGLIGIBLE)
    best, scale = torch.full_like(widest, torch.inf), widest
    for fraction in FRACTIONS:
        candidate = widest * fraction
        rounded = (weight / candidate).round_().clamp_(qmin, qmax).mul_(candidate)
        error = rounded.sub_(weight).square_().mul_(diagonal[:, :, None]).sum(1, keepdim=True)
        scale = torch.where(error < best, candidate, scale)
        best = torch.minimum(error, best)
    return scale


def gptq(metric: Metric, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes (B, K, R), float: rounded one after the other, each error made up for by the columns that follow.

    Args:
        weight: (B, K, R).
    """
    qmin, qmax = weight_limits(bits)
    root = metric.inverse_root
    left, scale = weight.clone(), scale.expand_as(weight)
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for k in range(start, end):
            column = left[:, k]
            codes[:, k] = (column / scale[:, k]).round_().clamp_(qmin, qmax)
            errors[:, k - start] = error = (column - codes[:, k] * scale[:, k]) / root[:, k, k, None]
            left[:, k + 1 : end] -= root[:, k, k + 1 : end, None] * error[:, None]
        left[:, end:] -= root[:, start:end, end:].mT @ errors
    return codes


def descend(metric: Metric, weight: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """One round of coordinate descent: each code in turn where its row's error is least, the others held."""
    qmin, qmax = weight_limits(bits)
    matrix = metric.matrix
    codes, scale = codes.clone(), scale.expand_as(codes)
    slope = matrix @ (codes * scale - weight)
    for start in range(0, codes.shape[1], BLOCK):
        end = min(start + BLOCK, codes.shape[1])
        inside, before = slope[:, start:end].clone(), codes[:, start:end].clone()
        for k in range(start, end):
            step = inside[:, k - start] / (matrix[:, k, k, None] * scale[:, k])
            code = (codes[:, k] - step).round_().clamp_(qmin, qmax)
            change = (code - codes[:, k]) * scale[:, k]
            inside += matrix[:, start:end, k, None] * change[:, None]
            codes[:, k] = code
        slope += matrix[:, :, start:end] @ ((codes[:, start:end] - before) * scale[:, start:end])
    return codes


def refitted_scale(metric: Metric, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scales (B, 1, R) that fit the codes best, s = q^T M w / q^T M q; the old one where that is not positive."""
    image = metric.matrix @ codes
    numerator, denominator = (image * weight).sum(1, keepdim=True), (image * codes).sum(1, keepdim=True)
    fitted = numerator / denominator.clamp(min=torch.finfo(codes.dtype).tiny)
    return torch.where((denominator > 0) & (fitted > NEGLIGIBLE), fitted, scale)


def refitted_groups(metric: Metric, weight: Tensor, codes: Tensor, scale: Tensor, groups: list[Tensor]) -> Tensor:
    """`refitted_scale` of each group in turn, the others held.

    Args:
        scale: (B, K, R).  groups: the inputs of each, int64.
    """
    scale = scale.clone()
    slope = metric.matrix @ (codes * scale - weight)
    for group in groups:
        inside, columns = codes[:, group], metric.matrix[:, :, group]
        bend = ((columns[:, group] @ inside) * inside).sum(1, keepdim=True)
        step = -(slope[:, group] * inside).sum(1, keepdim=True) / bend.clamp(min=torch.finfo(codes.dtype).tiny)
        before = scale[:, group[:1]]
        change = torch.where((bend > 0) & (before + step > NEGLIGIBLE), step, 0.0)
        scale[:, group] += change
        slope += columns @ (inside * change)
    return scale
