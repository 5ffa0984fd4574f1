"""What a verification found, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass

from calque.export.latency import Latency
from calque.export.runtimes import Target
from calque.report import table_lines

OUTSIDE = 8.0  # inputs "far outside": this many times as large
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "qonnx": "QONNX"}


@dataclass(frozen=True, slots=True)
class Agreement:
    """One file, one optimizer setting, one set of inputs, against the exact integer evaluation and the simulation.

    Attributes:
        exact, simulated: share of rows whose first output has the same top-1 (for outputs (N, C)), or of output values that
            are less than half a step apart (for any other output).
        mean_steps, largest_steps: distance to the exact evaluation in steps of the output.
        parted: the first tensor whose codes differ from the exact evaluation's in any place ("" if none does, or where the
            runtime was not asked for codes).
        parted_share: of that tensor's codes.
    """

    exact: float
    simulated: float
    mean_steps: float
    largest_steps: float
    parted: str
    parted_share: float


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
        """One line."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        headings = (TITLES[self.target], "= exact", "= simulated", "mean steps", "largest", "first tensor that parts")
        cases = {"optimized": self.optimized, "optimizer off": self.plain, "far outside": self.outside}
        asked = self.target == "onnxruntime"
        lines = table_lines(
            headings, [(name, *_cells(case, asked=asked)) for name, case in cases.items() if case is not None]
        )
        for title, kernels in (("integer", self.integer_kernels), ("float", self.float_kernels)):
            names = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
            lines.append(f"{title} kernels: {names or 'none'}")
        lines += [f"  {operator}: {reason}" for operator, reason in sorted(self.reasons.items())]
        lines.append(f"{self.inputs} inputs, {self.file_bytes:,} bytes ({self.ideal_bytes:,} packed)")
        if self.latency is not None:
            lines.append(str(self.latency))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _cells(case: Agreement, *, asked: bool) -> tuple[str, ...]:
    parted = (
        f"{case.parted} ({case.parted_share:.1e} of its codes)" if case.parted else "none" if asked else "not asked"
    )
    return (f"{case.exact:.2%}", f"{case.simulated:.2%}", f"{case.mean_steps:.2g}", f"{case.largest_steps:.2g}", parted)
