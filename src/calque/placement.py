"""Which tensors of a network are put on a grid, and which layers read which grid."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from calque.errors import SpecError
from calque.graph.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    CONCATENATIONS,
    MAX_POOLS,
    Network,
    is_movement,
    is_spatial_mean,
    result_of,
    value_of,
)
from calque.graph.signature import MASK
from calque.spec import Bits, Placement

SHARED_TENSOR_BITS = 8


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor on a grid.

    Attributes:
        name: of the grid; `tensor` edges have an entry of that name in the plan.
        source: the node whose value is quantized.
        bits: of the activation codes.
        readers: layers whose input grid this is.
        kind: "tensor": a grid of its own, for everything that reads `source`. "sole": the readers' grid, put on
            `source` itself because nothing else reads it. "input": the readers' grid, right in front of them only.
            "operand": right in front of a product, which alone reads it.
        product: that reads an operand.
    """

    name: str
    source: fx.Node
    bits: int
    readers: tuple[str, ...]
    kind: Literal["tensor", "sole", "input", "operand"]
    product: str = ""


def root(node: fx.Node) -> fx.Node:
    """The node where a value comes from, back through operators that only move values."""
    while is_movement(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def place(network: Network, bits: Mapping[str, Bits], placement: Placement) -> list[Edge]:
    """The grids of a network whose layers have the given bits, in the graph's order of their sources.

    "inputs" (Hubara et al. 2021): the input of each weighted layer. "integer": also results of convolutions, and operands
    and results of residual adds, pools and concatenations, at 8 bits unless `bits` has an entry of the tensor's name. A
    tensor that only layers of the same bits read is on their grid directly; one that others read as well is kept at its
    own bits and requantized in front of the layers. In both the operands of products, at 8 bits unless `bits` has an entry
    of the product's name.

    Args:
        bits: layer name -> bits; tensor name -> bits (optional entries).
    """
    quantized = [name for name in network.layers if bits[name].activation is not None]
    edges = _layer_edges(network, bits, placement, quantized) if quantized else []
    edges += _operand_edges(network, bits, default=SHARED_TENSOR_BITS if quantized else None)
    order = {node: index for index, node in enumerate(network.nodes())}
    return sorted(edges, key=lambda edge: order[edge.source])


def _layer_edges(network: Network, bits: Mapping[str, Bits], placement: Placement, quantized: list[str]) -> list[Edge]:
    """The grids of layers' inputs, and of shared tensors."""
    if placement == "inputs":
        asked = [name for name in bits if name not in network.layers and name not in network.products]
        if asked:
            raise SpecError(
                f'tensors have grids of their own in the placement "integer" only. Got bits for {asked[0]}.'
            )
        return [_input_edge(network, [name], _bits_of(bits, name)) for name in quantized]
    readers = _readers_by_root(network, quantized)
    shared = shared_tensors(network)
    skipped = _needless(network, bits)
    edges = []
    for node in network.nodes():
        names = readers.get(node, [])
        name = shared.get(node)
        widths = {_bits_of(bits, reader) for reader in names}
        if names and len(widths) == 1 and name not in bits and _is_exclusive(node, network, names):
            edges.append(Edge(_input_name(network, names), node, widths.pop(), tuple(names), "sole"))
            continue
        own = None
        if name is not None and (node not in skipped or name in bits):
            own = bits.get(name, Bits(None, SHARED_TENSOR_BITS)).activation
        direct = [reader for reader in names if _bits_of(bits, reader) == own]
        if name is not None and own is not None:
            edges.append(Edge(name, node, own, tuple(direct), "tensor"))
        rest = [reader for reader in names if reader not in direct]
        edges.extend(_requantizers(network, rest, bits))
    return edges


def _operand_edges(network: Network, bits: Mapping[str, Bits], default: int | None) -> list[Edge]:
    """The grids of both operands of each product."""
    edges = []
    for name, product in network.products.items():
        own = bits.get(name, Bits(None, default)).activation
        if own is not None:
            sources = dict.fromkeys(product.operands)  # one, where a tensor is multiplied by itself
            sides = zip(("left", "right"), sources, strict=False)
            edges += [
                Edge(_tensor_name(network, f"{name}.{side}"), source, own, (), "operand", name)
                for side, source in sides
            ]
    return edges


def named_tensors(network: Network) -> list[str]:
    """What a plan may name besides layers: shared tensors and products."""
    return [*shared_tensors(network).values(), *network.products]


def shared_tensors(network: Network) -> dict[fx.Node, str]:
    """Nodes whose value the integer placement keeps on a grid of its own unless a single layer's grid serves, with names.

    These are results of convolutions and residual adds, pools and concatenations with their operands.
    """
    names: dict[fx.Node, str] = {}
    by_result = {layer.result: layer for layer in network.layers.values()}

    def add(node: fx.Node) -> None:
        layer = by_result.get(node)
        names.setdefault(node, _tensor_name(network, f"{layer.name}.output" if layer else node.name))

    for node in network.nodes():
        operands = list(_operands(node))
        for operand in operands:
            if _carries_data(operand):
                add(root(operand))
        if operands and node.target not in MAX_POOLS:
            add(result_of(node))
        if node in {layer.node for layer in network.layers.values()}:
            layer = next(layer for layer in network.layers.values() if layer.node is node)
            if network.weighted(layer.name).geometry.kind == "convolution":
                add(layer.result)
    return {node: names[node] for node in network.nodes() if node in names}


def _tensor_name(network: Network, name: str) -> str:
    """The name of a tensor or of a grid; a layer or a product of that name keeps it."""
    return name if name not in network.layers and name not in network.products else f"{name}#tensor"


def _needless(network: Network, bits: Mapping[str, Bits]) -> set[fx.Node]:
    """Shared tensors that no integer kernel needs on a grid.

    Results of convolutions that stay float; network outputs that no convolution makes (they stay float, as the logits of a
    final Linear do); and what joins values, or is joined, where no integer kernel reads it.
    """
    by_result = {layer.result: layer for layer in network.layers.values()}
    quantized = {layer.node for name, layer in network.layers.items() if bits[name].activation is not None}
    found: set[fx.Node] = set()
    for node in reversed(shared_tensors(network)):  # readers first
        layer = by_result.get(node)
        if layer is not None:
            if bits[layer.name].activation is None and not any(list(_operands(user)) for user in node.users):
                found.add(node)
        else:
            ends = node.op != "placeholder" and _is_only_output(node)
            if ends or not (_made_by_kernel(node) or _read_by_kernel(node, quantized, found)):
                found.add(node)
    return found


def _made_by_kernel(node: fx.Node) -> bool:
    """Whether the node is the result of a residual add or a pool; joining values is no arithmetic."""
    makers = [maker for maker in (node, *node.all_input_nodes) if result_of(maker) is node]
    return any(list(_operands(maker)) and maker.target not in CONCATENATIONS for maker in makers)


def _read_by_kernel(node: fx.Node, quantized: set[fx.Node], needless: set[fx.Node]) -> bool:
    """Whether a quantized layer, or an add, pool or concatenation whose own result is on a grid, reads the node."""
    pending = list(node.users)
    while pending:
        reader = pending.pop()
        if reader in quantized or (list(_operands(reader)) and result_of(reader) not in needless):
            return True
        if is_movement(reader):
            pending.extend(reader.users)
    return False


def _is_only_output(node: fx.Node) -> bool:
    """Whether the network's outputs alone read the node, movements aside."""
    pending = list(node.users)
    while pending:
        reader = pending.pop()
        if is_movement(reader):
            pending.extend(reader.users)
        elif reader.op != "output":
            return False
    return True


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of a residual add, pool or concatenation; nothing for any other node."""
    if node.op != "call_function":
        return
    if node.target in ADDITIONS:
        both = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if (
            len(both) == 2
            and all(map(_is_floating, both))
            and not node.kwargs
            and all(_carries_data(operand) for operand in both)
        ):
            yield from both
    elif node.target in CONCATENATIONS:
        tensors = node.args[0]
        assert isinstance(tensors, (list, tuple))
        joined = [tensor for tensor in tensors if isinstance(tensor, fx.Node)]
        yield from joined if all(_is_floating(tensor) for tensor in joined) else ()
    elif node.target in MAX_POOLS | AVERAGE_POOLS or is_spatial_mean(node):
        assert isinstance(node.args[0], fx.Node)
        if _is_floating(node.args[0]):
            yield node.args[0]


def _is_floating(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.is_floating_point()


def _carries_data(node: fx.Node) -> bool:
    """Whether values of a layer or of a float input flow into the node: masks, made of the others, are on no grid."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op == "call_module":
            return True
        value = value_of(current) if current.op == "placeholder" else None
        if value is not None and value.is_floating_point() and current.target != MASK:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def _bits_of(bits: Mapping[str, Bits], name: str) -> int:
    activation = bits[name].activation
    assert activation is not None
    return activation


def _readers_by_root(network: Network, names: list[str]) -> dict[fx.Node, list[str]]:
    readers: dict[fx.Node, list[str]] = {}
    for name in names:
        source = network.layers[name].node.args[0]
        assert isinstance(source, fx.Node)
        readers.setdefault(root(source), []).append(name)
    return readers


def _is_exclusive(node: fx.Node, network: Network, names: list[str]) -> bool:
    """Whether nothing but these layers reads the node, movements aside, and no integer operator made it."""
    makers = [node, *node.all_input_nodes]  # the node may be the clip behind an add
    if any(list(_operands(maker)) for maker in makers if result_of(maker) is node):
        return False
    layers = {network.layers[name].node for name in names}
    pending = list(node.users)
    while pending:
        reader = pending.pop()
        if is_movement(reader) and reader.target not in MAX_POOLS:
            pending.extend(reader.users)
        elif reader not in layers:
            return False
    return True


def _input_name(network: Network, readers: list[str]) -> str:
    return _tensor_name(network, f"{readers[0]}.input")


def _input_edge(network: Network, readers: list[str], bits: int) -> Edge:
    source = network.layers[readers[0]].node.args[0]
    assert isinstance(source, fx.Node)
    return Edge(_input_name(network, readers), source, bits, tuple(readers), "input")


def _requantizers(network: Network, readers: list[str], bits: Mapping[str, Bits]) -> list[Edge]:
    """One grid for all of the readers that have the same input node and the same bits."""
    groups: dict[tuple[object, int], list[str]] = {}
    for name in readers:
        groups.setdefault((network.layers[name].node.args[0], _bits_of(bits, name)), []).append(name)
    return [_input_edge(network, names, width) for (_, width), names in groups.items()]
