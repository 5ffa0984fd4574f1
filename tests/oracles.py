"""Slow and obvious NumPy versions, written from METHOD.md and not from the code that they judge."""

import itertools
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Whole = NDArray[np.int64]
Number = TypeVar("Number", np.float32, np.int64)


def round_half_even(value: Fraction) -> int:
    """The nearest whole number; a tie goes to the even one."""
    below = value.numerator // value.denominator
    rest = value - below
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1):
        return below + 1
    return below


def quantize(x: Array, scale: float, zero_point: int, qmin: int, qmax: int) -> Whole:
    """q = clip(round(x / s) + z, qmin, qmax), number by number; only the division is float32."""
    codes = np.empty(x.shape, np.int64)
    for index in np.ndindex(*x.shape):
        ratio = Fraction(float(np.float32(x[index]) / np.float32(scale)))
        codes[index] = min(max(round_half_even(ratio) + zero_point, qmin), qmax)
    return codes


def dequantize(codes: Whole, scale: float, zero_point: int) -> Array:
    """x^ = s (q - z), rounded to float32 once."""
    return (codes - zero_point).astype(np.float32) * np.float32(scale)


def bias_code(bias: float, scale: float) -> int:
    """The bias on the accumulator's grid, half to even; the division is float64's."""
    return round_half_even(Fraction(bias / scale))


def requantize(accumulator: int, multiplier: float, zero_point: int, qmin: int, qmax: int) -> int:
    """Int32 accumulator times one float32 factor, round half to even, add the zero point, clip."""
    product = np.float32(accumulator) * np.float32(multiplier)
    return min(max(round_half_even(Fraction(float(product))) + zero_point, qmin), qmax)


def add(left: Whole, right: Whole, scales: tuple[float, float, float], zero_points: tuple[int, int, int]) -> Whole:
    """Codes of a sum before the clip, by QLinearAdd's fused multiply-adds; products of codes and factors fit float64."""
    a, b = (np.float32(scale) / np.float32(scales[2]) for scale in scales[:2])
    za, zb, zy = zero_points
    offset = np.float32(np.float64(a) * za + np.float64(b * np.float32(zb)))
    inner = (np.float64(b) * right + np.float64(np.float32(zy) - offset)).astype(np.float32)
    return np.rint((np.float64(a) * left + np.float64(inner)).astype(np.float32)).astype(np.int64)


def grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of the 2^bits points over [low, high] with 0 in it, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round_half_even(Fraction(-low / scale))


def rounding_error(x: Array, scale: float, zero_point: int, bits: int) -> float:
    """Sum of squared rounding errors in float64."""
    x64 = x.astype(np.float64)
    codes = np.clip(np.rint(x64 / scale) + zero_point, 0, 2**bits - 1)
    return float((((codes - zero_point) * scale - x64) ** 2).sum())


def pack(codes: list[int], bits: int) -> bytes:
    """Bit k of code i is bit i * bits + k of the string; bit 0 of a byte is its lowest."""
    string = 0
    for position, code in enumerate(codes):
        string |= (code % 2**bits) << (position * bits)
    return string.to_bytes((len(codes) * bits + 7) // 8, "little")


def convolution(
    x: NDArray[Number],
    weight: NDArray[Number],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> NDArray[Number]:
    """Cross-correlation by loops, in the type of the inputs; padding is (top, left, bottom, right)."""
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    height = (x.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    result = np.zeros((x.shape[0], out_channels, height, width), x.dtype)
    for n, o, i, j in itertools.product(*map(range, result.shape)):
        first = (o // (out_channels // groups)) * per_group
        rows = slice(i * stride[0], i * stride[0] + dilation[0] * (kernel_h - 1) + 1, dilation[0])
        columns = slice(j * stride[1], j * stride[1] + dilation[1] * (kernel_w - 1) + 1, dilation[1])
        result[n, o, i, j] = (x[n, first : first + per_group, rows, columns] * weight[o]).sum()
    return result


def linear(x: NDArray[Number], weight: NDArray[Number]) -> NDArray[Number]:
    """x W^T by loops, in the type of the inputs."""
    result = np.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)
    for index in np.ndindex(*result.shape):
        result[index] = (x[index[:-1]] * weight[index[-1]]).sum()
    return result
