"""Weighted layers: what a convolution or a linear layer computes, and its input as rows of patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a layer's weight meets its input.

    `padding` is (top, left, bottom, right), zeros; the kinds "linear" and "embedding" ignore everything but `kind`. An
    embedding's channels are its rows, its inputs are their numbers, and it has no bias.
    """

    kind: Literal["convolution", "linear", "embedding"]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output: (N, C_out, H_out, W_out), or (..., C_out) for a linear layer."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "embedding":
            return F.embedding(x, weight)
        top, left, bottom, right = self.padding
        if (top, left) == (bottom, right):
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        return F.conv2d(self.pad(x), weight, bias, self.stride, 0, self.dilation, self.groups)

    def biases(self, weight: Tensor) -> int:
        """How many biases a layer with that weight has."""
        return 0 if self.kind == "embedding" else weight.shape[0]

    def pad(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        return F.pad(x, (left, right, top, bottom))

    def positions(self, output: Tensor) -> int:
        """Output positions per row of the batch: H_out * W_out, or the product of a linear layer's middle axes."""
        if self.kind == "linear":
            return output[0].numel() // output.shape[-1]
        return output.shape[-2] * output.shape[-1]

    def macs(self, values: int, weight: Tensor) -> int:
        """Multiply-accumulates of so many output values; looking a row up takes none."""
        return 0 if self.kind == "embedding" else values // weight.shape[0] * weight.numel()

    def along_channels(self, values: Tensor) -> Tensor:
        """Values (C_out,) reshaped to broadcast against the layer's output."""
        return values if self.kind == "linear" else values.reshape(1, -1, 1, 1)

    def channels_last(self, output: Tensor) -> Tensor:
        """The layer's output as (N, positions, C_out)."""
        if self.kind == "linear":
            return output.reshape(output.shape[0], -1, output.shape[-1])
        return output.flatten(2).transpose(1, 2)

    def patches(self, x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        """The inputs that the weight meets at some output positions: (groups, N * P, K), K = C_in / groups * kh * kw.

        Args:
            x: the layer's input, (N, C_in, H, W) or (N, ..., C_in).
            weight: only its shape is read.
            positions: int64 (N, P), flat output positions, a selection per row of the batch.
        """
        if self.kind == "linear":
            rows = x.reshape(x.shape[0], -1, x.shape[-1])  # (N, positions, K)
            chosen = rows.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))
            return chosen.reshape(1, -1, x.shape[-1])
        kernel_h, kernel_w = weight.shape[2:]
        x = self.pad(x)
        width = x.shape[3]
        out_w = (width - self.dilation[1] * (kernel_w - 1) - 1) // self.stride[1] + 1
        rows_at = (positions // out_w) * self.stride[0]
        columns_at = (positions % out_w) * self.stride[1]
        taps_h = torch.arange(kernel_h, device=x.device) * self.dilation[0]
        taps_w = torch.arange(kernel_w, device=x.device) * self.dilation[1]
        taps = (taps_h[:, None] * width + taps_w).reshape(-1)
        index = (rows_at * width + columns_at)[:, :, None] + taps  # (N, P, kh * kw)
        count, channels = x.shape[:2]
        flat = index.reshape(count, 1, -1).expand(-1, channels, -1)
        values = x.flatten(2).gather(2, flat)  # (N, C_in, P * kh * kw)
        values = values.reshape(count, self.groups, channels // self.groups, index.shape[1], -1)
        return values.permute(1, 0, 3, 2, 4).reshape(self.groups, count * index.shape[1], -1)

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight (C_out, ...) as (groups, C_out / groups, K), which multiplies `patches`."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


@dataclass(frozen=True, slots=True)
class TrainedNorm:
    """A folded batch norm's trained statistics: mean `shift` (beta) and deviation `gain` (gamma) of each channel, (C,)."""

    shift: Tensor
    gain: Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise activation as data, so that it can be sent to a worker: an aten operator's name and its arguments.

    >>> Activation("aten.clamp.default", (0.0, 1.0), {})(torch.tensor([-1.0, 0.5, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    operator: str
    arguments: tuple[object, ...]
    options: Mapping[str, object]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.operator:
            return x
        _, name, overload = self.operator.split(".")
        y: Tensor = getattr(getattr(torch.ops.aten, name), overload)(x, *self.arguments, **self.options)
        return y


class WeightedLayer(nn.Module):
    """A float layer of the captured network: `geometry.apply(x, weight, bias)`; the bias always exists, empty for a table."""

    weight: Tensor
    bias: Tensor

    def __init__(self, geometry: Geometry, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.geometry = geometry
        self.register_buffer("weight", weight.detach().clone())
        zeros = weight.new_zeros(geometry.biases(weight))
        self.register_buffer("bias", zeros if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.geometry.apply(x, self.weight, self.bias)
