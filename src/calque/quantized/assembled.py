"""A quantized network while it is worked on: the captured operators, with quantized layers and a quantizer on each edge."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from calque.grid.bits import Plan
from calque.network import Network
from calque.network.rewrites.functional import free_name
from calque.network.rewrites.products import operands_of
from calque.quantized.kernels import fuse, grid_node, maker_of
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.placement import Edge

QUANTIZERS = (
    "quantizers"  # the sub-module that holds the quantizers of all edges, where the network has none of that name
)


@dataclass(frozen=True)
class Assembled:
    """A quantized network that stages may still change in place.

    Attributes:
        network: the float network that it was made of.
        graph_module: the operators; flat inputs in, a flat tuple out.
        plan: bits of every layer and every tensor that has a grid of its own.
        edges: the name of each quantizer's edge by the path of its module.
    """

    network: Network
    graph_module: fx.GraphModule
    plan: Plan
    edges: Mapping[str, str]

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name, in execution order."""
        return quantized_layers(self.graph_module)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by the name of their edge, in execution order."""
        return edge_quantizers(self.graph_module, self.edges)


def compiled(graph_module: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """What computes the flat outputs by the kernels that the exported file runs on, of the module (or a copy) and flat inputs."""
    return type(fx.GraphModule(graph_module, fuse(graph_module))).forward


def quantized_layers(graph_module: fx.GraphModule) -> dict[str, QuantizedLayer]:
    """The quantized layers that the graph calls, by name, in execution order."""
    return {name: module for name, module in _called(graph_module) if isinstance(module, QuantizedLayer)}


def edge_quantizers(graph_module: fx.GraphModule, edges: Mapping[str, str]) -> dict[str, Quantizer]:
    """The quantizers that the graph calls, by the name of their edge, in execution order."""
    return {edges[path]: module for path, module in _called(graph_module) if isinstance(module, Quantizer)}


def _called(graph_module: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            yield str(node.target), graph_module.get_submodule(str(node.target))


def assemble(
    network: Network,
    edges: list[Edge],
    layers: Mapping[str, QuantizedLayer],
    quantizers: Mapping[str, Quantizer],
    plan: Plan,
) -> Assembled:
    """The quantized network: `network` (left untouched) with its layers replaced and a quantizer on every edge.

    Args:
        layers, quantizers: by layer and edge name.
    """
    module = copy.deepcopy(network.module)
    twins = dict(zip(network.nodes(), module.graph.nodes, strict=True))
    holder, own = nn.Module(), free_name(module, QUANTIZERS)
    module.add_module(own, holder)
    targets = {}
    for index, edge in enumerate(edges):
        leaf = f"{index:03d}"
        holder.add_module(leaf, quantizers[edge.name])
        targets[f"{own}.{leaf}"] = edge.name
        _insert(module.graph, twins[edge.source], f"{own}.{leaf}", edge, network, twins)
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    module.graph.lint()
    module.recompile()
    link_requantization(module)
    return Assembled(network, module, plan, targets)


def link_requantization(module: fx.GraphModule) -> None:
    """Tells, in place, each quantized layer what grid its input is on, and its result's, where a single quantizer reads it."""
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, QuantizedLayer):
            grid = grid_of(module, node.all_input_nodes[0])
            if grid is not None:
                called.read(grid)
        elif isinstance(called, Quantizer):
            made = maker_of(node)
            layer = module.get_submodule(str(made[0].target)) if made and made[0].op == "call_module" else None
            if made and isinstance(layer, QuantizedLayer):
                layer.feed(called, made[1])


def _insert(
    graph: fx.Graph, source: fx.Node, target: str, edge: Edge, network: Network, twins: dict[fx.Node, fx.Node]
) -> None:
    readers = [twins[network.layers[name].node] for name in edge.readers]
    if edge.kind == "operand":
        product = network.products[edge.product]
        reader = twins[product.node]
        operands = operands_of(reader)  # a tensor's own grid may stand in front by now
        assert operands is not None
        operand = operands[product.operands.index(edge.source)]
        with graph.inserting_before(reader):
            node = graph.call_module(target, (operand,))
        reader.replace_input_with(operand, node)
    elif edge.kind == "input":
        value = readers[0].args[0]
        assert isinstance(value, fx.Node)
        with graph.inserting_before(readers[0]):
            node = graph.call_module(target, (value,))
        for reader in readers:
            reader.replace_input_with(value, node)
    else:
        users = list(source.users)
        with graph.inserting_after(source):
            node = graph.call_module(target, (source,))
        for user in users:
            user.replace_input_with(source, node)
    node.meta = {key: item for key, item in source.meta.items() if key in ("val", "tensor_meta")}


def grid_of(graph_module: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer on whose grid the node's value is, looking back through operators that only move values."""
    found = grid_node(graph_module, node)
    module = None if found is None else graph_module.get_submodule(str(found.target))
    return module if isinstance(module, Quantizer) else None
