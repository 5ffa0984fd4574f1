"""Bias tuning: the float network's outputs distilled, end to end, into the biases of the quantized one.

Source: Hubara et al. 2021 and its released code. No labels; codes, zero points and activation grids stay. Deviations: the
best iterate on held-out inputs is kept, the start included; "adam" moves each bias in standard deviations of its layer's
output with a cosine decay, where the released code ("sgd") takes constant steps in real units.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.batches import ROWS
from calque.calibration.execution import StandIn
from calque.calibration.losses import Loss
from calque.calibration.rows import Rows, alike, draw, hold_out
from calque.correction.executable import Executable, largest_part
from calque.correction.gradients import loss_gradients
from calque.errors import SpecError
from calque.fitting.descent import Best, best_so_far, descend, iterates
from calque.gains import Tuned
from calque.network import Batch
from calque.quantized.learnable import FixedQuantizer, LearnableBias, LearnableLayer, LearnableScale
from calque.quantized.modules import QuantizedLayer
from calque.settings import Tuning

log = logging.getLogger(__name__)

EPSILON = 1e-15  # of Adam, beside gradients of a KL that may be 1e-6


def tune_biases(
    module: fx.GraphModule,
    batches: list[Batch],
    references: Sequence[Sequence[Tensor]],
    loss: Loss,
    tuning: Tuning,
    *,
    memory: int,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> Tuned:
    """Moves, in place, the biases of a quantized network; on held-out inputs the loss is never larger than before.

    The last fifth of the inputs is held out; with fewer than five inputs nothing is tuned. Only rows of one shape are in a
    step. The loss of a step is that of all its rows, whatever the memory.

    Args:
        module: a quantized model's operators, flat inputs in and a flat tuple out.
        references: the float network's output leaves on each batch.
        loss: of reference and output leaves, differentiable in the outputs.
        memory: bytes for a backward pass, by an estimate; one row is always executed.
        on_step: called with the steps done and the loss of the last one.

    Raises:
        SpecError: a loss without a gradient, or one that is not finite at the start.
    """
    fitted, held_out = hold_out(batches, references)
    network = Executable(module)
    before = network.loss(held_out or fitted, loss)
    if not held_out or not network.layers:
        return Tuned(before, before, 0)
    if not math.isfinite(before):
        raise SpecError(
            f"the loss is {before} on the held-out inputs before any tuning. Pass a loss that is finite, or a recipe without "
            "tuning."
        )
    start = Best(network.modules(), before, 0)
    kept = start

    def judge(layers: Mapping[str, QuantizedLayer]) -> float:
        network.install(layers)
        return network.loss(held_out, loss)

    try:
        found = _iterates(network, alike(fitted), loss, tuning, memory=memory, generator=generator, on_step=on_step)
        for best in best_so_far(start, found, judge):
            kept = best  # which an interrupt leaves
    finally:
        network.install(kept.iterate)
    log.info("biases: loss %.4g -> %.4g on held-out inputs (step %d of %d)", before, kept.loss, kept.step, tuning.steps)
    return Tuned(before, kept.loss, kept.step)


def _learnable(network: Executable, tuning: Tuning, part: Rows) -> dict[str, LearnableLayer]:
    """A differentiable stand-in for each layer."""
    kind = LearnableBias if tuning.parameters == "biases" else LearnableScale
    if tuning.optimizer == "adam":
        units = network.output_units(part)
    else:
        units = {name: torch.ones_like(layer.real_bias) for name, layer in network.modules().items()}
    return {name: kind(layer, units[name]) for name, layer in network.modules().items()}


def _iterates(
    network: Executable,
    groups: list[list[Rows]],
    loss: Loss,
    tuning: Tuning,
    *,
    memory: int,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> Iterator[tuple[int, dict[str, QuantizedLayer]]]:
    """The number of steps and the layers at some moments of the descent, which ends where the loss is not finite."""
    largest = largest_part([part for group in groups for part in group])
    size = network.rows_at_a_time(largest, memory)
    layers = _learnable(network, tuning, largest.pick(torch.arange(min(ROWS, largest.count))))
    stand_ins: dict[str, StandIn] = {name: FixedQuantizer(part) for name, part in network.quantizers.items()}
    stand_ins |= layers
    leaves = [leaf for layer in layers.values() for leaf in layer.leaves().values()]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(leaves, tuning.rate, eps=EPSILON)
        if tuning.optimizer == "adam"
        else torch.optim.SGD(leaves, tuning.rate)
    )

    def outputs(inputs: Sequence[Any]) -> list[Any]:
        return network.outputs(inputs, stand_ins)

    def gradients() -> float:
        rows = draw(groups, tuning.rows, generator)
        value, found = loss_gradients(outputs, rows, loss, leaves, size=size)
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
        return value

    taken = descend(optimizer, gradients, tuning.steps, falling=tuning.optimizer == "adam", on_step=on_step)
    return iterates(taken, tuning.steps, lambda: network.restored(layers))
