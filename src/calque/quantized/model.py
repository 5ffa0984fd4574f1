"""The quantized network: an ordinary nn.Module with the original's signature."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from calque.grid.bits import Placement
from calque.network import Batch, DynamicAxes
from calque.network.compat import children
from calque.network.network import FlatInput
from calque.quantized.assembled import Assembled, compiled, edge_quantizers, quantized_layers
from calque.quantized.calls import CallForm
from calque.quantized.integer import IntegerModel
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.prices import Prices
from calque.report import Report

Axis = tuple[str, int]


@dataclass(frozen=True)
class Facts:
    """What was known when a network was captured and quantized; it is saved with the codes.

    Attributes:
        edges: the name of each quantizer's edge by the path of its module.
        inputs: the forms of the flat inputs; None for one that is no tensor.
        constants: the values of those that are no tensors.
        left_float: what is not quantized, a sentence each.
        scaled: groups of layers in front of whose input the channels have factors.
        placement: which tensors have grids.
        example: a few calibration inputs by argument name.
        dynamic: axes besides the batch that are free, by argument name.
        equal_axes: groups of axes with one size in every batch; None in files from before they were stored.
    """

    edges: Mapping[str, str]
    inputs: tuple[FlatInput | None, ...]
    constants: tuple[object, ...]
    left_float: tuple[str, ...]
    scaled: tuple[tuple[str, ...], ...]
    placement: Placement
    example: Batch
    dynamic: DynamicAxes
    equal_axes: tuple[tuple[Axis, ...], ...] | None

    @classmethod
    def of(
        cls,
        assembled: Assembled,
        *,
        placement: Placement,
        example: Batch,
        dynamic: DynamicAxes,
        equal_axes: tuple[tuple[Axis, ...], ...] | None,
    ) -> "Facts":
        """Those of an assembled network, and of the run that it came from."""
        network = assembled.network
        return cls(
            assembled.edges,
            network.inputs,
            network.constants,
            network.left_float,
            network.scaled,
            placement,
            example,
            dynamic,
            equal_axes,
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
        facts: what was known at the time.
        report: what was decided and gained; None where a file has none.
        prices: what each choice of bits would cost each layer, where a budget had them measured.
    """

    def __init__(self, assembled: Assembled, facts: Facts, report: Report | None, prices: Prices | None = None):
        super().__init__()
        network = assembled.network
        self.graph_module = assembled.graph_module
        self.signature = network.signature
        self.specs = _Specs(network.in_spec, network.out_spec)
        self.plan = assembled.plan
        self.facts = facts
        self.report: Any = report
        self.prices = prices
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
            self._kernels = compiled(self.graph_module)
        return self._kernels(self.graph_module, *leaves)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """An empty one, where all that was trained is codes now: scoring functions ask the first for its device."""
        found = tuple(super().parameters(recurse))
        device = next((buffer.device for buffer in self.buffers()), torch.device("cpu"))
        yield from found or (nn.Parameter(torch.empty(0, device=device), requires_grad=False),)

    def __getstate__(self) -> dict[str, Any]:
        names = [node.name for node in self.graph_module.graph.nodes]
        return {**self.__dict__, "_kernels": None, "_names": names}  # kernels are code that can be made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_names", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # nn.Module has no types here
        if names is not None:
            _rename(self.graph_module, names)

    @property
    def call_form(self) -> CallForm:
        """How the network may be called."""
        facts = self.facts
        tensors = [form is not None for form in facts.inputs]
        arguments = children(self.in_spec)[1]
        return CallForm(self.signature, arguments, tensors, facts.constants, facts.example, facts.dynamic)

    @property
    def in_spec(self) -> pytree.TreeSpec:
        return self.specs.inputs

    @property
    def out_spec(self) -> pytree.TreeSpec:
        return self.specs.outputs

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by name, in execution order."""
        return quantized_layers(self.graph_module)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers by the name of their edge, in execution order."""
        return edge_quantizers(self.graph_module, self.facts.edges)

    def edge_name(self, node: fx.Node) -> str:
        """The edge whose quantizer the node calls."""
        return str(self.facts.edges[str(node.target)])

    def integer(self) -> IntegerModel:
        """The exact integer evaluation of this network (slow): integer codes, int32 accumulators, requantization."""
        return IntegerModel(self.graph_module, self.call_form, self.out_spec, self.facts.edges)


def _rename(graph_module: fx.GraphModule, names: list[str]) -> None:
    """Gives, in place, the nodes the names that they had: torch pickles a graph as code and names its nodes anew.

    Saved files and exported ones are told apart by these names.
    """
    nodes = list(graph_module.graph.nodes)
    if len(nodes) != len(names) or [node.name for node in nodes] == names:
        return
    for node, name in zip(nodes, names, strict=True):
        node.name = name
    graph_module.recompile()
