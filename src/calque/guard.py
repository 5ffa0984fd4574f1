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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from calque.factors import multiply_inputs
from calque.graph import Network
from calque.job import Job
from calque.placement import SHARED_TENSOR_BITS, Edge, place
from calque.spec import FLOAT, Bits, Placement
from calque.trial import Extremes, Trial, survey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guarded:
    """What was decided.

    Attributes:
        network: the one that was given, with factors in front of some layers.
        tensors: names of shared tensors and products that stay float.
        layers: names of layers whose activations stay float.
        scaled: names of layers whose input got factors.
        notes: which of these, and why, a sentence each.
    """

    network: Network
    tensors: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def applied(
        self, choices: Mapping[str, Sequence[Bits]], entries: Mapping[str, Bits]
    ) -> tuple[dict[str, Sequence[Bits]], dict[str, Bits]]:
        """The choices of layers and the decided bits, with float in place of what is left out."""
        alone = {name: tuple(dict.fromkeys(Bits(b.weight, None) for b in choices[name])) for name in self.layers}
        decided = {name: options[0] for name, options in alone.items() if name in entries}
        return {**choices, **alone}, {**entries, **decided, **dict.fromkeys(self.tensors, FLOAT)}


def guard(
    job: Job, choices: Mapping[str, Sequence[Bits]], asked: Mapping[str, Bits], extremes: Mapping[fx.Node, Extremes]
) -> Guarded:
    """The job's network without the grids that would wipe out a part of what they carry.

    Its module is changed in place where a layer gets factors.

    Args:
        choices: the bits that each layer may have; each is judged at SHARED_TENSOR_BITS.
        asked: bits of tensors that the user has decided; these grids stay.
        extremes: of nodes on the calibration inputs, as far as they are known.
    """
    found, known = Guarded(job.network), dict(extremes)
    while True:
        edges = _edges(found, job.placement, choices, asked)
        known |= survey(found.network, job.batches, {edge.source for edge in edges} - known.keys())
        trial = Trial(found.network, job.batches, known)
        lost = trial.lost([edge for edge in edges if edge.name not in asked and edge.product not in asked])
        if not lost:
            return found
        for edge, loss in _joined(found.network, lost).items():
            log.info("grid %s would cost %.3g of a signal", edge.name, loss)
            found = _mended(found, edge, trial, loss)


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


def _mended(found: Guarded, edge: Edge, trial: Trial, loss: float) -> Guarded:
    """The decisions with one more, about a grid that loses a part."""
    why = f"one grid {trial.shown(edge)} would wipe out a part of {{}}{_kept(loss)}."
    if edge.kind in ("tensor", "operand"):
        name = edge.product or edge.name
        note = f"tensor {name} stays float: {why.format('it')}"
        return replace(found, tensors=found.tensors | {name}, notes=(*found.notes, note))
    names = ", ".join(edge.readers)
    scale = None if found.scaled & set(edge.readers) else trial.factors(edge)
    if scale is not None:
        note = f"layer {names}: each channel of the input is multiplied by a factor of its own; {why.format('it')}"
        network = multiply_inputs(found.network, edge.readers, scale)
        return replace(found, network=network, scaled=found.scaled | set(edge.readers), notes=(*found.notes, note))
    note = f"layer {names}: the activations stay float; {why.format('the input')}"
    return replace(found, layers=found.layers | set(edge.readers), notes=(*found.notes, note))


def _kept(loss: float) -> str:
    if not math.isfinite(loss):
        return ""
    return f" (some output would keep {-10 * math.log10(loss):.0f} dB)"
