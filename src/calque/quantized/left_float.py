"""The operators of a quantized network that compute on float values, in words: nothing stays float without an entry.

An operator stays float where no integer kernel and no quantizer does its work. This depends on the placement: an add between
tensors on grids is an integer one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from calque.network import Network
from calque.network.network import (
    ADDITIONS,
    AVERAGE_POOLS,
    MULTIPLICATIONS,
    SCALED,
    clamp_bounds,
    is_movement,
    is_spatial_mean,
    result_of,
)
from calque.network.rewrites.products import operands_of
from calque.network.uncovered import SHOWN, list_operators, uncovered_operators
from calque.quantized.assembled import Assembled, grid_of
from calque.quantized.modules import Quantizer

aten = torch.ops.aten

# Operators besides views and MOVEMENTS that put values into other places, or into another type.
_MOVES = frozenset(
    {
        "cat", "concat", "stack", "hstack", "vstack", "repeat", "repeat_interleave", "tile", "gather", "index", "index_select",
        "take", "flip", "roll", "clone", "pad", "constant_pad_nd", "to", "_to_copy", "type_as", "float", "lift_fresh_copy",
        "tril", "triu", "meshgrid", "masked_select", "getitem", "index_put", "scatter", "slice_scatter", "select_scatter", "copy",
        "dropout", "feature_dropout", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "reflection_pad1d",
        "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    }
)  # fmt: skip
# Operators that make a tensor of a size alone.
_MAKES = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "rand_like"}
)


def float_operators(q: Assembled, network: Network) -> list[str]:
    """A sentence for each kind of operator that stays float, beside those that the captured network lists itself.

    Args:
        network: that `q` was made from.
    """
    listed = {node.name for node in uncovered_operators(network.module, network.products)}
    left = [node for node in float_nodes(q.graph_module) if node.name not in listed]
    scaled = [", ".join(names) for names in network.scaled]
    sentences = list_operators(node for node in left if SCALED not in node.meta)
    if scaled:
        more = f" and {len(scaled) - SHOWN} others" if len(scaled) > SHOWN else ""
        sentences.append(
            f"inputs are multiplied by channel scales in float in front of {'; '.join(scaled[:SHOWN])}{more}."
        )
    return sentences


def float_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a quantized network's operators that compute on float values, batch norms aside, in execution order."""
    computed = _depends_on_inputs(module.graph.nodes)
    return [
        node
        for node in module.graph.nodes
        if node in computed
        and node.op == "call_function"
        and node.target is not aten.batch_norm.default
        and _computes(node)
        and not _is_integer(module, node)
    ]


def _depends_on_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on values of the inputs: sizes are none."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_tensor = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))
        if is_tensor and (node.op == "placeholder" or any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _computes(node: fx.Node) -> bool:
    """Whether float values go in or come out, and not only to other places."""
    values = pytree.tree_leaves([each.meta.get("val") for each in (node, *node.all_input_nodes)])
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return False
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")
    view = schema is not None and any(returned.alias_info is not None for returned in schema.returns)
    return not (view or is_movement(node) or name in _MOVES | _MAKES)


def _is_integer(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an integer kernel, or the quantizer behind it, does the node's work."""
    pair = operands_of(node)
    if pair is not None:
        return all(grid_of(module, operand) is not None for operand in pair)
    if clamp_bounds(node) is not None:
        return _goes_on_a_grid(module, node)
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    whole = node.target in ADDITIONS | MULTIPLICATIONS and len(operands) == 2 and not node.kwargs
    if not (whole or node.target in AVERAGE_POOLS or is_spatial_mean(node)):
        return False
    on_grids = all(grid_of(module, operand) is not None for operand in operands)
    return on_grids and _goes_on_a_grid(module, result_of(node))


def _goes_on_a_grid(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether quantizers alone read the node, movements aside."""
    for reader in node.users:
        if reader.op == "call_module" and isinstance(module.get_submodule(str(reader.target)), Quantizer):
            continue
        if not is_movement(reader) or not _goes_on_a_grid(module, reader):
            return False
    return bool(node.users)
