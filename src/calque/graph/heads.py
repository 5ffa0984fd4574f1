"""The layers that are last: of a network with several outputs, more than one of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from calque.graph.network import ACTIVATIONS, CONCATENATIONS, Network, is_movement, value_of

aten = torch.ops.aten

# What turns a head's result into an output besides activations and movements.
_ENDINGS = frozenset({aten.softmax.int, aten.log_softmax.int, aten.exp.default}) | CONCATENATIONS


def heads(network: Network) -> tuple[str, ...]:
    """Of a network with several outputs, the layers that make one and that no other layer is behind, in the graph's order.

    Behind the layer there may be activations, a softmax, movements and concatenations. A layer whose result goes on to other
    layers, as in a backbone that returns its stages, is none. With a single output there are none: its last layer is known.
    """
    (output,) = (node for node in network.nodes() if node.op == "output")
    returned: Any = output.args[0]
    leaves = {leaf for leaf in returned if isinstance(leaf, fx.Node) and _is_real(leaf)}
    if len(leaves) < 2:
        return ()
    layers = {layer.node: name for name, layer in network.layers.items() if not network.is_table(name)}
    reaching = _in_front_of(set(layers))
    found = {node for leaf in leaves for node in _makers(leaf, set(layers))}
    return tuple(name for node, name in layers.items() if node in found and node not in reaching)


def _is_real(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.is_floating_point()


def _in_front_of(layers: set[fx.Node]) -> set[fx.Node]:
    """Everything that one of the layers depends on."""
    found: set[fx.Node] = set()
    pending = [source for node in layers for source in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _makers(node: fx.Node, layers: set[fx.Node]) -> Iterator[fx.Node]:
    """The layers whose results the node is, but for what may be behind a head."""
    if node in layers:
        yield node
    elif is_movement(node) or node.target in ACTIVATIONS | _ENDINGS:
        for source in node.all_input_nodes:
            yield from _makers(source, layers)
