"""The float network and its quantized twin executed side by side; each layer is quantized when it is reached.

The sequential flavour of METHOD section 2: the target is the float layer's output on the float input, the quantized layer
sees the output of the already quantized prefix. One pass over the operators serves all layers.
"""

import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from calque.arithmetic import BIAS_LIMIT, activation_limits, affine_grid, bias_codes, weight_codes
from calque.calibration import Execution, Store
from calque.errors import CalibrationError
from calque.graph import Batch, Geometry, Layer, Network
from calque.graph.signature import rows
from calque.placement import Edge
from calque.quantizers import QuantizedLayer, Quantizer
from calque.ranges import TensorSample, activation_range, search_range, weight_scale
from calque.recipe import Recipe
from calque.report import FLOAT_BITS, LayerReport, layer_size
from calque.solvers.adaquant import fit_layer
from calque.solvers.problem import (
    Fit,
    Grid,
    LayerProblem,
    correct_bias,
    covariance,
    layer_problem,
    output_error,
    round_to_nearest,
)
from calque.spec import Bits
from calque.statistics import ChannelStatistics

log = logging.getLogger(__name__)

SAMPLED_VALUES = 2**18  # of a tensor, for its range


@dataclass
class Swept:
    """What the sweep leaves: by layer name, by edge name, and the float network's statistics by layer name.

    `weak` names layers with fewer equations than unknowns, with both numbers.
    """

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    weak: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Sweep:
    """One sweep over a network at given bits and edges; call `run` once."""

    def __init__(
        self,
        network: Network,
        bits: Mapping[str, Bits],
        edges: list[Edge],
        recipe: Recipe,
        batches: list[Batch],
        store: Store,
        seed: int,
    ):
        self.network = network
        self.bits = bits
        self.recipe = recipe
        self.seed = seed
        self.reference = Execution(network.module, batches, store)
        self.shadow = Execution(network.module, batches, store)
        self.inputs = sum(rows(batch) for batch in batches)
        self.by_node = {layer.node: layer for layer in network.layers.values()}
        self.input_edges = {reader: edge for edge in edges for reader in edge.readers}
        self.tensor_edges = {edge.source: edge for edge in edges if edge.kind == "tensor"}
        self.swept = Swept()

    def run(self, on_layer: Callable[[str], None]) -> Swept:
        """Executes every operator on the float and on the quantized values.

        Args:
            on_layer: called with the name of each finished layer.

        Raises:
            CalibrationError: the float network's values are not finite behind some layer.
        """
        for node in self.network.nodes():
            if node.op == "output":
                break
            self.reference.step(node)
            layer = self.by_node.get(node)
            if layer is None:
                self.shadow.step(node)
            else:
                self._layer(layer)
                on_layer(layer.name)
            if node in self.tensor_edges:
                self._tensor(self.tensor_edges[node])
            self.reference.release(node)
            self.shadow.release(node)
        return self.swept

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def _tensor(self, edge: Edge) -> None:
        """Gives a tensor its own grid and puts the quantized values on it."""
        sample = self._sample(edge, edge.source)
        low, high = activation_range(sample, self.recipe.tensor_range, edge.bits)
        if low == high:
            self.swept.notes.append(f"tensor {edge.name} is zero on all calibration inputs; its grid is a guess.")
        quantizer = Quantizer(*affine_grid(low, high, edge.bits), bits=edge.bits)
        self.swept.quantizers[edge.name] = quantizer
        self.shadow.put(edge.source, (quantizer(value) for value in self.shadow.values(edge.source)))

    def _sample(self, edge: Edge, source: fx.Node) -> TensorSample:
        """Values of the quantized prefix with the extremes of the float network.

        Extremes of values on a grid are whole multiples of its scale; a range from them would make the ratio of two scales a
        simple fraction, and then a good part of all values lies exactly between two codes.
        """
        generator = self._generator(edge.name)

        def sample(values: Iterator[Tensor]) -> TensorSample:
            return TensorSample.of(values, count=SAMPLED_VALUES, inputs=self.inputs, generator=generator)

        return replace(sample(self.reference.values(source)), values=sample(self.shadow.values(source)).values)

    def _layer(self, layer: Layer) -> None:
        started = time.perf_counter()
        bits = self.bits[layer.name]
        weighted = self.network.weighted(layer.name)
        shape = self._check_output(layer)
        macs = weighted.geometry.positions(shape) * weighted.weight.numel()
        if bits.weight is None:
            self.shadow.step(layer.node)
            size = 4 * (weighted.weight.numel() + weighted.bias.numel())
            seconds = time.perf_counter() - started
            operations = macs * FLOAT_BITS * FLOAT_BITS
            self.swept.reports.append(
                LayerReport(layer.name, "float", None, None, None, None, seconds, size, macs, operations)
            )
            return
        fit = self._fit(layer, bits)
        quantizer, module = self._modules(layer, fit, bits.weight)
        self.swept.layers[layer.name] = module
        edge = self.input_edges.get(layer.name)
        if edge is not None and edge.kind != "tensor" and quantizer is not None:
            stand_in: nn.Module = nn.Sequential(quantizer, module)
        else:
            stand_in = module
        self.shadow.put(layer.node, self.shadow.compute(layer.node, stand_in))
        if self.recipe.normalize:
            self.swept.statistics[layer.name] = ChannelStatistics.of(
                self.reference.values(layer.node), weighted.geometry
            )
        shared = layer.name in self.network.shared and self._shared_codes(layer.name, bits.weight) is not None
        codes = 0 if shared else module.codes.numel()
        low, high = quantizer.range if quantizer is not None else (None, None)
        operations = macs * bits.weight * (bits.activation or FLOAT_BITS)
        self.swept.reports.append(
            LayerReport(
                layer.name, str(bits), low, high, fit.before, fit.after, time.perf_counter() - started,
                layer_size(codes, module.codes.shape[0], bits.weight), macs, operations,
            )
        )  # fmt: skip
        log.info("%s %s error %.2e -> %.2e", layer.name, bits, fit.before, fit.after)

    def _check_output(self, layer: Layer) -> Tensor:
        """The first output of the float layer; all must be finite."""
        first: Tensor | None = None
        for output in self.reference.values(layer.node):
            if not torch.isfinite(output).all():
                raise CalibrationError(
                    f"layer {layer.name}: the float network's output is NaN or infinite on calibration inputs. Remove the "
                    "inputs that cause it, or repair the weights."
                )
            first = output if first is None else first
        assert first is not None
        return first

    def _problem(self, layer: Layer, targets: Iterator[Tensor] | None) -> LayerProblem:
        """The layer's problem; without targets (a layer further on) its own outputs on the quantized prefix serve."""
        weighted = self.network.weighted(layer.name)
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        values = self.shadow.values(source)
        pairs = ((x, weighted(x)) for x in values) if targets is None else zip(values, targets, strict=True)
        return layer_problem(
            weighted.geometry, weighted.weight, weighted.bias, layer.activate, pairs,
            inputs=self.inputs, generator=self._generator(layer.name),
        )  # fmt: skip

    def _fit(self, layer: Layer, bits: Bits) -> Fit:
        assert bits.weight is not None
        problem = self._problem(layer, self.reference.values(layer.node))
        grid, learn_grid = self._grid(layer, problem)
        codes = self._shared_codes(layer.name, bits.weight)
        if codes is None:
            moments = covariance(problem) if self.recipe.weight_range == "output" else None
            scale = weight_scale(problem.weight, bits.weight, self.recipe.weight_range, moments)
        else:
            scale = self.swept.layers[self.network.shared[layer.name]].scale.reshape(problem.weight.shape[:2])
        start = round_to_nearest(problem, scale, grid, bits.weight, codes)
        if not self.recipe.steps:
            corrected = correct_bias(problem, start)
            return corrected if corrected.after < start.after else start
        equations, unknowns = self._equations(layer), problem.weight.shape[-1]
        if equations < unknowns:
            self.swept.weak[layer.name] = (equations, unknowns)
        return fit_layer(
            problem, start, bits.weight, steps=self.recipe.steps, rates=self.recipe.rates,
            generator=self._generator(layer.name), codes=codes, learn_grid=learn_grid,
        )  # fmt: skip

    def _equations(self, layer: Layer) -> int:
        geometry = self.network.weighted(layer.name).geometry
        return sum(value.shape[0] * geometry.positions(value) for value in self.reference.values(layer.node))

    def _shared_codes(self, name: str, bits: int) -> Tensor | None:
        """Codes (groups, O, K) of an earlier call of the same module at the same bits."""
        earlier = self.swept.layers.get(self.network.shared.get(name, ""))
        return None if earlier is None or earlier.bits != bits else earlier.geometry.grouped(earlier.codes)

    def _grid(self, layer: Layer, problem: LayerProblem) -> tuple[Grid | None, bool]:
        """The grid of the layer's input, and whether the layer may move it."""
        edge = self.input_edges.get(layer.name)
        if edge is None:
            return None, False
        known = self.swept.quantizers.get(edge.name)
        if known is not None:
            return Grid(known.scale, known.zero_point, known.qmax), False
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        sample = self._sample(edge, source)
        if sample.low == sample.high:
            self.swept.notes.append(f"layer {layer.name}: its input is the same value everywhere; its grid is a guess.")
        _, qmax = activation_limits(edge.bits)
        if self.recipe.activation_range == "output":
            others = [self.network.layers[name] for name in edge.readers if name != layer.name]
            problems = [self._problem(other, None) for other in others if other.node.args[0] is source]
            error = output_error([problem, *problems])
            low, high = search_range(sample.low, sample.high, edge.bits, lambda s, z: error(s, z, qmax))
        else:
            low, high = activation_range(sample, self.recipe.activation_range, edge.bits)
        scale, zero_point = affine_grid(low, high, edge.bits)
        return Grid(scale, zero_point, qmax), len(edge.readers) == 1

    def _modules(self, layer: Layer, fit: Fit, bits: int) -> tuple[Quantizer | None, QuantizedLayer]:
        weighted = self.network.weighted(layer.name)
        if fit.grid is None:
            codes = fit.codes.reshape(weighted.weight.shape)
            return None, QuantizedLayer(
                weighted.geometry, codes, fit.scale.reshape(-1), fit.bias.reshape(-1), None, bits=bits
            )
        edge = self.input_edges[layer.name]
        quantizer = self.swept.quantizers.get(edge.name)
        if quantizer is None:
            quantizer = Quantizer(fit.grid.scale, fit.grid.zero_point, bits=edge.bits)
            self.swept.quantizers[edge.name] = quantizer
        module, note = integer_layer(weighted.geometry, weighted.weight, fit, quantizer.scale, bits)
        if note:
            self.swept.notes.append(f"layer {layer.name}: {note}")
        return quantizer, module


def integer_layer(
    geometry: Geometry, weight: Tensor, fit: Fit, input_scale: Tensor, bits: int
) -> tuple[QuantizedLayer, str]:
    """The fitted layer with an int32 bias; a channel whose bias code would leave int32 gets a larger weight scale.

    Returns the layer and a sentence about such channels ("" if there are none).
    """
    codes, scale, bias = fit.codes.reshape(weight.shape), fit.scale.reshape(-1), fit.bias.reshape(-1)
    smallest = (bias.abs() / BIAS_LIMIT / input_scale) * (1 + 1e-6)
    wide = smallest > scale
    note = ""
    if wide.any():
        scale = torch.where(wide, smallest, scale)
        codes = torch.where(wide.reshape(-1, *[1] * (weight.dim() - 1)), weight_codes(weight, scale, bits), codes)
        note = f"{int(wide.sum())} channels got a larger weight scale, because their bias would not fit 32 bits."
    bias_scale = input_scale * scale
    return QuantizedLayer(geometry, codes, scale, bias_codes(bias, bias_scale), bias_scale, bits=bits), note
