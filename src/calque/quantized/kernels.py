"""A quantized network's operators joined to what integer kernels compute in one: an operator, its clips, and the grid behind.

Each requantization is defined once, here and in `calque.grid.arithmetic`. What PyTorch runs and the exact integer evaluation both
execute the graph that `fuse` makes: they differ in how they hold and sum up codes, not in how they round.
"""

import copy
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from calque.grid.arithmetic import EXACT_FLOAT32, Grids, requantize_sum
from calque.network.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    MULTIPLICATIONS,
    clamp_bounds,
    is_global_average,
    is_movement,
    value_of,
)
from calque.network.rewrites.products import contracted_axes, operands_of
from calque.quantized.modules import QuantizedLayer, Quantizer, Settled

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (float("-inf"), float("inf"))
Trio = tuple[Quantizer, Quantizer, Quantizer]  # the grids of both operands and of the result


def maker_of(quantizer: fx.Node) -> tuple[fx.Node, Bounds] | None:
    """The node whose result goes to this quantizer alone, through clips at most, and the bounds of these together.

    None where something else reads the result or a clip of it: then it becomes real numbers.
    """
    node, clips = quantizer.args[0], list[Bounds]()
    while isinstance(node, fx.Node) and len(node.users) == 1:
        bounds = clamp_bounds(node) if node.op == "call_function" else None
        if bounds is None:
            low, high = UNBOUNDED
            for first, last in reversed(clips):
                low, high = (min(max(end, first), last) for end in (low, high))
            return node, (low, high)
        clips.append(bounds)
        node = node.args[0]
    return None


def grid_node(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node of the quantizer on whose grid the node's value is, looking back through operators that only move values."""
    while is_movement(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if is_quantizer(module, node) else None


def is_quantizer(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Quantizer)


def fuse(module: fx.GraphModule) -> fx.Graph:
    """The module's graph with the kernels below in place of the operators that a quantizer alone reads, and of products."""
    graph = copy.deepcopy(module.graph)
    fusion = _Fusion(module, graph)
    for node in list(graph.nodes):
        if is_quantizer(module, node):
            fusion.requantize(node)
        elif operands_of(node) is not None:
            fusion.multiply(node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return graph


class _Fusion:
    """Rewrites a copy of a module's graph."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph):
        self.module, self.graph = module, graph
        self.first = next(node for node in graph.nodes if node.op != "placeholder")
        self.modules: dict[str, fx.Node] = {}

    def requantize(self, quantizer: fx.Node) -> None:
        """Puts the kernel that returns its codes in front of a quantizer."""
        made = maker_of(quantizer)
        if made is None:
            return
        node, bounds = made
        with self.graph.inserting_before(quantizer):
            target = self._called(quantizer)
            layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            kernel: fx.Node | None = None
            if isinstance(layer, QuantizedLayer) and layer.bias_scale is not None:
                kernel = self.graph.call_function(settle, (node, self._called(node), target, bounds))
            elif node.op == "call_function":
                operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
                kernel = self._kernel(node, operands, target, bounds)
            if kernel is not None:
                quantizer.args = (kernel,)

    def _kernel(self, node: fx.Node, operands: list[fx.Node], target: fx.Node, bounds: Bounds) -> fx.Node | None:
        """The kernel of an operator whose operands are all on grids."""
        grids = [grid_node(self.module, operand) for operand in operands]
        if not operands or None in grids:
            return None
        both = (*map(self._called, grids), target)
        if len(operands) == len(node.args) == 2 and not node.kwargs and node.target in ADDITIONS | MULTIPLICATIONS:
            function = add if node.target in ADDITIONS else multiply
            return self.graph.call_function(function, (*operands, both, bounds))
        if is_global_average(node):
            value = value_of(node)
            keepdim = value is not None and value.dim() == 4
            return self.graph.call_function(average, (*operands, keepdim, both, bounds))
        if node.target in AVERAGE_POOLS:
            return self.graph.call_function(settle_pool, (node, target, bounds))
        return None

    def multiply(self, node: fx.Node) -> None:
        """Computes a product from whole numbers, where both operands are on grids."""
        pair = operands_of(node)
        assert pair is not None
        found = [grid_node(self.module, operand) for operand in pair]
        if None in found:
            return
        readers = list(node.users)
        with self.graph.inserting_before(node):
            grids = tuple(self._called(grid) for grid in found)
            factors = self.graph.call_function(whole_numbers, (*pair, grids, contracted_axes(node)))
            left, right = (self.graph.call_function(operator.getitem, (factors, side)) for side in (0, 1))
        offsets = {pair[0]: left, pair[1]: right}
        node.args = fx.map_arg(node.args, lambda operand: offsets.get(operand, operand))
        with self.graph.inserting_after(node):
            scaled = self.graph.call_function(scale_product, (node, grids))
        for reader in readers:
            reader.replace_input_with(node, scaled)

    def _called(self, node: fx.Node | None) -> fx.Node:
        """The node whose value is the module that `node` calls."""
        assert node is not None
        target = str(node.target)
        if target not in self.modules:
            with self.graph.inserting_before(self.first):
                self.modules[target] = self.graph.get_attr(target)
        return self.modules[target]


def settle(values: Tensor, layer: QuantizedLayer, grid: Quantizer, bounds: Bounds) -> Settled | Tensor:
    """A layer's result: on the grid where the layer feeds it, else real values, clipped, which the quantizer rounds."""
    return Settled(values) if layer.feeds(grid) else values.clamp(*bounds)


def settle_pool(means: Tensor, grid: Quantizer, bounds: Bounds) -> Settled:
    """Means on a grid as ONNX Runtime's QLinearAveragePool rounds them: the zero point is added before."""
    low, high = grid.offset_bounds(bounds)
    codes = means.div(grid.scale).add_(grid.zero_point).round_()
    return Settled(grid.real(codes.sub_(grid.zero_point).clamp_(low, high)))


def add(left: Tensor, right: Tensor, grids: Trio, bounds: Bounds) -> Settled:
    """The sum of two tensors on grids, on a third grid (QLinearAdd)."""
    grid = grids[-1]
    low, high = grid.offset_bounds(bounds)
    return Settled(grid.real(requantize_sum(left, right, Grids(*(each.constants for each in grids)), low, high)))


def multiply(left: Tensor, right: Tensor, grids: Trio, bounds: Bounds) -> Settled:
    """The elementwise product of two tensors on grids, on a third grid (QLinearMul)."""
    first, second, grid = grids
    multiplier = first.scale * second.scale / grid.scale
    return Settled(grid.real(grid.requantize(first.offsets(left) * second.offsets(right), multiplier, bounds)))


def average(x: Tensor, keepdim: bool, grids: tuple[Quantizer, Quantizer], bounds: Bounds) -> Settled:
    """The mean over an image (N, C, H, W) on a grid, on another grid (QLinearGlobalAveragePool)."""
    source, grid = grids
    count = x.shape[-2] * x.shape[-1]
    dtype = torch.float64 if count * source.reach >= EXACT_FLOAT32 else x.dtype
    sums = source.offsets(x).sum((-2, -1), keepdim=keepdim, dtype=dtype).to(x.dtype)
    return Settled(grid.real(grid.requantize(sums, source.scale / (grid.scale * count), bounds)))


def whole_numbers(
    left: Tensor, right: Tensor, grids: tuple[Quantizer, Quantizer], axes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """The offsets of a product's factors, in float64 where a float32 sum of their products might be rounded.

    Args:
        axes: what is summed over: (0 for left or 1 for right, axis).
    """
    first, second = grids
    terms = math.prod((left, right)[side].shape[axis] for side, axis in axes)
    offsets = first.offsets(left), second.offsets(right)
    if terms * first.reach * second.reach < EXACT_FLOAT32:
        return offsets
    return offsets[0].double(), offsets[1].double()


def scale_product(sums: Tensor, grids: tuple[Quantizer, Quantizer]) -> Tensor:
    """The real values of a product's sums."""
    scale = grids[0].scale * grids[1].scale
    return sums.mul_(scale).to(scale.dtype)
