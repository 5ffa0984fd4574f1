"""Calibration inputs with the float network's outputs, as rows to draw from: some fitted, the last fifth held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from calque.calibration.holdout import held_out_count
from calque.network import Batch
from calque.network.signature import flatten, have_rows, layout_of, rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that were or can be one batch.

    Attributes:
        inputs: the network's flat inputs; a tensor whose axis 0 has `count` entries has the batch axis.
        references: the float network's output leaves for them.
        count: the number of rows.
        whole: positions of inputs without the batch axis, however long they are; None where nothing has rows of its own.
    """

    inputs: list[Any]
    references: Sequence[Any]
    count: int
    whole: tuple[int, ...] | None = ()

    def has_rows(self, leaf: object) -> bool:
        if self.whole is None or any(leaf is self.inputs[position] for position in self.whole):
            return False
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.count

    def pick(self, index: Tensor) -> "Rows":
        """These rows alone, index: int64 (n,)."""

        def chosen(leaf: Any) -> Any:
            return leaf[index.to(leaf.device)] if self.has_rows(leaf) else leaf

        inputs, references = ([chosen(leaf) for leaf in leaves] for leaves in (self.inputs, self.references))
        return Rows(inputs, references, self.count if self.whole is None else len(index), self.whole)

    def split(self, size: int) -> "list[Rows]":
        """Pieces of at most `size` rows, in order."""
        if size >= self.count:
            return [self]
        return [self.pick(torch.arange(at, min(at + size, self.count))) for at in range(0, self.count, size)]

    def form(self) -> tuple[object, ...]:
        """What rows must agree on to be put into one batch; rows with a tensor that all of them share agree with none."""
        leaves = [leaf for leaf in (*self.inputs, *self.references) if isinstance(leaf, Tensor)]
        alone = None if all(self.has_rows(leaf) for leaf in leaves) else id(self)
        return (alone, *(tuple(leaf.shape[1:]) for leaf in leaves))


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts in one batch; what has no rows is taken from the first."""

    def joined(leaves: Sequence[Any]) -> Any:
        batched = all(part.has_rows(leaf) for part, leaf in zip(parts, leaves, strict=True))
        return torch.cat(list(leaves)) if batched else leaves[0]

    if len(parts) == 1:
        return parts[0]
    inputs = [joined(leaves) for leaves in zip(*(part.inputs for part in parts), strict=True)]
    references = [joined(leaves) for leaves in zip(*(part.references for part in parts), strict=True)]
    return Rows(inputs, references, sum(part.count for part in parts), parts[0].whole)


def hold_out(batches: Sequence[Batch], references: Sequence[Sequence[Any]]) -> tuple[list[Rows], list[Rows]]:
    """(fitted, held out): of N inputs the last N // 5, no copies where a batch is whole.

    Args:
        references: the float network's output leaves on each batch.
    """
    whole = [
        Rows(flatten(batch)[0], reference, rows(batch), _whole(batch))
        for batch, reference in zip(batches, references, strict=True)
    ]
    total = sum(part.count for part in whole)
    border = total - held_out_count(total, least=0)
    fitted, held_out = [], []
    for part, end in zip(whole, accumulate(part.count for part in whole), strict=True):
        inside = min(part.count, max(0, border - (end - part.count)))
        if inside == part.count:
            fitted.append(part)
        elif inside == 0:
            held_out.append(part)
        else:
            fitted.append(part.pick(torch.arange(inside)))
            held_out.append(part.pick(torch.arange(inside, part.count)))
    return fitted, held_out


def _whole(batch: Batch) -> tuple[int, ...] | None:
    layout = layout_of(batch)
    if layout is not None and not layout.apart:
        return None
    found = zip(flatten(batch)[0], have_rows(batch), strict=True)
    return tuple(position for position, (leaf, batched) in enumerate(found) if isinstance(leaf, Tensor) and not batched)


def alike(parts: Sequence[Rows]) -> list[list[Rows]]:
    """The parts in groups whose rows can be put into one batch."""
    groups: dict[tuple[object, ...], list[Rows]] = {}
    for part in parts:
        groups.setdefault(part.form(), []).append(part)
    return list(groups.values())


def draw(groups: Sequence[Sequence[Rows]], count: int, generator: torch.Generator) -> Rows:
    """`count` random rows, all if there are fewer, of one group, which is drawn in proportion to its rows."""
    sizes = [sum(part.count for part in group) for group in groups]
    position = int(torch.randint(sum(sizes), (1,), generator=generator))
    chosen = next(index for index, end in enumerate(accumulate(sizes)) if position < end)
    picked = torch.randperm(sizes[chosen], generator=generator)[:count]
    parts, start = [], 0
    for part in groups[chosen]:
        mine = picked[(picked >= start) & (picked < start + part.count)] - start
        if len(mine):
            parts.append(part.pick(mine))
        start += part.count
    return join(parts)
