"""What a network's outputs lose with grids in place, measured on a few calibration rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.batches import real_tokens, token_masks
from calque.grid.arithmetic import affine_grid, fake_quantize
from calque.network import Batch, Network
from calque.network.signature import flatten, rows, select
from calque.quantized.placement import SHARED_TENSOR_BITS, Edge

ROWS = 32  # calibration rows that judge
BATCHES = 4  # that they come from, where batches have enough rows
LOST = 0.01  # of the signal of a slice of an output (20 dB): a grid that costs less is left alone
TRIALS = 32  # of sets of grids: what loses everywhere a little has no grid to blame, and is not searched to its end
FEW = 2  # grids: of so few, all may be to blame
CHANGED = 0.05  # share of the whole numbers among the outputs (classes, say) whose change weighs as much as LOST
SILENT = 1e-5  # of a slice's largest value: a slice that varies less is constant
LARGEST_FACTOR = 2.0**60  # ratio of the factors of two channels: weights times it are normal numbers

Extremes = tuple[Tensor, Tensor]  # the least and the largest value of a tensor
Grid = tuple[Tensor, Tensor]  # scale, which may differ by channel, and zero point


@dataclass(frozen=True)
class Factors:
    """What the channels of a layer's input are divided by, `scale` (C,), and their largest absolute values before, (C,)."""

    scale: Tensor
    largest: Tensor
    axis: int

    def along_channels(self) -> Tensor:
        """The scale, so that it broadcasts against the input."""
        return self.scale if self.axis == -1 else self.scale.reshape(-1, 1, 1)


class Trial:
    """A network whose outputs on some rows are compared with and without grids."""

    def __init__(self, network: Network, batches: list[Batch], extremes: Mapping[fx.Node, Extremes]):
        self.network = network
        self.batches = batches
        self.extremes = extremes
        count = max(BATCHES, ROWS // rows(batches[0]))
        sample = [_some_rows(batch) for batch in batches[:: -(-len(batches) // count)]]
        self.masks = token_masks(sample)
        self.leaves = [flatten(batch)[0] for batch in sample]
        self.exact = self._outputs({})

    def lost(self, edges: list[Edge]) -> dict[Edge, float]:
        """The edges whose grid alone costs the outputs more than LOST, and more than all harmless grids together.

        All edges are tried together, and halves of them where that costs too much: a healthy network takes one trial.
        """
        endless = {edge: math.inf for edge in edges if not self._is_finite(edge)}
        if endless:
            return endless
        costly = self._costly(edges)
        if len(costly) > max(FEW, len(edges) // 2):
            return {}  # outputs that any rounding changes, as ranks of near ties: no grid is to blame
        harmless = self.loss([edge for edge in edges if edge not in costly]) if costly else 0.0
        return {edge: loss for edge, loss in costly.items() if loss > harmless}

    def _costly(self, edges: list[Edge]) -> dict[Edge, float]:
        """Single edges that cost more than LOST, the costliest halves first, as far as TRIALS lead."""
        loss = self.loss(edges)
        groups = [(loss, edges)] if loss > LOST else []
        found: dict[Edge, float] = {}
        trials = 1
        while groups:
            loss, group = groups.pop(max(range(len(groups)), key=lambda index: groups[index][0]))
            if len(group) == 1:
                found[group[0]] = loss
            elif trials < TRIALS:
                half = len(group) // 2
                halves = [(self.loss(part), part) for part in (group[:half], group[half:])]
                groups += [(loss, part) for loss, part in halves if loss > LOST]
                trials += len(halves)
        return found

    def loss(self, edges: list[Edge]) -> float:
        """The largest share of its signal that a slice of an output loses with these grids in place."""
        return self._loss({edge: affine_grid(*self.extremes[edge.source], SHARED_TENSOR_BITS) for edge in edges})

    def loss_with(self, edge: Edge, factors: "Factors") -> float:
        """The same with the grid of one layers' input alone, behind factors of its channels."""
        top = (factors.largest / factors.scale).max()
        low = -top if self.extremes[edge.source][0] < 0 else torch.zeros_like(top)
        step, zero_point = affine_grid(low, top, SHARED_TENSOR_BITS)
        placed = replace(edge, kind="input", source=self._read_by(edge))
        return self._loss({placed: (step * factors.along_channels(), zero_point)})

    def _loss(self, grids: Mapping[Edge, Grid]) -> float:
        if not grids:
            return 0.0
        pairs = zip(self.exact, self._outputs(grids), strict=True)
        return max((_lost_share(exact, received) for exact, received in pairs), default=0.0)

    def factors(self, edge: Edge) -> "Factors | None":
        """Powers of two, one for each channel of the layers' input, that make the channels alike; None where they are."""
        if set(edge.readers) & {*self.network.shared, *self.network.shared.values()}:
            return None  # the weights have another reader
        axis = -1 if self.network.weighted(edge.readers[0]).geometry.kind == "linear" else 1
        largest = _largest_by_channel(self.network, self.batches, self._read_by(edge), axis)
        powers = torch.where(largest > 0, largest, largest.max()).log2().round()
        powers = (powers - powers.max()).clamp(min=-math.log2(LARGEST_FACTOR))
        return None if bool((powers == 0).all()) else Factors(powers.exp2(), largest, axis)

    def _read_by(self, edge: Edge) -> fx.Node:
        """The value in front of the edge's layers: the source, moved."""
        value = self.network.layers[edge.readers[0]].node.args[0]
        assert isinstance(value, fx.Node)
        return value

    def shown(self, edge: Edge) -> str:
        low, high = self.extremes[edge.source]
        return f"from {low.item():.3g} to {high.item():.3g}"

    def _is_finite(self, edge: Edge) -> bool:
        return all(bool(torch.isfinite(end)) for end in self.extremes[edge.source])

    def _outputs(self, grids: Mapping[Edge, Grid]) -> list[tuple[Any, ...]]:
        """Each output of the network on the sampled rows, batch by batch, with these grids in place."""
        found = []
        for leaves, mask in zip(self.leaves, self.masks, strict=True):
            outputs = _OnGrids(self.network, grids).run(*leaves)
            found.append([_real(value, mask) for value in outputs])
        return list(zip(*found, strict=True))


def _real(value: Any, mask: Tensor | None) -> Any:
    """A value without what stands in padded places."""
    return next(real_tokens([value], [mask])) if isinstance(value, Tensor) else value


def _some_rows(batch: Batch) -> Batch:
    """Rows of a batch, spread over it."""
    count = rows(batch)
    wanted = min(count, ROWS // BATCHES)
    return select(batch, torch.arange(wanted) * count // wanted)


class _OnGrids(fx.Interpreter):
    """A float network with the values of some edges rounded to their grids."""

    def __init__(self, network: Network, grids: Mapping[Edge, Grid]):
        super().__init__(network.module)
        self.at_source = {edge.source: grid for edge, grid in grids.items() if edge.kind in ("tensor", "sole")}
        self.in_front: dict[fx.Node, dict[fx.Node, Grid]] = {}
        for edge, grid in grids.items():
            for reader in _readers(network, edge):
                self.in_front.setdefault(reader, {})[edge.source] = grid

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        grids = self.in_front.get(n, {})

        def read(source: fx.Node) -> Any:
            return _rounded(self.env[source], grids[source]) if source in grids else self.env[source]

        args, kwargs = fx.map_arg((n.args, n.kwargs), read)
        value = getattr(self, n.op)(n.target, args, kwargs)
        return _rounded(value, self.at_source[n]) if n in self.at_source else value


def _readers(network: Network, edge: Edge) -> list[fx.Node]:
    """The nodes in front of which the edge's grid stands."""
    if edge.kind == "input":
        return [network.layers[name].node for name in edge.readers]
    return [network.products[edge.product].node] if edge.kind == "operand" else []


def _rounded(value: Tensor, grid: Grid) -> Tensor:
    return fake_quantize(value, *grid, 0, 2**SHARED_TENSOR_BITS - 1)


@torch.no_grad()
def survey(network: Network, batches: list[Batch], sources: set[fx.Node]) -> dict[fx.Node, Extremes]:
    """The extremes of some nodes over all batches, padding left out."""
    found: dict[fx.Node, Extremes] = {}
    if not sources:
        return found

    def record(node: fx.Node, value: Any) -> None:
        if node in sources:
            low, high = _real(value, mask).aminmax()
            known = found.get(node, (low, high))
            found[node] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    recorder = _Recorder(network.module, record)
    for batch, mask in zip(batches, token_masks(batches), strict=True):  # noqa: B007  # record reads the mask
        recorder.run(*flatten(batch)[0])
    return found


class _Recorder(fx.Interpreter):
    """A graph that shows each value as it is computed."""

    def __init__(self, module: fx.GraphModule, record: Callable[[fx.Node, Any], None]):
        super().__init__(module)
        self.record = record
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.record(n, value)
        return value


@torch.no_grad()
def _largest_by_channel(network: Network, batches: list[Batch], source: fx.Node, axis: int) -> Tensor:
    """The largest absolute value of each channel of a node (C,) on all calibration inputs."""
    found: list[Tensor] = []

    def record(node: fx.Node, value: Any) -> None:
        if node is source:
            found.append(value.movedim(axis, 0).flatten(1).abs().amax(1))

    recorder = _Recorder(network.module, record)
    for batch in batches:
        recorder.run(*flatten(batch)[0])
    return torch.stack(found).amax(0)


def _lost_share(exact: Sequence[Any], received: Sequence[Any]) -> float:
    """The largest share of the signal that a slice of one output loses, along any of its axes, over all batches."""
    tensors = [(a, b) for a, b in zip(exact, received, strict=True) if isinstance(a, Tensor) and a.numel()]
    if not tensors:
        return 0.0
    if not tensors[0][0].is_floating_point():
        changed = sum(int((a != b).sum()) for a, b in tensors) / sum(a.numel() for a, _ in tensors)
        return changed / CHANGED * LOST
    axes = range(tensors[0][0].dim())
    whole = [_slices(tensors, None)]
    return max([*whole, *(_slices(tensors, axis) for axis in axes if axis > 0 and _same_length(tensors, axis))])


def _same_length(tensors: list[tuple[Tensor, Tensor]], axis: int) -> bool:
    return len({a.shape[axis] for a, _ in tensors}) == 1


def _slices(tensors: list[tuple[Tensor, Tensor]], axis: int | None) -> float:
    """The largest error power over signal power (about the mean) of slices along an axis; of the whole for None."""

    def apart(value: Tensor) -> Tensor:
        return value.double().reshape(1, -1) if axis is None else value.double().movedim(axis, 0).flatten(1)

    exact = torch.cat([apart(a) for a, _ in tensors], 1)  # (slices, values)
    error = torch.cat([apart(b) for _, b in tensors], 1) - exact
    finite = exact.isfinite()
    exact, error = exact.where(finite, 0.0), error.where(finite, 0.0)
    count = finite.sum(1).clamp(min=1)
    mean = exact.sum(1) / count
    signal = ((exact - mean[:, None]).where(finite, 0.0)).square().sum(1) / count
    noise = error.square().sum(1) / count
    audible = signal > (SILENT * exact.abs().amax(1)).square()
    if not audible.any():
        return 0.0
    return (noise / signal)[audible].nan_to_num(nan=math.inf).max().item()
