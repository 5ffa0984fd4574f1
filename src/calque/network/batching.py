"""Which axes of a network's inputs are the batch: found by running the network on two rows and on three."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calque.errors import CaptureError
from calque.network.copies import private_copy
from calque.network.outputs import flatten_outputs
from calque.network.signature import (
    Axis,
    Batch,
    Layout,
    cut,
    flatten,
    have_rows,
    laid_out,
    layout_of,
    leaf_names,
    length,
)
from calque.network.trace import distinct

Found = Literal["rows", "odd", "mixed", "none"]
"""Rows by themselves, with outputs of which each has the batch at axis 0 or not at all; with others; mixed rows; no batch."""


def find_layout(model: nn.Module, items: Sequence[Batch]) -> Layout | None:
    """Where the rows of the inputs are, by what the network does with two rows and with three.

    Tried is every set of tensors with the same length of axis 0, that of the first tensor before the others; and of each set
    those tensors alone that differ from item to item, where the others never do. The first is taken under which a row's
    outputs do not depend on the other rows; else the first under which the network runs; else nothing has rows, and
    every item is executed as it is.

    Args:
        items: what the network is called with, by argument name; empty ones are ignored.

    Returns:
        The layout; None where there is nothing to try it on, or the network cannot be copied.
    """
    items = [item for item in items if _tensors(item) and all(leaf.numel() for leaf in _tensors(item).values())]
    if not items:
        return None
    try:
        model = private_copy(model)
    except CaptureError:  # capture says so
        return None
    found: dict[Found, Layout] = {}
    for whole in _candidates(items):
        layout = Layout(whole)
        example = max((laid_out(item, layout) for item in items), key=length)
        kind = _attempt(model, example)
        found.setdefault(kind, Layout(whole, apart=kind != "mixed"))
        if kind == "rows":
            break
    nothing = Layout(frozenset(_tensors(items[0])), apart=False, nowhere=True)
    return found.get("rows") or found.get("odd") or found.get("mixed") or nothing


def varying_axes(batches: Sequence[Batch]) -> dict[str, dict[int, Any]]:
    """The axes besides the batch whose sizes differ between batches, for inputs that are tensors; as dynamic shapes."""
    found: dict[str, dict[int, Any]] = {}
    batched = dict(zip(leaf_names(batches[0]), have_rows(batches[0]), strict=True))
    for name, value in batches[0].items():
        if isinstance(value, Tensor):
            shapes = [tuple(other.shape) for batch in batches if isinstance(other := batch[name], Tensor)]
            start = 1 if batched[name] else 0
            axes = {axis for shape in shapes for axis in range(start, len(shape)) if shape[axis] != shapes[0][axis]}
            if axes:
                found[name] = dict.fromkeys(sorted(axes), torch.export.Dim.AUTO)
    return found


def equal_axes(batches: Sequence[Batch]) -> tuple[tuple[Axis, ...], ...]:
    """The axes whose sizes differ between batches, in groups that have one size in every batch.

    Rows are among them only where they may not be drawn apart from each other: elsewhere their number is free.

    >>> equal_axes([{"ids": torch.zeros(1, n), "mask": torch.zeros(1, n), "image": torch.zeros(1, n, 2 * n)} for n in (4, 6)])
    ((('ids', 1), ('mask', 1), ('image', 1)), (('image', 2),))
    """
    layout = layout_of(batches[0])
    apart = layout is None or layout.apart
    batched = dict(zip(leaf_names(batches[0]), have_rows(batches[0]), strict=True))
    leaves = [_tensors(batch) for batch in batches]
    groups: dict[tuple[int, ...], list[Axis]] = {}
    for name, leaf in leaves[0].items():
        for axis in range(1 if batched[name] and apart else 0, leaf.dim()):
            groups.setdefault(tuple(each[name].shape[axis] for each in leaves), []).append((name, axis))
    return tuple(tuple(axes) for sizes, axes in groups.items() if len(set(sizes)) > 1)


def layout_notes(layout: Layout | None) -> list[str]:
    """What a user should know of a layout, one sentence each; nothing where all tensors have rows of their own."""
    names = "" if layout is None else ", ".join(sorted(layout.whole))
    if layout is None or (layout.apart and not names):
        return []
    if layout.nowhere:
        return [
            f"the inputs ({names}) have no batch axis: the network takes neither two rows of them nor three. Each calibration "
            "batch was executed as it is, and sizes that are the same in all of them are fixed, in the file as well."
        ]
    notes = [f"taken to have no batch axis: {names}. Every row gets all of it."] if names else []
    if not layout.apart:
        notes.append("a row's outputs depend on the other rows: each calibration batch was executed whole.")
    return notes


def _tensors(item: Batch) -> dict[str, Tensor]:
    """The tensors with axes, by name."""
    named = zip(leaf_names(item), flatten(item)[0], strict=True)
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor) and leaf.dim() > 0}


def _candidates(items: Sequence[Batch]) -> Iterator[frozenset[str]]:
    """What would be without rows, likeliest first."""
    first, *others = [_tensors(item) for item in items]
    others = [other for other in others if other.keys() == first.keys()]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, leaf in first.items():
        groups.setdefault((leaf.shape[0], *(other[name].shape[0] for other in others)), []).append(name)
    leading, *rest = groups.items()
    for _, names in [leading, *sorted(rest, key=lambda group: (-len(group[1]), -max(group[0])))]:
        yield frozenset(first) - frozenset(names)
        moving = {name for name in names if any(not torch.equal(first[name], other[name]) for other in others)}
        if moving and len(moving) < len(names):
            yield frozenset(first) - moving


@torch.no_grad()
def _attempt(model: nn.Module, example: Batch) -> Found:
    """What the outputs for two rows have in common with those for three."""
    count = length(example)
    try:
        two, three = (
            flatten_outputs(model(**distinct(cut(example, torch.arange(size) % count))))[0] for size in (2, 3)
        )
    except Exception:  # whatever a network raises on inputs that are not meant for it
        return "none"
    pairs = [pair for pair in zip(two, three, strict=False) if all(isinstance(leaf, Tensor) for leaf in pair)]
    if len(two) != len(three) or any(a.dim() != b.dim() for a, b in pairs):
        return "none"
    if not all(_starts_with(b, a) for a, b in pairs):
        return "mixed"
    plain = [(len(a), len(b)) == (2, 3) and a.shape[1:] == b.shape[1:] for a, b in pairs if a.shape != b.shape]
    return "rows" if plain and all(plain) else "odd"


def _starts_with(longer: Tensor, shorter: Tensor) -> bool:
    """Whether the first tensor has the second at its beginning, rounding aside."""
    if any(a < b for a, b in zip(longer.shape, shorter.shape, strict=True)):
        return False
    if not shorter.is_floating_point() or not shorter.numel() or not torch.isfinite(shorter).all():
        return True  # an index may change by rounding; calibration speaks of what is not finite
    start = longer[tuple(slice(size) for size in shorter.shape)]
    return torch.allclose(start, shorter, rtol=0.0, atol=1e-3 * shorter.abs().max().item(), equal_nan=True)
