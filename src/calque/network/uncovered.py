"""What a captured graph leaves float or never reaches, in words."""

from collections.abc import Iterable

import torch
from torch import fx, nn

from calque.network.network import Product, is_movement, value_of
from calque.network.rewrites.functional import path_of
from calque.network.spelling import respellings

aten = torch.ops.aten
SHOWN = 3  # operators of a kind that are named where all of them stay float

# Other operators with a trained weight. They stay float, and are listed.
_OTHER_WEIGHTED = frozenset(
    {
        aten.conv1d.default, aten.conv3d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
        aten.conv_transpose3d.input, aten.embedding.default, aten.embedding_bag.padding_idx, aten.embedding_bag.default,
        aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.matmul.default,
        aten.bmm.default, aten.mm.default, aten.einsum.default, aten.scaled_dot_product_attention.default,
        aten.baddbmm.default, aten.addbmm.default,
        aten.bilinear.default, aten.conv2d.default, aten.conv2d.padding, aten.linear.default, aten.addmm.default,
        aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.rms_norm.default,
    }
)  # fmt: skip

# Operators that look values up; where these are the network's own, it is a table that stays float, and is listed.
_LOOKUPS = frozenset(
    {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default, aten.embedding.default}
)


def unreached(model: nn.Module, read: set[str]) -> tuple[str, ...]:
    """Conv2d, Linear and Embedding modules whose weight the graph does not read, under any of its names."""
    aliases: dict[int, set[str]] = {}
    spelled = respellings(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(spelled.get(name, name))
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding))
        and not any(aliases[id(parameter)] & read for parameter in module.parameters())
    )


def uncovered(module: fx.GraphModule, products: dict[str, Product]) -> list[str]:
    """A sentence for each kind of operator with weights, or product of activations, that stays float."""
    return list_operators(uncovered_operators(module, products))


def uncovered_operators(module: fx.GraphModule, products: dict[str, Product]) -> list[fx.Node]:
    """The operators with weights, the lookups in tables and the products of activations that no layer or product is."""
    quantized = {product.node for product in products.values()}
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and node not in quantized
        and (
            node.target in _OTHER_WEIGHTED
            or (node.target in _LOOKUPS and _table(node) is not None and _reads_inputs(node))
        )
    ]


def _table(node: fx.Node) -> str | None:
    """The path of the float tensor of the network that the node looks values up in."""
    source, value = node.args[0], value_of(node)
    if value is None or not value.is_floating_point():
        return None
    while isinstance(source, fx.Node) and is_movement(source):
        source = source.args[0]
    return str(source.target) if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _reads_inputs(node: fx.Node) -> bool:
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op in ("placeholder", "call_module"):
            return True
        if current not in seen and current.target is not aten.sym_size.int:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def list_operators(nodes: Iterable[fx.Node]) -> list[str]:
    """A sentence for each kind of these operators, which stay float; SHOWN of a kind are named."""
    places: dict[str, list[str]] = {}
    for node in nodes:
        places.setdefault(plain_name(node), []).append(_place(node))
    sentences = []
    for operator, found in places.items():
        if len(found) == 1:
            own = "" if found[0].startswith(operator) else f"{operator} "
            sentences.append(f"operator {own}{found[0]} stays float.")
        else:
            more = ", ..." if len(found) > SHOWN else ""
            sentences.append(f"{len(found)} operators {operator} stay float: {', '.join(found[:SHOWN])}{more}.")
    return sentences


def plain_name(node: fx.Node) -> str:
    """The operator's name as in torch: relu, softmax, matmul."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return str(name).strip("_")


def _place(node: fx.Node) -> str:
    """Where an operator stands: in the module that calls it; else its own name in the graph, as tensors have it in a plan."""
    table = _table(node) if node.target in _LOOKUPS else None
    what = f" of the table {table}" if table else ""
    path = path_of(node)
    return f"{what.strip()}{' ' if table else ''}in {path}" if path else f"{node.name}{what}"
