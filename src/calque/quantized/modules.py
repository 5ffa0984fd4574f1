"""The modules that stand in a quantized network: a quantizer on an edge, and a layer with integer weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calque.errors import SpecError
from calque.grid.arithmetic import (
    EXACT_FLOAT32,
    activation_limits,
    bias_codes,
    fake_quantize,
    float32,
    per_channel,
    requantize,
    smallest_weight_scale,
)
from calque.network import Geometry

TOGETHER = 2**21  # values of a layer's input at a time, where only a few rows are needed


@dataclass(frozen=True)
class Settled:
    """Real values that an integer kernel has put on the grid of the quantizer that reads them."""

    values: Tensor


class Quantizer(nn.Module):
    """Puts a tensor on an affine grid of unsigned codes: x -> scale * (q - zero_point).

    Attributes:
        scale: float32 scalar.  zero_point: int32 scalar in [0, 2^bits - 1].  bits: of the codes.

    >>> q = Quantizer(torch.tensor(0.5), torch.tensor(1), bits=2)
    >>> q(torch.tensor([-3.0, 0.2, 0.8]))
    tensor([-0.5000,  0.0000,  1.0000])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, *, bits: int):
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = activation_limits(bits)
        if scale.dim() or not (torch.isfinite(scale) and scale > 0):
            raise SpecError(f"a quantizer's scale must be a finite positive scalar. Got {scale}.")
        if zero_point.dim() or not self.qmin <= zero_point <= self.qmax:
            raise SpecError(f"a quantizer's zero point must lie in [{self.qmin}, {self.qmax}]. Got {zero_point}.")
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("zero_point", zero_point.detach().clone().to(torch.int32))

    def forward(self, x: Tensor | Settled) -> Tensor:
        if isinstance(x, Settled):
            return x.values
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def requantize(self, sums: Tensor, multiplier: Tensor, bounds: tuple[float, float]) -> Tensor:
        """The offsets (codes minus the zero point) of whole-number sums, times one float32 multiplier and clipped to `bounds`."""
        low, high = self.offset_bounds(bounds)
        return requantize(sums, multiplier, 0, low, high)

    def offsets(self, x: Tensor) -> Tensor:
        """The offsets, whole numbers, of real values that are on this grid."""
        return x.div(self.scale).round_()

    def real(self, offsets: Tensor) -> Tensor:
        """The real values of offsets, which are overwritten."""
        return offsets.to(self.scale.dtype).mul_(self.scale)

    @property
    def constants(self) -> tuple[float, int]:
        """Scale and zero point as numbers."""
        return self.scale.item(), int(self.zero_point)

    def offset_bounds(self, bounds: tuple[float, float]) -> tuple[int, int]:
        """The offsets that a clip of real values to `bounds` leaves; rounding is monotone, so the bounds may be rounded."""
        scale, zero = self.constants
        quotients = (float32(float32(end) / scale) for end in bounds)
        low, high = (round(min(max(end, self.qmin - zero), self.qmax - zero)) for end in quotients)
        return low, high

    @property
    def reach(self) -> int:
        """The largest magnitude of an offset."""
        _, zero = self.constants
        return max(zero - self.qmin, self.qmax - zero)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest real value on the grid."""
        low = (self.qmin - self.zero_point) * self.scale
        high = (self.qmax - self.zero_point) * self.scale
        return low.item(), high.item()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale.item():.4g}, zero_point={self.zero_point.item()}"


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with integer weights: `geometry.apply(x, codes * scale, bias)`.

    Where the input is on a grid, its whole-number offsets times the codes are summed, as integer kernels do it: float32 sums of
    whole numbers are exact below 2^24, and a layer whose sums could be larger is computed in pieces of its inputs.

    Attributes:
        codes: int8 (C_out, ...), within `bits`.  scale: float32 (C_out,), or (C_out, G) for G groups of inputs.
        bias: int32 (C_out,) in units of `bias_scale` = s_x * s_w, or float32 where the input is float.
        bias_scale: float32 (C_out,), or None where the input is float.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    bias_scale: Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor,
        bias_scale: Tensor | None,
        *,
        bits: int,
    ):
        super().__init__()
        biases = (geometry.biases(codes),)
        if codes.dtype != torch.int8 or scale.shape[:1] != codes.shape[:1] or bias.shape != biases:
            raise SpecError(
                "a quantized layer needs int8 codes (C_out, ...), a scale (C_out,) and a bias (C_out,), (0,) for a table. Got "
                f"{codes.dtype} {tuple(codes.shape)}, {tuple(scale.shape)} and {tuple(bias.shape)}."
            )
        grouped = (
            scale.dim() == 2
            and geometry.kind == "linear"
            and bias_scale is None
            and codes.shape[1] % scale.shape[1] == 0
        )
        if scale.dim() != 1 and not grouped:
            raise SpecError(
                "scales of groups (C_out, G) are for linear layers on float inputs, of a multiple of G. Got "
                f"{tuple(scale.shape)} for codes {tuple(codes.shape)}."
            )
        self.geometry = geometry
        self.bits = bits
        self.register_buffer("codes", codes.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("bias_scale", None if bias_scale is None else bias_scale.detach().clone())
        # in lists, so that these are no sub-modules
        self._source: list[Quantizer] = []
        self._next: list[tuple[Quantizer, tuple[float, float]]] = []
        self._parts: int | None = None
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]  # torch has no types here

    @classmethod
    def from_real(
        cls,
        geometry: Geometry,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor,
        input_scale: Tensor | None,
        *,
        bits: int,
    ) -> "QuantizedLayer":
        """The layer with a real bias; the scale of a channel whose bias code would leave int32 is made larger.

        So is one whose s_x s_w would be no normal float32.

        Args:
            bias: (C_out,) in real units.
            input_scale: s_x; None where the input is float, and then the bias stays float.
        """
        if input_scale is None:
            return cls(geometry, codes, scale, bias.to(scale.dtype), None, bits=bits)
        wide = torch.maximum(scale, smallest_weight_scale(bias, input_scale))
        bias_scale = input_scale * wide
        return cls(geometry, codes, wide, bias_codes(bias, bias_scale), bias_scale, bits=bits)

    def feed(self, grid: Quantizer, bounds: tuple[float, float]) -> None:
        """Makes `forward` return values on `grid`, clipped to `bounds`, requantized as integer kernels do it.

        For a layer whose result goes to that quantizer alone, through a clip to `bounds` at most. The quantizer then changes
        nothing; but y / s_y of a rounded y is not always the code that one factor s_x s_w / s_y gives.
        """
        self._next = [(grid, bounds)]

    def feeds(self, grid: Quantizer) -> bool:
        """Whether `forward` returns values on that grid."""
        return bool(self._next) and self._next[0][0] is grid

    def read(self, grid: Quantizer) -> None:
        """Says on which grid the input is: how large sums can become follows from it."""
        self._source, self._parts = [grid], None

    @property
    def source(self) -> Quantizer | None:
        """The grid that the input is on, where it is on one."""
        return self._source[0] if self._source else None

    def alone(self) -> "QuantizedLayer":
        """A copy of the layer that feeds no grid: its `forward` returns the real sums."""
        return QuantizedLayer(self.geometry, self.codes, self.scale, self.bias, self.bias_scale, bits=self.bits)

    @property
    def group(self) -> int | None:
        """How many inputs share a scale; None: all of a channel."""
        return None if self.scale.dim() == 1 else self.codes.shape[1] // self.scale.shape[1]

    @property
    def weight(self) -> Tensor:
        """The weights in real units, float32."""
        return self.codes.to(self.scale.dtype) * per_channel(self.scale, self.codes)

    @property
    def real_bias(self) -> Tensor:
        """The bias in real units, float32."""
        return self.bias if self.bias_scale is None else self.bias.to(self.scale.dtype) * self.bias_scale

    def forward(self, x: Tensor) -> Tensor:
        geometry, bias_scale = self.geometry, self.bias_scale
        if bias_scale is None:
            return geometry.apply(x, self.weight, self.bias)
        sums = self.sums(x.div(bias_scale[0] / self.scale[0]).round_())
        if not self._next:
            return sums.mul_(geometry.along_channels(bias_scale))
        grid, bounds = self._next[0]
        return grid.real(grid.requantize(sums, geometry.along_channels(bias_scale / grid.scale), bounds))

    def sums(self, offsets: Tensor) -> Tensor:
        """The exact sums of offsets times codes plus the bias, rounded to the offsets' dtype once."""
        if self._parts is None:
            self._parts = self._count_parts()
        codes, bias = self.codes.to(offsets.dtype), self.bias.to(offsets.dtype)
        if self._parts == 1:
            return self.geometry.apply(offsets, codes, bias)
        if self._parts == 0:
            exact = self.geometry.apply(offsets.double(), codes.double(), self.bias.double())
            return exact.to(offsets.dtype)
        axis = -1 if self.geometry.kind == "linear" else 1
        pieces = zip(offsets.chunk(self._parts, axis), codes.chunk(self._parts, 1), strict=True)
        total = sum(self.geometry.apply(x, weight, None).double() for x, weight in pieces)
        return (total + self.geometry.along_channels(self.bias)).to(offsets.dtype)

    def _count_parts(self) -> int:
        """In how many pieces of the inputs every float32 sum is exact; 0 where in none, for float64."""
        low, high = -255, 255
        if self._source:
            grid, zero = self._source[0], int(self._source[0].zero_point)
            low, high = grid.qmin - zero, grid.qmax - zero
        bias = int(self.bias.abs().max()) if self.bias.numel() else 0
        if bias + max(high, -low) * (self.codes[0].numel() << (self.bits - 1)) < EXACT_FLOAT32:
            return 1
        if bias + _largest_sum(self.codes, low, high) < EXACT_FLOAT32:
            return 1
        inputs = self.codes.shape[1] if self.geometry.groups == 1 else 0
        parts = 2
        while parts <= inputs:
            if all(_largest_sum(piece, low, high) < EXACT_FLOAT32 for piece in self.codes.chunk(parts, 1)):
                return len(self.codes.chunk(parts, 1))
            parts *= 2
        return 0

    def extra_repr(self) -> str:
        return f"{self.geometry.kind}, bits={self.bits}, codes={tuple(self.codes.shape)}"


def _largest_sum(codes: Tensor, low: int, high: int) -> int:
    """The largest magnitude of any partial sum of a channel's codes (C_out, ...) times offsets from low <= 0 to high >= 0."""
    rows = codes.flatten(1)
    positive, negative = (part.sum(1, dtype=torch.int64) for part in (rows.clamp(min=0), rows.clamp(max=0)))
    return int(torch.maximum(high * positive + low * negative, -low * positive - high * negative).max())


def _recount(layer: nn.Module, keys: Any) -> None:
    """Forgets how large a layer's sums can become: other codes were loaded."""
    layer._parts = None  # type: ignore[assignment]  # an int or None, in a QuantizedLayer alone
