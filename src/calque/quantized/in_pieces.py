"""A quantized layer executed on a few rows at a time."""

import torch
from torch import Tensor, nn

from calque.grid.arithmetic import TOGETHER
from calque.quantized.modules import QuantizedLayer, Quantizer


class InPieces(nn.Module):
    """A quantized layer behind grids, executed on a few rows at a time: what it needs besides its result is small.

    Its sums are exact wherever its input is on a grid, so that the result is the same to the last bit. Elsewhere all rows are
    executed together.
    """

    def __init__(self, layer: QuantizedLayer, *grids: Quantizer):
        super().__init__()
        self.layer, self.grids = layer, nn.Sequential(*grids)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.bias_scale is None or x.numel() <= TOGETHER:
            return self.layer(self.grids(x))  # type: ignore[no-any-return]  # nn.Module has no types here
        size = max(1, TOGETHER // x[0].numel())
        first, *rest = torch.split(x, size)
        y = self.layer(self.grids(first))
        found: Tensor = y.new_empty(len(x), *y.shape[1:])
        found[:size] = y
        for start, piece in enumerate(rest, 1):
            found[start * size : (start + 1) * size] = self.layer(self.grids(piece))
        return found
