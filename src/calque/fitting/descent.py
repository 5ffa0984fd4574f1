"""The one descent of layers, blocks and networks: steps at falling rates, and the best iterate that a judge finds."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

CHECKS = tuple((check + 1) / 8 for check in range(8))  # shares of the steps after which an iterate is judged

log = logging.getLogger(__name__)

Iterate = TypeVar("Iterate")


@dataclass(frozen=True, slots=True)
class Best(Generic[Iterate]):
    """What a descent keeps.

    Attributes:
        iterate: the start, or what the judge found better than all before it.
        loss: the judge's.
        step: the number of steps that led there; 0 for the start.
    """

    iterate: Iterate
    loss: float
    step: int


def descend(
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[], float | None],
    steps: int,
    *,
    falling: bool = True,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Iterator[int]:
    """Takes the steps; yields the number of them after each, and ends where the loss is not finite.

    Args:
        optimizer: of the leaves, at the rates of the first step.
        gradients: leaves the gradients of one step in the leaves and returns its loss, None where it costs too much to look.
        falling: whether the rates fall to 0 by a cosine.
        on_step: called with the steps done, this one included, and its loss, which is finite.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for step in range(steps):
        if falling:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = gradients()
        if loss is not None:
            if not math.isfinite(loss):
                log.info("the loss is %s at step %d, where the descent ends", loss, step + 1)
                return
            on_step(step + 1, loss)
        optimizer.step()
        yield step + 1


def iterates(
    steps: Iterable[int], total: int, read: Callable[[], Iterate], checks: tuple[float, ...] = CHECKS
) -> Iterator[tuple[int, Iterate]]:
    """What `read` returns at some moments of a descent, each with its number of steps.

    Args:
        steps: the descent.  total: its length, if it does not end early.
        checks: the moments, as shares of the total.
    """
    moments = {round(share * total) for share in checks}
    return ((step, read()) for step in steps if step in moments)


def best_so_far(
    start: Best[Iterate], found: Iterable[tuple[int, Iterate]], judge: Callable[[Iterate], float]
) -> Iterator[Best[Iterate]]:
    """After each iterate, the one with the least finite loss; the first of equals, the start included."""
    best = start
    for step, iterate in found:
        loss = judge(iterate)
        if loss < best.loss and math.isfinite(loss):
            best = Best(iterate, loss, step)
        yield best


def best_iterate(
    start: Best[Iterate], found: Iterable[tuple[int, Iterate]], judge: Callable[[Iterate], float]
) -> Best[Iterate]:
    """The iterate with the least finite loss; the first of equals, the start included."""
    best = start
    for better in best_so_far(start, found, judge):
        best = better
    return best
