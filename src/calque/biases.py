"""Bias tuning: the float network's outputs distilled, end to end, into the biases of the quantized one.

Source: Hubara et al. 2021 and its released code. No labels; codes, zero points and activation grids stay. Deviations: the
best iterate on held-out inputs is kept, the start included; "adam" moves each bias in standard deviations of its layer's
output with a cosine decay, where the released code ("sgd") takes constant steps in real units.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration import ROWS
from calque.errors import SpecError
from calque.gains import Tuned
from calque.graph import Batch
from calque.losses import Loss
from calque.quantizers import QuantizedLayer
from calque.settings import Tuning
from calque.solvers.adaquant import CHECKS
from calque.solvers.executable import Executable, largest_part
from calque.solvers.gradients import loss_gradients
from calque.solvers.learnable import FixedQuantizer, LearnableBias, LearnableLayer, LearnableScale, StandIn
from calque.solvers.rows import Rows, alike, draw, hold_out

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
    if not held_out or not network.layers or not tuning.steps:
        return Tuned(before, before, 0)
    if not math.isfinite(before):
        raise SpecError(
            f"the loss is {before} on the held-out inputs before any tuning. Pass a loss that is finite, or tune for 0 steps."
        )
    kept, best = network.modules(), Tuned(before, before, 0)
    try:
        for step, layers in _descend(
            network, alike(fitted), loss, tuning, memory=memory, generator=generator, on_step=on_step
        ):
            network.install(layers)
            after = network.loss(held_out, loss)
            if after < best.after:
                kept, best = layers, Tuned(before, after, step)
    finally:
        network.install(kept)
    log.info(
        "biases: loss %.4g -> %.4g on held-out inputs (step %d of %d)", before, best.after, best.steps, tuning.steps
    )
    return best


def _learnable(network: Executable, tuning: Tuning, part: Rows) -> dict[str, LearnableLayer]:
    """A differentiable stand-in for each layer."""
    kind = LearnableBias if tuning.parameters == "biases" else LearnableScale
    if tuning.optimizer == "adam":
        units = network.output_units(part)
    else:
        units = {name: torch.ones_like(layer.real_bias) for name, layer in network.modules().items()}
    return {name: kind(layer, units[name]) for name, layer in network.modules().items()}


def _descend(
    network: Executable,
    groups: list[list[Rows]],
    loss: Loss,
    tuning: Tuning,
    *,
    memory: int,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> Iterator[tuple[int, dict[str, QuantizedLayer]]]:
    """The number of steps and the layers at CHECKS moments of the descent, which ends where the loss is not finite."""
    largest = largest_part([part for group in groups for part in group])
    size = network.rows_at_a_time(largest, memory)
    layers = _learnable(network, tuning, largest.pick(torch.arange(min(ROWS, largest.count))))
    stand_ins: dict[str, StandIn] = {name: FixedQuantizer(part) for name, part in network.quantizers.items()}
    stand_ins |= layers

    def outputs(inputs: Sequence[Any]) -> list[Any]:
        return network.outputs(inputs, stand_ins)

    leaves = [leaf for layer in layers.values() for leaf in layer.leaves().values()]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(leaves, tuning.rate, eps=EPSILON)
        if tuning.optimizer == "adam"
        else torch.optim.SGD(leaves, tuning.rate)
    )
    checks = {round(tuning.steps * (k + 1) / CHECKS) for k in range(CHECKS)}
    for step in range(tuning.steps):
        if tuning.optimizer == "adam":
            optimizer.param_groups[0]["lr"] = tuning.rate * 0.5 * (1 + math.cos(math.pi * step / tuning.steps))
        rows = draw(groups, tuning.rows, generator)
        value, gradients = loss_gradients(outputs, rows, loss, leaves, size=size)
        on_step(step + 1, value)
        if not math.isfinite(value):
            log.info("biases: the loss is %s at step %d; tuning ends here", value, step + 1)
            return
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        if step + 1 in checks:
            yield step + 1, network.restored(layers)
