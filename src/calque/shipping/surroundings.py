"""What stands around each layer of a quantized network: who made its input, who else reads it, what becomes of its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from calque.grid.bits import FLOAT, Bits
from calque.network import Geometry
from calque.network.layers import WeightedLayer
from calque.network.network import is_movement
from calque.quantized.kernels import grid_node, is_quantizer, maker_of
from calque.quantized.model import QuantizedModel
from calque.quantized.modules import QuantizedLayer
from calque.quantized.placement import SHARED_TENSOR_BITS
from calque.shipping.alone import Alone


@dataclass(frozen=True, slots=True)
class Standing:
    """A layer where it stands.

    Attributes:
        name, geometry, weight, x: the layer, the shape of its weight and that of its input.
        bits: that it has.
        codes: whether an integer kernel made its input.
        shared: whether something else than layers reads that tensor on its grid, so that other bits need another grid.
        first: whether no earlier layer reads the same value: only the first one is charged for its grid.
        result: whether the result goes to a grid alone.
    """

    name: str
    geometry: Geometry
    weight: tuple[int, ...]
    x: tuple[int, ...]
    bits: Bits
    codes: bool
    shared: bool
    first: bool
    result: bool

    @property
    def is_table(self) -> bool:
        return self.geometry.kind == "embedding"

    def takes_groups(self, group: int | None) -> bool:
        """Whether the layer's inputs are whole groups."""
        return group is not None and self.geometry.kind == "linear" and self.weight[1] % group == 0


def alone(standing: Standing, bits: Bits) -> Alone:
    """The layer's work at these bits."""
    s = standing
    shapes = (s.geometry, s.weight, s.x)
    if s.is_table:
        return Alone(*shapes, "float" if bits.weight is None else "integer")
    if bits.activation is not None:
        narrow, again = bits.activation < SHARED_TENSOR_BITS, s.shared and bits.activation != SHARED_TENSOR_BITS
        if s.first:
            return Alone(*shapes, "integer", codes=s.codes, again=again, narrow=narrow, result=s.result)
        return Alone(*shapes, "integer", codes=True, result=s.result)
    if bits.group is not None:
        return Alone(*shapes, "grouped", 4 if bits.weight is not None and bits.weight <= 4 else 8, bits.group)
    if bits.weight == 4 and s.geometry.kind == "linear":
        return Alone(*shapes, "fused", 4)
    return Alone(*shapes, "float")


def standings(model: QuantizedModel, leaves: Sequence[Any]) -> list[Standing]:
    """All layers with weights in execution order, those that stay float among them.

    Args:
        leaves: the flat inputs that give the sizes.
    """
    module = model.graph_module
    found, seen = [], set[fx.Node]()
    sizes = _input_sizes(module, leaves)
    for node in module.graph.nodes:
        layer = _layer(module, node)
        if layer is None:
            continue
        name, source = str(node.target), node.all_input_nodes[0]
        grid = grid_node(module, source)
        users = list(node.users)
        found.append(
            Standing(
                name, layer.geometry, tuple(layer.weight.shape), sizes[name], model.plan.bits.get(name, FLOAT),
                codes=grid is not None and _made_of_codes(module, grid),
                shared=grid is not None and _is_shared(module, grid),
                first=source not in seen,
                result=any(_made_by(user, node) for user in _behind(users) if is_quantizer(module, user)),
            )
        )  # fmt: skip
        seen.add(source)
    return found


def _layer(module: fx.GraphModule, node: fx.Node) -> QuantizedLayer | WeightedLayer | None:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, (QuantizedLayer, WeightedLayer)) else None


def _input_sizes(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input when the network gets these inputs."""
    sizes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for node in module.graph.nodes:
        if _layer(module, node) is not None:
            name = str(node.target)

            def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                sizes[name] = tuple(inputs[0].shape)

            hooks.append(module.get_submodule(name).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            module(*leaves)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def _behind(users: list[fx.Node]) -> list[fx.Node]:
    """The readers of a value, and where it has one only, those behind it."""
    found = list(users)
    while len(users) == 1:
        users = list(users[0].users)
        found += users
    return found


def _made_by(quantizer: fx.Node, node: fx.Node) -> bool:
    made = maker_of(quantizer)
    return made is not None and made[0] is node


def _made_of_codes(module: fx.GraphModule, grid: fx.Node) -> bool:
    """Whether the value that is put on this grid is on one already, or an operator on grids alone makes it."""
    source = grid.args[0]
    assert isinstance(source, fx.Node)
    if grid_node(module, source) is not None:
        return True
    made = maker_of(grid)
    if made is None:
        return False
    node = made[0]
    return bool(node.all_input_nodes) and all(grid_node(module, read) is not None for read in node.all_input_nodes)


def _is_shared(module: fx.GraphModule, grid: fx.Node) -> bool:
    """Whether a part of the network that is no layer reads the tensor that a layer reads on this grid."""
    source = grid.args[0]
    assert isinstance(source, fx.Node)
    if grid_node(module, source) is not None:  # it is on a grid of the tensor's own, with other bits
        return True
    pending = list(grid.users)
    while pending:
        reader = pending.pop()
        if is_movement(reader):
            pending.extend(reader.users)
        elif _layer(module, reader) is None:
            return True
    return False
