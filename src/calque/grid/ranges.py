"""Ranges from data: five estimators for activations, three for weights.

minmax              the extremes (of everything seen)
mean_minmax         the mean over inputs of each input's extremes (Hubara et al. 2021, section 5)
percentile          the PERCENTILE of the sampled values on either side
least_squares       the widest clip whose rounding error on the tensor is within a tolerance of the smallest
output              the same with the error at the layer's output, under float weights
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from calque.grid.arithmetic import SMALLEST_SCALE, affine_grid, binary_unit, fake_quantize, weight_limits

ActivationRange = Literal["minmax", "mean_minmax", "percentile", "least_squares", "output"]
WeightRange = Literal["minmax", "least_squares", "output"]

PERCENTILE = 0.9999


def evenly_spaced(first: float, last: float, count: int) -> list[float]:
    """`count` float32 numbers from `first` to `last`: those of torch.linspace where a processor fuses its products.

    torch is not asked, as modules may be imported under another default dtype or device, or a mode that has no values.

    >>> evenly_spaced(1.0, 0.0, 5)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    low, high = np.float32(first), np.float32(last)
    step = float((high - low) / np.float32(count - 1))
    rising = [float(low) + step * index for index in range(count // 2)]
    falling = [float(high) - step * (count - 1 - index) for index in range(count // 2, count)]
    return np.array(rising + falling, dtype=np.float32).tolist()  # type: ignore[no-any-return]


# Fractions of the largest value, from the widest: fine near 1, where 8 bits are decided, then evenly spaced logarithms:
# torch.logspace(-0.3, -1.5, 16), whose last bits are not the same on all processors.
CLIP_CANDIDATES = [1 - 0.04 * step for step in range(12)] + [
    0.5011872053146362, 0.4168693721294403, 0.3467368483543396, 0.28840312361717224, 0.23988327383995056, 0.19952622056007385,
    0.16595867276191711, 0.13803841173648834, 0.1148153692483902, 0.09549926221370697, 0.07943282276391983, 0.0660693496465683,
    0.05495408922433853, 0.04570882022380829, 0.03801893815398216, 0.03162277489900589,
]  # fmt: skip
WEIGHT_CANDIDATES = evenly_spaced(1.0, 0.2, 60)
TIE = 1e-4  # of a step; x / scale in float32 is off by up to 2e-5 at 255 steps
TIES = 0.01  # share of values that may lie so near to the middle between two codes; evenly spread ones: 2e-4
TIE_STEPS = 8


@dataclass(frozen=True)
class TensorSample:
    """What one streamed pass over a tensor keeps.

    Attributes:
        low, high: extremes over all inputs.  mean_low, mean_high: means of the per-input extremes.
        values: a random sample of the values, float32 (n,).
    """

    low: Tensor
    high: Tensor
    mean_low: Tensor
    mean_high: Tensor
    values: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor], *, count: int, inputs: int, generator: torch.Generator) -> "TensorSample":
        """The sample of about `count` values of tensors (N, ...) with `inputs` rows in all, the same share of each."""

        def seen(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            flat = batch.reshape(batch.shape[0], -1)
            low, high = flat.aminmax(dim=1)
            share = max(1, count * batch.shape[0] // inputs)
            if batch.numel() <= share:
                return low, high, flat.reshape(-1)
            picked = torch.randint(batch.numel(), (share,), generator=generator)
            return low, high, flat.reshape(-1)[picked.to(batch.device)]

        low, high, values = map(torch.cat, zip(*map(seen, batches), strict=True))
        return cls(low.min(), high.max(), low.mean(), high.mean(), values)


def extremes(values: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The least and the largest of all values."""
    low, high = zip(*map(torch.aminmax, values), strict=True)
    return torch.stack(low).min(), torch.stack(high).max()


def activation_range(
    sample: TensorSample, kind: ActivationRange, bits: int, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(low, high) of a tensor by an estimator that needs no layer ("output" is `search_range` with a layer's error).

    >>> gradient = torch.linspace(0, 1, 101)[None]
    >>> sample = TensorSample.of([gradient], count=1000, inputs=1, generator=torch.Generator())
    >>> activation_range(sample, "minmax", 8)
    (tensor(0.), tensor(1.))
    """
    if kind == "minmax":
        return sample.low.clamp(max=0), sample.high.clamp(min=0)
    if kind == "mean_minmax":
        return sample.mean_low.clamp(max=0), sample.mean_high.clamp(min=0)
    if kind == "percentile":
        ordered = sample.values.sort().values
        rank = round(PERCENTILE * (len(ordered) - 1))
        return ordered[len(ordered) - 1 - rank].clamp(max=0), ordered[rank].clamp(min=0)

    unit = binary_unit(sample.values)

    def error(scale: Tensor, zero_point: Tensor) -> float:
        quantized = fake_quantize(sample.values, scale, zero_point, 0, 2**bits - 1)
        return ((quantized - sample.values) / unit).square_().sum(dtype=torch.float64).item()

    return search_range(sample.low, sample.high, bits, error, tolerance)


def search_range(
    low: Tensor, high: Tensor, bits: int, error: Callable[[Tensor, Tensor], float], tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The widest (low, high), both shrunk and then each alone, whose grid's error is within a tolerance of the least.

    Args:
        error: of a grid's (scale, zero_point).
        tolerance: a wider range is taken if its error is at most this share above the least: clipping errors, unlike
            rounding errors, add up over the layers (docs/experiments.md).
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    tried: list[tuple[float, Tensor, Tensor]] = []

    def least(candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        for candidate in candidates:
            loss = error(*affine_grid(*candidate, bits))
            tried.append((math.inf if math.isnan(loss) else loss, *candidate))  # an overflow is no reason to be chosen
        return min(tried, key=lambda case: case[0])[1:]

    chosen = least([(low * fraction, high * fraction) for fraction in CLIP_CANDIDATES])
    if low < 0 < high:
        finer = [1.5, 1.2, *(fraction for fraction in CLIP_CANDIDATES if fraction > 0.3)]
        chosen = least([((chosen[0] * f).clamp(min=low), chosen[1]) for f in finer])
        least([(chosen[0], (chosen[1] * f).clamp(max=high)) for f in finer])
    enough = min(case[0] for case in tried) * (1 + tolerance)
    _, low, high = max((case for case in tried if case[0] <= enough), key=lambda case: (case[2] - case[1]).item())
    return low, high


def off_ties(values: Tensor, scale: Tensor) -> Tensor:
    """The scale, widened by up to 8 / 4096 where many values lie exactly between two codes.

    Runtimes that multiply by the reciprocal of a scale round these to the other side than those that divide. Images of 8 bits
    are such values: normalized to (-1, 1), all 256 levels lie between two of the codes of that range.

    >>> image = torch.arange(256) / 127.5 - 1
    >>> off_ties(image, torch.tensor(1 / 127.5)) * 127.5
    tensor(1.0002)
    >>> off_ties(image / 2, torch.tensor(1 / 127.5)) * 127.5
    tensor(1.)
    """

    def ties(candidate: Tensor) -> float:
        steps = values / candidate
        return ((steps - steps.floor() - 0.5).abs() < TIE).double().mean().item()

    candidates = [scale * (1 + step / 4096) for step in range(TIE_STEPS + 1)]
    return next((candidate for candidate in candidates if ties(candidate) <= TIES), min(candidates, key=ties))


def weight_scale(
    weight: Tensor, bits: int, kind: WeightRange, covariance: Tensor | None = None, group: int | None = None
) -> Tensor:
    """Scales (groups, rows) of weights (groups, rows, K), one per row; (1, rows, K / group) of weights (1, rows, K) in groups.

    "minmax" is the smallest scale that clips nothing. The others try WEIGHT_CANDIDATES fractions of it and keep, per row,
    the one with the smallest rounding error e = q - w: e e^T ("least_squares"), or e H e^T ("output").

    Args:
        covariance: H (groups, K, K), the centred second moments of the layer's input patches; for "output".
        group: how many neighbouring weights of a row share a scale; of H their own block counts.
    """
    if group is not None:
        apart = weight[0].reshape(len(weight[0]), -1, group).transpose(0, 1)
        blocks = covariance
        if covariance is not None:
            count = len(apart)
            blocks = covariance[0].reshape(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return weight_scale(apart, bits, kind, blocks).mT[None]
    qmin, qmax = weight_limits(bits)
    unit = binary_unit(weight)  # of the errors, whose squares would leave float32
    largest = torch.maximum(weight.amax(-1) / qmax, weight.amin(-1) / qmin).clamp(min=SMALLEST_SCALE)
    if kind == "minmax":
        return largest
    best, scale = torch.full_like(largest, float("inf")), largest
    for fraction in WEIGHT_CANDIDATES:
        candidate = largest * fraction
        codes = (weight / candidate[..., None]).round().clamp(qmin, qmax)
        error = (codes * candidate[..., None] - weight) / unit
        weighted = error if kind == "least_squares" or covariance is None else error @ covariance
        loss = (weighted * error).sum(-1)
        scale = torch.where(loss < best, candidate, scale)
        best = torch.minimum(loss, best)
    return scale
