"""The float network and its quantized twin executed side by side; each layer is quantized when it is reached.

The sequential flavour of METHOD section 2: the target is the float layer's output on the float input, the quantized layer
sees the output of the already quantized prefix. One pass over the operators serves all layers.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from calque.arithmetic import activation_limits, affine_grid
from calque.calibration import largest_output, real_tokens
from calque.channel_statistics import ChannelStatistics
from calque.checkpoint import Checkpoint, Needs
from calque.execution import Execution
from calque.graph import Layer
from calque.graph.network import find_shortcuts
from calque.job import Job
from calque.migration import Migration
from calque.placement import Edge
from calque.quantizers import InPieces, QuantizedLayer, Quantizer
from calque.ranges import TensorSample, activation_range, extremes, off_ties, search_range
from calque.solvers.adaquant import Draw, Linear
from calque.solvers.layer import Settings, fit_from_piece, fit_to_piece, integer_layer, placed, solve_
from calque.solvers.problem import Fit, Grid, LayerProblem, layer_problem, output_error
from calque.solvers.table import fit_table
from calque.solvers.whole import whole_inputs
from calque.spec import Bits
from calque.store import Store
from calque.swept import Swept
from calque.tensors import root

log = logging.getLogger(__name__)

SAMPLED_VALUES = 2**18  # of a tensor, for its range


class Sweep:
    """One sweep over a network at given bits and edges; call `run` once."""

    def __init__(
        self,
        job: Job,
        bits: Mapping[str, Bits],
        edges: list[Edge],
        store: Store,
        *,
        checkpoint: Checkpoint,
        fits: Mapping[str, Fit] | None = None,
    ):
        """
        Args:
            checkpoint: keeps the fits of this sweep.
            fits: by layer, fits on float inputs (the parallel flavour), which are then put on the grids and not solved again.
        """
        self.needs: Needs = {}  # the piece of the layer in front, which depends on all before it
        self.job, self.network, self.recipe = job, job.network, job.recipe
        self.bits, self.store = bits, store
        self.checkpoint = checkpoint
        self.fits = fits or {}
        self.reference = Execution(self.network.module, job.batches, store)
        self.shadow = Execution(self.network.module, job.batches, store)
        self.by_node = {layer.node: layer for layer in self.network.layers.values()}
        self.migration = Migration.over(self.network, bits, edges, self.recipe.migration)
        self.input_edges = {reader: edge for edge in edges for reader in edge.readers}
        self.tensor_edges = {edge.source: edge for edge in edges if edge.kind == "tensor"}
        self.operands = {
            product.node: [edge for edge in edges if edge.product == name]
            for name, product in self.network.products.items()
        }
        self.shortcuts = find_shortcuts(self.network) if self.recipe.solver == "closed_form" else {}
        self.swept = Swept()

    def run(
        self, on_layer: Callable[[str], None], on_outputs: Callable[[Iterator[list[Any]]], None] | None = None
    ) -> Swept:
        """Executes every operator on the float and on the quantized values.

        Args:
            on_layer: called with each finished layer's name.  on_outputs: with the quantized network's outputs by batch.

        Raises:
            CalibrationError: the float network's values are not finite behind some layer.
        """
        for node in self.network.nodes():
            if node.op == "output":
                if on_outputs is not None:
                    on_outputs(self.shadow.outputs(node))
                break
            self.reference.step(node)
            layer = self.by_node.get(node)
            if layer is None:
                self._operator(node)
            else:
                self._layer(layer)
                on_layer(layer.name)
            if node in self.tensor_edges:
                self._tensor(self.tensor_edges[node])
            self.reference.release(node)
            self.shadow.release(node)
        return self.swept

    def _operator(self, node: fx.Node) -> None:
        """Executes an operator without weights on the quantized values; a product's operands get their grids first."""
        edges = self.operands.get(node, [])
        through = {edge.source: self._tensor_grid(edge) for edge in edges}
        if node.op != "placeholder":
            self.shadow.put(node, self.shadow.compute(node, through=through))

    def _tensor(self, edge: Edge) -> None:
        """Gives a tensor its own grid and puts the quantized values on it."""
        quantizer = self._tensor_grid(edge)
        self.shadow.put(edge.source, map(quantizer, self.shadow.values(edge.source)))

    def _tensor_grid(self, edge: Edge) -> Quantizer:
        """The grid of a tensor that no layer owns."""
        recipe, sample = self.recipe, self._sample(edge, edge.source)
        low, high = activation_range(sample, recipe.tensor_range, edge.bits, recipe.tolerance)
        self.swept.note_range(f"tensor {edge.name}", low, high, edge.bits)
        scale, zero_point = affine_grid(low, high, edge.bits)
        if root(edge.source).op == "placeholder":
            scale = off_ties(sample.values, scale)
        self.swept.quantizers[edge.name] = quantizer = Quantizer(scale, zero_point, bits=edge.bits)
        return quantizer

    def _sample(self, edge: Edge, source: fx.Node) -> TensorSample:
        """Values of the quantized prefix with the extremes of the float network.

        Extremes of values on a grid are whole multiples of its scale; a range from them would make the ratio of two scales a
        simple fraction, and then a good part of all values lies exactly between two codes.
        """
        generator = self.job.generator(edge.name)

        def sample(values: Iterator[Tensor]) -> TensorSample:
            values = real_tokens(values, self.job.masks)
            return TensorSample.of(values, count=SAMPLED_VALUES, inputs=self.job.inputs, generator=generator)

        exact = self.migration.inputs(next(iter(edge.readers), ""), self.reference.values(source))
        return replace(sample(exact), values=sample(self.shadow.values(source)).values)

    def _layer(self, layer: Layer) -> None:
        started = time.perf_counter()
        bits = self.bits[layer.name]
        weighted = self.network.weighted(layer.name)
        values = largest_output(self.reference.values(layer.node), self.job.sizes, layer.name)
        if bits.weight is None:
            self.shadow.step(layer.node)
            tied = self.bits.get(self.network.shared.get(layer.name, "")) == bits
            self.swept.report_float(layer.name, weighted, values, tied=tied, seconds=time.perf_counter() - started)
            return
        fit = self._fit(layer, bits)
        if self.recipe.steps and not self.network.is_table(layer.name):
            self._note_fit(layer, fit)
        quantizer, module = self._modules(layer, fit, bits.weight)
        self.swept.layers[layer.name] = module
        edge = self.input_edges.get(layer.name)
        own = [] if edge is None or edge.kind == "tensor" or quantizer is None else [quantizer]
        stand_in = InPieces(module, *own)
        self.shadow.put(layer.node, self.shadow.compute(layer.node, stand_in))
        if self.recipe.statistics in ("float", "guarded") and not self.network.is_table(layer.name):
            outputs = self.migration.outputs(layer.name, real_tokens(self._targets(layer), self.job.masks))
            self.swept.statistics[layer.name] = ChannelStatistics.of(outputs, weighted.geometry)
        tied = self._tied(layer.name, bits) is not None
        seconds = time.perf_counter() - started
        self.swept.report(layer.name, bits, fit, values, tied=tied, grid=quantizer, seconds=seconds)
        log.info("%s %s error %.2e -> %.2e", layer.name, bits, fit.before, fit.after)

    def _targets(self, layer: Layer) -> Iterator[Tensor]:
        """The float layer's outputs; in front of a residual add with what the shortcut has lost: their sum is fitted."""
        outputs = self.reference.values(layer.node)
        shortcut = self.shortcuts.get(layer.name)
        if shortcut is None:
            return outputs
        lost = map(Tensor.sub, self.reference.values(shortcut), self.shadow.values(shortcut))
        return map(lambda difference, output: difference.add_(output), lost, outputs)

    def _problem(self, layer: Layer, targets: Iterator[Tensor] | None) -> LayerProblem:
        """The layer's problem; without targets (a layer further on) its own outputs on the quantized prefix serve."""
        weighted = self.migration.weighted(layer.name)
        values = self.shadow.values(layer.node.all_input_nodes[0])
        alone = map(lambda x: (x, weighted(x)), values)
        pairs = alone if targets is None else map(lambda y, x: (x, y), targets, values)
        return layer_problem(
            weighted.geometry, weighted.weight, weighted.bias, layer.activate, pairs,
            inputs=self.job.inputs, generator=self.job.generator(layer.name), masks=self.job.masks,
            sizes=self.job.sizes,
        )  # fmt: skip

    def _fit(self, layer: Layer, bits: Bits) -> Fit:
        key, ready = f"layer {layer.name}", self.fits.get(layer.name)
        needs = self.needs if ready is None else {**self.needs, **self.checkpoint.needs(fit=fit_to_piece(ready))}
        piece = self.checkpoint.get(key, needs)
        if piece is not None:
            self.migration.restore(layer.name, piece)
            fit = fit_from_piece(piece, self.network.weighted(layer.name).weight.device)
        else:
            fit = self._solved(layer, bits, ready)
            self.store.give_back()
            piece = replace(self.migration.kept(layer.name, fit_to_piece(fit)), needs=needs)
            self.checkpoint.put(key, piece)
        self.needs = self.checkpoint.needs(before=piece)
        return fit

    def _solved(self, layer: Layer, bits: Bits, ready: Fit | None) -> Fit:
        """The layer's fit. Args: ready: that on float inputs, if there is one."""
        assert bits.weight is not None
        if self.network.is_table(layer.name):
            weight, tied = self.network.weighted(layer.name).weight, self._tied(layer.name, bits)
            return fit_table(weight, bits.weight, self.recipe.weight_range, tied)
        problem = self.migration.chosen(layer, self._problem(layer, self._targets(layer)))
        problem = replace(problem, group=bits.group)
        grid, learn_grid = self._grid(layer, problem)
        tied = self._tied(layer.name, bits)
        if ready is not None:
            return placed(problem, ready, grid, bits.weight, tied or (ready.codes, ready.scale))
        settings = Settings.of(self.recipe, self.recipe.steps)
        self.store.give_back()  # what the sampling left free, before the fit takes its own
        return solve_(
            problem, grid, bits.weight, settings, self.job.generator(layer.name), learn_grid=learn_grid, tied=tied,
            rows=self._rows(layer) if self.recipe.patches == "all" else None,
        )  # fmt: skip

    def _rows(self, layer: Layer) -> tuple[Draw, Linear]:
        weighted = self.network.weighted(layer.name)
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)

        def at(index: int) -> tuple[Tensor, Tensor]:
            return self.shadow.at(source, index), self.reference.at(layer.node, index)

        return whole_inputs(weighted.geometry, weighted.weight.shape, self.job.sizes, at)

    def _note_fit(self, layer: Layer, fit: Fit) -> None:
        """Remembers a layer with fewer equations than unknowns, and one whose fit gained nothing."""
        weighted = self.network.weighted(layer.name)
        count = weighted.geometry.positions
        equations = sum(map(lambda value: value.shape[0] * count(value), self.reference.values(layer.node)))
        unknowns = weighted.geometry.grouped(weighted.weight).shape[-1]
        if equations < unknowns:
            self.swept.weak[layer.name] = (equations, unknowns)
        if layer.name not in self.fits and fit.after >= fit.before:
            self.swept.unmoved.append(layer.name)

    def _tied(self, name: str, bits: Bits) -> tuple[Tensor, Tensor] | None:
        """Codes (groups, O, K) and scales of an earlier call of the same module at the same bits, as a fit has them."""
        earlier = self.swept.layers.get(self.network.shared.get(name, ""))
        if earlier is None or (earlier.bits, earlier.group) != (bits.weight, bits.group):
            return None
        codes = earlier.geometry.grouped(earlier.codes)
        return codes, earlier.scale.reshape(*codes.shape[:2], *earlier.scale.shape[1:])

    def _grid(self, layer: Layer, problem: LayerProblem) -> tuple[Grid | None, bool]:
        """The grid of the layer's input, and whether the layer may move it."""
        edge = self.input_edges.get(layer.name)
        if edge is None:
            return None, False
        known = self.swept.quantizers.get(edge.name)
        if known is not None:
            return Grid(known.scale, known.zero_point, known.qmax), False
        ready = self.fits.get(edge.readers[0])
        if ready is not None and ready.grid is not None:
            return ready.grid, False
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        _, qmax = activation_limits(edge.bits)
        kind, tolerance = self.recipe.activation_range, self.recipe.tolerance
        if kind == "output":
            exact = real_tokens(self.reference.values(source), self.job.masks)
            least, largest = extremes(self.migration.inputs(layer.name, exact))
            others = [self.network.layers[name] for name in edge.readers if name != layer.name]
            alike = [layer, *(other for other in others if other.node.args[0] is source)]
            error = output_error(problem if each is layer else self._problem(each, None) for each in alike)
            low, high = search_range(least, largest, edge.bits, lambda s, z: error(s, z, qmax), tolerance)
        else:
            sample = self._sample(edge, source)
            least, largest = sample.low, sample.high
            low, high = activation_range(sample, kind, edge.bits, tolerance)
        self.swept.note_range(f"layer {layer.name}: its input", least, largest, edge.bits)
        scale, zero_point = affine_grid(low, high, edge.bits)
        if root(source).op == "placeholder":
            scale = off_ties(self._sample(edge, source).values, scale)
        return Grid(scale, zero_point, qmax), len(edge.readers) == 1

    def _modules(self, layer: Layer, fit: Fit, bits: int) -> tuple[Quantizer | None, QuantizedLayer]:
        weighted = self.migration.weighted(layer.name)
        if fit.grid is None:
            return None, integer_layer(weighted.geometry, weighted.weight, fit, None, bits)[0]
        edge = self.input_edges[layer.name]
        quantizer = self.swept.quantizers.get(edge.name)
        if quantizer is None:
            quantizer = Quantizer(fit.grid.scale, fit.grid.zero_point, bits=edge.bits)
            self.swept.quantizers[edge.name] = quantizer
        module, note = integer_layer(weighted.geometry, weighted.weight, fit, quantizer.scale, bits)
        if note:
            self.swept.notes.append(f"layer {layer.name}: {note}")
        return quantizer, module
