"""A network at given bits, stage by stage: layers fitted in one sweep, blocks, channel statistics, biases."""

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calque.allocation.costs import FLOAT_BITS, layer_size
from calque.calibration.channel_statistics import ChannelStatistics, trained_statistics
from calque.calibration.job import Job
from calque.calibration.losses import Loss, closeness
from calque.correction.normalization import para_normalize
from calque.errors import CalibrationError
from calque.fitting.blocks import fit_blocks
from calque.fitting.fitted import Fitted, FittedLayer
from calque.fitting.parallel import fit_choices
from calque.fitting.problem import Fit
from calque.fitting.sequential import Sweep
from calque.gains import Distilled, Tuned
from calque.grid.bits import FLOAT, Bits, Plan
from calque.network import Batch, WeightedLayer
from calque.network.network import find_shortcuts
from calque.network.signature import flatten, rows
from calque.pipeline.stages import Stages
from calque.quantized.assembled import Assembled, assemble, link_requantization
from calque.quantized.placement import Edge, place
from calque.report import LayerReport
from calque.run.checkpoint import Checkpoint
from calque.settings import Parallel

log = logging.getLogger(__name__)

GUARDED_STRENGTH = 0.5  # power of the gains: docs/experiments.md


@dataclass(frozen=True)
class Built:
    """A quantized network and what became of it.

    Attributes:
        fitted: what the fits left.
        layers: a row of the report for each layer.
        pieces: where those of this network are kept.
        distilled, tuned: what distillation and the tuning of biases gained.
        phases: seconds of each stage.
    """

    model: Assembled
    fitted: Fitted
    layers: tuple[LayerReport, ...]
    pieces: Checkpoint
    distilled: Distilled | None = None
    tuned: Tuned | None = None
    phases: Mapping[str, float] = field(default_factory=dict)


def build(job: Job, entries: Mapping[str, Bits], stages: Stages, references: Sequence[Sequence[Tensor]] = ()) -> Built:
    """The network at these bits, before anything is trained end to end.

    Args:
        entries: bits of every layer, and of tensors where they are not the default.
        references: the float network's output leaves on each batch, by which the guarded normalization is judged.
    """
    network, clock = job.network, Clock()
    edges = place(network, entries, job.placement)
    plan = Plan(final_entries(job, entries, edges))
    pieces, judge = _pieces(job, plan, stages), _Judge(job, references)
    fitted, layers = _fitted(job, entries, edges, stages, pieces, judge)
    model = assemble(network, edges, fitted.layers, fitted.quantizers, plan)
    if stages.blocks is not None and not fit_blocks(job, model, stages.blocks):
        fitted.notes.append("blocks: no block of quantized layers was found; none was fitted.")
    codes = {name: layer.codes.clone() for name, layer in model.layers.items()}
    clock.lap("fit")
    if stages.normalization is not None:
        target = stages.normalization.target
        if stages.blocks is not None and target == "guarded":  # the blocks have moved the outputs
            judge(list(model.graph_module(*flatten(batch)[0])) for batch in job.batches)
        targets = trained_statistics(network) if target == "trained" else fitted.statistics
        targets = {name: each for name, each in targets.items() if name in model.layers}
        _normalize(job, model, targets, judge, guarded=target == "guarded")
        clock.lap("statistics")
    assert all(torch.equal(layer.codes, codes[name]) for name, layer in model.layers.items())
    return Built(model, fitted, layers, pieces, phases=clock.phases)


def _fitted(
    job: Job,
    entries: Mapping[str, Bits],
    edges: list[Edge],
    stages: Stages,
    checkpoint: Checkpoint,
    judge: "_Judge",
) -> tuple[Fitted, tuple[LayerReport, ...]]:
    """All layers and grids, and a row of the report for each layer."""
    network, fits = job.network, dict[str, Fit]()
    if isinstance(stages.flavour, Parallel):
        chosen = {name: (entries[name],) for name in network.layers}
        fits = {name: fit for (name, _), fit in fit_choices(job, chosen, stages.fit, stages.ranges).items()}
    target = None if stages.normalization is None else stages.normalization.target
    reports, count = [], job.counter("fit", len(network.layers))
    with job.store() as store:
        sweep = Sweep(
            job, entries, edges, store, checkpoint=checkpoint, ranges=stages.ranges, method=stages.fit,
            channel_scales=stages.channel_scales, shortcuts=find_shortcuts(network) if stages.shortcuts else {},
            statistics=target in ("float", "guarded"), fits=fits,
        )  # fmt: skip
        for layer in sweep.layers(judge if target == "guarded" else None):
            reports.append(layer_report(layer))
            count(layer.name)
    return sweep.done, tuple(reports)


def _pieces(job: Job, plan: Plan, stages: Stages) -> Checkpoint:
    """Where the pieces of a network at these bits are kept."""
    identity = plan.to_toml().encode() + repr(stages).encode()
    return job.checkpoint.within(f"network-{zlib.crc32(identity):08x}")


class _Judge:
    """How close outputs are to the float network's: taken from executions that compute them anyway, at no extra pass."""

    def __init__(self, job: Job, references: Sequence[Sequence[Tensor]]):
        self.sizes, self.references = [rows(batch) for batch in job.batches], references
        self.loss = math.inf

    @torch.no_grad()
    def __call__(self, outputs: Iterable[list[Tensor]]) -> None:
        """Keeps the loss of the outputs on all batches."""
        loss = closeness(self.references[0])
        pairs = zip(self.sizes, self.references, outputs, strict=True)
        self.loss = sum(size * loss(exact, found).item() for size, exact, found in pairs) / sum(self.sizes)


def _normalize(
    job: Job, model: Assembled, targets: Mapping[str, ChannelStatistics], judge: _Judge, *, guarded: bool
) -> None:
    """Para-normalizes in place; guarded, it is undone where the outputs are no closer for it.

    Args:
        judge: has the loss of the outputs as they are.
    """
    before, layers = judge.loss, model.layers
    with job.store() as store:
        para_normalize(
            model.graph_module, targets, job.batches, store, job.counter("statistics", len(targets)),
            strength=GUARDED_STRENGTH if guarded else 1.0, on_outputs=judge if guarded else None, masks=job.masks,
        )  # fmt: skip
    if not guarded:
        return
    log.info("statistics: loss %.4g -> %.4g on calibration inputs", before, judge.loss)
    if not judge.loss < before:
        for name, layer in layers.items():
            model.graph_module.set_submodule(name, layer)
        link_requantization(model.graph_module)


def final_entries(job: Job, entries: Mapping[str, Bits], edges: list[Edge]) -> dict[str, Bits]:
    """Bits of every layer and of every tensor with a grid of its own, in the graph's order; floats that were asked for."""
    layers = job.network.layers
    tensors = {edge.name: Bits(None, edge.bits) for edge in edges if edge.kind == "tensor"}
    tensors |= {edge.product: Bits(None, edge.bits) for edge in edges if edge.kind == "operand"}
    asked = {name: bits for name, bits in entries.items() if name not in layers and bits == FLOAT}
    return {**{name: entries[name] for name in layers}, **tensors, **asked}


@torch.no_grad()
def float_outputs(
    job: Job,
    run: Callable[[list[Any]], Sequence[Any]] | None = None,
    keep: Callable[[Iterable[Tensor]], Sequence[Tensor]] = list,
) -> list[Sequence[Tensor]]:
    """The float network's output leaves on each calibration batch.

    Args:
        run: executes the network on flat inputs; by default its module does.
        keep: what is returned in place of a batch's outputs.

    Raises:
        CalibrationError: a batch that the network fails on, or for whose infinite or huge values it returns NaN.
    """
    kept = []
    for index, batch in enumerate(job.batches):
        try:
            leaves = flatten(batch)[0]
            outputs = list(job.network.module(*leaves) if run is None else run(leaves))
        except RuntimeError as error:
            raise CalibrationError(
                f"the network fails on calibration batch {index}: {str(error).splitlines()[0]}"
            ) from error
        _refuse_endless(batch, outputs, index)
        kept.append(keep(outputs))
    return kept


def _refuse_endless(batch: Batch, outputs: Iterable[object], position: int) -> None:
    """Raises CalibrationError where huge or infinite inputs reach the outputs: a mask's do not, a broken row's do."""
    huge = [name for name, value in batch.items() if not all(map(_has_squares, flatten({name: value})[0]))]
    if huge and not all(_has_squares(each, but_infinite=True) for each in outputs):
        raise CalibrationError(
            f"calibration inputs must be finite, and their squares, where they are no mask. Batch {position} has larger values "
            f"in {', '.join(huge)}, and the network returns NaN or values as large; remove these rows or scale the inputs as "
            "they were in training."
        )


def _has_squares(leaf: object, *, but_infinite: bool = False) -> bool:
    """Whether the squares of all values, or of all but infinite ones, have a finite sum."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return True
    values = leaf.where(~leaf.isinf(), 0.0) if but_infinite else leaf
    return bool(torch.isfinite(torch.linalg.vector_norm(values)))


@torch.no_grad()
def measured_loss(job: Job, model: Assembled, loss: Loss, references: Sequence[Sequence[Tensor]]) -> float:
    """The loss of the whole network on the calibration inputs, without labels."""
    total = 0.0
    for batch, exact in zip(job.batches, references, strict=True):
        total += rows(batch) * loss(exact, model.graph_module(*flatten(batch)[0])).item()
    return total / job.inputs


def layer_report(done: FittedLayer) -> LayerReport:
    """What the report says of a layer."""
    layer, geometry = done.layer, done.layer.geometry
    if isinstance(layer, WeightedLayer) or done.fit is None:
        assert isinstance(layer, WeightedLayer)
        macs = geometry.macs(done.values, layer.weight)
        size = 4 * ((0 if done.tied else layer.weight.numel()) + layer.bias.numel())
        operations = macs * FLOAT_BITS * FLOAT_BITS
        return LayerReport(done.name, "float", None, None, None, None, done.seconds, size, macs, operations)
    macs = geometry.macs(done.values, layer.codes)
    codes = 0 if done.tied else layer.codes.numel()
    groups = layer.scale.numel() // len(layer.scale)
    low, high = done.grid.range if done.grid is not None else (None, None)
    size = layer_size(codes, layer.codes.shape[0], layer.bits, geometry, groups)
    operations = macs * layer.bits * (done.bits.activation or FLOAT_BITS)
    before, after = done.fit.before, done.fit.after
    return LayerReport(done.name, str(done.bits), low, high, before, after, done.seconds, size, macs, operations)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name] = now - self._last
        self._last = now
