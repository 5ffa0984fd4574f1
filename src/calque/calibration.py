"""Calibration inputs, checked; and the network executed on all of them, operator by operator, within a memory budget."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calque.errors import CalibrationError, warn
from calque.fields import shown
from calque.graph.signature import (
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
from calque.samples import batches_of, unusual
from calque.store import Store

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
    for value, mask in zip(values, masks, strict=True):
        axis = None if mask is None else token_axis(value, mask)
        yield value if mask is None or axis is None else value.movedim(axis, 1)[mask]


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
    largest = 0
    for output, size in zip(outputs, sizes, strict=True):
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
        largest = max(largest, output.numel() // size)
    return largest


def call_node(
    graph_module: fx.GraphModule,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: torch.nn.Module | None = None,
) -> Any:
    """What the node returns for these arguments; `stand_in` takes the place of the module that it calls."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_module":
        return (stand_in or graph_module.get_submodule(str(node.target)))(*args, **kwargs)
    if node.op == "get_attr":
        owner: Any = graph_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner
    assert node.op == "output"
    return args[0]


class Execution:
    """A graph executed operator by operator over all batches; values are freed once nothing reads them any more.

    Call `step` (or `compute` and `put` in its place) on each node of `graph_module.graph.nodes` in order, then `release`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: list[Batch],
        store: Store,
        *,
        keep: Mapping[fx.Node, fx.Node] | None = None,
    ):
        """
        Args:
            keep: node -> a later node at whose release its value is freed, in place of its last reader's.
        """
        self.module = graph_module
        self.store = store
        self.count = len(batches)
        self._kept: dict[fx.Node, list[object]] = {}
        self._last = {reader: node for node in graph_module.graph.nodes for reader in node.all_input_nodes}
        self._last.update(keep or {})
        leaves = [flatten(batch)[0] for batch in batches]
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            self._kept[node] = [leaf[index] for leaf in leaves]

    def values(self, node: fx.Node) -> Iterator[Any]:
        """The node's value on each batch."""
        for kept in self._kept[node]:
            yield self.store.get(kept)

    def at(self, node: fx.Node, index: int) -> Any:
        """The node's value on batch `index`."""
        return self.store.get(self._kept[node][index])

    def compute(
        self,
        node: fx.Node,
        module: torch.nn.Module | None = None,
        through: Mapping[fx.Node, torch.nn.Module] | None = None,
    ) -> Iterator[Any]:
        """The node's value on each batch, from the values of its inputs.

        Args:
            module: stands in for the one that the node calls.
            through: modules that values of these inputs pass first.
        """
        through = through or {}
        for index in range(self.count):
            values = {source: self.store.get(self._kept[source][index]) for source in node.all_input_nodes}
            try:
                with torch.no_grad():
                    values |= {source: part(values[source]) for source, part in through.items()}
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    yield call_node(self.module, node, args, kwargs, module)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise CalibrationError(f"operator {node.name} fails on calibration batch {index}: {reason}") from error

    def put(self, node: fx.Node, values: Iterable[object]) -> None:
        """Keeps the node's value on each batch, in place of what was kept before."""
        # in place, so that the old and the new values of all batches never stand side by side
        kept = self._kept.setdefault(node, [None] * self.count)
        for index, value in zip(range(self.count), values, strict=True):
            if node.op != "placeholder":  # the caller's tensors are not the store's
                self.store.drop(kept[index])
            kept[index] = self.store.put(value)

    def outputs(self, node: fx.Node) -> Iterator[list[Any]]:
        """What the graph returns on each batch; `node` is its output."""
        for index in range(self.count):
            yield [self.at(leaf, index) if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]  # type: ignore[union-attr]

    def step(self, node: fx.Node) -> None:
        """Computes and keeps the node's values."""
        if node.op != "placeholder":
            self.put(node, self.compute(node))

    def release(self, node: fx.Node) -> None:
        """Frees every value whose last reader is `node`, and the node's own if nothing reads it."""
        done = [source for source, last in self._last.items() if last is node]
        if not node.users and node.op != "output":
            done.append(node)
        for source in done:
            for kept in self._kept.pop(source, []):
                if source.op != "placeholder":
                    self.store.drop(kept)
        self.store.give_back()
