"""The float network that every tool is given: batch norms folded, operators as modules, a marker wherever a tensor has 8 bits.

This runs in each peer's environment and needs torch alone.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WEIGHTED = (nn.Conv2d, nn.Linear)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
END_BITS = 8  # of the first and the last layer, and of tensors at markers
CANDIDATES = (8, 4, 3, 2)  # bits of weights that methods of mixed bits choose from


class Add(nn.Module):
    """A residual add."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Marker(nn.Identity):
    """Stands where a tensor that an add or a mean reads or an add makes is put on a grid of 8 bits."""


@dataclass(frozen=True)
class Bits:
    """Bits of one layer's weights and of its input."""

    weight: int
    activation: int


def parse(bits: str) -> Bits:
    """The bits that "w4a8" stands for.

    >>> parse("w4a8")
    Bits(weight=4, activation=8)
    """
    weight, activation = bits.removeprefix("w").split("a")
    return Bits(int(weight), int(activation))


def layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The weighted layers by name, in the order of the graph that `prepare` made."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def plan(model: nn.Module, bits: str) -> dict[str, Bits]:
    """Layer name -> bits: those asked for, and 8 in the first and the last layer."""
    names = list(layers(model))
    return {name: Bits(END_BITS, END_BITS) if name in (names[0], names[-1]) else parse(bits) for name in names}


def weight_bytes(model: nn.Module, bits: str) -> int:
    """Bytes of the packed weights under `plan`, scales and biases not counted: what a plan of mixed bits may take."""
    chosen = plan(model, bits)
    return sum(-(-module.weight.numel() * chosen[name].weight // 8) for name, module in layers(model).items())


def marked(graph: fx.GraphModule, marker: type[nn.Module] = Marker) -> list[str]:
    """The modules whose results have 8 bits: those in front of the markers."""
    modules = dict(graph.named_modules())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [str(node.args[0].target) for node in calls if isinstance(modules[node.target], marker)]


def prepare(
    model: nn.Module, add: Callable[[], nn.Module] = Add, marker: Callable[[], nn.Module] = Marker
) -> fx.GraphModule:
    """A copy of `model` that computes the same with batch norms folded, modules only, and markers.

    Args:
        model: in eval mode; convolutions, batch norms, ReLU, ReLU6, adds, pads, slices, spatial means and a Linear.
        add: the module that adds two tensors.
        marker: the module that stands where a tensor has 8 bits.
    """
    graph = _flat(fx.symbolic_trace(model))
    _fold(graph)
    for node in list(graph.graph.nodes):
        if node.target in (F.relu, torch.relu):
            _replace(graph, node, nn.ReLU(), node.args[:1])
        elif node.target in (operator.add, torch.add):
            _replace(graph, node, add(), node.args)
    for node in [node for node in graph.graph.nodes if node in set(_shared(graph))]:
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(_name(graph, f"grid_{node.name}", marker()))
        node.replace_all_uses_with(new)
        new.args = (node,)
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


def _flat(traced: fx.GraphModule) -> fx.GraphModule:
    """The graph with its modules at the top, in the order of the graph, without identities and dropouts."""
    flat = nn.Module()
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        module = traced.get_submodule(node.target)
        if isinstance(module, (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
            continue
        node.target = node.target.replace(".", "_")
        flat.add_module(node.target, module)
    return fx.GraphModule(flat, traced.graph)


def _fold(graph: fx.GraphModule) -> None:
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            convolution = node.args[0]
            assert modules[convolution.target].__class__ is nn.Conv2d
            folded = fuse_conv_bn_eval(modules[convolution.target], modules[node.target])
            setattr(graph, convolution.target, folded)
            node.replace_all_uses_with(convolution)
            graph.graph.erase_node(node)
            graph.delete_submodule(node.target)


def _replace(graph: fx.GraphModule, node: fx.Node, module: nn.Module, arguments: Any) -> None:
    with graph.graph.inserting_after(node):
        new = graph.graph.call_module(_name(graph, f"{node.name}_", module), tuple(arguments))
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _name(graph: fx.GraphModule, name: str, module: nn.Module) -> str:
    graph.add_submodule(name, module)
    return name


def _shared(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Operands and results of adds, and what means read."""
    modules = dict(graph.named_modules())
    adds = [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and len(node.args) == 2 and not isinstance(modules[node.target], WEIGHTED)
    ]
    for node in adds:
        yield from (_root(operand, modules) for operand in node.args)
        readers = list(node.users)
        clipped = len(readers) == 1 and isinstance(modules.get(readers[0].target), ACTIVATIONS)
        yield readers[0] if clipped else node
    yield from (_root(node.args[0], modules) for node in graph.graph.nodes if node.target == "mean")


def _root(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Back through slices and pads."""
    while node.target in (operator.getitem, F.pad) or isinstance(modules.get(str(node.target)), nn.ZeroPad2d):
        node = node.args[0]  # type: ignore[assignment] # the first argument of each of these is a tensor
    return node
