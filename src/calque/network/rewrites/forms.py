"""Layers in other forms, rewritten as the convolutions and linear layers that they are.

A Conv1d is a Conv2d of height one, and so are the operators between two of them. A product with a constant matrix (torch.addmm,
GPT-2's Conv1D, x @ w) is a linear layer. A transposed convolution is a convolution of its input with zeros put between the
values; runtimes have integer kernels for that one only. Bags of embeddings of one length are embeddings and their sum or mean.
"""

import operator
from typing import Any

import torch
from torch import fx

from calque.network.build import Builder
from calque.network.network import value_of
from calque.network.rewrites.functional import constant_value
from calque.network.rewrites.signals import lift_signals

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten.reshape.default})


def unify_layers(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Rewrites the graph, whose constants are the module's, in place."""
    squeezes: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target in (aten.conv1d.default, aten.conv1d.padding):
            squeezes += _conv1d(Builder(node))
        elif node.target is aten.conv_transpose1d.default:
            squeezes += _transposed1d(module, Builder(node))
        elif node.target is aten.conv_transpose2d.input:
            _transposed(module, Builder(node))
        elif node.target is aten.addmm.default:
            _addmm(module, node)
        elif node.target is aten.embedding_bag.padding_idx:
            _bag(node)
        elif node.target in (aten.matmul.default, aten.mm.default):
            _matmul(module, node)
    lift_signals(graph, squeezes)


def _conv1d(build: Builder) -> list[fx.Node]:
    """The squeeze behind the convolution of height one, if it is one."""
    x, weight, *rest = build.node.args
    if value_of(x) is None or value_of(x).dim() != 3:  # type: ignore[union-attr]  # a signal without its batch axis
        return []
    names = ("bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, rest, strict=False)), **build.node.kwargs}
    padding = given.get("padding", 0)
    two = {
        "bias": given.get("bias"),
        "stride": [1, _one(given.get("stride", 1))],
        "padding": padding if isinstance(padding, str) else [0, _one(padding)],
        "dilation": [1, _one(given.get("dilation", 1))],
        "groups": given.get("groups", 1),
    }
    target = aten.conv2d.padding if isinstance(padding, str) else aten.conv2d.default
    lifted, kernel = build.call(aten.unsqueeze.default, x, 2), build.call(aten.unsqueeze.default, weight, 2)
    result = build.call(aten.squeeze.dim, build.call(target, lifted, kernel, *two.values()), 2)
    build.replace(result)
    return [result]


def _transposed1d(module: fx.GraphModule, build: Builder) -> list[fx.Node]:
    names = ("x", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given: dict[str, Any] = {**dict(zip(names, build.node.args, strict=False)), **build.node.kwargs}
    x, weight = given["x"], given["weight"]
    if value_of(x) is None or value_of(x).dim() != 3 or constant_value(module, weight) is None:  # type: ignore[union-attr]
        return []
    lengths = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    two: dict[str, Any] = {name: [own, _one(given.get(name, own))] for name, own in lengths.items()}
    two["groups"] = given.get("groups", 1)
    lifted, kernel = build.call(aten.unsqueeze.default, x, 2), build.call(aten.unsqueeze.default, weight, 2)
    image = build.call(aten.conv_transpose2d.input, lifted, kernel, given.get("bias"), *two.values())
    result = build.call(aten.squeeze.dim, image, 2)
    build.replace(result)
    _transposed(module, Builder(image))
    return [result]


def _one(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


def _two(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return int(values[0]), int(values[-1])


def _transposed(module: fx.GraphModule, build: Builder) -> None:
    """y = conv(x with stride - 1 zeros between its values, the kernel turned round and transposed)."""
    names = ("x", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given: dict[str, Any] = {**dict(zip(names, build.node.args, strict=False)), **build.node.kwargs}
    x, weight, groups = given["x"], given["weight"], given.get("groups", 1)
    value = value_of(x)
    if value is None or value.dim() != 4 or constant_value(module, weight) is None:
        return
    stride, padding, dilation = (
        _two(given.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    extra = _two(given.get("output_padding", 0))
    kernel = weight.meta["val"].shape[2:]
    inputs, outputs = weight.meta["val"].shape[:2]
    for axis, step in zip((2, 3), stride, strict=True):
        if step > 1:  # (.., L, ..) -> (.., L, step, ..) with zeros -> (.., L * step, ..), the last step - 1 zeros cut
            x = build.call(aten.unsqueeze.default, x, axis + 1)
            x = build.call(aten.constant_pad_nd.default, x, [*[0, 0] * (4 - axis - 1), 0, step - 1])
            x = build.call(aten.flatten.using_ints, x, axis, axis + 1)
    sides = []
    for axis in (1, 0):  # the last axis first
        reach = dilation[axis] * (kernel[axis] - 1) - padding[axis]
        sides += [reach, reach + extra[axis] - (stride[axis] - 1)]
    if any(sides):
        x = build.call(aten.constant_pad_nd.default, x, sides)
    turned = build.call(aten.flip.default, weight, [2, 3])
    turned = build.call(aten.reshape.default, turned, [groups, inputs // groups, outputs, *kernel])
    turned = build.call(
        aten.reshape.default,
        build.call(aten.transpose.int, turned, 1, 2),
        [groups * outputs, inputs // groups, *kernel],
    )
    build.replace(build.call(aten.conv2d.default, x, turned, given.get("bias"), [1, 1], [0, 0], list(dilation), groups))


def _addmm(module: fx.GraphModule, node: fx.Node) -> None:
    """bias + x W on flattened rows, as GPT-2's Conv1D writes it, on the tensor that was flattened."""
    bias, x, weight = node.args[:3]
    if node.kwargs or constant_value(module, weight) is None or constant_value(module, bias) is None:
        return
    readers = list(node.users)
    flat = isinstance(x, fx.Node) and x.target in _VIEWS and value_of(x.args[0]) is not None
    restored = len(readers) == 1 and readers[0].target in _VIEWS
    if not (flat and restored and isinstance(x, fx.Node)):
        return
    source, result = x.args[0], readers[0]
    before, after = value_of(source), value_of(result)
    assert before is not None
    assert after is not None
    if before.dim() != after.dim() or before.dim() < 3 or before.shape[-1] != value_of(weight).shape[0]:  # type: ignore[union-attr]
        return
    build = Builder(result)
    turned = build.call(aten.transpose.int, weight, 0, 1)
    build.replace(build.call(aten.linear.default, source, turned, bias))
    node.graph.erase_node(node)


def _bag(node: fx.Node) -> None:
    """Bags of one length, one in a row: their embeddings' sum or mean."""
    names = ("weight", "indices", "offsets", "scale", "mode", "sparse", "weights", "last", "padding")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    indices, offsets = given["indices"], given["offsets"]
    rows = indices.args[0] if indices.target in _VIEWS else None
    value = value_of(rows)
    readers = [reader for reader in node.users if reader.users]
    regular = (
        value is not None
        and value.dim() == 2
        and offsets.target is aten.arange.start_step
        and offsets.args[2] == value.shape[1]
        and given.get("mode", 0) in (0, 1)
        and given.get("weights") is None
        and given.get("padding") in (None, -1)
        and not given.get("last", False)
    )
    if not regular or len(readers) != 1 or readers[0].target is not operator.getitem or readers[0].args[1] != 0:
        return
    build = Builder(readers[0])
    found = build.call(aten.embedding.default, given["weight"], rows)
    build.replace(build.call(aten.mean.dim if given.get("mode", 0) else aten.sum.dim_IntList, found, [1]))


def _matmul(module: fx.GraphModule, node: fx.Node) -> None:
    x, weight = node.args
    left, right = value_of(x), value_of(weight)
    if left is None or right is None or right.dim() != 2 or left.dim() < 2 or constant_value(module, x) is not None:
        return
    if constant_value(module, weight) is None or not left.is_floating_point():
        return
    build = Builder(node)
    build.replace(build.call(aten.linear.default, x, build.call(aten.transpose.int, weight, 0, 1)))
