"""What a run decided and gained, as data and as a table."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from calque.gains import Distilled, Fidelity
from calque.grid.bits import SEEDS, written_bits
from calque.run.fields import (
    COUNT,
    Check,
    flag,
    mapping,
    measured,
    number,
    optional,
    parse_json,
    record,
    sequence,
    text,
    whole,
)

HEADINGS = (
    "layer",
    "bits",
    "input range",
    "error before",
    "after",
    "dB before",
    "after",
    "seconds",
    "bytes",
    "Mbit-ops",
    "price",
)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weighted layer.

    Attributes:
        low, high: the input grid's ends in real units; None where the input is float.
        before, after: squared error of the output over its variance on held-out calibration rows, with the weights rounded
            to nearest and as fitted; None for a layer that stays float.
        seconds: spent on this layer.
        size: bytes in the file.  macs: multiply-accumulates for one input.
        price: under a budget, the rise of the loss when this layer alone has these bits.
    """

    name: str
    bits: str
    low: float | None
    high: float | None
    before: float | None
    after: float | None
    seconds: float
    size: int
    macs: int
    bit_operations: int
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Finalist:
    """An allocation that was built and measured as a whole network.

    Attributes:
        plan: layer -> bits, as text.  size: bytes of its file at most, as the budget counts them.
        predicted, measured: rise of the loss over the base precision's: the sum of the prices, and of the network as built on
            the calibration inputs (below zero where it is better than the base, whose layers are only rounded).
    """

    plan: dict[str, str]
    size: int
    predicted: float
    measured: float
    chosen: bool = False


@dataclass(frozen=True)
class Report:
    """A run: its layers, its totals and everything that a reader must know about it.

    Attributes:
        recipe, placement, seed, versions: what reproduces it, with the plan.
        tensors: name -> (bits, low, high) of grids that no layer owns.
        float_size: bytes of the float32 network.  other_size: bytes of parameters that stay float.
        phases: name -> seconds.
        loss: by which prices and bias tuning are judged.
        finalists: under a budget, what was measured as whole networks.
        distilled: the loss on held-out inputs and their mixtures before and after distillation, and the steps that reproduce it.
        tuned: the loss on held-out inputs before and after bias tuning.
        file_size: bytes that the file for ONNX Runtime and OpenVINO takes at most, predicted; None where there is not one file.
        file_limit: bytes that a budget allows the file.
        fidelity: how close the outputs are to the float network's, on held-out calibration inputs; None in reports of older runs.
        notes: what stays float, what was changed or deserves attention, one sentence each.
    """

    recipe: str
    placement: str
    seed: int
    calibration_rows: int
    layers: tuple[LayerReport, ...]
    tensors: dict[str, tuple[str, float, float]]
    float_size: int
    other_size: int
    phases: dict[str, float]
    notes: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    loss: str = ""
    finalists: tuple[Finalist, ...] = ()
    tuned: tuple[float, float] | None = None
    distilled: Distilled | None = None
    file_size: int | None = None
    file_limit: int | None = None
    fidelity: Fidelity | None = None

    @property
    def size(self) -> int:
        """Bytes of all parameters, packed: codes at their bits, 12 bytes per channel, what stays float."""
        return sum(layer.size for layer in self.layers) + self.other_size

    @property
    def bit_operations(self) -> int:
        return sum(layer.bit_operations for layer in self.layers)

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, content: str) -> "Report":
        """The report that `to_json` wrote. Raises: SpecError, with the field and its rule."""
        table: dict[str, Any] = parse_json(content, "a report")
        check_report("report", table)
        table["layers"] = tuple(LayerReport(**layer) for layer in table["layers"])
        table["tensors"] = {
            name: (bits, float(low), float(high)) for name, (bits, low, high) in table["tensors"].items()
        }
        table["notes"] = tuple(table["notes"])
        table["finalists"] = tuple(Finalist(**finalist) for finalist in table.get("finalists", ()))
        table["tuned"] = None if table.get("tuned") is None else tuple(table["tuned"])
        table["distilled"] = None if table.get("distilled") is None else Distilled(**table["distilled"])
        table["fidelity"] = None if table.get("fidelity") is None else Fidelity.from_dict(table["fidelity"])
        return cls(**table)

    def __str__(self) -> str:
        rows = [_cells(layer) for layer in self.layers]
        totals = ("total", "", "", "", "", "", "", f"{sum(layer.seconds for layer in self.layers):.1f}",
                  f"{self.size:,}", f"{self.bit_operations / 1e6:,.1f}", "")  # fmt: skip
        columns = len(HEADINGS) if self.finalists else len(HEADINGS) - 1
        lines = [*table_lines(HEADINGS[:columns], [cells[:columns] for cells in (*rows, totals)])]
        for name, (bits, low, high) in self.tensors.items():
            lines.append(f"tensor {name}: {bits}, {low:.4g} .. {high:.4g}")
        lines.append(
            f"recipe {self.recipe}, placement {self.placement}, seed {self.seed}, {self.calibration_rows} calibration rows"
        )
        for finalist in self.finalists:
            lines.append(
                f"{'chosen' if finalist.chosen else 'tried '} {count_bits(finalist.plan.values())}: at most {finalist.size:,} "
                f"bytes on disk, {self.loss} +{finalist.predicted:.4g} predicted, {finalist.measured:+.4g} measured"
            )
        if self.distilled is not None:
            lines.append(str(self.distilled))
        if self.tuned is not None:
            lines.append(f"bias tuning: {self.loss} {self.tuned[0]:.4g} -> {self.tuned[1]:.4g} on held-out inputs")
        if self.fidelity is not None:
            lines.append(str(self.fidelity))
        share = self.size / self.float_size
        lines.append(f"{self.size:,} bytes, {share:.1%} of the float network's {self.float_size:,}{self._on_disk()}")
        lines.append(", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items()))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _on_disk(self) -> str:
        """What the file takes, and what it may take, as the end of a sentence."""
        if self.file_size is None:
            return ""
        limit = "" if self.file_limit is None else f"; the budget allows {self.file_limit:,}"
        return f"; about {self.file_size:,} bytes on disk, with scales, nodes and names{limit}"


_SIZE, _SECONDS = whole(0, COUNT), number(0)
_LAYER = record(
    {
        "name": text, "bits": written_bits, "low": optional(number()), "high": optional(number()), "before": optional(measured),
        "after": optional(measured), "seconds": _SECONDS, "size": _SIZE, "macs": _SIZE, "bit_operations": _SIZE,
    },
    {"price": optional(measured)},
)  # fmt: skip
_FINALIST = record(
    {"plan": mapping(written_bits), "size": _SIZE, "predicted": measured, "measured": measured}, {"chosen": flag}
)
_DISTILLED = record({"before": measured, "after": measured, "steps": _SIZE, "kept": _SIZE, "seconds": _SECONDS})


_OUTPUT = record(
    {"name": text, "decibels": measured},
    {"kl": optional(measured), "same_class": optional(measured), "certainty": optional(measured)},
)
_FIDELITY = record({"inputs": _SIZE, "held_out": flag, "outputs": sequence(_OUTPUT)})


def _tensor(where: str, value: Any) -> None:
    """Bits and both ends of a grid."""
    sequence(lambda *_: None, 3)(where, value)
    for check, entry in zip((written_bits, number(), number()), value, strict=True):
        check(where, entry)


check_report: Check = record(
    {
        "recipe": text, "placement": text, "seed": whole(*SEEDS), "calibration_rows": _SIZE, "layers": sequence(_LAYER),
        "tensors": mapping(_tensor), "float_size": whole(1, COUNT), "other_size": _SIZE, "phases": mapping(_SECONDS),
        "notes": sequence(text),
    },
    {
        "versions": mapping(text), "loss": text, "finalists": sequence(_FINALIST), "tuned": optional(sequence(measured, 2)),
        "distilled": optional(_DISTILLED), "fidelity": optional(_FIDELITY), "file_size": optional(_SIZE),
        "file_limit": optional(_SIZE),
    },
)  # fmt: skip


def count_bits(bits: Iterable[str]) -> str:
    """How many layers have which bits.

    >>> count_bits(["w4a4", "w8a8", "w4a4"])
    'w4a4 x2, w8a8 x1'
    """
    return ", ".join(f"{text} x{count}" for text, count in sorted(Counter(bits).items()))


def _cells(layer: LayerReport) -> tuple[str, ...]:
    span = "" if layer.low is None or layer.high is None else f"{layer.low:.3g} .. {layer.high:.3g}"
    errors = ("" if error is None else f"{error:.2e}" for error in (layer.before, layer.after))
    decibels = ("" if error is None else f"{signal_to_noise(error):.1f}" for error in (layer.before, layer.after))
    return (layer.name, layer.bits, span, *errors, *decibels, f"{layer.seconds:.2f}", f"{layer.size:,}",
            f"{layer.bit_operations / 1e6:,.1f}", "" if layer.price is None else f"{layer.price:.2e}")  # fmt: skip


def signal_to_noise(error: float) -> float:
    """Decibels of a relative squared error.

    >>> round(signal_to_noise(0.01))
    20
    """
    return -10 * math.log10(max(error, 1e-30))


def table_lines(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A plain-text table: the first column to the left, the others to the right.

    >>> table_lines(("a", "b"), [("x", "10")])
    ['a   b', '-  --', 'x  10']
    """
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return [line(headings), line(tuple("-" * width for width in widths)), *(line(row) for row in rows)]
