"""What a verification found, as a table and as JSON."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.utils._pytree import tree_map

from calque.report import table_lines
from calque.shipping.latency import Latency
from calque.shipping.runtimes import Target

Kind = Literal["class scores", "values", "whole numbers"]

EDGES = 0.01  # of the codes of the first tensor that parts: no more lie at rounding edges behind float kernels (measured: 1e-5)
LEAST_DB = 30.0  # a file's error lies this far below each of its outputs
LOOSE = (
    1 / 8
)  # of the spread: values of rows whose codes part at rounding edges may be this far away, if LEAST_DB holds
LIMIT_DB = 200.0  # of equal outputs; float32 itself ends near 150
OUTSIDE = 8.0  # inputs "far outside": this many times as large
PARTS = "first tensor that parts"  # a column
SHARES = {
    "class scores": "of rows with the same highest score",
    "values": "of values within half a step",
    "whole numbers": "of equal whole numbers",
}
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "qonnx": "QONNX"}


@dataclass(frozen=True, slots=True)
class OutputAgreement:
    """One output of a file, beside the exact integer evaluation's and the simulation's.

    Attributes:
        name: in the file.
        kind: "class scores" are real numbers (N, C) with C >= 2, "whole numbers" integers and booleans, "values" the rest.
        exact, simulated: the share that agrees: of class scores rows with the same top-1 (ties within half a step are none), of
            values those within half a step, of whole numbers those that are equal. ONNX Runtime also tells the codes of every
            tensor. A row of class scores whose codes are all the same must have the same values, too. Where the first tensor
            that parts does so in EDGES of its codes at most, values of rows whose codes part may be LOOSE of the spread away.
            Where it does in more, and no layer is on float inputs, rows whose codes part count only if their values are within
            half a step, and their whole numbers do not.
        decibels: variance of the exact output (mean square, where that is constant) over the mean square of the error, from
            -LIMIT_DB to LIMIT_DB; None for whole numbers.
        mean_steps, largest_steps: distance to the exact evaluation in steps of the output's grid, or of its integer sums; in
            1/256 of a standard deviation, where it has neither; None for whole numbers.
    """

    name: str
    kind: Kind
    exact: float
    simulated: float
    decibels: float | None
    mean_steps: float | None
    largest_steps: float | None

    def passes(self, bound: float) -> bool:
        """Whether the share is at least `bound` and the error LEAST_DB below the output or more; a bound of 0 asks nothing."""
        return bound == 0 or (self.exact >= bound and (self.decibels is None or self.decibels >= LEAST_DB))


@dataclass(frozen=True, slots=True)
class Agreement:
    """One file, one optimizer setting, one set of inputs, against the exact integer evaluation and the simulation.

    Attributes:
        outputs: each output of the file, in its order; the figures below are those of the worst.
        tensors: whose codes were compared; 0 where the runtime was not asked, or the network has no grids.
        parted: the first of them whose codes differ from the exact evaluation's in any place; "" if none does.
        parted_share: of that tensor's codes.
    """

    outputs: tuple[OutputAgreement, ...]
    tensors: int
    parted: str
    parted_share: float

    @property
    def exact(self) -> float:
        return min((output.exact for output in self.outputs), default=1.0)

    @property
    def simulated(self) -> float:
        return min((output.simulated for output in self.outputs), default=1.0)

    @property
    def decibels(self) -> float:
        return min((output.decibels for output in self.outputs if output.decibels is not None), default=LIMIT_DB)

    @property
    def mean_steps(self) -> float:
        return max((output.mean_steps for output in self.outputs if output.mean_steps is not None), default=0.0)

    @property
    def largest_steps(self) -> float:
        return max((output.largest_steps for output in self.outputs if output.largest_steps is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, those of the worst output beside those of each."""
        worst = ("exact", "simulated", "decibels", "mean_steps", "largest_steps")
        return {**{name: getattr(self, name) for name in worst}, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Verification:
    """What a runtime does with an exported file.

    Attributes:
        target: the runtime.
        inputs: rows compared.
        optimized: as the runtime loads the file by default, integer products exact where it offers that.
        plain: with the optimizer off; None where a runtime has no such switch.
        outside: as `optimized`, on inputs OUTSIDE times as large.
        integer_kernels, float_kernels, other_kernels: operator -> count in the executed graph.
        reasons: operator of a float kernel -> why it is one.
        file_bytes: of the file.
        ideal_bytes: packed codes, 12 bytes per output channel, and what stays float.
        notes: what to know before the file is shipped.
        latency: beside the float network's file; None where none was given.
    """

    target: Target
    inputs: int
    optimized: Agreement
    plain: Agreement | None
    outside: Agreement
    integer_kernels: dict[str, int]
    float_kernels: dict[str, int]
    other_kernels: dict[str, int]
    reasons: dict[str, str]
    file_bytes: int
    ideal_bytes: int
    notes: tuple[str, ...] = ()
    latency: Latency | None = None

    @property
    def agreement_exact(self) -> float:
        return self.optimized.exact

    @property
    def agreement(self) -> float:
        return self.optimized.simulated

    def to_json(self) -> str:
        """One line; distances that are not finite are null."""
        cases = {"optimized": self.optimized, "plain": self.plain, "outside": self.outside}
        figures = {name: None if case is None else case.to_dict() for name, case in cases.items()}
        return json.dumps(tree_map(_finite, asdict(self) | figures))

    def __str__(self) -> str:
        headings = (TITLES[self.target], "output", "= exact", "= simulated", "dB", "mean steps", "largest", PARTS)
        cases = {"optimized": self.optimized, "optimizer off": self.plain, "far outside": self.outside}
        rows = [row for name, case in cases.items() if case is not None for row in _rows(name, case)]
        lines = [*table_lines(headings, rows), *_legend(self)]
        for title, kernels in (("integer", self.integer_kernels), ("float", self.float_kernels)):
            names = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
            lines.append(f"{title} kernels: {names or 'none'}")
        for reason in dict.fromkeys(reason for _, reason in sorted(self.reasons.items())):
            alike = sorted(operator for operator, other in self.reasons.items() if other == reason)
            lines.append(f"  {', '.join(alike)}: {reason}")
        lines.append(f"{self.inputs} inputs, {self.file_bytes:,} bytes ({self.ideal_bytes:,} packed)")
        if self.latency is not None:
            lines.append(str(self.latency))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(title: str, case: Agreement) -> list[tuple[str, ...]]:
    """A row for each output."""
    share = f"{case.parted} ({case.parted_share:.1e} of its codes)"
    parted = share if case.parted else f"none of {case.tensors}" if case.tensors else "not asked"
    return [(title, *_cells(output), parted) for output in case.outputs]


def _cells(output: OutputAgreement) -> tuple[str, ...]:
    shares = (output.name, f"{output.exact:.2%}", f"{output.simulated:.2%}")
    if output.decibels is None or output.mean_steps is None:
        return (*shares, "-", "-", "-")
    decibels = "equal" if output.decibels == LIMIT_DB else f"{output.decibels:.1f}"
    return (*shares, decibels, f"{output.mean_steps:.2g}", f"{output.largest_steps:.2g}")


def _legend(found: Verification) -> list[str]:
    """What the table's rows and columns mean, for the kinds of outputs that it has."""
    kinds = {output.kind for output in found.optimized.outputs}
    off = "optimizer off, without its own rewriting, and " if found.plain is not None else ""
    shares = [text for kind, text in SHARES.items() if kind in kinds]
    lines = [
        f"optimized: as {TITLES[found.target]} loads the file, which is judged; not judged: {off}far outside, inputs "
        f"{OUTSIDE:g} times as large",
        f"= exact: share that is the exact integer evaluation's ({'; '.join(shares)}); = simulated: the PyTorch module's",
    ]
    if kinds != {"whole numbers"}:
        lines += [
            f"dB: the exact output's variance over the error's mean square; {LEAST_DB:g} is asked",
            "mean steps, largest: distance from the exact output, in steps of its grid or of its integer sums, else in "
            "1/256 of its standard deviation",
        ]
    return [
        f"  {line}" for line in [*lines, f"{PARTS}: whose codes differ from the exact ones in any place, in how many"]
    ]
