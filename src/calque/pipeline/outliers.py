"""Calibration rows that alone decide a range: found in the float pass, named, and left out of the run.

One image of 256 that was not divided by 255 makes each grid 255 times too coarse for all others. Such a row is told from the
tail of healthy ones by what the others do. It lies RATIO times beyond the largest of them, of few rows more: what is rare among
these may be common. And it lies so far beyond a Pareto tail like theirs that data with it reach there once in 1 / CHANCE sets.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from calque.calibration.batches import real_tokens
from calque.calibration.execution import execute_whole
from calque.calibration.job import Job
from calque.errors import warn
from calque.network import Batch, Network
from calque.network.network import value_of
from calque.network.signature import rows, select
from calque.network.tensors import root, shared_tensors
from calque.pipeline.build import float_outputs
from calque.pipeline.trial import Extremes
from calque.run.spill import Kept, Store

RATIO = 10.0  # costs 3 bits of 8; within it, some inputs are brighter than others
ENOUGH = 256  # rows for which RATIO holds; of fewer, it grows by the square root
CHANCE = 1e-4
FEWEST = 8  # rows: fewer do not show what is usual
SHARES = (
    32,
    100,
)  # one in so many rows may be left out: of the first, up to three rows, or of the second; at least one
APART = 50.0  # ratio at which more rows than that are named wherever they stand; healthy kinds of inputs differ by less
NAMED = 8  # rows at most in one sentence


@dataclass(frozen=True, slots=True)
class Outliers:
    """Rows beyond all others in one tensor.

    Attributes:
        place: the tensor, in words.  rows: by their number in the calibration set.
        least, others: the least of their largest absolute values, and the largest of all other rows.
    """

    place: str
    rows: tuple[int, ...]
    least: float
    others: float

    def __str__(self) -> str:
        names = ", ".join(map(str, self.rows[:NAMED])) + (", ..." if len(self.rows) > NAMED else "")
        rows = (
            f"row {names} (counted from 0) reaches" if len(self.rows) == 1 else f"rows {names} (counted from 0) reach"
        )
        times = f"{self.least / self.others:.3g} times what any other row does ({self.others:.3g})"
        return f"calibration {rows} {self.least:.3g} in {self.place}, {times}"


def healthy(job: Job, store: Store) -> tuple[Job, list[Sequence[Tensor]], dict[fx.Node, Extremes]]:
    """The job without the rows that alone decide a range; on what is left, the float network's outputs and extremes.

    The outputs are leaves by batch; extremes are those of tensors that may get a grid.

    Each is named by a CalibrationWarning and in the job's notes; a block of rows in another unit is named, too, and kept.

    Args:
        store: keeps the outputs.

    Raises:
        CalibrationError: a batch that the network fails on.
    """

    def keep(leaves: Iterable[Tensor]) -> Kept:
        return Kept(store, leaves)

    watch = _Watch(job)
    references = float_outputs(job, watch.run, keep)
    dropped: set[int] = set()
    notes = []
    for node in watch.judged:
        outliers = few(_without(watch.largest(node), dropped), watch.places[node])
        if outliers is not None:
            outliers = watch.named(outliers, dropped)
            dropped.update(outliers.rows)
            notes.append(f"{outliers}; {'it is' if len(outliers.rows) == 1 else 'they are'} left out.")
    for node in (node for node in watch.judged if node.op == "placeholder"):
        outliers = many(_without(watch.largest(node), dropped), watch.places[node])
        if outliers is not None:
            notes.append(f"{outliers}; they are kept, and decide the ranges. Are they in another unit than the others?")
    for note in notes:
        warn(note)
    job = replace(job, notes=(*job.notes, *notes))
    extremes = watch.ends(dropped)
    return (*_dropped(job, references, dropped, keep), extremes) if dropped else (job, references, extremes)


def few(extremes: Tensor, place: str) -> Outliers | None:
    """The few rows that lie far beyond all others, or None.

    Args:
        extremes: (N,), the largest absolute value of each row; rows that are 0 or not finite tell nothing.

    >>> few(torch.tensor([1.0] * 40 + [255.0]), "x").rows
    (40,)
    """
    return _beyond(extremes, place, lambda count: range(max(1, min(3, count // SHARES[0]), count // SHARES[1]), 0, -1))


def many(extremes: Tensor, place: str) -> Outliers | None:
    """Up to half of the rows that lie far beyond all others and stand side by side, as a batch in another unit does, or APART."""
    found = _beyond(extremes, place, lambda count: range(count // 2, 1, -1))
    if found is None:
        return None
    together = found.rows[-1] - found.rows[0] + 1 == len(found.rows)
    return found if together or found.least > APART * found.others else None


def _beyond(extremes: Tensor, place: str, counts: Callable[[int], Iterable[int]]) -> Outliers | None:
    """The rows before the first wide gap, looked for behind so many rows as `counts` says of the rows that tell something."""
    usable = torch.where(torch.isfinite(extremes), extremes, 0.0)
    ordered, order = usable.double().sort(descending=True, stable=True)
    values = ordered[ordered > 0].tolist()
    if len(values) < FEWEST:
        return None
    for count in counts(len(values)):
        others = values[count:]
        gap, ratio = values[count - 1] / others[0], RATIO * max(1.0, (ENOUGH / len(values)) ** 0.5)
        if gap > ratio and math.log(gap) > math.log(1 / CHANCE) * _tail(others):
            return Outliers(place, tuple(sorted(order[:count].tolist())), values[count - 1], others[0])
    return None


def _tail(values: list[float]) -> float:
    """1 / alpha of the Pareto tail of falling values: Hill's estimate or what the largest tells, and a standard error."""
    half = len(values) // 2
    hill = sum(math.log(value / values[half]) for value in values[:half]) / half
    steepness: float = max(hill, math.log(values[0] / values[half]) / math.log(half)) * (1 + half**-0.5)
    return steepness


def _without(extremes: Tensor, dropped: Iterable[int]) -> Tensor:
    left = extremes.clone()
    left[list(dropped)] = 0.0
    return left


def _dropped(
    job: Job, references: list[Sequence[Tensor]], dropped: set[int], keep: Callable[[Iterable[Tensor]], Kept]
) -> tuple[Job, list[Sequence[Tensor]]]:
    """The job and the outputs without these rows."""
    batches: list[Batch] = []
    outputs: list[Sequence[Tensor]] = []
    start = 0
    for batch, leaves in zip(job.batches, references, strict=True):
        count = rows(batch)
        kept = torch.tensor([index for index in range(count) if start + index not in dropped], dtype=torch.int64)
        start += count
        if len(kept) == count:
            batches.append(batch)
            outputs.append(leaves)
        elif len(kept):
            batches.append(select(batch, kept))
            outputs.append(keep(leaf[kept] if _has_rows(leaf, count) else leaf for leaf in leaves))
    return replace(job, batches=batches), outputs


def _has_rows(leaf: object, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count


class _Watch:
    """The float network executed batch by batch, with the ends of each row of the tensors that may get grids.

    Attributes:
        places: these tensors, in words.
        judged: those that layers read. What a mask rules out ends in a softmax, a maximum or a clip: it is no data.
        lows, highs: the least and the largest value of each row (N,), or 0, by tensor.
    """

    def __init__(self, job: Job):
        self.job = job
        self.places = _places(job.network, job.batches[0])
        read = {source for layer in job.network.layers.values() for source in layer.node.all_input_nodes}
        roots = {root(node) for node in read}
        self.judged = [node for node in self.places if node in read | roots]
        self.lows, self.highs = ({node: torch.zeros(job.inputs) for node in self.places} for _ in range(2))
        self._batch = self._start = 0

    def largest(self, node: fx.Node) -> Tensor:
        """The largest absolute value of each row (N,) of a tensor."""
        return torch.maximum(-self.lows[node], self.highs[node])

    def named(self, outliers: Outliers, dropped: set[int]) -> Outliers:
        """The same rows as they stand out in an argument, where they do: users know these."""
        for node, place in self.places.items():
            found = few(_without(self.largest(node), dropped), place) if node.op == "placeholder" else None
            if found is not None and found.rows == outliers.rows:
                return found
        return outliers

    def ends(self, dropped: set[int]) -> dict[fx.Node, Extremes]:
        """The least and the largest value of each tensor in all rows but these; 0 is among them."""
        kept = torch.ones(self.job.inputs, dtype=torch.bool)
        kept[list(dropped)] = False
        device = next(self.job.network.module.buffers()).device
        pairs = {node: (self.lows[node][kept].min(), self.highs[node][kept].max()) for node in self.places}
        return {node: (low.to(device), high.to(device)) for node, (low, high) in pairs.items()}

    def run(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """The network's outputs on the next batch."""
        result: Sequence[Any] = execute_whole(self.job.network.module, leaves, self.see)
        self._start += self.job.sizes[self._batch]
        self._batch += 1
        return result

    def see(self, node: fx.Node, value: object) -> None:
        """Keeps the ends of a float tensor that may get a grid."""
        if node not in self.places or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        count, mask = self.job.sizes[self._batch], self.job.masks[self._batch]
        if not value.numel() or value.shape[0] % count:
            return
        owners = torch.arange(count, device=value.device).repeat_interleave(value.shape[0] // count)
        real = next(real_tokens([value], [mask]))
        if real is not value and mask is not None:  # (tokens, ...)
            owners = mask.nonzero()[:, 0]
        flat = real.reshape(len(real), -1)
        here = slice(self._start, self._start + count)
        for kept, ends, reduce in (
            (self.lows, flat.amin(1), "amin"),
            (self.highs, flat.amax(1), "amax"),
        ):  # aminmax is slow
            found = torch.zeros(count, device=value.device).scatter_reduce_(0, owners, ends.float(), reduce)
            kept[node][here] = found.cpu()


def _places(network: Network, batch: Batch) -> Mapping[fx.Node, str]:
    """The float tensors with the batch on axis 0 that may get a grid, in words: arguments, operands, sums."""
    found: dict[fx.Node, str] = {}
    for layer in network.layers.values():
        for source in layer.node.all_input_nodes:
            found.setdefault(source, f"the input of layer {layer.name}")
    for product in network.products.values():
        for operand in product.operands:
            found.setdefault(operand, f"an operand of product {product.name}")
    for node in shared_tensors(network):
        found.setdefault(node, f"tensor {node.name}")
    arguments = [node for node in network.nodes() if node.op == "placeholder"]
    for node, (path, _) in zip(arguments, pytree.tree_flatten_with_path(dict(batch))[0], strict=True):
        assert isinstance(path[0], pytree.MappingKey)
        found[node] = f"the argument {path[0].key}{pytree.keystr(path[1:])}"
    count = next((symbols for node in arguments if (symbols := _symbols(node))), set())
    return {node: found[node] for node in network.nodes() if node in found and _symbols(node) == count}


def _symbols(node: fx.Node) -> set[object]:
    """What the length of the node's axis 0 depends on: the number of rows, where that is the batch axis."""
    value = value_of(node)
    size: Any = value.shape[0] if value is not None and value.dim() else 0
    return set() if isinstance(size, int) else set(size.node.expr.free_symbols)
