"""A network executed on all calibration inputs, operator by operator, within a memory budget."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from calque.errors import CalibrationError
from calque.network.signature import Batch, flatten
from calque.run.spill import Store

StandIn = Callable[..., Any]
"""What is called in place of a module."""


def call_node(
    graph_module: fx.GraphModule,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: torch.nn.Module | None = None,
) -> Any:
    """What the node returns for these arguments; `stand_in` takes the place of the module that it calls."""
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_module":
        return (stand_in or graph_module.get_submodule(str(node.target)))(*args, **kwargs)
    if node.op == "get_attr":
        owner: Any = graph_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        return owner
    assert node.op == "output"
    return args[0]


def execute(
    module: fx.GraphModule,
    nodes: Iterable[fx.Node],
    values: Mapping[fx.Node, Any],
    stand_ins: Mapping[str, StandIn] | None = None,
    on_value: Callable[[fx.Node, Any], None] = lambda node, value: None,
) -> Any:
    """The value of the last of `nodes`, executed in order with the gradient mode of the caller.

    Args:
        values: of the nodes that are not executed but read; constants need not be among them.
        stand_ins: by the target that a node calls, what is called in its place.
        on_value: called with each node and its value.
    """
    order = list(nodes)
    last = {source: node for node in order for source in node.all_input_nodes}
    known, stand_ins = dict(values), stand_ins or {}
    for node in order:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in known:
                known[source] = call_node(module, source, (), {})
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        called = stand_ins.get(str(node.target)) if node.op == "call_module" else None
        known[node] = call_node(module, node, args, kwargs) if called is None else called(*args, **kwargs)
        on_value(node, known[node])
        for source in node.all_input_nodes:
            if last[source] is node:
                del known[source]
    return known[order[-1]]


def execute_whole(
    module: fx.GraphModule,
    leaves: Sequence[Any],
    on_value: Callable[[fx.Node, Any], None],
) -> Any:
    """The network's output leaves for flat inputs; `on_value` is called with each node and its value, the inputs' too."""
    nodes = list(module.graph.nodes)
    values = dict(zip((node for node in nodes if node.op == "placeholder"), leaves, strict=True))
    for node, value in values.items():
        on_value(node, value)
    return execute(module, [node for node in nodes if node.op != "placeholder"], values, on_value=on_value)


class Execution:
    """A graph executed operator by operator over all batches; values are freed once nothing reads them any more.

    Call `step` (or `compute` and `put` in its place) on each node of `graph_module.graph.nodes` in order, then `release`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        batches: list[Batch],
        store: Store,
        *,
        keep: Mapping[fx.Node, fx.Node] | None = None,
    ):
        """
        Args:
            keep: node -> a later node at whose release its value is freed, in place of its last reader's.
        """
        self.module = graph_module
        self.store = store
        self.count = len(batches)
        self._kept: dict[fx.Node, list[object]] = {}
        self._last = {reader: node for node in graph_module.graph.nodes for reader in node.all_input_nodes}
        self._last.update(keep or {})
        leaves = [flatten(batch)[0] for batch in batches]
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._given = set(placeholders)  # whose values are the caller's
        for index, node in enumerate(placeholders):
            self._kept[node] = [leaf[index] for leaf in leaves]
        for tensor in (*itertools.chain(*leaves), *graph_module.parameters(), *graph_module.buffers()):
            store.lend(tensor)

    def values(self, node: fx.Node) -> Iterator[Any]:
        """The node's value on each batch; one is in memory at a time, as far as the reader lets go of it."""
        return map(
            self.store.get, self._kept[node]
        )  # generators and zip keep their last value until they have the next

    def at(self, node: fx.Node, index: int) -> Any:
        """The node's value on batch `index`."""
        return self.store.get(self._kept[node][index])

    def compute(
        self,
        node: fx.Node,
        module: torch.nn.Module | None = None,
        through: Mapping[fx.Node, torch.nn.Module] | None = None,
    ) -> Iterator[Any]:
        """The node's value on each batch, from the values of its inputs.

        Args:
            module: stands in for the one that the node calls.
            through: modules that values of these inputs pass first.
        """

        @torch.no_grad()
        def computed(index: int) -> Any:
            values = {source: self.store.get(self._kept[source][index]) for source in node.all_input_nodes}
            try:
                values |= {source: part(values[source]) for source, part in (through or {}).items()}
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                return call_node(self.module, node, args, kwargs, module)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise CalibrationError(f"operator {node.name} fails on calibration batch {index}: {reason}") from error

        return map(computed, range(self.count))

    def put(self, node: fx.Node, values: Iterable[object]) -> None:
        """Keeps the node's value on each batch, in place of what was kept before."""
        # in place, so that the old and the new values of all batches never stand side by side
        kept = self._kept.setdefault(node, [None] * self.count)
        found = iter(values)
        for index in range(self.count):
            value = next(found)
            if node not in self._given:
                self.store.drop(kept[index])
            kept[index] = self.store.put(value)
            del value  # before the next one is computed
        self._given.discard(node)

    def outputs(self, node: fx.Node) -> Iterator[list[Any]]:
        """What the graph returns on each batch; `node` is its output."""
        for index in range(self.count):
            yield [self.at(leaf, index) if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]  # type: ignore[union-attr]

    def step(self, node: fx.Node) -> None:
        """Computes and keeps the node's values."""
        if node.op != "placeholder":
            self.put(node, self.compute(node))

    def release(self, node: fx.Node) -> None:
        """Frees every value whose last reader is `node`, and the node's own if nothing reads it."""
        done = [source for source, last in self._last.items() if last is node]
        if not node.users and node.op != "output":
            done.append(node)
        for source in done:
            values = self._kept.pop(source, [])
            for kept in () if source in self._given else values:
                self.store.drop(kept)
        self.store.give_back()
