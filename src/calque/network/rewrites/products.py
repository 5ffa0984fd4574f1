"""Products of two computed tensors (attention), and fused attention taken apart into them."""

import math
from typing import Any

import torch
from torch import fx

from calque.network.build import Builder
from calque.network.layers import WeightedLayer
from calque.network.network import Product, value_of
from calque.network.rewrites.functional import path_of

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default})


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both factors of a product of two float tensors; None for any other node."""
    if node.op != "call_function" or node.target not in _PRODUCTS:
        return None
    arguments = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    assert isinstance(arguments, (list, tuple))
    pair = [argument for argument in arguments if isinstance(argument, fx.Node)]
    if len(pair) != 2 or not all((v := value_of(each)) is not None and v.is_floating_point() for each in pair):
        return None
    return pair[0], pair[1]


def contracted_axes(node: fx.Node) -> tuple[tuple[int, int], ...]:
    """What a product sums over: (0 for the left factor or 1 for the right one, axis), each index once."""
    if node.target is not aten.einsum.default:
        return ((0, -1),)
    equation = str(node.args[0]).replace(" ", "")
    factors, _, result = equation.partition("->")
    if "->" not in equation:
        result = "".join(index for index in factors if factors.count(index) == 1)
    found: dict[str, tuple[int, int]] = {}
    for side, indices in enumerate(factors.split(",")):
        front, dots, back = indices.partition("...")
        for axis, index in enumerate(front if dots else indices):
            found.setdefault(index, (side, axis))
        for axis, index in enumerate(reversed(back), start=1):
            found.setdefault(index, (side, -axis))
    return tuple(place for index, place in found.items() if index not in result)


def find_products(module: fx.GraphModule) -> dict[str, Product]:
    """The products of a captured graph whose operands both come from weighted layers, in execution order.

    Others are tables of angles or masks, on which no grid belongs. A product's name is the path of the module that computes it
    and the operator, "#2" appended to its second one, or where a layer has the name.
    """
    layered: set[fx.Node] = set()
    layers = {name for name, part in module.named_modules() if isinstance(part, WeightedLayer)}
    found: dict[str, Product] = {}
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, WeightedLayer) or any(source in layered for source in node.all_input_nodes):
            layered.add(node)
        pair = operands_of(node)
        if pair is not None and all(operand in layered for operand in pair):
            operator = str(node.target).split(".")[1]
            stem = ".".join(filter(None, (path_of(node), operator)))
            name, count = stem, 1
            while name in found or name in layers:
                count += 1
                name = f"{stem}#{count}"
            found[name] = Product(name, node, pair)
    return found


def decompose_attention(graph: fx.Graph) -> None:
    """Replaces, in place, scaled_dot_product_attention by its products, mask and softmax.

    Rows that a boolean mask leaves nothing of become zero, as the fused operator returns them. Its result lies otherwise in
    memory than that of its products, so that views of it become reshapes (torch 2.8 traces no copy in front of them).
    """
    found = [node for node in graph.nodes if node.target is aten.scaled_dot_product_attention.default]
    for node in found:
        build = Builder(node)
        build.replace(_attention(build))
    for view in graph.find_nodes(op="call_function", target=aten.view.default) if found else ():
        view.target = aten.reshape.default


def _attention(build: Builder) -> fx.Node:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, build.node.args, strict=False)), **build.node.kwargs}
    call = build.call
    query, key, value = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    example = query.meta["val"]
    width, heads = example.shape[-1], example.shape[-3]
    if given.get("enable_gqa") and key.meta["val"].shape[-3] != heads:
        groups = heads // key.meta["val"].shape[-3]
        key, value = (call(aten.repeat_interleave.self_int, each, groups, -3) for each in (key, value))
    scale = given.get("scale")
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(width) if scale is None else scale)
    kept = mask if mask is not None and mask.meta["val"].dtype == torch.bool else None
    if given.get("is_causal"):
        sizes = [build.size(each, -2) for each in (query, key)]
        kept = call(aten.tril.default, call(aten.ones.default, sizes, dtype=torch.bool, device=example.device))
    if kept is None:
        return call(
            aten.matmul.default,
            call(aten.softmax.int, scores if mask is None else call(aten.add.Tensor, scores, mask), -1),
            value,
        )
    dropped = call(aten.logical_not.default, kept)
    scores = call(aten.masked_fill.Scalar, scores, dropped, torch.finfo(example.dtype).min)
    weights = call(aten.masked_fill.Scalar, call(aten.softmax.int, scores, -1), dropped, 0.0)
    return call(aten.matmul.default, weights, value)
