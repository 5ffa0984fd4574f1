"""Calibration inputs mixed with each other: more inputs than there are, each with the float network's answer to it.

Source: mixup (Zhang et al., 1710.09412), without labels: the float network is asked about the mixed input itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calque.calibration.rows import Rows

Teacher = Callable[[Sequence[Any]], list[Any]]
"""The float network: flat inputs to output leaves."""


def can_mix(rows: Rows) -> bool:
    """Whether sums of these inputs are inputs: all of them are float tensors with an entry for each row."""
    return rows.count > 1 and all(
        isinstance(leaf, Tensor) and leaf.is_floating_point() and rows.has_rows(leaf) for leaf in rows.inputs
    )


@torch.no_grad()
def mixed(rows: Rows, share: float, teacher: Teacher, generator: torch.Generator) -> Rows:
    """The rows, each with the probability `share` in a random proportion with its neighbour, with the teacher's outputs.

    Rows that cannot be mixed, and those of a share of 0, come back with the references that they have.
    """
    if not share or not can_mix(rows):
        return rows
    own = torch.rand(rows.count, generator=generator)
    chosen = torch.rand(rows.count, generator=generator) < share
    own = torch.where(chosen, own, torch.ones_like(own))

    def blend(leaf: Tensor) -> Tensor:
        weight = own.to(leaf).reshape(-1, *[1] * (leaf.dim() - 1))
        return weight * leaf + (1 - weight) * leaf.roll(1, 0)

    inputs = [blend(leaf) for leaf in rows.inputs]
    return Rows(inputs, teacher(inputs), rows.count)
