"""How long a run will take and how much disk it will use, before the long work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calque.allocation.costs import activation_steps
from calque.calibration.execution import execute_whole
from calque.calibration.job import Job
from calque.fitting.blocks import ROWS
from calque.fitting.parallel import Choices
from calque.fitting.problem import POSITIONS, per_input
from calque.grid.bits import FLOAT, Bits
from calque.network import Network
from calque.network.signature import flatten, select
from calque.pipeline.effort import (
    Effort,
    Shape,
    Speed,
    closed_form,
    descent,
    range_search,
    rounding,
    sampling,
    table,
    tensor_range,
)
from calque.pipeline.stages import Stages
from calque.quantized.placement import Edge, place
from calque.recipe import Recipe
from calque.run.progress import Phase
from calque.settings import ClosedForm, Method, Nearest, Parallel, Ranges

# In passes of the float network over the calibration set, as they were timed; on resnet20, MobileNet and small networks.
SWEEP = 3.0  # a sweep besides its fits: the float network, the quantized one, grids
MOMENTS = 0.8  # the channel statistics of the float outputs
STATISTICS = 1.4  # re-estimating them
MEASURED = 1.3  # the loss of a quantized network
BACKWARD = 8  # one step that goes through the quantized network and back, by input
SUFFIX = 1.2  # pricing one choice: half of a network, quantized
WARMTH = 3.0  # a step of a fit by whole inputs, forward and backward, in float passes of the layer
STEP_INPUTS = 50  # of such a step
NOTABLE = 120  # seconds that are told in minutes


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        spent: seconds until now, the capture's among them.  phases: what is to come.
        inputs: calibration inputs.  memory, disk: bytes.  resumed: whether pieces of it are finished.
    """

    spent: float
    phases: tuple[Phase, ...]
    inputs: int
    memory: int
    disk: int
    resumed: bool

    @property
    def seconds(self) -> float:
        """In all, without what finished pieces save."""
        return self.spent + sum(phase.seconds for phase in self.phases)

    def __str__(self) -> str:
        seconds = self.seconds
        time = f"{seconds / 60:.0f} minutes" if seconds >= NOTABLE else f"{max(1.0, seconds):.0f} seconds"
        known = ", less what is finished" if self.resumed else ""
        gigabytes = f"{self.disk / 1e9:.1f} GB of disk beside {self.memory / 1e9:.1f} GB of memory"
        return f"about {time} for {self.inputs} inputs{known}{f', up to {gigabytes}' if self.disk >= 5e7 else ''}"


def forecast(
    job: Job,
    choices: Choices,
    recipe: Recipe,
    float_pass: float,
    *,
    search: bool,
    spent: float = 0.0,
    speed: Speed | None = None,
) -> Forecast:
    """The time and disk that the run will need; the time within a factor of one and a half on an evenly loaded machine.

    Args:
        float_pass: seconds that the float network took on the calibration set.
        spent: seconds since the call began.
        speed: of this machine; measured where it is None.
    """
    device = job.network.weighted(next(iter(job.network.layers))).weight.device
    plan = _Plan(job, choices, recipe.ranges, float_pass, Speed.measured(device) if speed is None else speed)
    phases = plan.search(recipe) if search else plan.build(Stages.of(recipe))
    phases = [phase for phase in (*phases, *plan.end_to_end(recipe)) if phase.steps]
    shapes = {node: torch.Size(shape) for node, (shape, _) in plan.values.items()}
    alive = max(fixed for fixed, _ in activation_steps(job.network, {}, job.placement, shapes))
    disk = max(0, 2 * alive * job.inputs - job.memory)
    if search:
        problems = [plan.problem_bytes(name) for name in choices]
        disk += max(problems) if job.workers is None else min(sum(problems), job.memory // 2 + max(problems))
    return Forecast(spent, tuple(phases), job.inputs, job.memory, disk, job.checkpoint.has_pieces())


class _Plan:
    """The phases of a run, with their seconds."""

    def __init__(self, job: Job, choices: Choices, ranges: Ranges, float_pass: float, speed: Speed):
        self.job, self.choices, self.ranges, self.speed = job, choices, ranges, speed
        self.float_pass = float_pass
        self.values = _values(job.network, job)
        self.layers = [name for name in job.network.layers if name in choices]
        self.shapes = {name: self._shape(name) for name in self.layers if not job.network.is_table(name)}
        bits = {name: choices[name][-1] for name in self.layers}
        self.edges = place(job.network, bits, job.placement)

    def build(self, stages: Stages) -> list[Phase]:
        """One network: a sweep over its layers, blocks, channel statistics."""
        phases, method = [], stages.fit
        if isinstance(stages.flavour, Parallel) and not isinstance(method, Nearest):
            one = {name: self.choices[name][-1:] for name in self.layers}
            phases.append(self._candidates(one, method))
            method = Nearest()  # what is left for the sweep
        normalization = stages.normalization
        measured = normalization is not None and normalization.target != "trained"
        shared = ((SWEEP + MOMENTS * measured) * self.float_pass + self._tensors()) / len(self.layers)
        phases.append(Phase("fit", tuple(shared + self._layer(name, method) for name in self.layers)))
        if stages.blocks is not None:
            phases.append(Phase("blocks", (self._stepped(stages.blocks.steps * ROWS),)))
        if normalization is not None:
            phases.append(Phase("statistics", (STATISTICS * self.float_pass,)))
        return phases

    def search(self, recipe: Recipe) -> list[Phase]:
        """Candidates fitted and priced, finalists built and measured."""
        search, stages = recipe.search, Stages.of(recipe)
        activations = any(bits.activation is not None for options in self.choices.values() for bits in options)
        base = Bits(8, 8 if activations else None)
        priced = {name: [bits for bits in self.choices[name] if bits not in (base, FLOAT)] for name in self.layers}
        phases = [
            *self.build(stages.base()),
            self._candidates({name: options for name, options in priced.items() if options}, search.fit),
        ]
        share = SUFFIX * self.float_pass * min(1.0, search.priced_inputs / self.job.inputs)
        phases.append(Phase("prices", tuple(share * len(options) for options in priced.values() if options)))
        for _ in range(search.finalists + 1):  # and the best one with the same bits everywhere
            *parts, last = self.build(stages)
            measured = *last.steps[:-1], last.steps[-1] + MEASURED * self.float_pass
            phases += [*parts, Phase(last.name, measured)]
        return phases

    def end_to_end(self, recipe: Recipe) -> list[Phase]:
        """Distillation and the tuning of biases."""
        phases = []
        if recipe.distillation is not None:
            how = recipe.distillation
            phases.append(Phase("distillation", (60.0 * how.minutes + self._stepped(how.steps * how.rows),)))
        if recipe.tuning is not None:
            phases.append(Phase("biases", (self._stepped(recipe.tuning.steps * recipe.tuning.rows),)))
        return phases

    def problem_bytes(self, name: str) -> int:
        """Bytes of a layer's sampled problem at most."""
        shape = self.shapes.get(name)
        return 0 if shape is None else 4 * shape.rows * shape.groups * (shape.inputs + shape.outputs)

    def _candidates(self, priced: Mapping[str, Sequence[Bits]], method: Method) -> Phase:
        """Each layer fitted at each of its choices, on float inputs."""
        passes = self.float_pass / max(1, len(priced))
        seconds = []
        for name, options in priced.items():
            shape = self.shapes.get(name)
            widths = {bits.activation for bits in options}
            found = Effort() if shape is None else sampling(shape) * 3 + range_search(shape) * len(widths - {None})
            fits = self._fits(name, method, len(options), shared=len(widths)) / (self.job.workers or 1)
            seconds.append(passes + self.speed.seconds(found) + fits)
        return Phase("candidates", tuple(seconds))

    def _layer(self, name: str, method: Method) -> float:
        """Seconds that a sweep is at a layer besides executing it."""
        if all(bits.weight is None for bits in self.choices[name]):
            return 0.0
        shape = self.shapes.get(name)
        found = Effort() if shape is None else sampling(shape)
        for edge in self.edges:
            if edge.readers[:1] == (name,) and edge.kind not in ("tensor", "operand"):
                found += self._edge(edge)
        return self.speed.seconds(found) + self._fits(name, method, 1)

    def _edge(self, edge: Edge) -> Effort:
        """The search for the range of an edge that layers read."""
        if self.ranges.activation != "output":
            return self._sampled(edge)
        known = [self.shapes[name] for name in edge.readers if name in self.shapes]
        return sum((range_search(shape) + sampling(shape) for shape in known), Effort())

    def _tensors(self) -> float:
        """Seconds of all grids that no layer owns."""
        found = (self._sampled(edge) for edge in self.edges if edge.kind in ("tensor", "operand"))
        return self.speed.seconds(sum(found, Effort()))

    def _sampled(self, edge: Edge) -> Effort:
        shape, signed = self.values.get(edge.source, ((), True))
        return tensor_range(self.job.inputs * torch.Size(shape).numel(), signed=signed)

    def _fits(self, name: str, method: Method, count: int, shared: int = 1) -> float:
        """Seconds of so many fits of a layer, by as many sets of moments where the method has such."""
        shape = self.shapes.get(name)
        if shape is None:
            return self.speed.seconds(table(self.job.network.weighted(name).weight.numel()) * count)
        if isinstance(method, ClosedForm):
            return self.speed.seconds(closed_form(shape, method.rounds, count, shared))
        found = rounding(shape, by_output=self.ranges.weight == "output") * count
        if isinstance(method, Nearest):
            return self.speed.seconds(found)
        if method.patches == "all":
            share = min(STEP_INPUTS, self.job.inputs) / self.job.inputs / len(self.layers)
            return self.speed.seconds(found) + count * method.steps * share * WARMTH * self.float_pass
        return self.speed.seconds(found + descent(shape, method.steps) * count)

    def _stepped(self, rows: int) -> float:
        """Seconds of steps through the whole network and back, of so many rows in all."""
        return rows / self.job.inputs * BACKWARD * self.float_pass

    def _shape(self, name: str) -> Shape:
        network = self.job.network
        layer, weighted = network.layers[name], network.weighted(name)
        groups, outputs, inputs = weighted.geometry.grouped(weighted.weight).shape
        shape, _ = self.values[layer.node]
        available = weighted.geometry.positions(torch.empty(shape, device="meta"))
        rows = self.job.inputs * per_input(min(POSITIONS, available), groups * (inputs + outputs), self.job.inputs)
        _, signed = self.values.get(layer.node.all_input_nodes[0], ((), True))
        return Shape(groups, outputs, inputs, rows, signed, clipped=layer.result is not layer.node)


@torch.no_grad()
def _values(network: Network, job: Job) -> dict[fx.Node, tuple[tuple[int, ...], bool]]:
    """The shape of every tensor in the network for one input, and whether some value is below 0."""
    found: dict[fx.Node, tuple[tuple[int, ...], bool]] = {}

    def record(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            found[node] = tuple(value.shape), value.is_floating_point() and bool((value < 0).any())

    execute_whole(network.module, flatten(select(job.batches[0], torch.arange(1)))[0], record)
    return found
