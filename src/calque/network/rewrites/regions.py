"""Regions of forward under another precision or gradient mode: computed in float32, and opened into the graph around them.

torch.export keeps what stands under enable_grad or no_grad as a graph of its own, an argument of one operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram

from calque.network.exclusive import for_this_thread

_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled  # of (enabled, the graph, its inputs...)


@contextmanager
def in_float32(device: str) -> Iterator[set[torch.dtype]]:
    """While it lasts, torch.autocast does nothing in this thread; the precisions that it would lower values on `device` to.

    The thread must have its turn (`exclusively`).
    """
    lowered: set[torch.dtype] = set()

    def note(region: torch.autocast) -> torch.autocast:
        if region._enabled and region.device == device:
            lowered.add(region.fast_dtype)
        return region

    with (
        for_this_thread(torch.autocast, "__enter__", note),
        for_this_thread(torch.autocast, "__exit__", lambda *_: False),
    ):
        yield lowered


def open_regions(program: ExportedProgram) -> None:
    """Puts, in place, the operators of every region where it was called."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if node.target is not _REGION:
            continue
        _, source, *inputs = node.args
        results = _copied(module, node, getattr(module, str(source.target)), inputs)
        for reader in list(node.users):  # each takes one of the region's results
            value = results[reader.args[1]]
            reader.replace_all_uses_with(value)
            program.graph_signature.replace_all_uses(reader.name, value.name)
            module.graph.erase_node(reader)
        module.graph.erase_node(node)
        if not source.users:
            module.graph.erase_node(source)
    module.recompile()


def _copied(module: fx.GraphModule, node: fx.Node, region: fx.GraphModule, inputs: list[Any]) -> list[fx.Node]:
    """Copies a region's operators in front of `node`; the nodes of its results."""
    taken = iter(inputs)
    copies: dict[fx.Node, Any] = {}
    with module.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(taken)
            elif inner.op == "output":
                return [copies[result] for result in inner.args[0]]
            else:
                copies[inner] = module.graph.node_copy(inner, copies.__getitem__)
    raise AssertionError("a graph ends in its output")


def control_flow(module: fx.GraphModule) -> list[str]:
    """A sentence for each operator that runs graphs of its own (torch.cond, a loop): they stay float, weights and all."""
    sentences = []
    for node in module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            weights = [str(each.target) for each in node.all_input_nodes if _is_weight(module, each)]
            what = f", with {', '.join(weights)}" if weights else ""
            sentences.append(f"operator {node.name} ({node.target}) stays float{what}.")
    return sentences


def _is_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    path, _, leaf = str(node.target).rpartition(".")
    return isinstance(getattr(module.get_submodule(path), leaf), Tensor)
