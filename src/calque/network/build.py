"""Nodes made by hand, with the example values that tracing would have left on them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from calque.network.exclusive import exclusively


class Builder:
    """Makes nodes in front of one node, in whose place they stand: for the same module and line of the user's code."""

    def __init__(self, node: fx.Node):
        self.node = node
        self.mode = next(
            value.fake_mode
            for source in (node, *node.all_input_nodes)
            for value in pytree.tree_leaves(source.meta.get("val"))
            if hasattr(value, "fake_mode")
        )
        self.meta: dict[str, Any] = {
            key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
        }

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of the operator; its value is computed from those of the nodes among the arguments."""
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args, kwargs)
        made_args, made_kwargs = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        # torch counts modes for the whole process; its choice of a kernel would fix the sizes that it looks at
        # the dispatcher of tracing, without which composite operators of torch 2.8 cannot take open sizes
        with exclusively(), enable_python_dispatcher(), self.mode, self._open_sizes():
            made.meta = {**self.meta, "val": target(*made_args, **made_kwargs)}
        return made

    def _open_sizes(self) -> AbstractContextManager[object]:
        """Keeps sizes that tracing left open from being fixed."""
        sizes = self.mode.shape_env
        return nullcontext() if sizes is None else sizes.suppress_guards()

    def size(self, node: fx.Node, axis: int) -> Any:
        """The length of an axis: a number, or a node where tracing left it open."""
        size = node.meta["val"].shape[axis]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, axis)

    def replace(self, result: fx.Node) -> None:
        """Puts `result` in the node's place."""
        self.node.replace_all_uses_with(result)
        self.node.graph.erase_node(self.node)
