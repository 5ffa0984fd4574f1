"""What bits cost: bytes in the file, bit-operations and bytes of activations, for each layer and each choice of bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from calque.allocation.filecosts import file_costs
from calque.calibration.execution import execute_whole
from calque.grid.bits import Bits, Placement
from calque.network import Batch, Geometry, Network
from calque.network.network import is_movement, result_of
from calque.network.signature import flatten, select
from calque.network.tensors import root, shared_tensors
from calque.quantized.placement import place

CHANNEL_BYTES = 12  # scale, bias and bias scale of an output channel (docs/method.md)
SCALE_BYTES = 4  # of an embedding's row, and of each group of inputs but a channel's first
FLOAT_BITS = 32

Step = tuple[int, dict[str, tuple[int, ...]]]
"""One execution step: bytes that no choice changes, and by layer name the bytes of each of its choices."""


def layer_size(codes: int, channels: int, bits: int, geometry: Geometry, groups: int = 1) -> int:
    """Bytes of a layer with that many codes: packed, and CHANNEL_BYTES per output channel, SCALE_BYTES per row of a table.

    Args:
        groups: of inputs that have a scale of their own in each channel.

    >>> layer_size(100, 4, 4, Geometry("linear"))
    98
    """
    each = SCALE_BYTES if geometry.kind == "embedding" else CHANNEL_BYTES + SCALE_BYTES * (groups - 1)
    return -(-codes * bits // 8) + each * channels


@dataclass(frozen=True)
class Costs:
    """Costs of every choice of every layer, for one input.

    Attributes:
        size, bops: by layer, bytes in the file (see `file_costs`) and bit-operations of each choice.
        fixed_size: bytes in the file that no choice changes.
        float_size, float_bops, float_memory: the float32 network's; of its size the parameters alone.
        steps: bytes of activations that are alive together.
    """

    size: Mapping[str, tuple[int, ...]]
    bops: Mapping[str, tuple[int, ...]]
    steps: tuple[Step, ...]
    fixed_size: int
    float_size: int
    float_bops: int
    float_memory: int


def costs(network: Network, choices: Mapping[str, Sequence[Bits]], placement: Placement, batch: Batch) -> Costs:
    """The costs of the layers' choices.

    Args:
        choices: by layer; the bits of tensors that are not the default, as their only choice.
        batch: inputs of the size that is counted; one row of them.
    """
    shapes = value_shapes(network, batch)
    bops, macs = {}, {}
    for name, layer in network.layers.items():
        weighted = network.weighted(name)
        macs[name] = weighted.geometry.macs(shapes[layer.node].numel(), weighted.weight)
        bops[name] = tuple(macs[name] * (b.weight or FLOAT_BITS) * (b.activation or FLOAT_BITS) for b in choices[name])
    steps = activation_steps(network, choices, placement, shapes)
    size, fixed_size = file_costs(network, choices, placement)
    whole = 4 * values_outside_layers(network) + float_size(network)
    return Costs(
        size, bops, steps, fixed_size, whole, sum(macs.values()) * FLOAT_BITS**2,
        max(step for step, _ in activation_steps(network, {}, placement, shapes)),
    )  # fmt: skip


def values_outside_layers(network: Network) -> int:
    """The number of float values that the network stores besides its layers."""
    layers = {id(value) for name in network.layers for value in network.weighted(name).buffers()}
    others = {id(value): value for value in (*network.module.buffers(), *network.module.parameters())}
    return sum(value.numel() for key, value in others.items() if key not in layers and value.is_floating_point())


def float_size(network: Network) -> int:
    """Bytes of the float32 layers; weights and biases that several layers share are counted once."""
    total = 0
    for name in network.layers:
        layer, earlier = network.weighted(name), network.shared.get(name)
        total += 0 if earlier is not None else layer.weight.numel()
        if earlier is None or not torch.equal(layer.bias, network.weighted(earlier).bias):
            total += layer.bias.numel()
    return 4 * total


@torch.no_grad()
def value_shapes(network: Network, batch: Batch) -> dict[fx.Node, torch.Size]:
    """The shape of every tensor in the network for one row of the batch."""
    found: dict[fx.Node, torch.Size] = {}

    def record(node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[node] = value.shape

    execute_whole(network.module, flatten(select(batch, torch.arange(1)))[0], record)
    return found


def activation_steps(
    network: Network, choices: Mapping[str, Sequence[Bits]], placement: Placement, shapes: Mapping[fx.Node, torch.Size]
) -> tuple[Step, ...]:
    """Bytes of the activations that are alive while each operator runs.

    A tensor that one layer alone reads is stored at that layer's bits. One that is read by more is stored at 8 bits, with a
    copy at the layer's bits while a layer of other bits runs: an upper bound where several layers agree. What is on no grid,
    or on none for some of the choices, is float32. Operators that only move values, and clips behind a layer, take no memory
    of their own.

    Args:
        choices: by layer, and the bits of tensors that are not the default; without any, every tensor is float32.
    """
    nodes = list(network.nodes())
    home = {node: _storage(node) for node in nodes}
    index = {node: position for position, node in enumerate(nodes)}
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        place_of = home[node]
        first.setdefault(place_of, index[node])
        readers = [index[user] for user in node.users]
        last[place_of] = max([last.get(place_of, index[node]), *readers])
    alone, shared, copies = _widths(network, choices, placement)
    steps = []
    for node in nodes:
        if node.op in ("output", "get_attr") or is_movement(node) or _is_fused(node):
            continue
        fixed, by_layer = 0, {}
        for stored in (s for s in first if first[s] <= index[node] <= last[s] and s in shapes and s.op != "get_attr"):
            count = shapes[stored].numel()
            if stored in alone:
                by_layer[alone[stored]] = tuple(_bytes(count, b.activation) for b in choices[alone[stored]])
            else:
                fixed += _bytes(count, shared.get(stored))
        name = network_layer(network, node)
        if name in copies:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            count = shapes[source].numel()
            extra = tuple(
                0 if b.activation in (None, copies[name]) else _bytes(count, b.activation) for b in choices[name]
            )
            before = by_layer.get(name, (0,) * len(extra))
            by_layer[name] = tuple(a + b for a, b in zip(before, extra, strict=True))
        steps.append((fixed, by_layer))
    return tuple(steps)


def network_layer(network: Network, node: fx.Node) -> str:
    """The name of the layer that the node is; "" for any other node."""
    return str(node.target) if node.op == "call_module" and str(node.target) in network.layers else ""


def _storage(node: fx.Node) -> fx.Node:
    """The node under which the memory of a value is counted."""
    result = result_of(node)
    if result is not node:
        return _storage(result)
    if is_movement(node) and isinstance(node.args[0], fx.Node):
        return _storage(root(node))
    return node


def _is_fused(node: fx.Node) -> bool:
    """Whether the operator in front of the node does its work: a clip behind a layer or an add."""
    return any(result_of(source) is node for source in node.all_input_nodes)


def _bytes(count: int, bits: int | None) -> int:
    return -(-count * (bits or FLOAT_BITS) // 8)


def _widths(
    network: Network, choices: Mapping[str, Sequence[Bits]], placement: Placement
) -> tuple[dict[fx.Node, str], dict[fx.Node, int | None], dict[str, int | None]]:
    """How tensors are stored.

    Returns:
        storage -> the layer whose bits it has; storage -> its own bits (float where it is in neither); layer -> the bits of
        its input where it copies that to its own bits.
    """
    alone: dict[fx.Node, str] = {}
    shared: dict[fx.Node, int | None] = {}
    copies: dict[str, int | None] = {}
    if not choices:
        return alone, shared, copies
    widths = {name: {b.activation for b in choices[name]} for name in network.layers}
    base = {name: Bits(8, 8) if widths[name] != {None} else Bits(8, None) for name in network.layers}
    base |= {name: options[0] for name, options in choices.items() if name not in network.layers}
    may_be_float = any(None in each and each != {None} for each in widths.values())
    named = set() if may_be_float else set(shared_tensors(network))
    for edge in place(network, base, placement):
        stored = _storage(edge.source)
        if edge.kind == "sole" and len(edge.readers) == 1:
            alone[stored] = edge.readers[0]
        elif edge.kind == "input":
            copies.update(dict.fromkeys(edge.readers))
        else:  # readers of different bits leave a tensor without a grid of its own in float32
            read_at = set().union(*(widths[name] for name in edge.readers))
            agreed = edge.kind == "sole" and len(read_at) == 1
            own = read_at.pop() if agreed else edge.bits if edge.source in named else None
            shared[stored] = own
            copies.update(dict.fromkeys(edge.readers, own))
    return alone, shared, copies
