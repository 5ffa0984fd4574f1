"""AdaQuant over a block: all its layers' parameters at once, fitted to the float block's output by gradient descent.

Source: Hubara et al. 2021, section 3: the objective of `calque.fitting.adaquant` over several layers up to a residual add, on
the quantized prefix's output. Deviations: as there, the best iterate on held-out inputs is kept, the start included, every
layer moves in its own units and the rate falls by a cosine; the descent starts from the codes that the layers have.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.execution import StandIn, execute
from calque.calibration.holdout import held_out_count
from calque.errors import SpecError
from calque.fitting.descent import Best, best_iterate, descend, iterates
from calque.fitting.problem import CONSTANT
from calque.grid.arithmetic import binary_unit
from calque.network.blocks import axis_of
from calque.network.network import is_movement
from calque.quantized.assembled import grid_of
from calque.quantized.learnable import (
    FixedQuantizer,
    Kind,
    LearnableCodes,
    LearnableLayer,
    LearnableQuantizer,
    LearnableScale,
    output_unit,
)
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.settings import Blocks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockProblem:
    """A part of a quantized network with what enters it and what the float network has at its end.

    Attributes:
        module: operators of an assembled quantized network.
        source, end: nodes of its graph; what lies between them depends on the rest through the value of `source` alone.
        inputs: (N, ...) the quantized network's values of `source`, before a quantizer that is put on it.
        targets: (N, ...) the float network's values at `end`, before a quantizer that is put on it.
        nodes: what is executed, in order: everything on a way from `source` (exclusive) to `end` (inclusive).
    """

    module: fx.GraphModule
    source: fx.Node
    end: fx.Node
    inputs: Tensor
    targets: Tensor
    nodes: tuple[fx.Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise SpecError(
                f"a block needs as many targets as inputs, at least one. Got {len(self.inputs)} inputs and "
                f"{len(self.targets)} targets."
            )
        object.__setattr__(self, "nodes", _between(self.module.graph, self.source, self.end))

    def run(
        self,
        x: Tensor,
        stand_ins: Mapping[str, StandIn],
        on_value: Callable[[fx.Node, Any], None] = lambda node, value: None,
    ) -> Tensor:
        """The value of `end` where that of `source` is x."""
        values: dict[fx.Node, Any] = {self.source: x}
        for size in {outer for node in self.nodes for outer in node.all_input_nodes} - {self.source, *self.nodes}:
            axis = axis_of(size, self.source)
            if axis is not None:
                values[size] = x.shape[axis]
        y: Tensor = execute(self.module, self.nodes, values, stand_ins, on_value)
        return y

    def layers(self) -> dict[fx.Node, QuantizedLayer]:
        """The quantized layers of the block by the node that calls them, in order."""
        return {node: part for node, part in self._called().items() if isinstance(part, QuantizedLayer)}

    def quantizers(self) -> dict[fx.Node, Quantizer]:
        """The quantizers of the block by the node that calls them, in order."""
        return {node: part for node, part in self._called().items() if isinstance(part, Quantizer)}

    def _called(self) -> dict[fx.Node, torch.nn.Module]:
        called = [node for node in self.nodes if node.op == "call_module"]
        return {node: self.module.get_submodule(str(node.target)) for node in called}

    @torch.no_grad()
    def error(self, stand_ins: Mapping[str, StandIn], index: Tensor, rows: int) -> float:
        """Squared error over that of the targets about their channel means, for the inputs `index`, `rows` at a time."""
        target = self.targets[index]
        channel = 1 if target.dim() == 4 else target.dim() - 1
        others = [axis for axis in range(target.dim()) if axis != channel]
        unit = binary_unit(target)
        power = ((target - target.mean(others, keepdim=True)) / unit).square().mean(dtype=torch.float64)
        output = torch.cat([self.run(self.inputs[part], stand_ins) for part in torch.split(index, rows)])
        return (((output - target) / unit).square().mean(dtype=torch.float64) / power.clamp(min=CONSTANT)).item()


def _between(graph: fx.Graph, source: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """Everything on a way from `source` (exclusive) to `end` (inclusive), in order."""
    behind = {source}
    for node in graph.nodes:
        if any(reader in behind for reader in node.all_input_nodes):
            behind.add(node)
    needed, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node in behind and node is not source and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return tuple(node for node in graph.nodes if node in needed)


@dataclass(frozen=True)
class BlockFit:
    """A block's modules as the fit leaves them; to be put into the graph module, then `link_requantization`.

    Attributes:
        layers, quantizers: by target in the graph module, all layers of the block and the quantizers that may have moved.
        before, after: relative squared error on the held-out inputs, of the start and of this fit.
    """

    layers: dict[str, QuantizedLayer]
    quantizers: dict[str, Quantizer]
    before: float
    after: float


def fit_block(
    problem: BlockProblem,
    how: Blocks,
    *,
    rows: int,
    generator: torch.Generator,
    fixed_codes: Collection[str] = (),
) -> BlockFit:
    """The block fitted to the float block's output; never worse than it was on the last fifth of the inputs.

    Weights, their scales and biases of all layers move, and the grids that one layer of the block alone reads.

    Args:
        how: steps and rates.
        rows: inputs per step.
        fixed_codes: layers that share their weights with another one; their codes stay.
    """
    fitted, held_out = _hold_out(len(problem.inputs), problem.inputs.device)
    start = {str(node.target): layer.alone() for node, layer in problem.layers().items()}
    before = problem.error(start, held_out, rows)
    grids = {str(node.target): problem.quantizers()[node] for node in _owned(problem)}
    twins = _Twins(problem, fitted[:rows], fixed_codes)
    groups = [{"params": [leaf], "lr": getattr(how.rates, kind)} for kind, leaf in twins.leaves()]
    optimizer = torch.optim.Adam(groups)
    gradients = _gradients(problem, twins, fitted, rows=rows, generator=generator)
    found = iterates(descend(optimizer, gradients, how.steps), how.steps, twins.restored)
    kept = best_iterate(
        Best((start, grids), before, 0), found, lambda parts: problem.error({**parts[0], **parts[1]}, held_out, rows)
    )
    best = BlockFit(*kept.iterate, before, kept.loss)
    names = ", ".join(best.layers)
    log.info("block %s error %.2e -> %.2e (%d steps)", names, best.before, best.after, how.steps)
    return best


def _hold_out(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(fitted, held out): int64 numbers of the inputs; a single input is both."""
    everything = torch.arange(count, device=device)
    border = count - held_out_count(count)
    return everything[:border], everything[border:] if border < count else everything


def _owned(problem: BlockProblem) -> list[fx.Node]:
    """The quantizers whose grid a single layer of the block reads and nothing else, movements aside."""
    layers = problem.layers()
    return [node for node in problem.quantizers() if len(found := _readers(node)) == 1 and found[0] in layers]


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the node's value, through operators that only move it."""
    found = []
    for reader in node.users:
        found.extend(_readers(reader) if is_movement(reader) else [reader])
    return found


class _Twins:
    """Stand-ins for all quantized modules of a block."""

    def __init__(self, problem: BlockProblem, rows: Tensor, fixed_codes: Collection[str]):
        self.problem = problem
        owned = _owned(problem)
        self.fixed: dict[str, StandIn] = {
            str(node.target): FixedQuantizer(part) for node, part in problem.quantizers().items() if node not in owned
        }
        self.grids = {node: LearnableQuantizer(problem.quantizers()[node]) for node in owned}
        units = self._units(rows)
        self.layers: dict[fx.Node, LearnableLayer] = {
            node: (LearnableScale if str(node.target) in fixed_codes else LearnableCodes)(layer, units[node])
            for node, layer in problem.layers().items()
        }

    @torch.no_grad()
    def _units(self, rows: Tensor) -> dict[fx.Node, Tensor]:
        """The deviations (C_out,) of each layer's real outputs."""
        layers, units = self.problem.layers(), {}

        def measure(node: fx.Node, value: Any) -> None:
            if node in layers:
                units[node] = output_unit(layers[node], value)

        alone = {str(node.target): layer.alone() for node, layer in layers.items()}
        self.problem.run(self.problem.inputs[rows], alone, measure)
        return units

    def stand_ins(self) -> dict[str, StandIn]:
        """What is called in place of each target."""
        found = dict(self.fixed)
        found.update({str(node.target): grid for node, grid in self.grids.items()})
        found.update({str(node.target): layer for node, layer in self.layers.items()})
        return found

    def leaves(self) -> list[tuple[Kind, Tensor]]:
        """The tensors that move, with what they are."""
        grids = [pair for grid in self.grids.values() for pair in grid.leaves().items()]
        return grids + [pair for layer in self.layers.values() for pair in layer.leaves().items()]

    def restored(self) -> tuple[dict[str, QuantizedLayer], dict[str, Quantizer]]:
        """Layers and quantizers by target, as the stand-ins have them now."""
        starts = self.problem.quantizers()
        quantizers = {starts[node]: twin.restored() for node, twin in self.grids.items()}
        layers = {}
        for node, twin in self.layers.items():
            source = node.args[0]
            assert isinstance(source, fx.Node)
            grid = grid_of(self.problem.module, source)
            scale = None if grid is None else quantizers.get(grid, grid).scale
            layers[str(node.target)] = twin.restored(scale)
        return layers, {str(node.target): quantizers[starts[node]] for node in self.grids}


def _gradients(
    problem: BlockProblem, twins: _Twins, fitted: Tensor, *, rows: int, generator: torch.Generator
) -> Callable[[], float]:
    """What leaves the gradients of random inputs in the twins' leaves, and returns the relative error."""
    leaves = [leaf for _, leaf in twins.leaves()]
    stand_ins = twins.stand_ins()
    # Adam's epsilon must be small beside the gradients of any block, whatever its unit
    unit = binary_unit(problem.targets)
    power = (problem.targets / unit).var().clamp(min=CONSTANT)

    def gradients() -> float:
        picked = fitted[torch.randperm(len(fitted), generator=generator)[:rows].to(fitted.device)]
        with torch.enable_grad():
            output = problem.run(problem.inputs[picked], stand_ins)
            error = ((output - problem.targets[picked]) / unit).square().mean() / power
            found = torch.autograd.grad(error, leaves, allow_unused=True, materialize_grads=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
        return error.item()

    return gradients
