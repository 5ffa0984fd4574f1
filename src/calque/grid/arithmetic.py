"""Where a number meets a grid: pure functions on tensors.

The quantizer of Hubara et al. 2021 (section 3), affine, uniform, round half to even:

    q = clip(round(x / scale) + zero_point, qmin, qmax)        x^ = scale * (q - zero_point)

x is divided by the scale, never multiplied by its reciprocal: runtimes divide, and the two differ at rounding edges.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it numbers lose digits, and some processors take them for zero
NEGLIGIBLE = (
    2.0**-60
)  # a scale of weights in units of their layer (`calque.fitting.units`): what is smaller adds nothing
BIAS_LIMIT = 2**30  # half of int32, so that accumulator plus bias stays inside it
EXACT_FLOAT32 = 2**24  # integers up to here, and sums of them that stay below, are exact in float32
# Of a requantized sum, in units of 1 + A + B: ten roundings of at most 2^-24 of values below 256, and a half more.
TOGETHER = 2**19  # values at a time: larger temporaries take most of the time to be mapped
SUM_ERROR = 2**-12


def activation_limits(bits: int) -> tuple[int, int]:
    """(qmin, qmax) of unsigned codes: (0, 2^bits - 1).

    >>> activation_limits(4)
    (0, 15)
    """
    return 0, 2**bits - 1


def weight_limits(bits: int) -> tuple[int, int]:
    """(qmin, qmax) of signed codes: (-2^(bits-1), 2^(bits-1) - 1).

    >>> weight_limits(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def binary_unit(x: Tensor) -> float:
    """The power of two below the mean absolute value of x; 1 where that is zero or not finite.

    In such units squares stay inside float32, and no result depends on them: to divide by a power of two rounds nothing.

    >>> binary_unit(torch.tensor([3e-20, -5e-20])) == 2.0**-65
    True
    """
    if x.numel() > TOGETHER:  # of all at once, torch makes a copy in float64
        axis = max(range(x.dim()), key=lambda each: x.shape[each])
        parts = torch.split(x, max(1, TOGETHER * x.shape[axis] // x.numel()), axis)
    else:
        parts = (x,)
    total = sum(torch.linalg.vector_norm(part, 1, dtype=torch.float64).item() for part in parts)
    mean = total / max(1, x.numel())
    if not 0 < mean < math.inf:
        return 1.0
    return 2.0 ** min(max(math.frexp(mean)[1] - 1, -126), 126)  # normal in float32, and so is its reciprocal


def affine_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of the grid of 2^bits points over [low, high], widened to contain 0.

    An empty range tells nothing: [0, 1] is taken, a guess.

    Args:
        low, high: scalars, the range in real units.

    >>> affine_grid(torch.tensor(-1.0), torch.tensor(2.0), 2)
    (tensor(1.), tensor(1, dtype=torch.int32))
    """
    low, high = low.clamp(max=0.0).float(), high.clamp(min=0.0).float()
    qmin, qmax = activation_limits(bits)
    high = torch.where(high > low, high, torch.ones_like(high))
    scale = ((high - low) / (qmax - qmin)).clamp(min=SMALLEST_SCALE)
    zero_point = (qmin - low / scale).round().clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The codes of x, in x's dtype; scale and zero point broadcast against x.

    >>> quantize(torch.tensor([-9.0, 0.0, 0.5, 1.5]), torch.tensor(1.0), torch.tensor(1), 0, 3)
    tensor([0., 1., 1., 3.])
    """
    return x.div(scale).round_().add_(zero_point).clamp_min_(qmin).clamp_max_(qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The real values of codes: scale * (codes - zero_point), float32."""
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """x on its grid, in real units: dequantize(quantize(x)), the same bits with fewer passes over memory.

    >>> fake_quantize(torch.tensor([-9.0, 0.0, 0.5, 1.5]), torch.tensor(1.0), torch.tensor(1), 0, 3)
    tensor([-1.,  0.,  0.,  2.])
    """
    low, high = (qmin - zero_point).to(x.dtype), (qmax - zero_point).to(x.dtype)
    return x.div(scale).round_().clamp_min_(low).clamp_max_(high).mul_(scale)


def round_through(x: Tensor) -> Tensor:
    """round(x) whose gradient is 1 (the straight-through estimator)."""
    return x + (x.round() - x).detach()


def learned_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` with gradients for x (zero outside the clip), scale and a real zero point.

    Source: LSQ (Esser et al., 1902.08153), to which Hubara et al. 2021 refer for the scale's gradient.
    """
    offset = round_through(zero_point)
    codes = torch.clamp(round_through(x / scale) + offset, qmin, qmax)
    return (codes - offset) * scale


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """`values` (C,) reshaped to broadcast along axis 0 of `like` (C, ...); (C, G), each repeated for a group of K / G of (C, K).

    >>> per_channel(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 4))
    tensor([[1., 1., 2., 2.]])
    """
    return values.reshape(-1, *[1] * (like.dim() - 1)) if values.dim() == 1 else by_input(values, like)


def by_input(scale: Tensor, like: Tensor) -> Tensor:
    """Scales of weight rows (..., K) that broadcast against them.

    Args:
        scale: (...), one for a row, or (..., G), one for each group of K / G inputs of a row.
        like: (..., K).
    """
    if scale.dim() < like.dim():
        return scale[..., None]
    return scale.repeat_interleave(like.shape[-1] // scale.shape[-1], -1)


def weight_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes (int8) of a weight (C_out, ...) with one scale per output channel (C_out,), or per group (C_out, G).

    >>> weight_codes(torch.tensor([[0.5, -3.0], [0.3, 0.1]]), torch.tensor([0.5, 0.1]), 2)
    tensor([[ 1, -2],
            [ 1,  1]], dtype=torch.int8)
    """
    qmin, qmax = weight_limits(bits)
    return (weight / per_channel(scale, weight)).round().clamp(qmin, qmax).to(torch.int8)


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """Codes (int32) of a bias (C_out,) on the accumulator's grid, whose scale is s_x * s_w (C_out,).

    >>> bias_codes(torch.tensor([1.0, -0.26]), torch.tensor([0.5, 0.1]))
    tensor([ 2, -3], dtype=torch.int32)
    """
    return (bias.double() / scale.double()).round().clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)


def smallest_weight_scale(bias: Tensor, input_scale: Tensor) -> Tensor:
    """The least weight scales (C_out,) with which codes of the bias fit 32 bits, and s_w and s_x s_w are normal numbers.

    >>> smallest_weight_scale(torch.tensor([3.0 * 2**30]), torch.tensor(2.0))
    tensor([1.5000])
    """
    fits = (bias.abs() / input_scale / BIAS_LIMIT).to(input_scale.dtype) * (1 + 1e-6)
    return torch.maximum(fits, 2 * SMALLEST_SCALE / input_scale.clamp(max=1.0))


def requantize(
    accumulator: Tensor, multiplier: Tensor, zero_point: Tensor | int, qmin: Tensor | int, qmax: Tensor | int
) -> Tensor:
    """Codes of an int32 accumulator on the next grid, as integer kernels compute them.

    The accumulator as float32, times one float32 factor s_x s_w / s_y, rounded half to even, plus the zero point, clipped.

    Args:
        accumulator: integers (exactly represented, any dtype).
        multiplier: float32, broadcasts against the accumulator.

    >>> one = torch.tensor(1.0)
    >>> requantize(torch.tensor([5, -7, 99]), 0.5 * one, one, 0 * one, 15 * one)
    tensor([ 3.,  0., 15.])
    """
    return (accumulator.float() * multiplier).round_().add_(zero_point).clamp_(int(qmin), int(qmax))


class Grids(NamedTuple):
    """Scale and zero point of both operands of an operator and of its result."""

    left: tuple[float, int]
    right: tuple[float, int]
    result: tuple[float, int]


def requantize_sum(left: Tensor, right: Tensor, grids: Grids, low: int, high: int) -> Tensor:
    """Offsets (codes minus the zero point) of left + right on the result's grid, as ONNX Runtime's QLinearAdd computes them.

    With float32 factors A = s_a / s_y and B = s_b / s_y, and fused multiply-adds (one rounding each, to float32):

        q = round(A q_a + (B q_b + (z_y - (A z_a + B z_b))))

    The quotient of the real sum by s_y, which is cheap, is close to that: the multiply-adds are computed, in float64, only
    where rounding errors could decide which code is the nearest.

    Args:
        left, right: real values on their grids, of shapes that broadcast.
        low, high: offsets, the ends of the clip.

    >>> grids = Grids((1.0, 0), (0.5, 0), (2.0, 0))
    >>> requantize_sum(torch.tensor([1.0, 9.0]), torch.tensor([0.5, 9.0]), grids, 0, 7)
    tensor([1., 7.])
    """
    (left_scale, left_zero), (right_scale, right_zero), (scale, zero) = grids
    a, b = float32(left_scale / scale), float32(right_scale / scale)
    quotient = (left + right).div_(scale)
    offsets = quotient.round()
    distance = quotient.sub_(offsets).abs_()
    close = (distance >= 0.5 - SUM_ERROR * (1 + a + b)).flatten().nonzero().squeeze(1)
    if len(close):
        fixed = float32(zero - float32(a * left_zero + float32(b * right_zero)))
        first = torch.take(left.expand_as(offsets), close).div_(left_scale).round_().add_(left_zero)
        second = torch.take(right.expand_as(offsets), close).div_(right_scale).round_().add_(right_zero)
        inner = second.double().mul_(b).add_(fixed).float()
        exact = first.double().mul_(a).add_(inner.double()).float()
        values = exact.round_().sub_(zero).to(offsets.dtype)
        offsets = offsets.flatten().index_put_((close,), values).view(offsets.shape)  # put_ refuses to be deterministic
    return offsets.clamp_(low, high)


def float32(value: float) -> float:
    """The nearest float32; of a quotient, a product or a sum of float32 numbers it is what float32 arithmetic gives.

    >>> float32(0.1)
    0.10000000149011612
    """
    return float(np.float32(value))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, signed, fitting `bits`) as a dense bit string: uint8, (ceil(numel * bits / 8),).

    Bit k of code i is bit i * bits + k of the string; bit 0 of a byte is its lowest.

    >>> pack(torch.tensor([1, -1, 2], dtype=torch.int8), 4)
    tensor([241,   2], dtype=torch.uint8)
    """
    planes = torch.arange(bits, device=codes.device)
    string = ((codes.reshape(-1, 1).int() >> planes) & 1).reshape(-1)
    string = torch.nn.functional.pad(string, (0, -string.numel() % 8)).reshape(-1, 8)
    return (string << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: signed codes (int8) of the given shape.

    >>> unpack(torch.tensor([241, 2], dtype=torch.uint8), 4, (3,))
    tensor([ 1, -1,  2], dtype=torch.int8)
    """
    count = int(torch.Size(shape).numel())
    string = (packed.reshape(-1, 1).int() >> torch.arange(8, device=packed.device)) & 1
    fields = string.reshape(-1)[: count * bits].reshape(count, bits)
    codes = (fields << torch.arange(bits, device=packed.device)).sum(1)
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8).reshape(shape)
