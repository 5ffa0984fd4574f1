"""How close the quantized network's outputs are to the float network's, on calibration inputs that its fits did not see."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from calque.calibration.losses import closeness, kl
from calque.calibration.rows import Rows, hold_out
from calque.gains import LIMIT_DB, Fidelity, OutputFidelity
from calque.network import Batch
from calque.network.paths import leaf_paths, output_names

MOST = (
    128  # inputs that are compared: a tenth of a mean's size is sure, for 1 or 2 % of the time of the quickest recipe
)

Pair = tuple[int, Sequence[Any], Sequence[Any]]
"""A number of inputs, and the float and the quantized network's output leaves for them."""


@torch.no_grad()
def held_out_fidelity(
    exact: Callable[[list[Any]], Sequence[Any]],
    quantized: Callable[[list[Any]], Sequence[Any]],
    batches: Sequence[Batch],
    references: Sequence[Sequence[Any]],
    spec: pytree.TreeSpec,
    *,
    fitted: bool,
) -> Fidelity | None:
    """The fidelity on the last fifth of the inputs, MOST at most; on all of them where there are fewer than five.

    Args:
        exact, quantized: the networks, of flat inputs.
        references: the float network's output leaves on each batch.
        spec: their tree.
        fitted: whether fits used the last fifth as well.

    Returns:
        None where there is none; see `fidelity`.
    """
    first, last = hold_out(batches, references)
    parts = last or first
    if last and len(first) + len(last) > len(batches):  # outputs of a batch that was cut: not all have its rows
        parts[0] = Rows(parts[0].inputs, list(exact(parts[0].inputs)), parts[0].count, parts[0].whole)
    while len(parts) > 1 and sum(part.count for part in parts[1:]) >= MOST:
        del parts[0]
    pairs = ((part.count, part.references, quantized(part.inputs)) for part in parts)
    return fidelity(pairs, output_names(leaf_paths(spec)), held_out=bool(last) and not fitted)


@torch.no_grad()
def fidelity(pairs: Iterable[Pair], names: Sequence[str], *, held_out: bool) -> Fidelity | None:
    """The fidelity over all pairs of outputs.

    Returns:
        None where no output has real numbers, or values decide how many there are: those of boxes, say, are no pairs then.
    """
    sums: dict[str, _Sums] = {}
    inputs = 0
    for count, exact, found in pairs:
        inputs += count
        for name, one, other in zip(names, exact, found, strict=True):
            if not isinstance(one, Tensor) or not one.is_floating_point():
                continue
            if one.shape != other.shape:
                return None
            if one.numel():
                sums.setdefault(name, _Sums(scores=closeness([one]) is kl)).add(one, other)
    outputs = tuple(found.output(name) for name, found in sums.items())
    return Fidelity(inputs, held_out, outputs) if outputs else None


@dataclass
class _Sums:
    """Of one output over the batches so far; infinite values, which a mask leaves, count in none of them."""

    scores: bool
    values: int = 0
    total: float = 0.0
    power: float = 0.0
    noise: float = 0.0
    rows: int = 0
    divergence: float = 0.0
    same: int = 0
    certainty: float = 0.0
    offset: float | None = None

    def add(self, exact: Tensor, found: Tensor) -> None:
        finite = exact.isfinite()
        one, other = exact[finite].double(), found[finite].double()
        if self.offset is None:  # squares of values far from zero would lose the digits of their variance
            self.offset = one.mean().item() if one.numel() else 0.0
        apart = one - self.offset
        self.values += one.numel()
        self.total += apart.sum().item()
        self.power += apart.square().sum().item()
        self.noise += (other - one).square().sum().item()
        if self.scores:
            self.rows += len(exact)
            self.divergence += len(exact) * kl([exact], [found]).item()
            self.same += int((exact.argmax(1) == found.argmax(1)).sum())
            self.certainty += exact.softmax(1).amax(1).sum().item()

    def output(self, name: str) -> OutputFidelity:
        """The figures."""
        count = max(1, self.values)
        variance = max(0.0, self.power / count - (self.total / count) ** 2)
        decibels = _decibels(variance, self.noise / count)
        if not self.scores:
            return OutputFidelity(name, decibels)
        divergence, same, certainty = (total / self.rows for total in (self.divergence, self.same, self.certainty))
        return OutputFidelity(name, decibels, divergence, same, certainty)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return LIMIT_DB
    if signal == 0 or not math.isfinite(noise):
        return -LIMIT_DB
    return max(-LIMIT_DB, min(LIMIT_DB, 10 * math.log10(signal / noise)))
