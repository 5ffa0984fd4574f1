"""Distillation: every parameter of the quantized network learns the float network's outputs, end to end.

Sources: the straight-through estimator with learned scales of Hubara et al. 2021, section 3, and LSQ (1902.08153), through the
whole network; mixup (1710.09412) of the calibration inputs with the float network as teacher. No labels. The best iterate on
held-out inputs is kept, the start included.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calque.calibration.batches import ROWS
from calque.calibration.execution import StandIn
from calque.calibration.losses import Loss
from calque.calibration.rows import Rows, alike, draw, hold_out
from calque.correction.biases import EPSILON
from calque.correction.executable import Executable, largest_part
from calque.correction.gradients import loss_gradients
from calque.correction.mixture import Teacher, can_mix, mixed
from calque.errors import SpecError
from calque.fitting.descent import Best, best_so_far, descend, iterates
from calque.gains import Distilled
from calque.network import Batch
from calque.quantized.learnable import Kind, LearnableCodes, LearnableLayer, LearnableQuantizer, LearnableScale
from calque.quantized.modules import QuantizedLayer, Quantizer
from calque.settings import Distillation

log = logging.getLogger(__name__)

CHECKS = (0.3, 0.6, 0.8, 1.0)  # shares of the steps after which the iterate is judged; early ones are noisy
TIMED = 3  # steps that tell how long one takes
MIXTURES = 3  # of all held-out inputs, beside the inputs themselves: what the float network is sure of decides little

Parts = dict[str, QuantizedLayer | Quantizer]


def distill(
    module: fx.GraphModule,
    teacher: Teacher,
    batches: list[Batch],
    references: Sequence[Sequence[Tensor]],
    loss: Loss,
    how: Distillation,
    *,
    fixed_codes: Collection[str],
    memory: int,
    generator: torch.Generator,
    on_step: Callable[[int, int], None],
) -> Distilled:
    """Moves, in place, everything in a quantized network; on held-out inputs and their mixtures its loss never rises.

    The mixtures decide most of it: on the inputs alone the loss may rise (docs/experiments.md).

    The last fifth of the inputs is held out; with fewer than five inputs nothing is distilled. Only rows of one shape are in
    a step.

    Args:
        module: a quantized model's operators, flat inputs in and a flat tuple out.
        teacher: the float network's, alike.
        references: the float network's output leaves on each batch.
        loss: of reference and output leaves, the mean over rows, differentiable in the outputs.
        fixed_codes: layers that share their weights with another one; their codes stay.
        memory: bytes for a backward pass, by an estimate; one row is always executed.
        on_step: called with the steps done and the steps in all.

    Raises:
        SpecError: a loss without a gradient, or one that is not finite at the start.
    """
    started = time.perf_counter()
    fitted, held_out = hold_out(batches, references)
    network = Executable(module)
    mixtures = MIXTURES if how.mixup else 0
    judged = [*held_out, *(mixed(part, 1.0, teacher, generator) for part in held_out * mixtures if can_mix(part))]
    checking = time.perf_counter()
    before = network.loss(judged or fitted, loss)
    checking = time.perf_counter() - checking
    if not held_out or not network.layers:
        return Distilled(before, before, 0, 0, time.perf_counter() - started)
    if not math.isfinite(before):
        raise SpecError(
            f"the loss is {before} on the held-out inputs before distillation. Pass one that is finite, or another recipe."
        )
    student = _Student(network, alike(fitted), teacher, loss, how, fixed_codes=fixed_codes, memory=memory)
    steps = how.steps or student.steps_in(60 * how.minutes - checking * len(CHECKS) - (time.perf_counter() - started))
    start = Best(student.start(), before, 0)
    kept = start

    def judge(parts: Parts) -> float:
        network.install(parts)
        return network.loss(judged, loss)

    try:
        taken = student.descend(steps, generator, lambda step, _: on_step(step, steps))
        for best in best_so_far(start, iterates(taken, steps, student.restored, CHECKS), judge):
            kept = best  # which an interrupt leaves
    finally:
        network.install(kept.iterate)
    log.info(
        "distillation: loss %.4g -> %.4g on held-out inputs and their mixtures (step %d of %d)",
        before, kept.loss, kept.step, steps,
    )  # fmt: skip
    return Distilled(before, kept.loss, steps, kept.step, time.perf_counter() - started)


class _Student:
    """A quantized network all of whose parameters may move."""

    def __init__(
        self,
        network: Executable,
        groups: list[list[Rows]],
        teacher: Teacher,
        loss: Loss,
        how: Distillation,
        *,
        fixed_codes: Collection[str],
        memory: int,
    ):
        self.network, self.groups, self.teacher, self.loss, self.how = network, groups, teacher, loss, how
        largest = largest_part([part for group in groups for part in group])
        self.size = network.rows_at_a_time(largest, memory)
        units = network.output_units(largest.pick(torch.arange(min(ROWS, largest.count))))
        self.layers: dict[str, LearnableLayer] = {
            name: (LearnableScale if name in fixed_codes else LearnableCodes)(layer, units[name])
            for name, layer in network.modules().items()
        }
        self.grids = {name: LearnableQuantizer(grid) for name, grid in network.quantizers.items()}
        self.stand_ins: dict[str, StandIn] = {**self.layers, **self.grids}
        leaves: dict[Kind, list[Tensor]] = {}
        for found in [part.leaves() for part in self.layers.values()] + [part.leaves() for part in self.grids.values()]:
            for kind, leaf in found.items():
                leaves.setdefault(kind, []).append(leaf)
        self.leaves = [leaf for group in leaves.values() for leaf in group]
        groups_of = [{"params": group, "lr": getattr(how.rates, kind)} for kind, group in leaves.items()]
        self.optimizer = torch.optim.Adam(groups_of, eps=EPSILON, fused=True)

    def start(self) -> Parts:
        """The network's parts as they are before any step."""
        return {**self.network.modules(), **self.network.quantizers}

    @torch.no_grad()
    def restored(self) -> Parts:
        """The parts that the stand-ins stand for."""
        grids = {name: grid.restored() for name, grid in self.grids.items()}
        return {**grids, **self.network.restored(self.layers, grids)}

    def descend(self, steps: int, generator: torch.Generator, on_step: Callable[[int, float], None]) -> Iterator[int]:
        """The number of steps after each; ends where the loss is not finite."""
        return descend(self.optimizer, lambda: self._gradients(generator), steps, on_step=on_step)

    def steps_in(self, seconds: float) -> int:
        """How many steps the seconds hold, at least one, by the time of the first ones, which are not taken."""
        generator = torch.Generator().manual_seed(0)
        times = []
        for _ in range(TIMED + 1):
            started = time.perf_counter()
            self._gradients(generator)
            times.append(time.perf_counter() - started)
        return max(1, int((seconds - sum(times)) / statistics.median(times[1:])))

    def _gradients(self, generator: torch.Generator) -> float:
        """The loss of random rows, whose gradients are left in the leaves."""
        rows = draw(self.groups, self.how.rows, generator)
        total = 0.0
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf)
        # the loss is a mean over rows: pieces need no second pass
        for part in mixed(rows, self.how.mixup, self.teacher, generator).split(self.size):
            share = part.count / rows.count
            value, gradients = loss_gradients(self._outputs, part, self.loss, self.leaves, size=part.count)
            total += share * value
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                assert leaf.grad is not None
                leaf.grad.add_(gradient, alpha=share)
        return total

    def _outputs(self, inputs: Sequence[Any]) -> list[Any]:
        return self.network.outputs(inputs, self.stand_ins)
