"""The quantized network: an ordinary nn.Module with the original's signature."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from calque.calls import CallForm
from calque.compat import children
from calque.graph import Network
from calque.graph.products import operands_of
from calque.graph.rewrite import free_name
from calque.graph.signature import Signature
from calque.integer import IntegerModel
from calque.kernels import fuse, grid_node, maker_of
from calque.placement import Edge
from calque.prices import Prices
from calque.quantizers import QuantizedLayer, Quantizer
from calque.spec import Plan

QUANTIZERS = (
    "quantizers"  # the sub-module that holds the quantizers of all edges, where the network has none of that name
)


@dataclass(frozen=True)
class _Specs:
    """The trees of inputs and outputs; immutable, so a deep copy is itself (torch's own copy warns)."""

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec

    def __deepcopy__(self, memo: dict[int, object]) -> "_Specs":
        return self


class QuantizedModel(nn.Module):
    """A captured network with its quantizers; what PyTorch evaluates is what is shipped.

    Attributes:
        graph_module: the operators; flat inputs in, a flat tuple out.
        plan: bits of every layer and every tensor that has a grid of its own.
        report: what was decided and gained (None until a pipeline has set it).
        prices: what each choice of bits would cost each layer, where a budget had them measured.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
        plan: Plan,
        facts: Mapping[str, Any],
    ):
        super().__init__()
        self.graph_module = graph_module
        self.signature = signature
        self.specs = _Specs(*specs)
        self.plan = plan
        self.facts = dict(facts)
        self.report: Any = None
        self.prices: Prices | None = None
        self._kernels: Callable[..., tuple[Any, ...]] | None = None
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> Any:
        leaves = self.call_form.leaves(args, kwargs)
        return pytree.tree_unflatten(self.evaluate(*leaves), self.out_spec)

    def evaluate(self, *leaves: object) -> tuple[Any, ...]:
        """The flat outputs for flat inputs, computed by the kernels that the exported file runs on.

        `graph_module` is the same network operator by operator: there, an add is rounded as real numbers, and codes may
        differ by a step at rounding edges.
        """
        if self._kernels is None:
            self._kernels = type(fx.GraphModule(self.graph_module, fuse(self.graph_module))).forward
        outputs: tuple[Any, ...] = self._kernels(self.graph_module, *leaves)
        return outputs

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """An empty one, where all that was trained is codes now: scoring functions ask the first for its device."""
        found = tuple(super().parameters(recurse))
        device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
        yield from found or (nn.Parameter(torch.empty(0, device=device), requires_grad=False),)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": None}  # code made from the graph, which can be made again

    @property
    def call_form(self) -> CallForm:
        """How the network may be called."""
        tensors = [form is not None for form in self.facts["inputs"]]
        example, dynamic = self.facts.get("example", {}), self.facts.get("dynamic", {})
        return CallForm(self.signature, children(self.in_spec)[1], tensors, self.facts["constants"], example, dynamic)

    @property
    def in_spec(self) -> pytree.TreeSpec:
        return self.specs.inputs

    @property
    def out_spec(self) -> pytree.TreeSpec:
        return self.specs.outputs

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name, in execution order."""
        found = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
                if isinstance(module, QuantizedLayer):
                    found[str(node.target)] = module
        return found

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by the name of their edge, in execution order."""
        found = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.graph_module.get_submodule(str(node.target))
                if isinstance(module, Quantizer):
                    found[self.edge_name(node)] = module
        return found

    def edge_name(self, node: fx.Node) -> str:
        """The edge whose quantizer the node calls."""
        return str(self.facts["edges"][str(node.target)])

    def integer(self) -> IntegerModel:
        """The exact integer evaluation of this network (slow): integer codes, int32 accumulators, requantization."""
        return IntegerModel(self.graph_module, self.call_form, self.out_spec, self.facts["edges"])


def assemble(
    network: Network,
    edges: list[Edge],
    layers: Mapping[str, QuantizedLayer],
    quantizers: Mapping[str, Quantizer],
    plan: Plan,
) -> QuantizedModel:
    """The quantized network: `network` (left untouched) with its layers replaced and a quantizer on every edge.

    Args:
        layers, quantizers: by layer and edge name.
    """
    module = copy.deepcopy(network.module)
    twins = dict(zip(network.nodes(), module.graph.nodes, strict=True))
    holder, own = nn.Module(), free_name(module, QUANTIZERS)
    module.add_module(own, holder)
    targets = {}
    for index, edge in enumerate(edges):
        leaf = f"{index:03d}"
        holder.add_module(leaf, quantizers[edge.name])
        targets[f"{own}.{leaf}"] = edge.name
        _insert(module.graph, twins[edge.source], f"{own}.{leaf}", edge, network, twins)
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    module.graph.lint()
    module.recompile()
    link_requantization(module)
    facts = {
        "edges": targets,
        "inputs": network.inputs,
        "constants": network.constants,
        "left_float": network.left_float,
        "scaled": network.scaled,
    }
    return QuantizedModel(module, network.signature, (network.in_spec, network.out_spec), plan, facts)


def link_requantization(module: fx.GraphModule) -> None:
    """Tells, in place, each quantized layer what grid its input is on, and its result's, where a single quantizer reads it."""
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(called, QuantizedLayer):
            grid = grid_of(module, node.all_input_nodes[0])
            if grid is not None:
                called.read(grid)
        elif isinstance(called, Quantizer):
            made = maker_of(node)
            layer = module.get_submodule(str(made[0].target)) if made and made[0].op == "call_module" else None
            if made and isinstance(layer, QuantizedLayer):
                layer.feed(called, made[1])


def _insert(
    graph: fx.Graph, source: fx.Node, target: str, edge: Edge, network: Network, twins: dict[fx.Node, fx.Node]
) -> None:
    readers = [twins[network.layers[name].node] for name in edge.readers]
    if edge.kind == "operand":
        product = network.products[edge.product]
        reader = twins[product.node]
        operands = operands_of(reader)  # a tensor's own grid may stand in front by now
        assert operands is not None
        operand = operands[product.operands.index(edge.source)]
        with graph.inserting_before(reader):
            node = graph.call_module(target, (operand,))
        reader.replace_input_with(operand, node)
    elif edge.kind == "input":
        value = readers[0].args[0]
        assert isinstance(value, fx.Node)
        with graph.inserting_before(readers[0]):
            node = graph.call_module(target, (value,))
        for reader in readers:
            reader.replace_input_with(value, node)
    else:
        users = list(source.users)
        with graph.inserting_after(source):
            node = graph.call_module(target, (source,))
        for user in users:
            user.replace_input_with(source, node)
    node.meta = {key: item for key, item in source.meta.items() if key in ("val", "tensor_meta")}


def grid_of(graph_module: fx.GraphModule, node: fx.Node) -> Quantizer | None:
    """The quantizer on whose grid the node's value is, looking back through operators that only move values."""
    found = grid_node(graph_module, node)
    module = None if found is None else graph_module.get_submodule(str(found.target))
    return module if isinstance(module, Quantizer) else None
