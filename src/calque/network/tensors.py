"""Tensors that no layer owns: results and operands of residual adds, pools and concatenations, and which of them need a grid."""

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from calque.grid.bits import Bits
from calque.network.network import (
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
from calque.network.signature import MASK

aten = torch.ops.aten

_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})
_MASKINGS = frozenset(
    {
        aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.maximum.default, aten.minimum.default, aten.clamp.default, aten.clamp_min.default, aten.mul.Tensor, aten.div.Tensor,
        aten.sub.Tensor, aten.to.dtype,
    }
)  # fmt: skip


def root(node: fx.Node) -> fx.Node:
    """The node where a value comes from, back through operators that only move values."""
    while is_movement(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


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
        names.setdefault(node, tensor_name(network, f"{layer.name}.output" if layer else node.name))

    for node in network.nodes():
        operands = list(operands_on_grids(node))
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


def tensor_name(network: Network, name: str) -> str:
    """The name of a tensor or of a grid; a layer or a product of that name keeps it."""
    return name if name not in network.layers and name not in network.products else f"{name}#tensor"


def needless_tensors(network: Network, bits: Mapping[str, Bits]) -> set[fx.Node]:
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
            if bits[layer.name].activation is None and not any(list(operands_on_grids(user)) for user in node.users):
                found.add(node)
        else:
            ends = node.op != "placeholder" and _is_only_output(node)
            made = _made_by_kernel(node) and not _ends_in_softmax(node)
            if ends or not (made or _read_by_kernel(node, quantized, found)):
                found.add(node)
    return found


def _made_by_kernel(node: fx.Node) -> bool:
    """Whether the node is the result of a residual add or a pool; joining values is no arithmetic."""
    makers = [maker for maker in (node, *node.all_input_nodes) if result_of(maker) is node]
    return any(list(operands_on_grids(maker)) and maker.target not in CONCATENATIONS for maker in makers)


def _ends_in_softmax(node: fx.Node) -> bool:
    """Whether softmax alone reads the node, masks applied: no integer kernel, and what a mask rules out has no least value."""
    pending = list(node.users)
    while pending:
        reader = pending.pop()
        if is_movement(reader) or reader.target in _MASKINGS | ADDITIONS:
            pending.extend(reader.users)
        elif reader.target not in _SOFTMAXES:
            return False
    return bool(node.users)


def _read_by_kernel(node: fx.Node, quantized: set[fx.Node], needless: set[fx.Node]) -> bool:
    """Whether a quantized layer, or an add, pool or concatenation whose own result is on a grid, reads the node."""
    pending = list(node.users)
    while pending:
        reader = pending.pop()
        if reader in quantized or (list(operands_on_grids(reader)) and result_of(reader) not in needless):
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


def operands_on_grids(node: fx.Node) -> Iterator[fx.Node]:
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
