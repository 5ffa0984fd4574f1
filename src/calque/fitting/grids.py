"""The one choice of grids: of tensors that no layer owns, and of the inputs of layers.

Extremes are the float network's, errors are judged on the values of the quantized prefix. Extremes of values on a grid are
whole multiples of its scale; a range from them would make the ratio of two scales a simple fraction, and then a good part of
all values lies exactly between two codes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, fx

from calque.calibration.batches import real_tokens
from calque.calibration.execution import Execution
from calque.calibration.job import Job
from calque.fitting.channel_scales.migration import Migration
from calque.fitting.problem import Fit, Grid, LayerProblem, output_error
from calque.grid.arithmetic import SMALLEST_SCALE, activation_limits, affine_grid
from calque.grid.ranges import TensorSample, activation_range, extremes, off_ties, search_range
from calque.network import Layer
from calque.network.tensors import root
from calque.quantized.modules import Quantizer
from calque.quantized.placement import Edge
from calque.settings import Ranges

SAMPLED_VALUES = 2**18  # of a tensor, for its range

ProblemOf = Callable[[Layer], LayerProblem]
"""A layer further on, fitted to its own outputs on the quantized prefix: what another reader of a grid asks of it."""


class Grids:
    """The grids of one network, each chosen when it is first needed.

    Attributes:
        chosen: by the name of their edge.
        notes: where the calibration inputs say little of a range.
    """

    def __init__(
        self,
        job: Job,
        ranges: Ranges,
        reference: Execution,
        shadow: Execution,
        migration: Migration,
        *,
        chosen: dict[str, Quantizer],
        notes: list[str],
    ):
        """
        Args:
            ranges: how they are estimated.
            reference, shadow: the float network and the quantized prefix, executed up to where a grid is asked for.
            chosen, notes: filled as grids are chosen.
        """
        self.job, self.ranges = job, ranges
        self.reference, self.shadow, self.migration = reference, shadow, migration
        self.chosen, self.notes = chosen, notes

    def of_tensor(self, edge: Edge) -> Quantizer:
        """The grid of a tensor that no layer owns."""
        sample = self._sample(edge, edge.source)
        low, high = activation_range(sample, self.ranges.tensor, edge.bits, self.ranges.tolerance)
        self._note(f"tensor {edge.name}", low, high, edge.bits)
        scale, zero_point = affine_grid(low, high, edge.bits)
        if root(edge.source).op == "placeholder":
            scale = off_ties(sample.values, scale)
        self.chosen[edge.name] = quantizer = Quantizer(scale, zero_point, bits=edge.bits)
        return quantizer

    def of_input(
        self,
        layer: Layer,
        edge: Edge | None,
        problem: LayerProblem,
        problem_of: ProblemOf,
        fits: Mapping[str, Fit],
    ) -> tuple[Grid | None, bool]:
        """The grid of a layer's input, None where that is float, and whether the layer may move it.

        Args:
            edge: of the input.
            problem: the layer's own.
            problem_of: makes those of other layers that read the same grid.
            fits: of layers that were fitted on float inputs; their grids are taken.
        """
        if edge is None:
            return None, False
        known = self.chosen.get(edge.name)
        if known is not None:
            return Grid(known.scale, known.zero_point, known.qmax), False
        ready = fits.get(edge.readers[0])
        if ready is not None and ready.grid is not None:
            return ready.grid, False
        source = layer.node.args[0]
        assert isinstance(source, fx.Node)
        _, qmax = activation_limits(edge.bits)
        if self.ranges.activation == "output":
            low, high = self._by_outputs(layer, edge, source, problem, problem_of)
        else:
            sample = self._sample(edge, source)
            low, high = activation_range(sample, self.ranges.activation, edge.bits, self.ranges.tolerance)
            self._note(f"layer {layer.name}: its input", sample.low, sample.high, edge.bits)
        scale, zero_point = affine_grid(low, high, edge.bits)
        if root(source).op == "placeholder":
            scale = off_ties(self._sample(edge, source).values, scale)
        return Grid(scale, zero_point, qmax), len(edge.readers) == 1

    def _by_outputs(
        self, layer: Layer, edge: Edge, source: fx.Node, problem: LayerProblem, problem_of: ProblemOf
    ) -> tuple[Tensor, Tensor]:
        """The range with the least error of the outputs of all layers that read the grid."""
        _, qmax = activation_limits(edge.bits)
        exact = real_tokens(self.reference.values(source), self.job.masks)
        least, largest = extremes(self.migration.inputs(layer.name, exact))
        others = [self.job.network.layers[name] for name in edge.readers if name != layer.name]
        alike = [layer, *(other for other in others if other.node.args[0] is source)]
        error = output_error(problem if each is layer else problem_of(each) for each in alike)
        found = search_range(least, largest, edge.bits, lambda s, z: error(s, z, qmax), self.ranges.tolerance)
        self._note(f"layer {layer.name}: its input", least, largest, edge.bits)
        return found

    def _sample(self, edge: Edge, source: fx.Node) -> TensorSample:
        """Values of the quantized prefix with the extremes of the float network."""
        generator = self.job.generator(edge.name)

        def sample(values: Iterator[Tensor]) -> TensorSample:
            values = real_tokens(values, self.job.masks)
            return TensorSample.of(values, count=SAMPLED_VALUES, inputs=self.job.inputs, generator=generator)

        exact = self.migration.inputs(next(iter(edge.readers), ""), self.reference.values(source))
        return replace(sample(exact), values=sample(self.shadow.values(source)).values)

    def _note(self, what: str, low: Tensor, high: Tensor, bits: int) -> None:
        """Adds a note where the calibration inputs tell nothing of a tensor's range, or where it is too small for `bits`."""
        width = (high.clamp(min=0.0) - low.clamp(max=0.0)).item()
        if low == high:
            self.notes.append(f"{what} is the same value on all calibration inputs; its grid is a guess.")
        elif width < SMALLEST_SCALE * (2**bits - 1):
            self.notes.append(f"{what} spans {width:.1e} only: a finer scale would be no normal float32 number.")
