"""Differentiable stand-ins for the modules of a quantized network, and the way back.

Hubara et al. 2021, section 3: straight through the rounding, zero outside the clip for x; scale and zero point learn through
the rounding as in LSQ (Esser et al., 1902.08153). A stand-in returns real values and feeds no grid: the quantizer behind it
quantizes. After putting restored modules into a network call `calque.quantized.assembled.link_requantization`.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from calque.grid.arithmetic import (
    SMALLEST_SCALE,
    bias_codes,
    binary_unit,
    per_channel,
    smallest_weight_scale,
    weight_codes,
    weight_limits,
)
from calque.grid.straight_through import learn_through, quantize_through, weights_through
from calque.quantized.modules import QuantizedLayer, Quantizer

CONSTANT = 1e-12  # of the size of outputs: the deviation of those that are the same everywhere
SMALLEST_UNIT = 0.1  # of the layer's mean deviation: the bias of a constant channel must be able to move, too

Kind = Literal["weight", "weight_scale", "bias", "activation_scale", "zero_point"]
"""What a leaf is; the names are those of the rates in `Rates`."""


class FixedQuantizer:
    """A quantizer whose grid stays and that lets gradients through to x, zero outside the clip.

    Its values are bit for bit those of the quantizer.
    """

    def __init__(self, quantizer: Quantizer):
        self._grid = (quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)

    def __call__(self, x: Tensor) -> Tensor:
        return quantize_through(x, *self._grid)


class LearnableQuantizer:
    """A quantizer whose scale moves by its logarithm, and whose zero point, unless it is 0, by levels of the grid.

    After a ReLU the zero point is 0 and stays.
    """

    def __init__(self, quantizer: Quantizer):
        self._start = quantizer
        self._log_scale = torch.zeros_like(quantizer.scale).requires_grad_()
        self._zero_point = quantizer.zero_point.float().requires_grad_(bool(quantizer.zero_point > 0))

    def leaves(self) -> dict[Kind, Tensor]:
        """The tensors that may move."""
        chosen: dict[Kind, Tensor] = {"activation_scale": self._log_scale}
        return {**chosen, "zero_point": self._zero_point} if self._zero_point.requires_grad else chosen

    def _scale(self) -> Tensor:
        return (self._start.scale * self._log_scale.exp()).clamp(min=SMALLEST_SCALE)

    def __call__(self, x: Tensor) -> Tensor:
        return learn_through(x, self._scale(), self._zero_point, self._start.qmin, self._start.qmax)

    @torch.no_grad()
    def restored(self) -> Quantizer:
        """The quantizer that these values stand for."""
        zero_point = self._zero_point.round().clamp(self._start.qmin, self._start.qmax).to(torch.int32)
        return Quantizer(self._scale(), zero_point, bits=self._start.bits)


class LearnableLayer(ABC):
    """A quantized layer, of which something moves: geometry.apply(x, weight, bias) in real units, differentiable.

    The bias moves in a unit per channel, so that one relative step size suits layers of any range.

    Args:
        unit: (C_out,), real units; `output_units` gives the standard deviations of the layer's output.
    """

    def __init__(self, layer: QuantizedLayer, unit: Tensor):
        self._start = layer
        self._unit = unit
        self._moved = torch.zeros_like(unit).requires_grad_()  # the bias's way from its start, in units

    @abstractmethod
    def leaves(self) -> dict[Kind, Tensor]:
        """The tensors that may move."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weights (C_out, ...) in real units, with gradient."""

    @abstractmethod
    def restored(self, input_scale: Tensor | None) -> QuantizedLayer:
        """The layer that these values stand for, its bias rounded to the accumulator's grid s_x s_w.

        Args:
            input_scale: s_x, a scalar; None where the input is float, and then the bias stays float.
        """

    def __call__(self, x: Tensor) -> Tensor:
        return self._start.geometry.apply(x, self.weight(), self._start.real_bias + self._unit * self._moved)

    def _bias(self) -> Tensor:
        """The bias (C_out,) in real units, float64: a code of 30 bits that has not moved comes back as it was."""
        bias, scale = self._start.bias.double(), self._start.bias_scale
        start = bias if scale is None else bias * scale.double()
        return start + self._unit.double() * self._moved.detach().double()


class LearnableBias(LearnableLayer):
    """Only the bias moves."""

    def __init__(self, layer: QuantizedLayer, unit: Tensor):
        super().__init__(layer, unit)
        self._weight = layer.weight

    def leaves(self) -> dict[Kind, Tensor]:
        return {"bias": self._moved}

    def weight(self) -> Tensor:
        return self._weight

    def restored(self, input_scale: Tensor | None) -> QuantizedLayer:
        """The layer with its bias rounded to the accumulator grid that it has; the input's scale has not changed."""
        start, bias = self._start, self._bias()
        stored = bias.to(start.scale.dtype) if start.bias_scale is None else bias_codes(bias, start.bias_scale)
        return QuantizedLayer(start.geometry, start.codes, start.scale, stored, start.bias_scale, bits=start.bits)


class LearnableScale(LearnableLayer):
    """The bias and a gain on each channel's weight scale move, s_w' = s_w gain; the codes stay."""

    def __init__(self, layer: QuantizedLayer, unit: Tensor):
        super().__init__(layer, unit)
        self._log_gain = torch.zeros_like(layer.scale).requires_grad_()

    def leaves(self) -> dict[Kind, Tensor]:
        return {"bias": self._moved, "weight_scale": self._log_gain}

    def _scale(self) -> Tensor:
        return (self._start.scale * self._log_gain.exp()).clamp(min=SMALLEST_SCALE)

    def weight(self) -> Tensor:
        return self._start.codes.to(self._start.scale.dtype) * per_channel(self._scale(), self._start.codes)

    @torch.no_grad()
    def restored(self, input_scale: Tensor | None) -> QuantizedLayer:
        start = self._start
        scale, bias = self._scale(), self._bias()
        return QuantizedLayer.from_real(start.geometry, start.codes, scale, bias, input_scale, bits=start.bits)


class LearnableCodes(LearnableScale):
    """Everything moves: the weights in levels of their grid, rounded through, their scales and the bias."""

    def __init__(self, layer: QuantizedLayer, unit: Tensor):
        super().__init__(layer, unit)
        self._limits = weight_limits(layer.bits)
        self._levels = layer.codes.to(layer.scale.dtype).requires_grad_()

    def leaves(self) -> dict[Kind, Tensor]:
        return {**super().leaves(), "weight": self._levels}

    def weight(self) -> Tensor:
        return weights_through(self._levels, per_channel(self._scale(), self._levels), self._limits)

    @torch.no_grad()
    def restored(self, input_scale: Tensor | None) -> QuantizedLayer:
        """The layer; a channel whose bias code would leave int32 gets a larger weight scale."""
        start, scale, bias = self._start, self._scale(), self._bias()
        levels = self._levels
        if input_scale is not None:
            wider = torch.maximum(scale, smallest_weight_scale(bias, input_scale))
            levels, scale = levels.round().clamp(*self._limits) * per_channel(scale / wider, levels), wider
        codes = weight_codes(levels, torch.ones_like(scale), start.bits)
        return QuantizedLayer.from_real(start.geometry, codes, scale, bias, input_scale, bits=start.bits)


def output_unit(layer: QuantizedLayer, output: Tensor) -> Tensor:
    """The standard deviation of each channel (C_out,) of the layer's output, at least a part of the layer's mean one."""
    channels = layer.geometry.channels_last(output).flatten(0, 1)  # (N * positions, C_out)
    unit = binary_unit(channels)
    deviation = (channels / unit).std(0, correction=0)
    return deviation.clamp(min=max(SMALLEST_UNIT * deviation.mean().item(), CONSTANT)) * unit
