"""AdaQuant: a layer's weights, scales, zero point and bias fitted to its float output by gradient descent.

Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets",
ICML 2021, section 3 (equation 2). Whether it is the parallel or the sequential flavour is decided by the problem's inputs.
Deviations: the best iterate on held-out rows is kept, the start included; with relative rates, unlike the released code's
absolute ones, every layer moves in its own units and the rate falls by a cosine.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from calque.fitting.descent import Best, best_iterate, descend, iterates
from calque.fitting.parameters import KINDS
from calque.fitting.problem import Fit, LayerProblem, correct_bias
from calque.settings import AbsoluteRates, RelativeRates

BATCH_VALUES = 2**17  # patch values per step at most
BATCH_ROWS = (32, 512)  # rows per step

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The layer's output for inputs, weights (groups, O, K) and bias (groups, 1, O)."""
Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Inputs and float outputs of one step, at random."""


def multiply(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer on patches (groups, R, K): (groups, R, O)."""
    return patches @ weight.transpose(1, 2) + bias


def rows_per_step(width: int) -> int:
    """How many patches a step sees where one has `width` values in all groups."""
    return max(BATCH_ROWS[0], min(BATCH_ROWS[1], BATCH_VALUES // width))


def sampled_rows(problem: LayerProblem) -> Draw:
    """Random patches of the fitted rows: 32 to 512 of them, fewer where they are wide."""
    rows = rows_per_step(problem.patches[:, 0].numel())

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(problem.fitted), (rows,), generator=generator).to(problem.fitted.device)
        chosen = problem.fitted[picked]
        return problem.patches[:, chosen], problem.targets[:, chosen]

    return draw


@torch.enable_grad()
def fit_layer(
    problem: LayerProblem,
    start: Fit,
    bits: int,
    *,
    steps: int,
    rates: RelativeRates | AbsoluteRates,
    generator: torch.Generator,
    codes: Tensor | None = None,
    learn_grid: bool = True,
    rows: tuple[Draw, Linear] | None = None,
) -> Fit:
    """The layer fitted to its float output; never worse than `start` on the held-out rows.

    Args:
        steps: of Adam.
        codes: int8 (groups, O, K) that must stay as they are (a layer that shares its weights), or None.
        learn_grid: whether the input's scale and zero point may move (nothing else reads them).
        rows: what each step sees and how the layer maps it; the default are the problem's own patches.
    """
    corrected = correct_bias(problem, start)
    parameters = KINDS[type(rates)](problem, corrected, bits, codes=codes, learn_grid=learn_grid)
    draw, linear = rows or (sampled_rows(problem), multiply)
    optimizer = torch.optim.Adam(
        [{"params": [leaf.requires_grad_()], "lr": rate} for leaf, rate in parameters.leaves(rates)]
    )

    def gradients() -> None:
        x, target = draw(generator)
        bias = parameters.bias * parameters.bias_unit
        output = problem.activation(linear(parameters.inputs(x), parameters.weight(), bias))
        error = output - problem.activation(target)
        optimizer.zero_grad()
        (error.square().mean() / parameters.power).backward()  # type: ignore[no-untyped-call]

    taken = descend(optimizer, gradients, steps, falling=isinstance(rates, RelativeRates))
    found = chain([(0, corrected)], iterates(taken, steps, parameters.fit))
    return best_iterate(Best(start, start.after, 0), found, lambda fit: fit.after).iterate
