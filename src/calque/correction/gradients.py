"""The gradient of a loss of the network's outputs, with as many rows at a time as memory allows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calque.calibration.losses import Loss
from calque.calibration.rows import Rows, join
from calque.errors import SpecError

Outputs = Callable[[Sequence[Any]], list[Any]]
"""A network: flat inputs to output leaves, differentiable."""


def loss_gradients(
    outputs: Outputs, rows: Rows, loss: Loss, leaves: Sequence[Tensor], *, size: int
) -> tuple[float, list[Tensor]]:
    """The loss of the rows and its gradients for the leaves, whatever the gradient mode of the caller.

    A loss may depend on its batch as a whole. With more than `size` rows its gradient for the outputs of all of them comes
    first and is then pulled back to the leaves piece by piece, which costs one more forward pass. No tensor's `grad` is
    touched.

    Args:
        leaves: tensors that the outputs depend on; a leaf that the loss does not depend on gets zeros.
        size: rows that are executed with gradients at a time.

    Raises:
        SpecError: a loss without a gradient for the outputs.
    """
    with torch.enable_grad():
        if rows.count <= size:
            value = loss(rows.references, outputs(rows.inputs))
            return value.item(), _require_gradient([value], leaves)
        return _piecewise(outputs, rows, loss, leaves, size)


def _piecewise(
    outputs: Outputs, rows: Rows, loss: Loss, leaves: Sequence[Tensor], size: int
) -> tuple[float, list[Tensor]]:
    parts = rows.split(size)
    with torch.no_grad():
        pieces = [Rows([], outputs(part.inputs), part.count) for part in parts]
    whole = Rows([], [_leaf(output) for output in join(pieces).references], rows.count)
    value = loss(rows.references, whole.references)
    floats = [position for position, output in enumerate(whole.references) if _is_float(output)]
    pulls = dict(
        zip(floats, _require_gradient([value], [whole.references[position] for position in floats]), strict=True)
    )
    total = [torch.zeros_like(leaf) for leaf in leaves]
    start = 0
    for part in parts:
        found = outputs(part.inputs)
        targets, weights = [], []
        for position, pull in pulls.items():
            if whole.has_rows(pull):
                targets.append(found[position])
                weights.append(pull[start : start + part.count])
            elif start == 0:  # an output without rows was taken from the first piece
                targets.append(found[position])
                weights.append(pull)
        for sum_, gradient in zip(total, _require_gradient(targets, leaves, weights), strict=True):
            sum_ += gradient
        start += part.count
    return value.item(), total


def _is_float(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point()


def _leaf(output: Any) -> Any:
    """The output as a leaf of its own: it may be an input or a buffer, which nothing may change."""
    return output.detach().requires_grad_() if _is_float(output) else output


def _require_gradient(
    values: Sequence[Tensor], leaves: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Gradients of the values (scalars, or weighted) for the leaves."""
    chosen = [position for position, value in enumerate(values) if value.requires_grad]
    if not chosen or not leaves:
        raise SpecError(
            "the loss has no gradient for what is tuned: it, or the network's outputs, are no differentiable function of it. "
            "Pass a loss made of differentiable torch operators on float outputs, or tune for 0 steps."
        )
    targets = [values[position] for position in chosen]
    pulls = None if weights is None else [weights[position] for position in chosen]
    return list(torch.autograd.grad(targets, list(leaves), pulls, allow_unused=True, materialize_grads=True))
