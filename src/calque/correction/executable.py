"""A quantized network whose modules can be replaced by stand-ins: what is tuned end to end is executed by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.execution import StandIn, execute
from calque.calibration.losses import Loss
from calque.calibration.rows import Rows
from calque.quantized.assembled import grid_of, link_requantization
from calque.quantized.learnable import LearnableLayer, output_unit
from calque.quantized.modules import QuantizedLayer, Quantizer

KEPT_FOR_BACKWARD = 4  # tensors per value of the network that a backward pass may need, estimated


def _nothing(node: fx.Node, value: Any) -> None:
    """Looks at no value."""


class Executable:
    """A quantized graph module with the nodes that call its layers, tables aside; stand-ins may take the place of its modules."""

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.nodes = [node for node in module.graph.nodes if node.op != "placeholder"]
        called = {node: module.get_submodule(str(node.target)) for node in self.nodes if node.op == "call_module"}
        self.layers = [
            node
            for node, part in called.items()
            if isinstance(part, QuantizedLayer) and part.geometry.kind != "embedding"
        ]
        self.quantizers = {str(node.target): part for node, part in called.items() if isinstance(part, Quantizer)}
        names = {part: name for name, part in self.quantizers.items()}
        grids = {str(node.target): grid_of(module, node.all_input_nodes[0]) for node in self.layers}
        self._grids = {layer: None if grid is None else names[grid] for layer, grid in grids.items()}

    def modules(self) -> dict[str, QuantizedLayer]:
        """The layers by name as they are now."""
        found = {}
        for node in self.layers:
            layer = self.module.get_submodule(str(node.target))
            assert isinstance(layer, QuantizedLayer)
            found[str(node.target)] = layer
        return found

    def install(self, parts: Mapping[str, QuantizedLayer | Quantizer]) -> None:
        """Puts layers and quantizers, in place, into the network."""
        for name, part in parts.items():
            self.module.set_submodule(name, part)
        link_requantization(self.module)

    def outputs(
        self,
        inputs: Sequence[Any],
        stand_ins: Mapping[str, StandIn],
        on_value: Callable[[fx.Node, Any], None] = _nothing,
    ) -> list[Any]:
        """The network's output leaves."""
        values = dict(zip(self.placeholders, inputs, strict=True))
        return list(execute(self.module, self.nodes, values, stand_ins, on_value))

    @torch.no_grad()
    def loss(self, parts: Sequence[Rows], loss: Loss) -> float:
        """The loss of the network as it is shipped, mean over the rows."""
        total = sum(part.count * loss(part.references, self.outputs(part.inputs, {})).item() for part in parts)
        return total / sum(part.count for part in parts)

    def rows_at_a_time(self, part: Rows, memory: int) -> int:
        """How many rows like these can be executed with gradients in so many bytes; at least one."""
        return max(1, memory // (KEPT_FOR_BACKWARD * max(1, self._bytes_per_row(part))))

    @torch.no_grad()
    def _bytes_per_row(self, part: Rows) -> int:
        """Of the values of all operators together, measured on one row."""
        found = 0

        def count(node: fx.Node, value: Any) -> None:
            nonlocal found
            found += sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))

        self.outputs(part.pick(torch.zeros(1, dtype=torch.int64)).inputs, {}, count)
        return found

    @torch.no_grad()
    def output_units(self, part: Rows) -> dict[str, Tensor]:
        """The standard deviations (C_out,) of each layer's real outputs."""
        layers, units = self.modules(), {}

        def measure(node: fx.Node, value: Any) -> None:
            if node in self.layers:
                units[str(node.target)] = output_unit(layers[str(node.target)], value)

        # a layer that feeds a grid returns clipped values: measured alone
        self.outputs(part.inputs, {name: layer.alone() for name, layer in layers.items()}, measure)
        return units

    def restored(
        self, layers: Mapping[str, LearnableLayer], quantizers: Mapping[str, Quantizer] | None = None
    ) -> dict[str, QuantizedLayer]:
        """The layers that the stand-ins stand for.

        Args:
            quantizers: by target, those that have moved.
        """
        grids = {**self.quantizers, **(quantizers or {})}
        scales = {layer: None if name is None else grids[name].scale for layer, name in self._grids.items()}
        return {name: layers[name].restored(scale) for name, scale in scales.items()}


def largest_part(parts: Sequence[Rows]) -> Rows:
    """The part with the most input values per row."""
    return max(parts, key=_values_per_row)


def _values_per_row(part: Rows) -> int:
    return sum(leaf.numel() for leaf in part.inputs if isinstance(leaf, Tensor)) // part.count
