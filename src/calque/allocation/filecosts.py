"""What each choice of bits adds to the file, at most: no plan of these choices takes more than the sum over its layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from calque.allocation.filesize import edge_bytes, fixed_bytes, layer_bytes
from calque.grid.bits import Bits, Placement
from calque.network import Network
from calque.network.tensors import needless_tensors, shared_tensors
from calque.quantized.placement import SHARED_TENSOR_BITS, Edge, input_edge, is_exclusive, place, readers_by_root

Widths = Mapping[str, Sequence[int | None]]  # by layer, bits of activations to choose from


@dataclass(slots=True)
class _Grids:
    """Bytes of quantizers.

    Attributes:
        fixed: of those that are counted whatever the choice.
        added: by layer and bits of its activations, of what such a reader adds.
        names: by layer, the longest name that the grid of its input may have.
    """

    fixed: int = 0
    added: dict[str, dict[int | None, int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def file_costs(
    network: Network, choices: Mapping[str, Sequence[Bits]], placement: Placement
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Bytes of the file for ONNX Runtime and OpenVINO by layer and choice, and those that are in it whatever the choice.

    A layer's bytes include the quantizer of its input where that is not on a grid anyway. Layers that read one tensor are
    counted with a quantizer each, which those of equal bits share; what decodes codes is counted for every width to choose from.

    Args:
        choices: by layer; the bits of tensors that are not the default, as their only choice.
    """
    options = {name: tuple(choices[name]) for name in network.layers}
    tensors = {name: chosen[0] for name, chosen in choices.items() if name not in options}
    widths = {name: tuple(bits.activation for bits in each) for name, each in options.items()}
    grids = _in_front(network, widths) if placement == "inputs" else _among_layers(network, widths, tensors)
    operands = (edge for edge in place(network, _plan(widths, tensors, any), placement) if edge.kind == "operand")
    plans = [
        {name: each[min(index, len(each) - 1)] for name, each in options.items()} | tensors
        for index in range(max(map(len, options.values())))
    ]
    fixed = fixed_bytes(network, plans) + grids.fixed + sum(edge_bytes(network, edge) for edge in operands)

    def size(name: str, bits: Bits) -> int:
        added = grids.added.get(name, {}).get(bits.activation, 0)
        return layer_bytes(network, name, bits, grid=grids.names.get(name)) + added

    return {name: tuple(size(name, bits) for bits in each) for name, each in options.items()}, fixed


def _plan(widths: Widths, tensors: Mapping[str, Bits], when: Callable[[Iterable[bool]], bool]) -> dict[str, Bits]:
    """A plan in which a layer's input is on a grid when `any` of its choices is, or `all` are."""
    on_grid = {name: when(width is not None for width in each) for name, each in widths.items()}
    return {name: Bits(8, SHARED_TENSOR_BITS if on else None) for name, on in on_grid.items()} | dict(tensors)


def _in_front(network: Network, widths: Widths) -> _Grids:
    """Each layer has the grid of its input to itself."""
    grids = _Grids()
    for name in _on_grids(widths):
        edges = {bits: input_edge(network, [name], bits) for bits in widths[name] if bits is not None}
        grids.added[name] = {bits: edge_bytes(network, edge) for bits, edge in edges.items()}
        grids.names[name] = next(iter(edges.values())).name
    return grids


def _among_layers(network: Network, widths: Widths, tensors: Mapping[str, Bits]) -> _Grids:
    """Tensors that have a grid of their own for several readers, or that of their only one; see `place`."""
    grids, quantized, shared = _Grids(), _on_grids(widths), shared_tensors(network)
    never = needless_tensors(network, _plan(widths, tensors, any)) if quantized else set(shared)
    perhaps = needless_tensors(network, _plan(widths, tensors, all))
    readers = readers_by_root(network, quantized)
    for source in [*readers, *(node for node in shared if node not in readers)]:
        name, between = shared.get(source, ""), readers.get(source, [])
        asked = name in tensors
        width = tensors[name].activation if asked else SHARED_TENSOR_BITS
        own = None
        if quantized and name and width is not None and (asked or source not in never):
            own = Edge(name, source, width, (), "tensor")
        alone = not asked and bool(between) and is_exclusive(source, network, between)
        tensor = _Source(network, source, between, own, sure=asked or source not in perhaps, alone=alone)
        grids.fixed += 0 if alone and len(between) == 1 else tensor.standing
        grids.added |= {reader: {bits: tensor.added(reader, bits) for bits in widths[reader]} for reader in between}
        names = [name, *(input_edge(network, [reader], SHARED_TENSOR_BITS).name for reader in between)]
        grids.names |= dict.fromkeys(between, max(names, key=len))
    return grids


def _on_grids(widths: Widths) -> list[str]:
    """Layers whose inputs are on a grid for some choice."""
    return [name for name, each in widths.items() if any(bits is not None for bits in each)]


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that layers read.

    Attributes:
        readers: whose inputs may be on a grid.
        own: the grid of its own.
        sure: it has that whatever the choice, unless its readers' grid serves.
        alone: these layers alone read it, so that their grid serves where they agree.
    """

    network: Network
    source: fx.Node
    readers: list[str]
    own: Edge | None
    sure: bool
    alone: bool

    @property
    def standing(self) -> int:
        return 0 if self.own is None else edge_bytes(self.network, self.own)

    def added(self, reader: str, bits: int | None) -> int:
        """Bytes that the reader adds at these bits of its input."""
        single = self.alone and len(self.readers) == 1
        if bits is None:  # the tensor keeps a grid of its own
            return self.standing if single else 0
        edge = input_edge(self.network, [reader], bits)
        common = edge_bytes(self.network, replace(edge, source=self.source))
        if single:
            return common
        direct = self.own is not None and self.sure and self.own.bits == bits
        requantized = 0 if direct else edge_bytes(self.network, edge)
        rest = common - self.standing if self.alone else 0  # where all agree, that is the only grid
        return max(requantized, -(-rest // len(self.readers)))
