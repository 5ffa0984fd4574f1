"""What a file says about the network it fits: inputs, operators, where grids are; and what differs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, fx

from calque.errors import SpecError
from calque.network import Network, WeightedLayer
from calque.quantized.assembled import edge_quantizers
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.shipping.saved.file import Tensors
from calque.shipping.saved.rules import layers_of

LONGEST = 200  # characters of an operator in a message


def describe_input(value: object, leaves: Tensors) -> object:
    """The form of an input as JSON; its tensors are added to `leaves`."""
    if isinstance(value, Tensor):
        key = f"input:{len(leaves)}"
        leaves[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if type(value) in (list, tuple):
        assert isinstance(value, (list, tuple))
        return {type(value).__name__: [describe_input(item, leaves) for item in value]}
    if type(value) is dict:
        return {"dict": {str(key): describe_input(item, leaves) for key, item in value.items()}}
    raise SpecError(
        "only inputs of tensors, numbers, strings, None, and lists, tuples and dicts of them can be saved. "
        f"Got {type(value).__name__}."
    )


def example_input(form: Any, tensors: Tensors, generator: torch.Generator, device: torch.device) -> object:
    """An input of the described form; integers steer a trace (indices, lengths): the stored ones."""
    if "tensor" in form:
        stored = tensors.get(form["tensor"])
        dtype = getattr(torch, form["dtype"])
        return torch.randn(form["shape"], generator=generator).to(device, dtype) if stored is None else stored
    if "dict" in form:
        return {key: example_input(item, tensors, generator, device) for key, item in form["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in form:
            return kind(example_input(item, tensors, generator, device) for item in form[kind.__name__])
    return form["value"]


def operators(module: fx.GraphModule) -> list[list[str]]:
    """[name, operator, arguments] of each node in order, looking through quantizers."""

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return text(value.args[0]) if _is_quantizer(module, value) else f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return "device" if isinstance(value, torch.device) else repr(value)

    lines = []
    for node in module.graph.nodes:
        if _is_quantizer(module, node):
            continue
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, (QuantizedLayer, WeightedLayer)):
            operator = f"layer {node.target} {' '.join(map(str, astuple(called.geometry)))}"
        else:
            named = isinstance(node.target, (str, torch._ops.OpOverload))
            operator = str(node.target) if named else getattr(node.target, "__name__", str(node.target))
        keywords = [f"{key}={text(value)}" for key, value in sorted(node.kwargs.items())]
        lines.append([node.name, operator, ", ".join([*map(text, node.args), *keywords])])
    return lines


def _is_quantizer(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Quantizer)


def grids(graph_module: fx.GraphModule, edges: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Edge -> its grid, what is put on it and who reads it; a quantizer goes by its edge's name.

    Args:
        edges: the name of each quantizer's edge by the path of its module.
    """
    quantizers = edge_quantizers(graph_module, edges)

    def name(node: fx.Node) -> str:
        return edges[str(node.target)] if _is_quantizer(graph_module, node) else node.name

    result = {}
    for node in graph_module.graph.nodes:
        if _is_quantizer(graph_module, node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            readers = sorted(name(user) for user in node.users)
            grid = quantizers[name(node)]
            result[name(node)] = {
                "bits": grid.bits,
                "scale": grid.scale.item(),  # a float32 is the same after JSON
                "zero_point": grid.zero_point.item(),
                "source": name(source),
                "readers": readers,
            }
    return result


def left_float(module: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The tensors besides quantized layers and quantizers that the operators read, by their path."""
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            path, _, leaf = target.rpartition(".")
            value = getattr(module.get_submodule(path), leaf)
            if isinstance(value, Tensor):  # control flow reads graphs, too
                yield target, value
        elif node.op == "call_module" and isinstance(layer := module.get_submodule(target), WeightedLayer):
            yield f"{target}.weight", layer.weight
            yield f"{target}.bias", layer.bias


def mismatches(network: Network, table: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """Layers, tensors and kinds of operators that the file or the network lacks, and other shapes."""
    problems = [f"the network has no layer {name}" for name in layers_of(table) if name not in network.layers]
    for name in network.layers:
        stored = table["layers"].get(name)
        if stored is not None and stored["shape"] != list(network.weighted(name).weight.shape):
            problems.append(shapes(f"layer {name}", stored["shape"], network.weighted(name).weight))
    parts = {f"{name}.{leaf}" for name in table["layers"] for leaf in ("weight", "bias")}
    for name, tensor in left_float(network.module):
        value = tensors.get(f"float:{name}")
        if value is None and name not in parts:
            problems.append(f"the file has no {name}")
        elif value is not None and value.shape != tensor.shape:
            problems.append(shapes(name, value.shape, tensor))
    ours, theirs = (
        Counter(operator for _, operator, _ in lines if not operator.startswith("layer "))
        for lines in (operators(network.module), table["operators"])
    )
    problems += [f"the network has {count} {_short(kind)} too many" for kind, count in (ours - theirs).items()]
    return problems + [f"the network lacks {count} {_short(kind)}" for kind, count in (theirs - ours).items()]


def differences(stored: list[list[str]], found: list[list[str]]) -> list[str]:
    """Operators of the same kinds that are arranged otherwise, or have other arguments."""
    pairs = zip(stored, found, strict=True)
    return [
        f"{_short(f'{a[1]}({a[2]})')} in the file is {_short(f'{b[1]}({b[2]})')} in the network"
        for a, b in pairs
        if a != b
    ]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def shapes(what: str, stored: object, tensor: Tensor) -> str:
    return f"{what} is {list(torch.Size(stored))} in the file and {list(tensor.shape)} in the network"  # type: ignore[arg-type]
