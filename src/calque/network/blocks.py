"""Blocks: the parts of a network between two places where a single tensor is alive."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from calque.network.network import Network, result_of, value_of


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a network that depends on the rest through one tensor, and the rest on it through another.

    Attributes:
        input: the node whose value enters.
        nodes: what is computed from it up to `end`, in order; constants are not among them.
        end: the node whose value leaves: behind a clip at zero that is fused to the last operator.
        layers: the names of the weighted layers, in order; at least two.
    """

    input: fx.Node
    nodes: tuple[fx.Node, ...]
    end: fx.Node
    layers: tuple[str, ...]


def find_blocks(network: Network) -> list[Block]:
    """The blocks of a network, in order: residual blocks up to their add, branches up to their concatenation.

    A cut is a node behind which everything depends on what came before through its value alone. A block lies between two
    neighbouring cuts and has at least two weighted layers; a chain of layers without shortcuts, each a cut, has none, and
    neither has a network one of whose inputs (a mask) is read to the very end. Sizes that were taken of an earlier tensor do
    not count where they are sizes of the block's input as well.

    Source: Hubara et al. 2021, section 3 (AdaQuant over a block); BRECQ (Li et al., 2102.05426) for blocks as units.
    """
    order = list(network.nodes())
    position = {node: index for index, node in enumerate(order)}
    variable = _variable(order)
    names = {layer.node: name for name, layer in network.layers.items()}
    cuts = _cuts(order, variable)
    blocks = []
    for entry, cut in pairwise(cuts):
        end = result_of(cut)
        inside = [node for node in order[position[entry] + 1 : position[end] + 1] if node in variable]
        layers = tuple(names[node] for node in inside if node in names)
        read = {source for node in inside for source in node.all_input_nodes if source in variable}
        outside = read - {entry, *inside}
        if len(layers) >= 2 and all(axis_of(size, entry) is not None for size in outside):
            blocks.append(Block(entry, tuple(inside), end, layers))
    return blocks


def _variable(order: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose value depends on an input of the network."""
    found: set[fx.Node] = set()
    for node in order:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _cuts(order: list[fx.Node], variable: set[fx.Node]) -> list[fx.Node]:
    """The nodes whose tensor is the only one that is alive at some moment, in order."""
    last = {source: index for index, node in enumerate(order) for source in node.all_input_nodes}
    cuts: list[fx.Node] = []
    alive: set[fx.Node] = set()
    for index, node in enumerate(order):
        if node.op == "output":
            break
        if node in variable and _holds_tensors(node) and node in last:
            alive.add(node)
        alive -= {source for source in node.all_input_nodes if last[source] == index}
        if len(alive) == 1 and value_of(only := next(iter(alive))) is not None and only not in cuts:
            cuts.append(only)
    return cuts


def _holds_tensors(node: fx.Node) -> bool:
    """Whether the value is a tensor or has tensors: sizes, which tracing took of them, are not counted."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def axis_of(size: fx.Node, tensor: fx.Node) -> int | None:
    """The axis of a node's tensor whose length `size` is, as tracing saw it; None where there is none."""
    length, value = size.meta.get("val"), value_of(tensor)
    if value is None or not isinstance(length, torch.SymInt):
        return None
    return next((axis for axis, other in enumerate(value.shape) if str(other) == str(length)), None)
