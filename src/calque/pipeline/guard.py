"""Grids that would wipe out a part of what they carry: found by what the network's outputs lose, and left out or mended.

Values of different scales in one tensor (boxes in pixels beside scores, image features beside raw measurements, masks of -1e9)
leave the small ones a few codes of a common grid. Nothing local tells a dead channel from one that matters, so the network is
asked: a grid is left out where, alone in place, it costs some slice of an output more of its signal than all harmless grids
together, and more than a hundredth.

A tensor that operators share stays float. The input of a layer gets a factor for each channel, which moves into the weights;
where that does not help, the layer's activations stay float.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from calque.calibration.job import Job
from calque.grid.bits import FLOAT, Bits, Placement
from calque.network import Network
from calque.network.rewrites.factors import multiply_inputs
from calque.pipeline.trial import Extremes, Trial, survey
from calque.quantized.placement import SHARED_TENSOR_BITS, Edge, place

log = logging.getLogger(__name__)

RUINED = 0.1  # of the signal of a slice of an output (10 dB): what a layer's integer kernel is given up for


@dataclass(frozen=True)
class Guarded:
    """What was decided.

    Attributes:
        network: the one that was given, with factors in front of some layers.
        tensors: names of shared tensors and products that stay float.
        layers: names of layers whose activations stay float.
        judged: names of layers whose input is decided on: it got factors, or stays as it is.
        notes: which of these, and why, a sentence each.
    """

    network: Network
    tensors: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    judged: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def applied(
        self, choices: Mapping[str, Sequence[Bits]], entries: Mapping[str, Bits]
    ) -> tuple[dict[str, Sequence[Bits]], dict[str, Bits]]:
        """The choices of layers and the decided bits, with float in place of what is left out."""
        alone = {name: tuple(dict.fromkeys(Bits(b.weight, None) for b in choices[name])) for name in self.layers}
        decided = {name: options[0] for name, options in alone.items() if name in entries}
        return {**choices, **alone}, {**entries, **decided, **dict.fromkeys(self.tensors, FLOAT)}


def guard(
    job: Job,
    choices: Mapping[str, Sequence[Bits]],
    asked: Mapping[str, Bits],
    extremes: Mapping[fx.Node, Extremes],
    *,
    kept: Collection[str] = (),
) -> Guarded:
    """The job's network without the grids that would wipe out a part of what they carry.

    Its module is changed in place where a layer gets factors.

    Args:
        choices: the bits that each layer may have; each is judged at SHARED_TENSOR_BITS.
        asked: bits of tensors that the user has decided; these grids stay.
        extremes: of nodes on the calibration inputs, as far as they are known.
        kept: layers whose bits the user has decided; they may get factors.
    """
    found, known = Guarded(job.network), dict(extremes)
    while True:
        edges = _edges(found, job.placement, choices, asked)
        known |= survey(found.network, job.batches, {edge.source for edge in edges} - known.keys())
        trial = Trial(found.network, job.batches, known)
        lost = trial.lost([edge for edge in edges if not _is_decided(edge, asked, found)])
        if not lost:
            return found
        for edge, loss in _joined(found.network, lost).items():
            log.info("grid %s would cost %.3g of a signal", edge.name, loss)
            if edge.kind in ("tensor", "operand"):
                found = _left_out(found, edge, trial, loss)
            else:
                found = _mended(found, edge, trial, loss, kept=bool(set(edge.readers) & set(kept)))


def _is_decided(edge: Edge, asked: Mapping[str, Bits], found: Guarded) -> bool:
    return edge.name in asked or edge.product in asked or bool(found.judged & set(edge.readers))


def _edges(
    found: Guarded, placement: Placement, choices: Mapping[str, Sequence[Bits]], asked: Mapping[str, Bits]
) -> list[Edge]:
    """The grids of the network with each layer that may have quantized inputs at SHARED_TENSOR_BITS."""
    bits = {**asked, **dict.fromkeys(found.tensors, FLOAT)}
    for name, options in choices.items():
        on_grid = name not in found.layers and any(option.activation is not None for option in options)
        bits[name] = Bits(SHARED_TENSOR_BITS, SHARED_TENSOR_BITS if on_grid else None)
    return place(found.network, bits, placement)


def _joined(network: Network, lost: Mapping[Edge, float]) -> dict[Edge, float]:
    """The lost edges, with one in place of those that stand in front of layers on the same value: they share factors."""
    found: dict[object, tuple[Edge, float]] = {}
    for edge, loss in lost.items():
        key = network.layers[edge.readers[0]].node.args[0] if edge.kind == "input" else edge
        first, most = found.get(key, (replace(edge, readers=()), 0.0))
        found[key] = replace(first, readers=(*first.readers, *edge.readers)), max(most, loss)
    return dict(found.values())


def _left_out(found: Guarded, edge: Edge, trial: Trial, loss: float) -> Guarded:
    """The decisions with one more: a tensor, or the operands of a product, stays float."""
    name = edge.product or edge.name
    if name in found.tensors:  # the product's other operand was lost, too
        return found
    note = f"tensor {name} stays float: one grid {trial.shown(edge)} would wipe out a part of it{_remains(loss)}."
    return replace(found, tensors=found.tensors | {name}, notes=(*found.notes, note))


def _mended(found: Guarded, edge: Edge, trial: Trial, loss: float, *, kept: bool) -> Guarded:
    """The decisions with one more, about layers' input: factors where they help; float where all is lost, unless it is kept."""
    names, readers = ", ".join(edge.readers), set(edge.readers)
    why = f"one grid {trial.shown(edge)} would wipe out a part of the input{_remains(loss)}"
    factors = trial.factors(edge)
    rest = loss if factors is None else trial.loss_with(edge, factors)
    if factors is not None and rest < loss / 2 and (rest <= RUINED or kept):
        note = f"layer {names}: each channel of the input has a factor of its own; {why}."
        network = multiply_inputs(found.network, edge.readers, factors.scale)
        return replace(found, network=network, judged=found.judged | readers, notes=(*found.notes, note))
    if loss <= RUINED:
        return replace(found, judged=found.judged | readers)
    if kept:
        note = f"layer {names}: {why}; its activations have the bits that were asked for."
        return replace(found, judged=found.judged | readers, notes=(*found.notes, note))
    note = f"layer {names}: the activations stay float; {why}."
    return replace(found, layers=found.layers | readers, notes=(*found.notes, note))


def _remains(loss: float) -> str:
    if not math.isfinite(loss):
        return ""
    return f" (some slice of an output would keep {-10 * math.log10(loss):.0f} dB)"
