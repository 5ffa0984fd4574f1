"""Which tensors of a network are put on a grid, and which layers read which grid."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx

from calque.errors import SpecError
from calque.grid.bits import Bits, Placement
from calque.network.network import MAX_POOLS, Network, is_movement, result_of
from calque.network.tensors import needless_tensors, operands_on_grids, root, shared_tensors, tensor_name

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
        return [input_edge(network, [name], _bits_of(bits, name)) for name in quantized]
    readers = readers_by_root(network, quantized)
    shared = shared_tensors(network)
    skipped = needless_tensors(network, bits)
    edges = []
    for node in network.nodes():
        names = readers.get(node, [])
        name = shared.get(node)
        widths = {_bits_of(bits, reader) for reader in names}
        if names and len(widths) == 1 and name not in bits and is_exclusive(node, network, names):
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
                Edge(tensor_name(network, f"{name}.{side}"), source, own, (), "operand", name) for side, source in sides
            ]
    return edges


def _bits_of(bits: Mapping[str, Bits], name: str) -> int:
    activation = bits[name].activation
    assert activation is not None
    return activation


def readers_by_root(network: Network, names: Iterable[str]) -> dict[fx.Node, list[str]]:
    """Where the inputs of these layers come from, back through operators that only move values, with the layers of each."""
    readers: dict[fx.Node, list[str]] = {}
    for name in names:
        source = network.layers[name].node.args[0]
        assert isinstance(source, fx.Node)
        readers.setdefault(root(source), []).append(name)
    return readers


def is_exclusive(node: fx.Node, network: Network, names: list[str]) -> bool:
    """Whether nothing but these layers reads the node, movements aside, and no integer operator made it."""
    makers = [node, *node.all_input_nodes]  # the node may be the clip behind an add
    if any(list(operands_on_grids(maker)) for maker in makers if result_of(maker) is node):
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
    return tensor_name(network, f"{readers[0]}.input")


def input_edge(network: Network, readers: list[str], bits: int) -> Edge:
    """A grid right in front of these layers, which read one node."""
    source = network.layers[readers[0]].node.args[0]
    assert isinstance(source, fx.Node)
    return Edge(_input_name(network, readers), source, bits, tuple(readers), "input")


def _requantizers(network: Network, readers: list[str], bits: Mapping[str, Bits]) -> list[Edge]:
    """One grid for all of the readers that have the same input node and the same bits."""
    groups: dict[tuple[object, int], list[str]] = {}
    for name in readers:
        groups.setdefault((network.layers[name].node.args[0], _bits_of(bits, name)), []).append(name)
    return [input_edge(network, names, width) for (_, width), names in groups.items()]
