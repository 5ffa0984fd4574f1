"""Losses between the float network's outputs and the quantized one's: what prices, choices and bias tuning are judged by."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from calque.errors import SpecError
from calque.grid.arithmetic import binary_unit
from calque.run.fields import shown

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Of the float network's output leaves and the quantized one's, a scalar: the mean over the rows of the batch."""

OutputLoss = Callable[[object, object], Tensor]
"""A user's loss, of the float and the quantized network's outputs as the network returns them."""

LossName = Literal["kl", "mse"]

SCORES = (2.0**-10, 2.0**10)  # mean sizes of the scores of classes
CONSTANT = 1e-30  # of the squared size of an output: the power of one that is the same everywhere


def kl(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
    """KL(float || quantized) in nats of the softmax over the last axis, mean over rows, summed over the outputs.

    >>> kl([torch.zeros(1, 2)], [torch.tensor([[0.0, 0.0]])])
    tensor(0.)
    """
    total = torch.zeros(())
    for one, other in zip(_floats(reference), _floats(output), strict=True):
        p, q = F.log_softmax(one, -1), F.log_softmax(other, -1)
        apart = (p - q).where(p.isfinite(), 0.0)  # a class that a mask rules out has no probability in either
        total = total.to(one.device) + (p.exp() * apart).sum(-1).mean()
    return total


def mse(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
    """Squared error over the power of the float output about its mean, summed over the outputs.

    >>> mse([torch.tensor([[1.0, -1.0]])], [torch.tensor([[1.0, 0.0]])])
    tensor(0.5000)
    """
    total = torch.zeros(())
    for one, other in zip(_floats(reference), _floats(output), strict=True):
        finite = one.isfinite()
        if not finite.all():  # what a mask rules out
            one, other = one[finite], other[finite]
        unit = binary_unit(one)
        power = ((one - one.mean()) / unit).square().mean().clamp(min=CONSTANT)
        total = total.to(one.device) + ((other - one) / unit).square().mean() / power
    return total


def kl_and_mse(reference: Sequence[Tensor], output: Sequence[Tensor]) -> Tensor:
    """The sum of the two: the squared error restrains a KL that few inputs decide.

    >>> kl_and_mse([torch.zeros(1, 2)], [torch.tensor([[0.0, 0.0]])])
    tensor(0.)
    """
    return kl(reference, output) + mse(reference, output)


def closeness(leaves: Sequence[object]) -> Loss:
    """KL where the outputs are scores of classes, float tensors (N, C), else the squared error.

    Scores have a unit, the nat: the softmax of numbers far below it is uniform, that of numbers far above it takes one class,
    and neither tells how close other such numbers are. These are no scores.

    Args:
        leaves: the float network's outputs on one batch.
    """
    floats = _floats(leaves)
    low, high = SCORES
    scores = all(leaf.dim() == 2 and leaf.shape[1] > 1 and low <= binary_unit(leaf) <= high for leaf in floats)
    return kl if floats and scores else mse


def _floats(leaves: Sequence[object]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_loss(loss: object) -> None:
    """Raises SpecError where `loss` is neither a name nor a function."""
    named = loss is None or (isinstance(loss, str) and loss in ("kl", "mse"))
    if not named and not callable(loss):
        raise SpecError(f'loss is "kl", "mse" or a function of the two networks\' outputs. Got {shown(loss)}.')


def find_loss(
    loss: "LossName | OutputLoss | None", leaves: Sequence[object], spec: pytree.TreeSpec
) -> tuple[str, Loss]:
    """The loss and its name; None is mse.

    On images that a network was trained on, a KL is decided by the few that it is not certain of: on resnet20 a squared error
    on calibration images foretells the KL on test images better than the KL on calibration images does (docs/experiments.md).

    Args:
        leaves: the float network's outputs on one batch.
        spec: their tree, in which a user's own loss receives them.

    Raises:
        SpecError: another name, or kl for outputs without a class axis.
    """
    if loss is None or loss == "mse":
        return "mse", mse
    if loss == "kl":
        if not _floats(leaves) or any(leaf.dim() < 2 for leaf in _floats(leaves)):
            raise SpecError('the loss "kl" needs outputs with an axis of classes, the last one. Use "mse".')
        return "kl", kl
    check_loss(loss)
    assert callable(loss)
    return getattr(loss, "__name__", type(loss).__name__), _structured(loss, spec)


def _structured(loss: OutputLoss, spec: pytree.TreeSpec) -> Loss:
    """The user's loss on flat leaves; what it returns is checked."""

    def flat(reference: Sequence[Any], output: Sequence[Any]) -> Tensor:
        given = [pytree.tree_map_only(Tensor, torch.clone, list(leaves)) for leaves in (reference, output)]
        # copies, because a loss may write into what it gets
        value = loss(*(pytree.tree_unflatten(leaves, spec) for leaves in given))
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SpecError(f"a loss returns one float number. Got {type(value).__name__}.") from error
        if value.numel() != 1 or not value.is_floating_point():
            raise SpecError(f"a loss returns one float number. Got {value.dtype} of shape {tuple(value.shape)}.")
        return value.reshape(())

    return flat
