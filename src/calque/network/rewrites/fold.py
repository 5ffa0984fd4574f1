"""Batch norms folded into the layers that they follow, found by the data flow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from calque.network.layers import TrainedNorm, WeightedLayer
from calque.network.network import value_of
from calque.network.rewrites.functional import constant_value, drop_unread_buffers
from calque.network.uncovered import SHOWN

aten = torch.ops.aten


def fold_batch_norms(module: fx.GraphModule) -> tuple[list[str], dict[str, TrainedNorm]]:
    """Folds, in place, each batch norm that alone reads a weighted layer.

    Returns a sentence for each reason for which some stay float, and by layer name the statistics of those that were folded.

    With y = gamma (x - mean) / sqrt(var + eps) + beta behind W x + b:
    W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta.
    """
    kept: dict[str, list[str]] = {}
    trained: dict[str, TrainedNorm] = {}
    for node in list(module.graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        chain, axis = _origin(node)
        producer, reason = chain[-1], _obstacle(module, node, chain, axis)
        if reason:
            kept.setdefault(reason, []).append(_name(node))
            continue
        layer = module.get_submodule(str(producer.target))
        assert isinstance(layer, WeightedLayer)
        gain, offset = batch_norm_affine(module, node)
        trained[str(producer.target)] = _trained(module, node, layer.bias)
        module.set_submodule(str(producer.target), folded(layer, gain, offset))
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    drop_unread_buffers(module)
    module.recompile()
    return [_sentence(names, reason) for reason, names in kept.items()], trained


def _sentence(names: list[str], reason: str) -> str:
    if len(names) == 1:
        return f"batch norm {names[0]} stays float: it {reason}."
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} batch norms stay float: {', '.join(names[:SHOWN])}{more}: each {reason}."


def _trained(module: fx.GraphModule, node: fx.Node, like: Tensor) -> TrainedNorm:
    gamma, beta = (constant_value(module, argument) for argument in node.args[1:3])
    ones = torch.ones_like(like)
    return TrainedNorm(
        torch.zeros_like(like) if beta is None else beta.detach(), ones if gamma is None else gamma.detach()
    )


def folded(layer: WeightedLayer, gain: Tensor, offset: Tensor) -> WeightedLayer:
    """The layer followed by y * gain + offset, as one layer; computed in float64."""
    weight = layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.dim() - 1))
    bias = layer.bias.double() * gain + offset
    return WeightedLayer(layer.geometry, weight.to(layer.weight.dtype), bias.to(layer.bias.dtype))


def batch_norm_affine(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """(gain, offset) in float64 of a batch norm in eval mode: y = x * gain + offset per channel."""
    gamma, beta, mean, var = (constant_value(module, argument) for argument in node.args[1:5])
    assert mean is not None
    assert var is not None
    eps = node.args[7]
    assert isinstance(eps, float)
    gain = (var.double() + eps).rsqrt()
    if gamma is not None:
        gain = gain * gamma.double()
    offset = -mean.double() * gain
    return gain, offset if beta is None else offset + beta.double()


def _obstacle(module: fx.GraphModule, node: fx.Node, chain: list[fx.Node], axis: int | None) -> str | None:
    producer = chain[-1]
    layer = module.get_submodule(str(producer.target)) if producer.op == "call_module" else None
    if axis is not None and not isinstance(layer, WeightedLayer):
        return "does not follow a weighted layer"
    if any(len(source.users) > 1 for source in chain):
        return "follows a layer that other operators read too"
    if node.args[3] is None or node.args[5]:
        return "normalizes with the statistics of the batch"
    if not isinstance(layer, WeightedLayer) or axis != _channel_axis(layer, producer):
        return "has other channels than the layer that it follows"
    if any(constant_value(module, argument) is None for argument in node.args[1:5] if argument is not None):
        return "has parameters that depend on the input"
    return None


def _channel_axis(layer: WeightedLayer, producer: fx.Node) -> int | None:
    """The axis of the layer's output that has its channels; a table's are its rows, which no output has."""
    output = value_of(producer)
    if output is None or layer.geometry.kind == "embedding":
        return None
    return 1 if layer.geometry.kind == "convolution" else output.dim() - 1


def _origin(node: fx.Node) -> tuple[list[fx.Node], int | None]:
    """The nodes from a batch norm's input back to what computes it, and the axis of that which has the norm's channels.

    Between them are operators that only move whole channels; the axis is None where these are mixed with others.
    """
    source, axis = node.args[0], 1
    assert isinstance(source, fx.Node)
    chain: list[fx.Node] = [source]
    while source.target in _MOVED and isinstance(source.args[0], fx.Node):
        before, after = value_of(source.args[0]), value_of(source)
        found = None if before is None or after is None else _MOVED[source.target](source, axis, before, after)
        if found is None:
            return chain, None
        source, axis = source.args[0], found
        chain.append(source)
    return chain, axis


def _transposed_axis(node: fx.Node, axis: int, before: Tensor, after: Tensor) -> int | None:
    axes: Any = node.args[1:3]
    first, second = (int(index) % before.dim() for index in axes)
    return {first: second, second: first}.get(axis, axis)


def _permuted_axis(node: fx.Node, axis: int, before: Tensor, after: Tensor) -> int | None:
    order: Any = node.args[1]
    return int(order[axis]) % before.dim()


def _sliced_axis(node: fx.Node, axis: int, before: Tensor, after: Tensor) -> int | None:
    sliced: Any = node.args[1]
    return None if int(sliced) % before.dim() == axis else axis


def _viewed_axis(node: fx.Node, axis: int, before: Tensor, after: Tensor) -> int | None:
    """The last axis stays the last one where its length does."""
    last = axis == after.dim() - 1 and bool(after.shape[-1] == before.shape[-1])
    return before.dim() - 1 if last else None


def _same_axis(node: fx.Node, axis: int, before: Tensor, after: Tensor) -> int | None:
    return axis


_MOVED: dict[object, Callable[[fx.Node, int, Tensor, Tensor], int | None]] = {
    aten.transpose.int: _transposed_axis,
    aten.permute.default: _permuted_axis,
    aten.slice.Tensor: _sliced_axis,
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.flatten.using_ints), _viewed_axis),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default, aten.dropout.default), _same_axis),
}


def _name(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0] or node.name) if stack else node.name
