"""Channel scales moved from an activation into the weights on both sides of it, so that one grid suits all its channels.

Where a layer's output goes through a ReLU to weighted layers alone, y_c -> s_c y_c changes nothing in real numbers: the rows of
the layer are multiplied by s_c, the columns of its readers divided. Behind a ReLU6 the bound is not moved: channels only grow
(s_c >= 1), so their own bounds lie above it, and a grid that ends at it saturates first. No operator is added to the network.

Sources: cross-layer equalization (Nagel et al., 1906.04721); SmoothQuant (2211.10438) for the exponent.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from calque.fitting.problem import LayerProblem
from calque.grid.bits import Bits
from calque.network import Layer, Network, WeightedLayer
from calque.network.network import clamp_bounds
from calque.network.rewrites.factors import along_inputs
from calque.quantized.placement import Edge
from calque.run.checkpoint import Piece

QUANTILE = 0.9995  # of a channel's values: what its size is
LARGEST = 64.0  # scale: a channel that is nearly always zero stays small
SCALES = "channel_scales"  # their name in a piece
ROWS = 2**13  # sampled values of a channel that its size is taken from


@dataclass(frozen=True)
class Migration:
    """Where scales may move, and those that were moved.

    Attributes:
        network: float, which stays as it is.
        readers: of each layer whose channels may be scaled.
        exponent: 0 leaves the channels, 1 makes them equally large; depthwise readers always take 1, which costs them nothing.
        scales: (C_out,) by layer, as far as they were chosen.
    """

    network: Network
    readers: Mapping[str, tuple[str, ...]]
    exponent: float
    scales: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, network: Network, bits: Mapping[str, Bits], edges: list[Edge], exponent: float) -> "Migration":
        """Over every edge that allows it: one clip at zero between a layer and its readers, all of them quantized."""
        if not exponent:
            return cls(network, {}, 0.0)
        kept = {edge.source for edge in edges if edge.kind == "tensor"}
        on_grid = {name for edge in edges if edge.kind != "tensor" for name in edge.readers}
        tied = {*network.shared, *network.shared.values()}
        by_node = {layer.node: name for name, layer in network.layers.items()}
        found = {}
        for name, layer in network.layers.items():
            names = tuple(by_node.get(user, "") for user in layer.result.users)
            kind = network.weighted(name).geometry.kind
            if (
                layer.result is not layer.node
                and layer.result not in kept
                and names
                and all(reader in on_grid and network.weighted(reader).geometry.kind == kind for reader in names)
                and all(bits[each].weight is not None and each not in tied for each in (name, *names))
            ):
                found[name] = names
        return cls(network, found, exponent)

    def chosen(self, layer: Layer, problem: LayerProblem) -> LayerProblem:
        """Chooses the scales of the layer's channels from its sampled outputs, and returns the problem of the scaled layer."""
        if layer.name not in self.readers:
            return problem
        step = math.ceil(problem.targets.shape[1] / ROWS)
        sizes = _sizes(problem.activation(problem.targets[:, ::step]))  # (groups, O)
        readers = [self.network.weighted(name).geometry for name in self.readers[layer.name]]
        depthwise = all(reader.groups == sizes.numel() > 1 for reader in readers)
        grown = (sizes.max() / sizes) ** (1.0 if depthwise else self.exponent)
        scale = torch.where(sizes > 0, grown, torch.ones_like(sizes)).clamp(max=LARGEST)
        self.scales[layer.name] = scale.reshape(-1)
        return replace(
            problem, targets=problem.targets * scale[:, None], weight=problem.weight * scale[:, :, None],
            bias=problem.bias * scale[:, None],
        )  # fmt: skip

    def weighted(self, name: str) -> WeightedLayer:
        """The float layer with the scales of its inputs and outputs in its weights."""
        layer = self.network.weighted(name)
        producer, outputs = self._producer(name), self.scales.get(name)
        if producer is None and outputs is None:
            return layer
        weight, bias = layer.weight, layer.bias
        if producer is not None:
            weight = weight / along_inputs(self.scales[producer], layer.geometry, weight)
        if outputs is not None:
            weight, bias = weight * outputs.reshape(-1, *[1] * (weight.dim() - 1)), bias * outputs
        return WeightedLayer(layer.geometry, weight, bias)

    def outputs(self, name: str, values: Iterator[Tensor]) -> Iterator[Tensor]:
        """Float outputs of the layer as the scaled layer has them, before its activation."""
        return self._scaled(name, values) if name in self.scales else values

    def inputs(self, name: str, values: Iterator[Tensor]) -> Iterator[Tensor]:
        """Float inputs of the layer as the scaled network has them, up to the bound of the clip in front."""
        producer = self._producer(name)
        if producer is None:
            return values
        bounds = clamp_bounds(self.network.layers[producer].result)
        high = math.inf if bounds is None else bounds[1]
        return map(lambda value: value.clamp(max=high), self._scaled(producer, values))

    def kept(self, name: str, fit: Piece) -> Piece:
        """The layer's fit with the layer's scales, if it has any."""
        return replace(fit, tensors={**fit.tensors, SCALES: self.scales[name]}) if name in self.scales else fit

    def restore(self, name: str, kept: Piece) -> None:
        """Brings back the scales that `kept` added."""
        if SCALES in kept.tensors:
            self.scales[name] = kept.tensors[SCALES].to(self.network.weighted(name).weight.device)

    def _scaled(self, name: str, values: Iterator[Tensor]) -> Iterator[Tensor]:
        geometry = self.network.weighted(name).geometry
        return map(lambda value: value * geometry.along_channels(self.scales[name]), values)

    def _producer(self, name: str) -> str | None:
        """The layer whose scaled channels this layer reads."""
        if name not in self.network.layers:
            return None
        source = self.network.layers[name].node.args[0]
        assert isinstance(source, fx.Node)
        return next((each for each in self.scales if self.network.layers[each].result is source), None)


def _sizes(outputs: Tensor) -> Tensor:
    """The QUANTILE of each channel (groups, O) of outputs (groups, R, O)."""
    beyond = max(1, round((1 - QUANTILE) * outputs.shape[1]))
    return outputs.topk(beyond, dim=1).values[:, -1]
