"""Means and variances of a layer's output channels, over all calibration inputs and positions."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calque.grid.arithmetic import TOGETHER, binary_unit
from calque.network import Geometry, Network


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and variance (float64, (C,)) of a layer's output channels over all inputs and positions."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, outputs: Iterable[Tensor], geometry: Geometry) -> "ChannelStatistics":
        """Exact statistics of the outputs (N, C, H, W) or (N, ..., C), accumulated in float64."""
        total, squares, count = None, None, 0

        def add(output: Tensor) -> None:
            nonlocal total, squares, count
            channels = (
                output.flatten(2) if geometry.kind == "convolution" else output.reshape(1, -1, output.shape[-1]).mT
            )
            unit = binary_unit(output)
            for rows in torch.split(channels, max(1, TOGETHER // channels[0].numel())):  # (N, C, P)
                mean = rows.mean((0, 2))
                # about the rows' own mean, in float32: torch.var_mean takes eight times as long
                variance = (rows - mean[:, None]).div_(unit).square_().mean((0, 2)).double() * unit**2
                mean = mean.double()
                n = rows.shape[0] * rows.shape[2]
                first, second = n * mean, n * (variance + mean.square())
                total = first if total is None else total + first
                squares = second if squares is None else squares + second
                count += n

        deque(map(add, outputs), maxlen=0)  # a loop's variable would keep each output until the next one is there
        assert total is not None
        assert squares is not None
        mean = total / count
        return cls(mean, (squares / count - mean.square()).clamp(min=0))


def trained_statistics(network: Network) -> dict[str, ChannelStatistics]:
    """The statistics that the folded batch norms were trained to give: mean beta and variance gamma^2, by layer name."""
    return {
        name: ChannelStatistics(norm.shift.double(), norm.gain.double().square())
        for name, norm in network.trained.items()
    }
