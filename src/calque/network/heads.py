"""The layers that are last: of a network with several outputs, more than one of them."""

from typing import Any

from torch import fx

from calque.network.network import Network, value_of


def heads(network: Network) -> tuple[str, ...]:
    """Of a network with several outputs, the layers that make one and that no other layer is behind, in the graph's order.

    Behind the layer there may be any operators, as those that make boxes of a head's result. A layer whose result goes on to
    other layers, as in a backbone that returns its stages, is none. With a single output there are none: its last layer is known.
    """
    (output,) = (node for node in network.nodes() if node.op == "output")
    returned: Any = output.args[0]
    leaves = {leaf for leaf in returned if isinstance(leaf, fx.Node) and _is_real(leaf)}
    if len(leaves) < 2:
        return ()
    layers = {layer.node: name for name, layer in network.layers.items() if not network.is_table(name)}
    reaching = _in_front_of(set(layers))
    found = _makers(leaves, set(layers))
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


def _makers(leaves: set[fx.Node], layers: set[fx.Node]) -> set[fx.Node]:
    """The layers that these come from without another layer in between."""
    found: set[fx.Node] = set()
    seen, pending = set(leaves), list(leaves)
    while pending:
        node = pending.pop()
        if node in layers:
            found.add(node)
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending.extend(new)
    return found
