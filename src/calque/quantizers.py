"""The modules that stand in a quantized network: a quantizer on an edge, and a layer with integer weights."""

import torch
from torch import Tensor, nn

from calque.arithmetic import activation_limits, fake_quantize, per_channel, quantize, requantize
from calque.errors import SpecError
from calque.graph import Geometry


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

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def code_bounds(self, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The codes that a clip of real values to `bounds` leaves; rounding is monotone, so the bounds may be rounded."""
        ends = torch.tensor(bounds, device=self.scale.device)
        low, high = quantize(ends, self.scale, self.zero_point, self.qmin, self.qmax)
        return low, high

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

    Where the input is on a grid, its whole-number offsets times the codes are summed, as integer kernels do it; float32 sums
    of whole numbers are exact below 2^24, so that the evaluation parts from the integer one at rounding edges only.

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
        self._next: list[tuple[Quantizer, tuple[float, float]]] = []  # in a list, so that it is no sub-module

    def feed(self, grid: Quantizer, bounds: tuple[float, float]) -> None:
        """Makes `forward` return values on `grid`, clipped to `bounds`, requantized as integer kernels do it.

        For a layer whose result goes to that quantizer alone, through a clip to `bounds` at most. The quantizer then changes
        nothing; but y / s_y of a rounded y is not always the code that one factor s_x s_w / s_y gives.
        """
        self._next = [(grid, bounds)]

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
        if self.bias_scale is None:
            return self.geometry.apply(x, self.weight, self.bias)
        offsets = x.div(self.bias_scale[0] / self.scale[0]).round_()
        sums = self.geometry.apply(offsets, self.codes.to(x.dtype), self.bias.to(x.dtype))
        if not self._next:
            return sums.mul_(self.geometry.along_channels(self.bias_scale))
        grid, bounds = self._next[0]
        low, high = grid.code_bounds(bounds)
        multiplier = self.geometry.along_channels(self.bias_scale / grid.scale)
        codes = requantize(sums, multiplier, grid.zero_point, low, high)
        return codes.sub_(grid.zero_point).mul_(grid.scale)

    def extra_repr(self) -> str:
        return f"{self.geometry.kind}, bits={self.bits}, codes={tuple(self.codes.shape)}"
