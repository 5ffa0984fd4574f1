"""What a run decided and gained, as data and as a table."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

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
)
CHANNEL_BYTES = 12  # scale, bias and bias scale of an output channel (METHOD section 3)
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weighted layer.

    Attributes:
        low, high: the input grid's ends in real units; None where the input is float.
        before, after: squared error of the output over its variance on held-out calibration rows, with the weights rounded
            to nearest and as fitted; None for a layer that stays float.
        seconds: spent on this layer.
        size: bytes in the file.  macs: multiply-accumulates for one input.
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


@dataclass(frozen=True)
class Report:
    """A run: its layers, its totals and everything that a reader must know about it.

    Attributes:
        recipe, placement, seed, versions: what reproduces it, with the plan.
        tensors: name -> (bits, low, high) of grids that no layer owns.
        float_size: bytes of the float32 network.  other_size: bytes of parameters that stay float.
        phases: name -> seconds.
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
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote."""
        table: dict[str, Any] = json.loads(text)
        table["layers"] = tuple(LayerReport(**layer) for layer in table["layers"])
        table["tensors"] = {
            name: (str(b), float(low), float(high)) for name, (b, low, high) in table["tensors"].items()
        }
        table["notes"] = tuple(table["notes"])
        return cls(**table)

    def __str__(self) -> str:
        rows = [_cells(layer) for layer in self.layers]
        totals = ("total", "", "", "", "", "", "", f"{sum(layer.seconds for layer in self.layers):.1f}",
                  f"{self.size:,}", f"{self.bit_operations / 1e6:,.1f}")  # fmt: skip
        lines = [*table_lines(HEADINGS, [*rows, totals])]
        for name, (bits, low, high) in self.tensors.items():
            lines.append(f"tensor {name}: {bits}, {low:.4g} .. {high:.4g}")
        lines.append(
            f"recipe {self.recipe}, placement {self.placement}, seed {self.seed}, {self.calibration_rows} calibration rows"
        )
        share = self.size / self.float_size
        lines.append(f"{self.size:,} bytes, {share:.1%} of the float network's {self.float_size:,}")
        lines.append(", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items()))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    span = "" if layer.low is None or layer.high is None else f"{layer.low:.3g} .. {layer.high:.3g}"
    errors = ("" if error is None else f"{error:.2e}" for error in (layer.before, layer.after))
    decibels = ("" if error is None else f"{signal_to_noise(error):.1f}" for error in (layer.before, layer.after))
    return (layer.name, layer.bits, span, *errors, *decibels, f"{layer.seconds:.2f}", f"{layer.size:,}",
            f"{layer.bit_operations / 1e6:,.1f}")  # fmt: skip


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


def layer_size(codes: int, channels: int, bits: int) -> int:
    """Bytes of a layer with that many codes: packed, and CHANNEL_BYTES per output channel.

    >>> layer_size(100, 4, 4)
    98
    """
    return -(-codes * bits // 8) + CHANNEL_BYTES * channels
