"""Chains of one-dimensional operators, moved onto the images of height one on which their convolutions compute.

A Conv1d is a Conv2d between an unsqueeze and a squeeze, which would keep it from its batch norm, its activation, its residual
add and the next convolution. Whatever computes the same on (N, C, 1, L) moves in front of the squeeze, which the next unsqueeze
undoes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from calque.network.build import Builder
from calque.network.network import ACTIVATIONS, ADDITIONS, CONCATENATIONS, all_ints, padding_of, value_of

aten = torch.ops.aten

HEIGHT = 2  # the axis of length one of (N, C, 1, L)
_ELEMENTWISE = ACTIVATIONS | {
    aten.batch_norm.default, aten.dropout.default, aten.feature_dropout.default, aten.alias.default, aten.detach.default,
    aten.clone.default, aten.contiguous.default, aten.prelu.default,
}  # fmt: skip
_BINARY = ADDITIONS | {aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def unsqueezed(node: object) -> bool:
    """Whether the node puts the axis of length one into a signal (N, C, L)."""
    return isinstance(node, fx.Node) and node.target is aten.unsqueeze.default and node.args[1:] == (HEIGHT,)


def lift_signals(graph: fx.Graph, squeezes: Iterable[fx.Node]) -> None:
    """Moves operators, in place, in front of these squeezes, which follow convolutions of height one."""
    images = {squeeze: squeeze.args[0] for squeeze in squeezes}  # signal (N, C, L) -> its image (N, C, 1, L)
    for node in list(graph.nodes):
        if unsqueezed(node) and padding_of(node.args[0]) is not None and len(node.args[0].users) == 1:
            _pad_behind(Builder(node))
        elif unsqueezed(node) and node.args[0] in images:
            node.replace_all_uses_with(images[node.args[0]])
            graph.erase_node(node)
        else:
            _lift(node, images)


def _pad_behind(build: Builder) -> None:
    """An unsqueeze of a padded signal as a padded image, where the convolution takes the padding into its own."""
    padded = build.node.args[0]
    assert isinstance(padded, fx.Node)
    lifted = build.call(aten.unsqueeze.default, padded.args[0], HEIGHT)
    build.replace(build.call(padded.target, lifted, *padded.args[1:], **padded.kwargs))


def _lift(node: fx.Node, images: dict[fx.Node, Any]) -> None:
    """Moves the node onto images where one of its operands is one and it computes the same there."""
    rule = _RULES.get(node.target)
    if rule is None or not any(source in images for source in node.all_input_nodes):
        return
    build, name = Builder(node), node.name

    def image_of(signal: Any) -> Any:
        return images[signal] if signal in images else build.call(aten.unsqueeze.default, signal, HEIGHT)

    call = rule(node, image_of)
    if call is None:
        return
    result = image = build.call(*call)
    value = value_of(image)
    assert value is not None
    if value.dim() == 4:
        result = build.call(aten.squeeze.dim, image, HEIGHT)
        images[result] = image
    build.replace(result)
    image.name = name  # tensors and grids are called after it


Rule = Callable[[fx.Node, Callable[[Any], Any]], tuple[Any, ...] | None]
"""A node, and what gives the image of a signal -> the operator and its arguments on images; None where it has none."""


def _is_signal(value: object) -> bool:
    found = value_of(value)
    return found is not None and found.dim() == 3


def _same(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    if not _is_signal(node.args[0]) or node.kwargs:
        return None
    return node.target, image_of(node.args[0]), *node.args[1:]


def _pad(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    return _same(node, image_of) if len(padding_of(node) or [0] * 4) == 2 else None


def _binary(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    operands = node.args[:2]
    ranks = [value.dim() for operand in operands if (value := value_of(operand)) is not None]
    if node.kwargs or any(rank == 2 or rank > 3 for rank in ranks):  # (C, 1) would lie along other axes
        return None
    return node.target, *(image_of(operand) if _is_signal(operand) else operand for operand in operands)


def _concatenation(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    signals, axis = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(signals, (list, tuple))
    assert isinstance(axis, int)
    if not all(_is_signal(signal) for signal in signals):
        return None
    return node.target, [image_of(signal) for signal in signals], _axis(axis)


def _slice(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    x, axis, *bounds = node.args
    assert isinstance(axis, int)
    return None if node.kwargs else (node.target, image_of(x), _axis(axis), *bounds)


def _flatten(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    """The last axis alone, which changes nothing: what is written for images and signals alike."""
    ends: list[Any] = [*node.args[1:], *[0, -1][len(node.args) - 1 :]]  # from axis 0 to the last one by default
    last_alone = all(int(end) % 3 == 2 for end in ends) and not node.kwargs
    return (aten.alias.default, image_of(node.args[0])) if last_alone else None


def _axis(axis: int) -> int:
    """The axis of an image that is this one of the signal."""
    return 3 if axis % 3 == 2 else axis % 3


def _mean(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    x, axes, *keep = node.args
    if node.kwargs or not all_ints(axes) or [axis % 3 for axis in axes] != [2]:  # type: ignore[union-attr, operator]
        return None
    return node.target, image_of(x), [2, 3], *keep


def _adaptive(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    size = node.args[1]
    return aten.adaptive_avg_pool2d.default, image_of(node.args[0]), [1, *(size if isinstance(size, list) else [size])]


def _pool(target: Any, neutral: tuple[int, ...]) -> Rule:
    """Pools with a kernel and a stride, and so many lengths as `neutral`, which are those of height one."""

    def rule(node: fx.Node, image_of: Callable[[Any], Any]) -> tuple[Any, ...] | None:
        x, *rest = node.args
        lengths, flags = [_one(value) for value in rest[: 2 + len(neutral)]], rest[2 + len(neutral) :]
        if node.kwargs:
            return None
        sizes = [[1, length or lengths[0]] for length in lengths[:2]]  # no stride is the kernel's
        sizes += [[own, length] for own, length in zip(neutral, lengths[2:], strict=False)]
        return target, image_of(x), *sizes, *flags

    return rule


def _one(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) and value else 0 if value in ([], ()) else int(value)


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _same),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(CONCATENATIONS, _concatenation),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _pad),
    aten.slice.Tensor: _slice,
    aten.flatten.using_ints: _flatten,
    aten.mean.dim: _mean,
    aten.max_pool1d.default: _pool(aten.max_pool2d.default, (0, 1)),
    aten.avg_pool1d.default: _pool(aten.avg_pool2d.default, (0,)),
    aten.adaptive_avg_pool1d.default: _adaptive,
}
