"""What a captured graph leaves float or never reaches, in words."""

import torch
from torch import fx, nn

from calque.graph.network import Product
from calque.graph.rewrite import path_of

aten = torch.ops.aten
SHOWN = 3  # operators of a kind that are named where all of them stay float

# Other operators with a trained weight. They stay float, and are listed.
_OTHER_WEIGHTED = frozenset(
    {
        aten.conv1d.default, aten.conv3d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
        aten.conv_transpose3d.input, aten.embedding.default, aten.embedding_bag.padding_idx, aten.embedding_bag.default,
        aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.matmul.default,
        aten.bmm.default, aten.mm.default, aten.einsum.default, aten.scaled_dot_product_attention.default,
        aten.bilinear.default, aten.conv2d.default, aten.conv2d.padding, aten.linear.default, aten.addmm.default,
        aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.rms_norm.default,
    }
)  # fmt: skip


def unreached(model: nn.Module, read: set[str]) -> tuple[str, ...]:
    """Conv2d, Linear and Embedding modules whose weight the graph does not read, under any of its names."""
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding))
        and not any(aliases[id(parameter)] & read for parameter in module.parameters())
    )


def uncovered(module: fx.GraphModule, products: dict[str, Product]) -> list[str]:
    """A sentence for each kind of operator with weights, or product of activations, that stays float."""
    places: dict[str, list[str]] = {}
    quantized = {product.node for product in products.values()}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _OTHER_WEIGHTED and node not in quantized:
            where = f" in {path_of(node)}" if path_of(node) else ""
            places.setdefault(str(node.target), []).append(f"{node.name}{where}")
    sentences = []
    for operator, names in places.items():
        if len(names) == 1:
            name, _, where = names[0].partition(" ")
            sentences.append(f"operator {name} ({operator}){' ' if where else ''}{where} stays float.")
        else:
            more = ", ..." if len(names) > SHOWN else ""
            sentences.append(f"{len(names)} operators {operator} stay float: {', '.join(names[:SHOWN])}{more}.")
    return sentences
