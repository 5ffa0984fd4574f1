"""Calibration inputs as batches, checked; and which of their tokens are padding."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from calque.calibration.samples import batches_of, unusual
from calque.errors import CalibrationError, warn
from calque.network.signature import (
    MASK,
    Batch,
    Layout,
    Signature,
    flatten,
    laid_out,
    layout_of,
    length,
    rows,
    split,
    values,
)
from calque.run.fields import shown

ROWS = 50  # rows that are executed at a time, at most
VALUES = 1_500_000  # input values at a time: with larger tensors most of the time goes into mapping fresh memory


def prepare(
    calibration: object,
    signature: Signature,
    device: torch.device,
    find: Callable[[list[Batch]], Layout | None] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Batch]:
    """The calibration inputs as batches of at most ROWS rows, by argument name, checked.

    Rows that depend on each other stay together.

    Args:
        calibration: a tensor or array, a tuple or dict of them with all rows, a Dataset of single samples, or an iterable
            (list, DataLoader) of batches, each a tensor, a tuple of positional arguments or a dict of keyword arguments.
        find: tells where the rows of such inputs are, if the signature does not know.
        on_note: called with a sentence on each part of the batches that was left out.

    Raises:
        CalibrationError: nothing in it, a batch of another form or shape, or values that are not finite.
    """
    items: list[Batch] = []
    notes: dict[str, bool] = {}
    for item in batches_of(calibration):
        items.append(_to_device(signature.batch(item), device))
        for note in signature.left_out(item):
            notes[note] = isinstance(item, Mapping) and len(items[-1]) < len(signature.names)
    for note, misspelt in notes.items():
        on_note(note)
        if misspelt:  # it may be: something else kept its default
            warn(f"calibration: {note} Check the spelling.")
    layout = find(items) if find is not None and signature.layout is None else signature.layout
    whole = [batch for batch in (laid_out(item, layout) for item in items) if length(batch) > 0]
    batches = [piece for batch in whole for piece in split(batch, rows_at_a_time(batch))]
    if not batches:
        raise CalibrationError("calibration needs at least one input. Got none; pass a few hundred rows.")
    _check(batches)
    return batches


def rows_at_a_time(batch: Batch) -> int:
    """How many rows of such a batch are executed at once: ROWS, fewer where the inputs are large."""
    return max(1, min(ROWS, VALUES * rows(batch) // max(1, values(batch))))


def _to_device(batch: Batch, device: torch.device) -> Batch:
    move = torch.utils._pytree.tree_map
    moved: Batch = move(lambda leaf: _real(leaf).to(device) if isinstance(leaf, Tensor) else leaf, dict(batch))
    return laid_out(moved, layout_of(batch))


def _real(leaf: Tensor) -> Tensor:
    """The tensor. Raises: CalibrationError, where it is no plain one with values."""
    problem = unusual(leaf)
    if not problem and leaf.dim() > 1 and 0 in leaf.shape[1:]:
        problem = f"of the shape {tuple(leaf.shape)}, which has no values"
    if problem:
        raise CalibrationError(
            f"calibration inputs must be plain tensors with values. Got one {problem}; convert it first."
        )
    return leaf


def _check(batches: list[Batch]) -> None:
    leaves, spec = flatten(batches[0])
    constant = [True] * len(leaves)
    for position, batch in enumerate(batches):
        others, other_spec = flatten(batch)
        if other_spec != spec:
            raise CalibrationError(f"calibration batch {position} has the form {other_spec}; batch 0 has {spec}.")
        for index, (first, leaf) in enumerate(zip(leaves, others, strict=True)):
            if not isinstance(leaf, Tensor):
                if leaf != first:
                    raise CalibrationError(
                        f"arguments that are no tensors must be the same in every batch. Batch {position}: {shown(leaf)}; "
                        f"batch 0: {shown(first)}."
                    )
                continue
            if leaf.dim() != first.dim() or leaf.dtype != first.dtype:
                raise CalibrationError(
                    f"calibration inputs must have the same rank and dtype. Batch {position}: {leaf.dtype} "
                    f"{tuple(leaf.shape)}; batch 0: {first.dtype} {tuple(first.shape)}."
                )
            if leaf.is_floating_point():
                is_mask = leaf is batch.get(MASK)
                if torch.isnan(leaf).any():
                    raise CalibrationError(
                        f"calibration inputs must be finite. Batch {position} has NaN; remove these rows."
                    )
                constant[index] &= not is_mask and bool((leaf == first.reshape(-1)[0]).all())
    for position, mask in enumerate(token_masks(batches)):
        if mask is not None and not mask.any():
            raise CalibrationError(
                f"attention_mask calls every token of calibration batch {position} padding. 1 (True) is a real token and 0 "
                "padding, or 0 and negative numbers where the mask is added to scores; a mask of another kind needs another name."
            )
    if any(
        c for c, leaf in zip(constant, leaves, strict=True) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ):
        warn("a calibration input has the same value everywhere: ranges cannot be estimated from it. Pass real inputs.")


def token_masks(batches: Iterable[Batch]) -> list[Tensor | None]:
    """Which tokens of each batch are real, bool (N, T): the argument `attention_mask`; None where a batch has none.

    Padding is 0 (False), or negative where some value is: such masks are added to scores.
    """
    found = [batch.get(MASK) for batch in batches]
    masks = [mask if isinstance(mask, Tensor) and mask.dim() == 2 else None for mask in found]
    added = any(mask is not None and mask.dtype is not torch.bool and bool((mask < 0).any()) for mask in masks)
    return [None if mask is None else mask >= 0 if added else mask != 0 for mask in masks]


def real_tokens(values: Iterable[Tensor], masks: Iterable[Tensor | None]) -> Iterator[Tensor]:
    """The values without those of padding: (tokens, ...) for a tensor that has the mask's rows and an axis of its tokens.

    Padding is no calibration data: nothing real depends on its values.
    """
    return map(_without_padding, values, masks)


def _without_padding(value: Tensor, mask: Tensor | None) -> Tensor:
    axis = None if mask is None else token_axis(value, mask)
    return value if mask is None or axis is None else value.movedim(axis, 1)[mask]


def token_axis(value: Tensor, mask: Tensor) -> int | None:
    """The first axis behind the batch that is as long as the mask's rows."""
    if value.dim() < 3 or value.shape[0] != mask.shape[0]:
        return None
    return next((axis for axis in range(1, value.dim()) if value.shape[axis] == mask.shape[1]), None)


def largest_output(outputs: Iterable[Tensor], sizes: Iterable[int], layer: str) -> int:
    """How many values a float layer returns for one input at most, given the inputs of each batch.

    Raises:
        CalibrationError: some output is not finite, or so large that its squares are not.
    """

    def counted(output: Tensor, size: int) -> int:
        if not torch.isfinite(torch.linalg.vector_norm(output)):  # one pass tells both; the reason is rarely asked for
            if not torch.isfinite(output).all():
                raise CalibrationError(
                    f"layer {layer}: the float network's output is NaN or infinite on calibration inputs. Remove the "
                    "inputs that cause it, or repair the weights."
                )
            raise CalibrationError(
                f"layer {layer}: the float network's output reaches {output.abs().max().item():.0e} on calibration inputs, "
                "and the sum of its squares leaves float32. Scale the inputs as they were in training."
            )
        return output.numel() // size

    return max(map(counted, outputs, sizes))
