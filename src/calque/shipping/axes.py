"""What the free axes of a file are called: one name for axes that have always had one size, across inputs and outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from torch import Tensor

from calque.network.signature import MASK, flatten, have_rows, laid_out, layout_of, leaf_names
from calque.quantized.model import QuantizedModel
from calque.shipping.names import free_name, graphs

ROWS, TOKENS = "batch", "sequence"
IMAGE = {2: "height", 3: "width"}  # of images (N, C, H, W)


@dataclass(frozen=True, slots=True)
class _Axis:
    """A free axis of an input.

    Attributes:
        base: what such an axis is usually called; "" where nothing tells.
        sizes: what it was in calibration: ROWS where it counts rows that stand apart, the group of axes with which it varied, or
            the only size that it had.
        symbol: torch's, the same for axes that the network only takes with equal sizes.
    """

    owner: str
    number: int
    base: str
    sizes: object
    symbol: str

    def shares_name(self, other: "_Axis") -> bool:
        """Whether both always have the same size."""
        varied = isinstance(self.sizes, tuple)
        return self.sizes == other.sizes and (self.symbol == other.symbol or varied or self.base == ROWS == other.base)

    def differs(self, other: "_Axis") -> bool:
        """Whether calibration had another size here than there."""
        return self.sizes != other.sizes


def name_axes(graph: onnx.GraphProto, model: QuantizedModel) -> None:
    """Names the free axes of the inputs and outputs in place; these must have their own names already.

    Rows are "batch", axis 1 of integers (N, T) and the axes of an attention mask "sequence", the last two of float images
    "height" and "width"; where that name is taken, the input's is put in front. Other axes are called by the input's name and
    their number, computed ones by the output's. Two axes share a name if they varied in calibration and never differed, or
    if the network takes equal sizes alone and calibration had no others.
    """
    axes = list(_free_axes(graph, model))
    named = _names(axes)
    known: dict[str, str] = {}  # torch's symbol -> the name, where that is one
    for axis in axes:
        shared = {named[other] for other in axes if other.symbol == axis.symbol}
        if len(shared) == 1:
            known[axis.symbol] = named[axis]
    by_place = {(axis.owner, axis.number): name for axis, name in named.items()}
    used = {*named.values()}
    for value in graph.input:
        for number, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = by_place[value.name, number]
    for value in graph.output:
        for number, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and dim.dim_param not in known:
                known[dim.dim_param] = free_name(f"{value.name}_axis{number}", used)
            if dim.dim_param:
                dim.dim_param = known[dim.dim_param]
    for inner in list(graphs(graph))[1:]:
        _forget_symbols(inner)


def _free_axes(graph: onnx.GraphProto, model: QuantizedModel) -> Iterator[_Axis]:
    """The free axes of all inputs in order."""
    example = laid_out(model.facts.example, model.signature.layout)
    layout = layout_of(example)
    apart = layout is None or layout.apart
    group_of = {axis: group for group in model.facts.equal_axes or () for axis in group}
    leaves = zip(graph.input, leaf_names(example), flatten(example)[0], have_rows(example), strict=True)
    for value, argument, leaf, batched in leaves:
        for number, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                rows = batched and number == 0
                sizes = ROWS if rows and apart else group_of.get((argument, number), leaf.shape[number])
                base = ROWS if rows else _usual_name(argument, leaf, number)
                yield _Axis(value.name, number, base, sizes, dim.dim_param)


def _usual_name(argument: str, leaf: Tensor, number: int) -> str:
    if argument == MASK or (not leaf.is_floating_point() and leaf.dim() == 2 and number == 1):
        return TOKENS
    return IMAGE.get(number, "") if leaf.is_floating_point() and leaf.dim() == 4 else ""


def _names(axes: Sequence[_Axis]) -> dict[_Axis, str]:
    """The name of each axis."""
    groups: list[list[_Axis]] = []
    for axis in axes:
        fitting = (group for group in groups if any(map(axis.shares_name, group)) and not any(map(axis.differs, group)))
        found = next(fitting, None)
        if found is None:
            groups.append([axis])
        else:
            found.append(axis)
    named: dict[_Axis, str] = {}
    used: set[str] = set()
    for group in groups:
        usual = [axis for base in (ROWS, TOKENS, *IMAGE.values()) for axis in group if axis.base == base]
        first = usual[0] if usual else group[0]
        name = first.base or f"{first.owner}_{first.number}"
        name = f"{first.owner}_{name}" if name in used else name
        named |= dict.fromkeys(group, free_name(name, used))
    return named


def _forget_symbols(graph: onnx.GraphProto) -> None:
    """Removes torch's symbols from the shapes in a branch or loop; runtimes find them again."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.Clear()
