"""How large an exported file will be, before it is written: by layer, by quantizer, and what no choice of bits changes.

An upper bound: what the exporter may share, fold or drop is counted where that cannot be known from the network alone.
"""

from collections.abc import Iterable, Mapping

from torch import fx

from calque.allocation.filenodes import (
    AXIS,
    HEAD,
    TABLES,
    TO,
    VALUE,
    constant_bytes,
    node_bytes,
    operator_bytes,
    tensor_bytes,
)
from calque.grid.bits import FLOAT, Bits, Placement
from calque.network import Network, WeightedLayer
from calque.network.compat import children
from calque.network.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    CONCATENATIONS,
    clamp_bounds,
    is_movement,
    is_spatial_mean,
    is_symbolic,
    value_of,
)  # fmt: skip
from calque.network.paths import joined, leaf_paths, output_names
from calque.quantized.placement import Edge, place

INTERFACE, AXIS_FORM = 60, 14  # bytes of an input or output besides its name, and of an axis


def file_size(network: Network, plan: Mapping[str, Bits], placement: Placement, computed: Iterable[str] = ()) -> int:
    """Bytes of the file for ONNX Runtime and OpenVINO, at most.

    Args:
        plan: bits of every layer, and of tensors that are not the default.
        computed: layers whose bias scales are exactly products of two scales: only these are not stored.
    """
    edges = place(network, plan, placement)
    known = set(computed)
    grids = {reader: edge.name for edge in edges for reader in edge.readers if reader in known}
    layers = sum(layer_bytes(network, name, plan[name], grid=grids.get(name)) for name in network.layers)
    return fixed_bytes(network, [plan]) + layers + sum(edge_bytes(network, edge) for edge in edges)


def fixed_bytes(network: Network, plans: Iterable[Mapping[str, Bits]]) -> int:
    """What the choice of bits does not change: constants, other operators, metadata, inputs and outputs, tables of codes.

    Args:
        plans: whose bits the file may have.
    """
    plans = list(plans)
    chosen = [(name, plan[name]) for plan in plans for name in network.layers]
    decoded = [(name, bits.weight) for name, bits in chosen if bits.weight in TABLES and bits.group is None]
    shapes = {tuple(network.weighted(name).weight.shape) for name, _ in decoded}
    total = HEAD + sum(TABLES[width] for width in {width for _, width in decoded} if width) + 45 * len(shapes)
    asked = {name for plan in plans for name, bits in plan.items() if bits == FLOAT and name not in network.layers}
    total += sum(len(f'"{name}":"float",') for name in asked) + _interface(network)
    constants, computed = constant_bytes(network)
    operators = (node for node in network.nodes() if node.op == "call_function" and node not in computed)
    return total + sum(constants) + sum(map(operator_bytes, operators))


def _interface(network: Network) -> int:
    """Inputs and outputs with their names, which the nodes that read or make them repeat, and those of their free axes."""
    total = 0
    (output,) = network.module.graph.find_nodes(op="output")
    leaves = [value_of(leaf) if isinstance(leaf, fx.Node) else None for leaf in output.args[0]]
    paths = zip(leaf_paths(network.out_spec), leaves, strict=True)
    names = iter(output_names([path for path, leaf in paths if leaf is not None]))
    results = [(next(names), 1, leaf) for leaf in leaves if leaf is not None]
    given = zip(
        leaf_paths(children(network.in_spec)[1]), network.module.graph.find_nodes(op="placeholder"), strict=True
    )
    inputs = [(joined(path), len(node.users), value_of(node)) for path, node in given]
    for name, uses, value in [*inputs, *results]:
        if value is not None:
            axes = sum(AXIS_FORM + is_symbolic(size) * len(name) for size in value.shape)
            total += INTERFACE + (1 + uses) * len(name) + axes
    return total


def edge_bytes(network: Network, edge: Edge) -> int:
    """A quantizer: its nodes, once more wherever its values are moved, its scale and its zero point, its entry in the plan."""
    short = edge.bits < 8 or (clamp_bounds(edge.source) or (0, float("inf")))[1] != float("inf")
    codes, scale = f"{edge.name}/codes", f"{edge.name}/scale"
    first, again = _quantizer(codes, scale, clipped=short), _quantizer(VALUE, scale, clipped=short)
    entry = len(edge.product or edge.name) + len('"":"a8",') if edge.kind in ("tensor", "operand") else 0
    constants = tensor_bytes(scale, (), 4) + tensor_bytes(VALUE, (), 1)
    return first + again * _repetitions(network, edge) + constants + entry


def _quantizer(codes: str, scale: str, *, clipped: bool) -> int:
    clip = node_bytes("Min", VALUE, VALUE, codes) if clipped else 0
    raw = VALUE if clipped else codes
    return (
        node_bytes("QuantizeLinear", VALUE, scale, VALUE, raw)
        + clip
        + node_bytes("DequantizeLinear", codes, scale, VALUE, VALUE)
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


def layer_bytes(network: Network, name: str, bits: Bits, *, grid: str | None = None) -> int:
    """A layer: codes as they are stored, scales, biases and zero points, nodes, its entries in the metadata.

    A layer that shares its weights with an earlier one has its own scales, biases and nodes alone.

    Args:
        grid: of the input, by whose scale the layer's own is multiplied at load; None where that product is stored.
    """
    layer, node = network.weighted(name), network.layers[name].node
    own = name not in network.shared
    total = len(f'"{name}":"w8a8g128","layer {name}":"01234567",')
    if bits.weight is None:
        weight = tensor_bytes(f"module.{name}.weight", layer.weight.shape, 4 * layer.weight.numel()) if own else 0
        return (
            total
            + weight
            + tensor_bytes(f"module.{name}.bias", layer.bias.shape, 4 * layer.bias.numel())
            + _applied(layer, node, name)
        )
    if bits.group is not None:
        return total + _grouped(layer, name, bits.weight, bits.group, own=own)
    total += _codes(layer, name, bits.weight, own=own)
    channels, scale = len(layer.weight), f"{name}/scale"
    total += tensor_bytes(scale, (channels, 1), 4 * channels) + _applied(layer, node, name)
    if layer.geometry.kind == "embedding":
        return total + 2 * (node_bytes("Gather", scale, VALUE, VALUE) + 14) + node_bytes("Cast", VALUE, VALUE) + TO
    if bits.activation is None:
        nodes = node_bytes("Cast", VALUE, VALUE) + TO + node_bytes("Mul", VALUE, scale, VALUE)
        return total + nodes + tensor_bytes(f"{name}/bias", layer.bias.shape, 4 * layer.bias.numel())
    bias = tensor_bytes(f"{name}/bias/codes", (channels,), 4 * channels)
    bias += node_bytes("DequantizeLinear", f"{name}/bias/codes", VALUE, VALUE) + AXIS
    stored = f"{name}/bias/scale"
    product = tensor_bytes(stored, (channels,), 4 * channels) + len(stored)
    if grid is not None:
        product = node_bytes("Mul", f"{grid}/scale", scale, VALUE)
    zeros = tensor_bytes(VALUE, (channels,), channels)
    weight = node_bytes("DequantizeLinear", f"{name}/codes" if bits.weight == 8 else VALUE, scale, VALUE, VALUE) + AXIS
    return total + bias + product + zeros + weight


def _grouped(layer: WeightedLayer, name: str, bits: int, group: int, *, own: bool) -> int:
    """MatMulNBits: codes of 4 or of 8 bits, a scale for each group."""
    outputs, inputs = layer.weight.shape
    packed = outputs * inputs * (4 if bits <= 4 else 8) // 8
    codes, scale, bias = f"{name}/codes", f"{name}/scale", f"{name}/bias"
    nodes = node_bytes("MatMulNBits", VALUE, codes, scale, bias, VALUE, name) + 90
    stored = tensor_bytes(codes, (outputs, inputs // group, packed), packed) if own else 0
    scales = tensor_bytes(scale, (outputs, inputs // group), 4 * outputs * inputs // group)
    return nodes + stored + scales + tensor_bytes(bias, (outputs,), 4 * outputs)


def _codes(layer: WeightedLayer, name: str, bits: int, *, own: bool) -> int:
    """Packed codes and the nodes that decode them."""
    count = layer.weight.numel()
    if bits in (4, 8):
        copied = node_bytes("Reshape", VALUE, VALUE, VALUE) if not own else 0
        nodes = copied if bits == 8 else node_bytes("Cast", f"{name}/codes", VALUE) + TO
        return nodes + (tensor_bytes(f"{name}/codes", layer.weight.shape, -(-count * bits // 8)) if own else 0)
    parts = [width for width in (4, 2, 1) if bits & width]
    rows = -(-count // 8)
    nodes = len(parts) * (node_bytes("Cast", f"{name}/packed0", VALUE) + TO + node_bytes("Gather", VALUE, VALUE, VALUE))
    nodes += (len(parts) - 1) * node_bytes("Add", VALUE, VALUE, VALUE) + node_bytes("Reshape", VALUE, VALUE, VALUE)
    nodes += node_bytes("Cast", VALUE, VALUE) + TO if len(parts) > 1 else 0
    if count % 8:
        nodes += node_bytes("Reshape", VALUE, VALUE, VALUE) + node_bytes("Slice", VALUE, VALUE, VALUE, VALUE) + 20
    return nodes + (sum(tensor_bytes(f"{name}/packed0", (rows, 2, 2), rows * width) for width in parts) if own else 0)


def _applied(layer: WeightedLayer, node: fx.Node, name: str) -> int:
    """The operator itself."""
    geometry, value = layer.geometry, value_of(node)
    if geometry.kind == "convolution":
        given = (tuple(geometry.stride) != (1, 1), any(geometry.padding), tuple(geometry.dilation) != (1, 1))
        lists = sum(width * asked for width, asked in zip((18, 21, 20), given, strict=True))
        return node_bytes("Conv", VALUE, VALUE, VALUE, VALUE, name) + lists + (14 if geometry.groups > 1 else 0)
    if geometry.kind == "embedding":
        return node_bytes("Mul", VALUE, VALUE, VALUE, name)
    product = node_bytes("MatMul", VALUE, VALUE, VALUE, VALUE, name) + 14
    if value is None or value.dim() == 2:
        return product
    free = sum(map(is_symbolic, value.shape))
    reshapes = 2 * (node_bytes("Reshape", VALUE, VALUE, VALUE) + 40)
    return product + reshapes + (140 if free > 1 else 0)
