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

from calque.calibration.batches import largest_output, real_tokens
from calque.calibration.channel_statistics import ChannelStatistics
from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.fitting.adaquant import Draw, Linear
from calque.fitting.channel_scales.migration import Migration
from calque.fitting.embedding import fit_table
from calque.fitting.fitted import Fitted, FittedLayer
from calque.fitting.grids import Grids
from calque.fitting.layer import fit_from_piece, fit_to_piece, integer_layer, placed, reads_whole_inputs, solve_
from calque.fitting.problem import Fit, LayerProblem, layer_problem
from calque.fitting.whole_inputs import whole_inputs
from calque.grid.bits import Bits
from calque.network import Layer
from calque.quantized.in_pieces import InPieces
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.placement import Edge
from calque.run.checkpoint import Checkpoint, Needs
from calque.run.spill import Store
from calque.settings import Method, Nearest, Ranges

log = logging.getLogger(__name__)


class Sweep:
    """One sweep over a network at given bits and edges: iterate over `layers` once, then read `done`."""

    def __init__(
        self,
        job: Job,
        bits: Mapping[str, Bits],
        edges: list[Edge],
        store: Store,
        *,
        checkpoint: Checkpoint,
        ranges: Ranges,
        method: Method,
        channel_scales: float = 0.0,
        shortcuts: Mapping[str, fx.Node] | None = None,
        statistics: bool = False,
        fits: Mapping[str, Fit] | None = None,
    ):
        """
        Args:
            checkpoint: keeps the fits of this sweep.
            ranges: estimators of the grids.
            method: of the fit of a layer.
            channel_scales: exponent of those that move over a clip at zero; 0 for none.
            shortcuts: by layer in front of a residual add, the other term; the layer makes up for what that has lost.
            statistics: whether those of the float layers' channels are kept, for a later stage to put back.
            fits: by layer, fits on float inputs (the parallel flavour), which are then put on the grids and not solved again.
        """
        self.needs: Needs = {}  # the piece of the layer in front, which depends on all before it
        self.job, self.network, self.ranges, self.method = job, job.network, ranges, method
        self.bits, self.store = bits, store
        self.checkpoint = checkpoint
        self.fits = fits or {}
        self.reference = Execution(self.network.module, job.batches, store)
        self.shadow = Execution(self.network.module, job.batches, store)
        self.by_node = {layer.node: layer for layer in self.network.layers.values()}
        self.migration = Migration.over(self.network, bits, edges, channel_scales)
        self.input_edges = {reader: edge for edge in edges for reader in edge.readers}
        self.tensor_edges = {edge.source: edge for edge in edges if edge.kind == "tensor"}
        self.operands = {
            product.node: [edge for edge in edges if edge.product == name]
            for name, product in self.network.products.items()
        }
        self.shortcuts, self.statistics = shortcuts or {}, statistics
        self.done = Fitted()
        self.grids = Grids(
            job, ranges, self.reference, self.shadow, self.migration,
            chosen=self.done.quantizers, notes=self.done.notes,
        )  # fmt: skip

    def layers(self, on_outputs: Callable[[Iterator[list[Any]]], None] | None = None) -> Iterator[FittedLayer]:
        """Executes every operator on the float and on the quantized values; yields each layer when it is fitted.

        Args:
            on_outputs: called at the end with the quantized network's outputs by batch.

        Raises:
            CalibrationError: the float network's values are not finite behind some layer.
        """
        for node in self.network.nodes():
            if node.op == "output":
                if on_outputs is not None:
                    on_outputs(self.shadow.outputs(node))
                return
            self.reference.step(node)
            layer = self.by_node.get(node)
            if layer is None:
                self._operator(node)
            else:
                yield self._layer(layer)
            if node in self.tensor_edges:
                self._tensor(self.tensor_edges[node])
            self.reference.release(node)
            self.shadow.release(node)

    def _operator(self, node: fx.Node) -> None:
        """Executes an operator without weights on the quantized values; a product's operands get their grids first."""
        edges = self.operands.get(node, [])
        through = {edge.source: self.grids.of_tensor(edge) for edge in edges}
        if node.op != "placeholder":
            self.shadow.put(node, self.shadow.compute(node, through=through))

    def _tensor(self, edge: Edge) -> None:
        """Gives a tensor its own grid and puts the quantized values on it."""
        quantizer = self.grids.of_tensor(edge)
        self.shadow.put(edge.source, map(quantizer, self.shadow.values(edge.source)))

    def _layer(self, layer: Layer) -> FittedLayer:
        started = time.perf_counter()
        bits = self.bits[layer.name]
        values = largest_output(self.reference.values(layer.node), self.job.sizes, layer.name)
        if bits.weight is None:
            self.shadow.step(layer.node)
            tied = self.bits.get(self.network.shared.get(layer.name, "")) == bits
            weighted = self.network.weighted(layer.name)
            return FittedLayer(layer.name, bits, weighted, None, None, values, tied, time.perf_counter() - started)
        fit = self._fit(layer, bits)
        if not isinstance(self.method, Nearest) and not self.network.is_table(layer.name):
            self._note_fit(layer, fit)
        quantizer, module = self._modules(layer, fit, bits.weight)
        self.done.layers[layer.name] = module
        self._execute(layer, module, quantizer)
        self._measure(layer)
        log.info("%s %s error %.2e -> %.2e", layer.name, bits, fit.before, fit.after)
        tied = self._tied(layer.name, bits) is not None
        return FittedLayer(layer.name, bits, module, fit, quantizer, values, tied, time.perf_counter() - started)

    def _execute(self, layer: Layer, module: QuantizedLayer, quantizer: Quantizer | None) -> None:
        """The quantized layer on the quantized values, behind its input's grid where that is the layer's own."""
        edge = self.input_edges.get(layer.name)
        own = [] if edge is None or edge.kind == "tensor" or quantizer is None else [quantizer]
        self.shadow.put(layer.node, self.shadow.compute(layer.node, InPieces(module, *own)))

    def _measure(self, layer: Layer) -> None:
        """Keeps the statistics of the float layer's channels, where a later stage puts them back."""
        if self.statistics and not self.network.is_table(layer.name):
            outputs = self.migration.outputs(layer.name, real_tokens(self._targets(layer), self.job.masks))
            geometry = self.network.weighted(layer.name).geometry
            self.done.statistics[layer.name] = ChannelStatistics.of(outputs, geometry)

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
            return fit_table(weight, bits.weight, self.ranges.weight, tied)
        problem = self.migration.chosen(layer, self._problem(layer, self._targets(layer)))
        problem = replace(problem, group=bits.group)
        edge = self.input_edges.get(layer.name)
        grid, learn_grid = self.grids.of_input(
            layer, edge, problem, lambda other: self._problem(other, None), self.fits
        )
        tied = self._tied(layer.name, bits)
        if ready is not None:
            return placed(problem, ready, grid, bits.weight, tied or (ready.codes, ready.scale))
        self.store.give_back()  # what the sampling left free, before the fit takes its own
        return solve_(
            problem, grid, bits.weight, self.method, self.job.generator(layer.name), weight_range=self.ranges.weight,
            learn_grid=learn_grid, tied=tied, rows=self._rows(layer) if reads_whole_inputs(self.method) else None,
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
            self.done.weak[layer.name] = (equations, unknowns)
        if layer.name not in self.fits and fit.after >= fit.before:
            self.done.unmoved.append(layer.name)

    def _tied(self, name: str, bits: Bits) -> tuple[Tensor, Tensor] | None:
        """Codes (groups, O, K) and scales of an earlier call of the same module at the same bits, as a fit has them."""
        earlier = self.done.layers.get(self.network.shared.get(name, ""))
        if earlier is None or (earlier.bits, earlier.group) != (bits.weight, bits.group):
            return None
        codes = earlier.geometry.grouped(earlier.codes)
        return codes, earlier.scale.reshape(*codes.shape[:2], *earlier.scale.shape[1:])

    def _modules(self, layer: Layer, fit: Fit, bits: int) -> tuple[Quantizer | None, QuantizedLayer]:
        weighted = self.migration.weighted(layer.name)
        if fit.grid is None:
            return None, integer_layer(weighted.geometry, weighted.weight, fit, None, bits)[0]
        edge = self.input_edges[layer.name]
        quantizer = self.done.quantizers.get(edge.name)
        if quantizer is None:
            quantizer = Quantizer(fit.grid.scale, fit.grid.zero_point, bits=edge.bits)
            self.done.quantizers[edge.name] = quantizer
        module, note = integer_layer(weighted.geometry, weighted.weight, fit, quantizer.scale, bits)
        if note:
            self.done.notes.append(f"layer {layer.name}: {note}")
        return quantizer, module
