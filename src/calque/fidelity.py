"""How close the quantized network's outputs are to the float network's, on calibration inputs that its fits did not see."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from calque.graph import Batch
from calque.graph.paths import leaf_paths, output_names
from calque.losses import closeness, kl
from calque.solvers.rows import Rows, hold_out

MOST = (
    128  # inputs that are compared: a tenth of a mean's size is sure, for 1 or 2 % of the time of the quickest recipe
)
CERTAIN = 0.99  # resnet20 gives its training images 0.995, and new ones, whose KL is eight times as large, 0.971
LIMIT_DB = 200.0  # of equal outputs; float32 itself ends near 150

Pair = tuple[int, Sequence[Any], Sequence[Any]]
"""A number of inputs, and the float and the quantized network's output leaves for them."""


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the quantized network beside the float network's.

    Attributes:
        name: its key or field in what forward returns; "output" where that is one tensor.
        decibels: variance of the float output over the mean square of the error, from -LIMIT_DB to LIMIT_DB.
        kl: of scores of classes (N, C), KL(float || quantized) in nats, mean over inputs; else None.
        same_class: of scores of classes, the share of inputs with the same highest score; else None.
        certainty: of scores of classes, the mean probability that the float network gives its own class; else None. Where it is
            near 1, as on images that the network was trained on, KL and classes of new inputs will be worse than these.
    """

    name: str
    decibels: float
    kl: float | None = None
    same_class: float | None = None
    certainty: float | None = None

    def __str__(self) -> str:
        decibels = "equal" if self.decibels >= LIMIT_DB else f"{self.decibels:.1f} dB"
        if self.kl is None or self.certainty is None:
            return decibels
        sure = " (the float network is sure of these: expect more KL on others)" if self.certainty > CERTAIN else ""
        return f"{decibels}, KL {self.kl:.3g} nats, same class {self.same_class:.1%}{sure}"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What quantization cost the whole network, by its outputs.

    Attributes:
        inputs: the calibration inputs compared, the last ones.
        held_out: whether no fit saw them. They chose between fits, ranges cover them, and statistics count them in.
        outputs: every output of real numbers, in the order in which forward returns them.
    """

    inputs: int
    held_out: bool
    outputs: tuple[OutputFidelity, ...]

    @property
    def worst(self) -> OutputFidelity:
        """The output with the fewest decibels."""
        return min(self.outputs, key=lambda output: output.decibels)

    def __str__(self) -> str:
        where = "held-out calibration inputs" if self.held_out else "calibration inputs that the fits used as well"
        line = f"outputs on {self.inputs} {where}: "
        if len(self.outputs) == 1:
            return f"{line}{self.worst}"
        scores = [output for output in self.outputs if output.kl is not None and output is not self.worst]
        more = "".join(f"; {output.name}: {output}" for output in scores)
        return f"{line}worst of {len(self.outputs)} is {self.worst.name}: {self.worst}{more}"

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Fidelity":
        """What `dataclasses.asdict` took apart."""
        outputs = tuple(OutputFidelity(**output) for output in table["outputs"])
        return cls(table["inputs"], table["held_out"], outputs)


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
