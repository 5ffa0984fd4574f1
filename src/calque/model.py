"""The quantized network: an ordinary nn.Module with the original's signature."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calque.graph import Network
from calque.graph.products import operands_of
from calque.graph.rewrite import free_name
from calque.graph.signature import Batch, Signature, flatten
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
        batch = self.signature.bind(args, kwargs)
        leaves, spec = flatten(batch)
        expected = self.in_spec.child(1)
        if spec != expected:
            raise TypeError(f"the network was captured with inputs of the form {expected}. Got {spec}.")
        self._check_sizes(batch)
        for leaf, constant in zip(leaves, self.facts["constants"], strict=True):
            if not isinstance(leaf, Tensor) and leaf != constant:
                raise TypeError(
                    f"the network was captured with the argument {constant!r}. Got {leaf!r}; capture it anew."
                )
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": None}  # code made from the graph, which can be made again

    def _check_sizes(self, batch: Batch) -> None:
        """Raises ValueError where an axis has another size than at capture and is neither the batch's nor free.

        TypeError for real numbers in place of whole ones, or the other way round: images of bytes, say.
        """
        example, free = self.facts.get("example", {}), self.facts.get("dynamic", {})
        whole = self.signature.layout.whole if self.signature.layout is not None else ()
        for name, value in batch.items():
            known, axes = example.get(name), free.get(name, {})
            if not isinstance(value, Tensor) or not isinstance(known, Tensor) or not isinstance(axes, Mapping):
                continue
            if value.is_floating_point() != known.is_floating_point():
                raise TypeError(
                    f"{name} was captured as {known.dtype}. Got {value.dtype}; prepare it as in calibration."
                )
            if value.dim() != known.dim():
                raise ValueError(f"{name} was captured with {known.dim()} axes. Got {value.dim()}.")
            for axis in range(0 if name in whole else 1, value.dim()):
                if axis not in axes and value.shape[axis] != known.shape[axis]:
                    raise ValueError(
                        f"axis {axis} of {name} was captured as {known.shape[axis]}. Got {value.shape[axis]}. Calibrate with "
                        f'several sizes, or quantize with dynamic={{"{name}": {{{axis}: Dim.AUTO}}}}.'
                    )

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
        return IntegerModel(self.graph_module, self.signature, self.out_spec, self.facts["edges"])


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


def input_signature(values: list[Tensor]) -> list[dict[str, Any]]:
    """Shape and dtype of example inputs, as JSON."""
    return [{"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")} for value in values]
