"""The captured network: a flat graph of operators whose weighted layers are modules under the user's names."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from calque.network.layers import Activation, TrainedNorm, WeightedLayer
from calque.network.signature import Signature

aten = torch.ops.aten

# Operators after which every value is a value of the first argument, or zero: a grid survives them.
MOVEMENTS = frozenset(
    {
        aten.flatten.using_ints, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
        aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.contiguous.default, aten.dropout.default,
        aten.feature_dropout.default, aten.alias.default, aten.detach.default, aten.clone.default,
        aten.expand.default, aten.unflatten.int, aten.max_pool2d.default, aten.adaptive_max_pool2d.default,
        aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
        aten.index_select.default, aten.flip.default, aten.roll.default,
    }
)  # fmt: skip
MAX_POOLS = frozenset({aten.max_pool2d.default, aten.adaptive_max_pool2d.default})
AVERAGE_POOLS = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})
ADDITIONS = frozenset({aten.add.Tensor})
MULTIPLICATIONS = frozenset({aten.mul.Tensor})
CONCATENATIONS = frozenset({aten.cat.default, aten.concat.default})
SCALED = "scaled"  # in the meta of a multiplication by channel scales (calque.fitting.channel_scales.smoothing)
# Elementwise activations of one tensor, which a layer is fitted through.
ACTIVATIONS = frozenset(
    {
        aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default,
        aten.leaky_relu.default, aten.elu.default, aten.gelu.default, aten.silu.default, aten.mish.default,
        aten.sigmoid.default, aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default,
        aten.softplus.default,
    }
)  # fmt: skip


def is_movement(node: fx.Node) -> bool:
    """Whether every value of the node's result is a value of its first argument, or zero."""
    if node.op != "call_function":
        return False
    if node.target is aten.constant_pad_nd.default or node.target is aten.pad.default:
        return padding_of(node) is not None
    if node.target is operator.getitem:  # of a list of pieces, not of (values, indices)
        return isinstance(node.args[0], fx.Node) and is_movement(node.args[0])
    return node.target in MOVEMENTS


def padding_of(node: fx.Node) -> list[int] | None:
    """The amounts of a padding with the constant zero, last axis first; None for any other node."""
    if node.target is aten.constant_pad_nd.default:
        value = node.args[2] if len(node.args) > 2 else 0
    elif node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        if mode != "constant":
            return None
    else:
        return None
    amounts = node.args[1]
    if value not in (None, 0, 0.0) or not isinstance(amounts, (list, tuple)):
        return None
    return [amount for amount in amounts if isinstance(amount, int)] if all_ints(amounts) else None


def all_ints(values: object) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of an activation that only clips: ReLU, ReLU6, hardtanh, clamp; None for any other node."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    if not all(value is None or isinstance(value, (int, float)) for value in arguments):
        return None
    if node.target is aten.relu.default:
        return 0.0, float("inf")
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    named = {"min_val": 0, "max_val": 1, "min": 0, "max": 1}
    bounds: list[object] = [-1.0, 1.0] if node.target is aten.hardtanh.default else [None, None]
    if node.target not in (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default):
        return None
    for position, value in enumerate(node.args[1:3]):
        bounds[position] = value
    for name, value in node.kwargs.items():
        if name in named:
            bounds[named[name]] = value
    low, high = (float(bound) if isinstance(bound, (int, float)) else None for bound in bounds)
    return (float("-inf") if low is None else low, float("inf") if high is None else high)


def is_spatial_mean(node: fx.Node) -> bool:
    """Whether the node averages over exactly the last two axes of an image tensor (N, C, H, W)."""
    if node.target is not aten.mean.dim or len(node.args) < 2 or not all_ints(node.args[1]):
        return False
    axes = node.args[1]
    rank = value_of(node.args[0])
    return (
        isinstance(axes, (list, tuple))
        and rank is not None
        and rank.dim() == 4
        and (sorted(axis % 4 for axis in axes if isinstance(axis, int)) == [2, 3])
    )


def is_global_average(node: fx.Node) -> bool:
    """Whether the node averages over the whole of an image tensor (N, C, H, W)."""
    if node.target is not aten.adaptive_avg_pool2d.default:
        return is_spatial_mean(node)
    value = value_of(node.args[0])
    return value is not None and value.dim() == 4 and node.args[1] in ([1, 1], (1, 1))


def value_of(node: object) -> Tensor | None:
    """The example value (a fake tensor) that tracing left on a node, if it is a tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


@dataclass(frozen=True, slots=True)
class Layer:
    """A weighted layer: its name, its node, the activation fused behind it and the node whose value is its result."""

    name: str
    node: fx.Node
    activation: fx.Node | None  # the elementwise activation that alone reads the layer
    result: fx.Node  # the activation if it only clips, else the layer itself

    @property
    def activate(self) -> Activation:
        """The layer's fused activation, of its output; the identity where it has none."""
        if self.activation is None:
            return Activation("", (), {})
        return Activation(str(self.activation.target), self.activation.args[1:], self.activation.kwargs)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of two tensors that both come from weighted layers: its name, its node and both operands."""

    name: str
    node: fx.Node
    operands: tuple[fx.Node, fx.Node]


@dataclass(frozen=True, slots=True)
class FlatInput:
    """One flat input of a captured network: the example's shape and dtype, and the axes that may change."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A network as operators.

    Attributes:
        module: flat placeholders in, a flat tuple out; weighted layers are `WeightedLayer` modules under their names.
        inputs: the placeholders' forms, in order; None for an input that is no tensor.
        constants: the values of those inputs, which tracing fixed; None for tensors.
        layers: by name, in execution order.
        products: of two computed tensors, by name, in execution order.
        shared: layer -> the earlier layer that has the same weights (one module called twice).
        trained: layer -> the trained statistics of the batch norm that was folded into it.
        unreached: Conv2d, Linear and Embedding modules that forward never reads.
        left_float: what will not be quantized, one sentence each.
        scaled: groups of layers in front of whose input the channels have factors (calque.fitting.channel_scales.smoothing).
    """

    module: fx.GraphModule
    signature: Signature
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[FlatInput | None, ...]
    constants: tuple[object, ...]
    layers: dict[str, Layer]
    products: dict[str, Product]
    shared: dict[str, str]
    trained: dict[str, TrainedNorm]
    unreached: tuple[str, ...]
    left_float: tuple[str, ...]
    scaled: tuple[tuple[str, ...], ...] = ()

    def weighted(self, name: str) -> WeightedLayer:
        """The float module of the layer `name`."""
        module = self.module.get_submodule(str(self.layers[name].node.target))
        assert isinstance(module, WeightedLayer)
        return module

    def is_table(self, name: str) -> bool:
        """Whether the layer looks rows up (an embedding): its input is never on a grid."""
        return self.weighted(name).geometry.kind == "embedding"

    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.module.graph.nodes)


def fused_activation(node: fx.Node, accept: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The only reader of `node`, if it is an activation that `accept` takes."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target not in ACTIVATIONS or readers[0].args[0] is not node:
        return None
    return readers[0] if accept(readers[0]) else None


def result_of(node: fx.Node) -> fx.Node:
    """The node whose value an integer kernel for `node` returns: a clip at zero right behind it, else the node itself."""

    def clips_at_zero(reader: fx.Node) -> bool:
        bounds = clamp_bounds(reader)
        return bounds is not None and bounds[0] == 0.0

    return fused_activation(node, clips_at_zero) or node


def find_layers(module: fx.GraphModule) -> dict[str, Layer]:
    """The weighted layers of a captured graph, in execution order."""
    layers = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), WeightedLayer):
            activation = fused_activation(node, lambda _: True)
            layers[str(node.target)] = Layer(str(node.target), node, activation, result_of(node))
    return layers


def find_shortcuts(network: Network) -> dict[str, fx.Node]:
    """By layer whose output goes to a residual add alone, the add's other operand, where that is computed before."""
    order = {node: index for index, node in enumerate(network.nodes())}
    found = {}
    for name, layer in network.layers.items():
        readers = list(layer.node.users)
        if len(readers) != 1 or readers[0].target not in ADDITIONS or readers[0].kwargs or len(readers[0].args) != 2:
            continue
        others = [operand for operand in readers[0].args if operand is not layer.node]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or order[others[0]] > order[layer.node]:
            continue
        mine, other = value_of(layer.node), value_of(others[0])
        if mine is not None and other is not None and mine.shape == other.shape and mine.dtype == other.dtype:
            found[name] = others[0]
    return found


def is_symbolic(size: object) -> bool:
    """Whether tracing left the size open."""
    return isinstance(size, torch.SymInt) and not is_concrete_int(size)


def flat_inputs(module: fx.GraphModule, example: list[object]) -> tuple[FlatInput | None, ...]:
    """The forms of the placeholders, given the flat example that the module was traced with."""
    forms: list[FlatInput | None] = []
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(placeholders, example, strict=True):
        traced = value_of(node)
        if not isinstance(leaf, Tensor) or traced is None:
            forms.append(None)
            continue
        dynamic = tuple(axis for axis, size in enumerate(traced.shape) if is_symbolic(size))
        forms.append(FlatInput(node.name, tuple(leaf.shape), leaf.dtype, dynamic))
    return tuple(forms)
