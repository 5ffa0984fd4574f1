"""A network at given bits, stage by stage: layers fitted in one sweep, blocks, channel statistics, biases."""

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calque.allocation.costs import FLOAT_BITS, layer_size
from calque.calibration.channel_statistics import ChannelStatistics, trained_statistics
from calque.calibration.job import Job
from calque.calibration.losses import Loss, closeness, kl, kl_and_mse, mse
from calque.correction.biases import tune_biases
from calque.correction.distillation import distill
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
from calque.network.signature import flatten, rows
from calque.quantized.assembled import Assembled, assemble, link_requantization
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.quantized.placement import Edge, place
from calque.report import LayerReport
from calque.run.checkpoint import Checkpoint, Piece

log = logging.getLogger(__name__)

GUARDED_STRENGTH = 0.5  # power of the gains: docs/experiments.md


@dataclass(frozen=True)
class Built:
    """A quantized network and what became of it.

    Attributes:
        fitted: what the fits left.
        layers: a row of the report for each layer.
        distilled, tuned: what distillation and the tuning of biases gained.
        phases: seconds of each stage.
    """

    model: Assembled
    fitted: Fitted
    layers: tuple[LayerReport, ...]
    distilled: Distilled | None = None
    tuned: Tuned | None = None
    phases: Mapping[str, float] = field(default_factory=dict)


def build(job: Job, entries: Mapping[str, Bits], loss: Loss, references: Sequence[Sequence[Tensor]]) -> Built:
    """The network at these bits, by the job's recipe.

    Args:
        entries: bits of every layer, and of tensors where they are not the default.
        loss, references: what biases are tuned by, and the float network's output leaves on each batch.
    """
    recipe, network, clock = job.recipe, job.network, _Clock()
    edges = place(network, entries, job.placement)
    plan = Plan(final_entries(job, entries, edges))
    kept = _pieces(job, plan)
    fits: dict[str, Fit] = {}
    if recipe.flavour == "parallel":
        chosen = {name: (entries[name],) for name in network.layers}
        fits = {name: fit for (name, _), fit in fit_choices(job, chosen, recipe.steps).items()}
    with job.store() as store:
        sweep = Sweep(job, entries, edges, store, checkpoint=kept, fits=fits)
        judge = _Judge(job, references)
        layers, count = [], job.counter("fit", len(network.layers))
        for layer in sweep.layers(judge if recipe.statistics == "guarded" else None):
            layers.append(layer_report(layer))
            count(layer.name)
    fitted = sweep.done
    model = assemble(network, edges, fitted.layers, fitted.quantizers, plan)
    if recipe.block_steps and not fit_blocks(job, model):
        fitted.notes.append("block_steps: no block of quantized layers was found; none was fitted.")
    codes = {name: layer.codes.clone() for name, layer in model.layers.items()}
    clock.lap("fit")
    targets = trained_statistics(network) if recipe.statistics == "trained" else fitted.statistics
    targets = {name: target for name, target in targets.items() if name in model.layers}
    if recipe.statistics != "none":
        if recipe.block_steps and recipe.statistics == "guarded":  # the blocks have moved the outputs
            judge(list(model.graph_module(*flatten(batch)[0])) for batch in job.batches)
        _normalize(job, model, targets, judge)
        clock.lap("statistics")
    assert all(torch.equal(layer.codes, codes[name]) for name, layer in model.layers.items())
    return trained_end_to_end(job, Built(model, fitted, tuple(layers), phases=clock.phases), loss, references)


def trained_end_to_end(job: Job, built: Built, loss: Loss, references: Sequence[Sequence[Tensor]]) -> Built:
    """A built network distilled and its biases tuned, in place, as far as the job's recipe asks for it."""
    clock, recipe, model = _Clock(), job.recipe, built.model
    if recipe.distillation:
        built = replace(built, distilled=distill_network(job, model, loss, references))
        clock.lap("distillation")
    if recipe.tuning.steps:
        codes = {name: layer.codes.clone() for name, layer in model.layers.items()}
        built = replace(built, tuned=tune(job, model, loss, references))
        assert all(torch.equal(layer.codes, codes[name]) for name, layer in model.layers.items())
        clock.lap("biases")
    return replace(built, phases={**built.phases, **clock.phases})


def _pieces(job: Job, plan: Plan) -> Checkpoint:
    """Where the pieces of a network at these bits are kept."""
    identity = plan.to_toml().encode() + job.recipe.to_toml().encode()
    return job.checkpoint.within(f"network-{zlib.crc32(identity):08x}")


def distill_network(job: Job, model: Assembled, loss: Loss, references: Sequence[Sequence[Tensor]]) -> Distilled:
    """Distills the float network in place, by the job's recipe; what was finished before is not done again."""
    how, module, checkpoint = job.recipe.distillation, model.graph_module, _pieces(job, model.plan)
    needs = checkpoint.needs(network=Piece(module.state_dict(), {}))
    ready = checkpoint.get("distillation", needs)
    if ready is not None:
        module.load_state_dict(dict(ready.tensors), strict=False)
        return Distilled(**ready.facts)
    outputs = kl_and_mse if closeness(references[0]) is kl else mse
    judge = {"outputs": outputs, "run": loss, "kl": kl, "mse": mse}[how.loss]
    shared = job.network.shared
    found = distill(
        module, lambda inputs: list(job.network.module(*inputs)), job.batches, references, judge, how, rates=job.recipe.rates,
        fixed_codes={*shared, *shared.values()}, memory=job.memory, generator=job.generator("distillation"),
        on_step=lambda step, steps: job.progress("distillation", step, steps),
    )  # fmt: skip
    moved = {name: part for name, part in module.named_modules() if isinstance(part, (QuantizedLayer, Quantizer))}
    state = {f"{name}.{key}": value for name, part in moved.items() for key, value in part.state_dict().items()}
    checkpoint.put("distillation", Piece(state, asdict(found), needs))
    return found


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


def _normalize(job: Job, model: Assembled, targets: Mapping[str, ChannelStatistics], judge: _Judge) -> None:
    """Para-normalizes in place; guarded, it is undone where the outputs are no closer for it.

    Args:
        judge: has the loss of the outputs as they are.
    """
    guarded = job.recipe.statistics == "guarded"
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


def tune(job: Job, model: Assembled, loss: Loss, references: Sequence[Sequence[Tensor]]) -> Tuned:
    """Tunes the biases in place, by the job's recipe."""
    steps = job.recipe.tuning.steps
    judge = {"run": loss, "kl": kl, "mse": mse}[job.recipe.tuning.loss]
    return tune_biases(
        model.graph_module, job.batches, references, judge, job.recipe.tuning, memory=job.memory,
        generator=job.generator("biases"), on_step=lambda step, _: job.progress("biases", step, steps),
    )  # fmt: skip


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


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name] = now - self._last
        self._last = now
