"""How large an exported file will be, before it is written: by layer, by quantizer, and what no choice of bits changes.

An upper bound: what the exporter may share, fold or drop is counted where that cannot be known from the network alone.
"""

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from calque.graph import Network, WeightedLayer
from calque.graph.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    CONCATENATIONS,
    clamp_bounds,
    is_movement,
    is_spatial_mean,
    is_symbolic,
    value_of,
)  # fmt: skip
from calque.placement import Edge, place
from calque.spec import Bits, Placement

VALUE = "abc"  # stands for the exporter's short names of values
HEAD = 650  # of the file: versions, recipe, names of domains, form of the graph, checksums of grids and float tensors
TABLES = {2: 560, 3: 780, 5: 780, 6: 780, 7: 1100}  # what decodes fields of codes, once for each width in a file
FOLDED_FROM, FOLDED_TO = 8192, 524_288  # bytes that torch.onnx reads at most to compute a constant, and writes
AXIS, TO = 13, 10  # bytes of these attributes
OPERATOR = 160  # of an operator that is not in the table: it may become several nodes
NUMBER = 16  # of a constant number, which an operator reads

aten = torch.ops.aten
_NODES: dict[object, int] = {  # bytes, as measured
    **dict.fromkeys((aten.dropout.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
                     aten.clone.default, aten.feature_dropout.default, operator.getitem), 0),
    **dict.fromkeys((aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.matmul.default, aten.add.Tensor,
                     aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.eq.Scalar, aten.logical_not.default), 28),
    **dict.fromkeys((aten.softmax.int, aten.gelu.default, aten.cat.default, aten.permute.default, aten.transpose.int,
                     aten.unsqueeze.default, aten.masked_fill.Scalar), 50),
    **dict.fromkeys((aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.layer_norm.default, aten.flatten.using_ints,
                     aten.split.Tensor, aten.chunk.default), 75),
    **dict.fromkeys((aten.relu6.default, aten.hardtanh.default, aten.silu.default), 90),
}  # fmt: skip


def file_size(network: Network, plan: Mapping[str, Bits], placement: Placement, computed: Iterable[str] = ()) -> int:
    """Bytes of the file for ONNX Runtime and OpenVINO, at most.

    Args:
        plan: bits of every layer, and of tensors that are not the default.
        computed: layers whose bias scales are exactly products of two scales: only these are not stored.
    """
    edges = place(network, plan, placement)
    stored = set(network.layers) - set(computed)
    layers = sum(layer_bytes(network, name, plan[name], stored_scale=name in stored) for name in network.layers)
    return fixed_bytes(network, [plan]) + layers + sum(edge_bytes(network, edge) for edge in edges)


def fixed_bytes(network: Network, plans: Iterable[Mapping[str, Bits]]) -> int:
    """What the choice of bits does not change: constants, other operators, metadata, inputs and outputs, tables of codes.

    Args:
        plans: whose bits the file may have.
    """
    chosen = [(name, plan[name]) for plan in plans for name in network.layers]
    decoded = [(name, bits.weight) for name, bits in chosen if bits.weight in TABLES and bits.group is None]
    shapes = {tuple(network.weighted(name).weight.shape) for name, _ in decoded}
    total = HEAD + sum(TABLES[width] for width in {width for _, width in decoded} if width) + 45 * len(shapes)
    for node in network.nodes():
        value = value_of(node)
        if node.op == "placeholder" and value is not None:
            total += 40 + len(node.name) + 14 * value.dim()
        elif node.op == "output":
            leaves = [value_of(leaf) for leaf in node.all_input_nodes]
            total += sum(60 + 14 * leaf.dim() for leaf in leaves if leaf is not None)
    constants, computed = _constants(network)
    operators = (node for node in network.nodes() if node.op == "call_function" and node not in computed)
    return total + sum(constants) + sum(map(_operator_bytes, operators))


def edge_bytes(network: Network, edge: Edge) -> int:
    """A quantizer: its nodes, once more wherever its values are moved, its scale and its zero point, its entry in the plan."""
    short = edge.bits < 8 or (clamp_bounds(edge.source) or (0, float("inf")))[1] != float("inf")
    codes, scale = f"{edge.name}/codes", f"{edge.name}/scale"
    first, again = _quantizer(codes, scale, clipped=short), _quantizer(VALUE, scale, clipped=short)
    entry = len(edge.product or edge.name) + len('"":"a8",') if edge.kind in ("tensor", "operand") else 0
    constants = _tensor(scale, (), 4) + _tensor(VALUE, (), 1)
    return first + again * _repetitions(network, edge) + constants + entry


def _quantizer(codes: str, scale: str, *, clipped: bool) -> int:
    clip = _node("Min", VALUE, VALUE, codes) if clipped else 0
    raw = VALUE if clipped else codes
    return (
        _node("QuantizeLinear", VALUE, scale, VALUE, raw) + clip + _node("DequantizeLinear", codes, scale, VALUE, VALUE)
    )


def _repetitions(network: Network, edge: Edge) -> int:
    """How often values are put on the edge's grid again: behind movements, where an integer operator reads them."""
    count, seen, front = 0, {edge.source}, [edge.source]
    while front:
        node = front.pop()
        for reader in node.users:
            if reader in seen:
                continue
            seen.add(reader)
            if is_movement(reader):
                front.append(reader)
                count += any(_is_integer(other) or _is_layer(network, other, folded=False) for other in reader.users)
            elif _is_layer(network, reader, folded=True):
                count += 1
    return count


def _is_integer(node: fx.Node) -> bool:
    return node.target in ADDITIONS | CONCATENATIONS | AVERAGE_POOLS or is_spatial_mean(node)


def _is_layer(network: Network, node: fx.Node, *, folded: bool) -> bool:
    """Whether the node is a layer; one whose input is flattened to rows first, or one whose input is not."""
    if node.op != "call_module" or str(node.target) not in network.layers:
        return False
    value = value_of(node)
    linear = network.weighted(str(node.target)).geometry.kind == "linear"
    return (linear and value is not None and value.dim() != 2) == folded


def layer_bytes(network: Network, name: str, bits: Bits, *, stored_scale: bool = True) -> int:
    """A layer: codes as they are stored, scales, biases and zero points, nodes, its entries in the metadata.

    A layer that shares its weights with an earlier one has its own scales, biases and nodes alone.

    Args:
        stored_scale: its bias scale is not the product of two scales, as rounded, and has to be stored.
    """
    layer, node = network.weighted(name), network.layers[name].node
    own = name not in network.shared
    total = len(f'"{name}":"w8a8g128","layer {name}":"01234567",')
    if bits.weight is None:
        weight = _tensor(f"module.{name}.weight", layer.weight.shape, 4 * layer.weight.numel()) if own else 0
        return (
            total
            + weight
            + _tensor(f"module.{name}.bias", layer.bias.shape, 4 * layer.bias.numel())
            + _applied(layer, node, name)
        )
    if bits.group is not None:
        return total + _grouped(layer, name, bits.weight, bits.group, own=own)
    total += _codes(layer, name, bits.weight, own=own)
    channels, scale = len(layer.weight), f"{name}/scale"
    total += _tensor(scale, (channels, 1), 4 * channels) + _applied(layer, node, name)
    if layer.geometry.kind == "embedding":
        return total + 2 * (_node("Gather", scale, VALUE, VALUE) + 14) + _node("Cast", VALUE, VALUE) + TO
    if bits.activation is None:
        nodes = _node("Cast", VALUE, VALUE) + TO + _node("Mul", VALUE, scale, VALUE)
        return total + nodes + _tensor(f"{name}/bias", layer.bias.shape, 4 * layer.bias.numel())
    bias = _tensor(f"{name}/bias/codes", (channels,), 4 * channels)
    bias += _node("DequantizeLinear", f"{name}/bias/codes", VALUE, VALUE) + AXIS
    product = _node("Mul", f"{name}.input/scale", scale, VALUE)
    stored = _tensor(f"{name}/bias/scale", (channels,), 4 * channels) + len(f"{name}/bias/scale")
    zeros = _tensor(VALUE, (channels,), channels)
    weight = _node("DequantizeLinear", f"{name}/codes" if bits.weight == 8 else VALUE, scale, VALUE, VALUE) + AXIS
    return total + bias + (stored if stored_scale else product) + zeros + weight


def _grouped(layer: WeightedLayer, name: str, bits: int, group: int, *, own: bool) -> int:
    """MatMulNBits: codes of 4 or of 8 bits, a scale for each group."""
    outputs, inputs = layer.weight.shape
    packed = outputs * inputs * (4 if bits <= 4 else 8) // 8
    codes, scale, bias = f"{name}/codes", f"{name}/scale", f"{name}/bias"
    nodes = _node("MatMulNBits", VALUE, codes, scale, bias, VALUE, name) + 90
    stored = _tensor(codes, (outputs, inputs // group, packed), packed) if own else 0
    scales = _tensor(scale, (outputs, inputs // group), 4 * outputs * inputs // group)
    return nodes + stored + scales + _tensor(bias, (outputs,), 4 * outputs)


def _codes(layer: WeightedLayer, name: str, bits: int, *, own: bool) -> int:
    """Packed codes and the nodes that decode them."""
    count = layer.weight.numel()
    if bits in (4, 8):
        copied = _node("Reshape", VALUE, VALUE, VALUE) if not own else 0
        nodes = copied if bits == 8 else _node("Cast", f"{name}/codes", VALUE) + TO
        return nodes + (_tensor(f"{name}/codes", layer.weight.shape, -(-count * bits // 8)) if own else 0)
    parts = [width for width in (4, 2, 1) if bits & width]
    rows = -(-count // 8)
    nodes = len(parts) * (_node("Cast", f"{name}/packed0", VALUE) + TO + _node("Gather", VALUE, VALUE, VALUE))
    nodes += (len(parts) - 1) * _node("Add", VALUE, VALUE, VALUE) + _node("Reshape", VALUE, VALUE, VALUE)
    nodes += _node("Cast", VALUE, VALUE) + TO if len(parts) > 1 else 0
    if count % 8:
        nodes += _node("Reshape", VALUE, VALUE, VALUE) + _node("Slice", VALUE, VALUE, VALUE, VALUE) + 20
    return nodes + (sum(_tensor(f"{name}/packed0", (rows, 2, 2), rows * width) for width in parts) if own else 0)


def _applied(layer: WeightedLayer, node: fx.Node, name: str) -> int:
    """The operator itself."""
    geometry, value = layer.geometry, value_of(node)
    if geometry.kind == "convolution":
        given = (tuple(geometry.stride) != (1, 1), any(geometry.padding), tuple(geometry.dilation) != (1, 1))
        lists = sum(width * asked for width, asked in zip((18, 21, 20), given, strict=True))
        return _node("Conv", VALUE, VALUE, VALUE, VALUE, name) + lists + (14 if geometry.groups > 1 else 0)
    if geometry.kind == "embedding":
        return _node("Mul", VALUE, VALUE, VALUE, name)
    product = _node("MatMul", VALUE, VALUE, VALUE, VALUE, name) + 14
    if value is None or value.dim() == 2:
        return product
    free = sum(map(is_symbolic, value.shape))
    reshapes = 2 * (_node("Reshape", VALUE, VALUE, VALUE) + 40)
    return product + reshapes + (140 if free > 1 else 0)


def _operator_bytes(node: fx.Node) -> int:
    """The nodes that torch.onnx writes for an operator, with their small constants."""
    value = value_of(node)
    if value is None and not isinstance(node.meta.get("val"), (list, tuple)):
        return OPERATOR // 2  # a size, or arithmetic on sizes
    if node.target is aten.slice.Tensor and _shape(node.all_input_nodes[0]) == _shape(node):
        return 0
    numbers = NUMBER * sum(isinstance(argument, (int, float)) for argument in node.args[1:])
    names = sum(len(f"module.{each.target}") for each in node.all_input_nodes if each.op == "get_attr")
    return names + (_NODES[node.target] + numbers if _NODES.get(node.target) else _NODES.get(node.target, OPERATOR))


def _shape(node: fx.Node) -> list[str]:
    value = value_of(node)
    return [] if value is None else [str(size) for size in value.shape]


def _constants(network: Network) -> tuple[list[int], set[fx.Node]]:
    """Bytes of each different tensor that stays float or whole, and the operators on constants that are computed at export."""
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    values: dict[fx.Node, Tensor] = {}
    interpreter = fx.Interpreter(network.module)
    for node in network.nodes():
        if node.op == "get_attr":
            found = interpreter.fetch_attr(str(node.target))
            if isinstance(found, Tensor):
                sources[node], values[node] = frozenset([node]), found
        elif node.op == "call_function" and all(each in sources for each in node.all_input_nodes):
            found = _value(node, values)
            if found is not None:
                sources[node] = frozenset().union(*(sources[each] for each in node.all_input_nodes))
                values[node] = found
    kept: dict[tuple[object, ...], int] = {}
    computed: set[fx.Node] = set()
    for node in sources:
        if all(user in sources for user in node.users):
            continue
        whole = {each: values[each].nbytes for each in sources[node]}
        read, made = sum(whole.values()), values[node].nbytes
        folded = made <= read or (read <= FOLDED_FROM and made <= FOLDED_TO)
        computed |= {node} if folded else set()
        for each in [node] if folded else whole:
            tensor = values[each].detach().cpu().contiguous()
            content = (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            kept[content] = _tensor(
                f"module.{each.target}" if each.op == "get_attr" else VALUE, tensor.shape, tensor.nbytes
            )
    for node in reversed(list(sources)):  # what only computed operators read is not written either
        if node.users and all(user in computed for user in node.users):
            computed.add(node)
    return list(kept.values()), computed


@torch.no_grad()
def _value(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """What an operator on constants returns; None where that is no tensor."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:  # drawn anew in every run
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: values[each])
    assert callable(node.target)
    found = node.target(*args, **kwargs)
    return found if isinstance(found, Tensor) else None


def _node(kind: str, *names: str) -> int:
    inside = 2 + len(kind) + sum(2 + len(name) for name in names)
    return 1 + _varint(inside) + inside


def _tensor(name: str, shape: Iterable[int], size: int) -> int:
    """Bytes of a constant.

    Args:
        size: of its values.
    """
    inside = sum(1 + _varint(length) for length in shape) + 4 + len(name) + 1 + _varint(size) + size
    return 1 + _varint(inside) + inside


def _varint(number: int) -> int:
    """How many bytes a number takes in a protobuf."""
    return max(1, -(-number.bit_length() // 7))
