"""Whole inputs in place of sampled patches: every output position of some inputs in each step, as Hubara et al. 2021 do it."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from calque.calibration.holdout import held_out_count
from calque.fitting.adaquant import Draw, Linear
from calque.network import Geometry

INPUTS = 50  # inputs per step (Hubara et al. 2021, released code)


def whole_inputs(
    geometry: Geometry, shape: torch.Size, sizes: Sequence[int], at: Callable[[int], tuple[Tensor, Tensor]]
) -> tuple[Draw, Linear]:
    """What each step of a fit sees, and how the layer maps it: INPUTS inputs that are not held out.

    Args:
        shape: of the layer's weight.
        sizes: inputs in each batch.
        at: a batch's inputs and float outputs of the layer, before its activation.
    """
    starts = [0, *accumulate(sizes)]
    fitted = starts[-1] - held_out_count(starts[-1])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randperm(fitted, generator=generator)[:INPUTS]
        inputs, outputs = [], []
        for index in range(len(sizes)):
            mine = picked[(picked >= starts[index]) & (picked < starts[index + 1])] - starts[index]
            if len(mine):
                x, y = at(index)
                inputs.append(x[mine.to(x.device)])
                outputs.append(y[mine.to(y.device)])
            if (
                inputs and inputs[-1].shape[1:] != inputs[0].shape[1:]
            ):  # batches of another size: those of the first alone
                inputs.pop()
                outputs.pop()
        return torch.cat(inputs), torch.cat(outputs)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return geometry.apply(x, weight.reshape(shape), bias.reshape(-1))

    return draw, linear
