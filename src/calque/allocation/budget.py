"""What a network may cost, and the table of latencies that a user measured."""

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from calque.errors import SpecError
from calque.grid.bits import Bits
from calque.run.fields import ENDLESS, choice, shown
from calque.run.files import require_file

FilePath = str | os.PathLike[str]
Amount = float | int | str
Latencies = Mapping[tuple[str, str], float]  # (layer, bits) -> milliseconds
Minimized = Literal["size", "bops", "latency"]

QUANTITIES = ("size", "bops", "activation_memory")
HEADER = ["layer", "bits", "milliseconds"]
MOST = 10**21  # bytes, bit-operations
MOST_MILLISECONDS = 10**9  # eleven days
NANOSECONDS = 10**6  # of a millisecond

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_OPERATIONS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NUMBER_WITH_UNIT = re.compile(r"\s*(\d{1,30}(?:\.\d{0,30})?(?:[eE][+-]?\d{1,3})?|\.\d{1,30})\s*([A-Za-z]*|%)\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """What the quantized network may cost.

    Attributes:
        size: bytes of the file that `export_onnx` writes for ONNX Runtime and OpenVINO, everything in it included (nodes, names,
            metadata, what stays float): its predicted upper bound keeps to this. A share is of the float32 network's parameters,
            which anybody can count, and which no version of an exporter changes.
        bops: bit-operations for one input.  activation_memory: bytes of activations alive at one time, the peak.
            Each of the three is a float in (0, 1], a share of the float32 network; an int > 0, absolute; or text,
            as on the command line: a plain number up to 1 or a percentage, a share ("0.13", "13%"); or a number with a unit
            ("1.2MB", "300kB", "500B" for bytes; "3.5G", "200M", "1e9" for bit-operations).
        latency: a table (a CSV file with the columns layer, bits, milliseconds, or a mapping from (layer, bits) to
            milliseconds) and the limit of the layers' sum in milliseconds.
        loss: the predicted increase of the loss that `minimize` may cost, in the loss's own unit.
        minimize: which cost is made small, with `loss` as the limit; None makes the loss small.

    Raises:
        SpecError: an amount out of its range or of another form, nothing limited, `loss` without `minimize` or the reverse.

    >>> Budget(size=0.13, bops="3.5G").limits({"size": 1000, "bops": 10**12})
    {'size': 130, 'bops': 3500000000}
    """

    size: Amount | None = None
    bops: Amount | None = None
    activation_memory: Amount | None = None
    latency: tuple[FilePath | Latencies, float] | None = None
    loss: float | None = None
    minimize: Minimized | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in (*QUANTITIES, "latency", "loss", "minimize")):
            raise SpecError(
                "a budget limits something. Give size, bops, activation_memory, latency, or loss with minimize."
            )
        for name in QUANTITIES:
            if getattr(self, name) is not None:
                _parse_amount(name, getattr(self, name))
        if self.latency is not None:
            object.__setattr__(self, "latency", _checked_latency(self.latency, self.minimize))
        self._check_loss()

    def _check_loss(self) -> None:
        if (self.loss is None) != (self.minimize is None):
            raise SpecError(
                "loss and minimize come together: which cost to make small, and what the loss may increase by. "
                f"Got loss={shown(self.loss)}, minimize={shown(self.minimize)}."
            )
        if self.minimize is not None:
            choice(*get_args(Minimized))("minimize", self.minimize)
        if self.loss is not None and not (_is_number(self.loss) and math.isfinite(self.loss) and self.loss >= 0):
            raise SpecError(f"loss must be a finite number >= 0. Got {shown(self.loss)}.")
        if self.minimize == "latency" and self.latency is None:
            raise SpecError(
                'minimize="latency" needs latency=(table, limit in milliseconds); the limit may be float("inf").'
            )

    def limits(self, floats: Mapping[str, int]) -> dict[str, int]:
        """The absolute limits by quantity: bytes, bit-operations, and nanoseconds for "latency" where that is finite.

        Args:
            floats: what the float32 network costs, by quantity; shares refer to it.

        Raises:
            SpecError: a share of a quantity that `floats` lacks, or one of less than one unit.
        """
        found: dict[str, int] = {}
        for name in QUANTITIES:
            given = getattr(self, name)
            if given is None:
                continue
            amount, is_share = _parse_amount(name, given)
            if is_share and name not in floats:
                raise SpecError(
                    f"{name} is a share of the float32 network, whose {name} is not known. Give it absolute."
                )
            found[name] = math.floor(amount * floats[name]) if is_share else math.floor(amount)
            if found[name] < 1:
                raise SpecError(f"{name} must allow at least one unit. Got {shown(given)}.")
        if self.latency is not None and math.isfinite(self.latency[1]):
            found["latency"] = nanoseconds(self.latency[1])
        return found

    def to_dict(self) -> dict[str, Any]:
        """The budget as JSON can carry it."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in (*QUANTITIES, "loss", "minimize")}
        if self.latency is None:
            return {**plain, "latency": None}
        table, limit = self.latency
        entries = [[*key, value] for key, value in table.items()] if isinstance(table, Mapping) else table
        return {**plain, "latency": {"table": entries, "milliseconds": limit if math.isfinite(limit) else None}}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Budget":
        """The budget that `to_dict` wrote. Raises: SpecError."""
        try:
            latency = plain.get("latency")
            if latency is not None:
                table = latency["table"]
                if not isinstance(table, str):
                    table = {(layer, bits): value for layer, bits, value in table}
                limit = latency["milliseconds"]
                latency = (table, math.inf if limit is None else limit)
            return cls(**{**plain, "latency": latency})
        except SpecError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpecError(f"not a budget: {error}. Write it with Budget.to_dict.") from error


def read_latency(table: FilePath | Latencies) -> dict[tuple[str, str], float]:
    """Milliseconds of each (layer, bits), from a CSV file with the header layer,bits,milliseconds, or a mapping.

    Raises:
        SpecError: a missing header, a malformed or repeated line, bits that are none, a time negative or not finite.
        OSError: the file cannot be read.

    >>> read_latency({("conv1", "w8a8"): 0.5})
    {('conv1', 'w8a8'): 0.5}
    """
    found: dict[tuple[str, str], float] = {}
    if isinstance(table, Mapping):
        entries = ((f"latency of {key}", [*key, value]) for key, value in table.items())
        return _collected(entries, found)
    return _collected(_lines(require_file(table)), found)


def _collected(
    entries: Iterator[tuple[str, list[Any]]], found: dict[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    for place, fields in entries:
        if len(fields) != len(HEADER):
            raise SpecError(f"{place}: an entry is layer, bits, milliseconds. Got {fields}.")
        layer, bits, value = fields
        try:
            key = (str(layer).strip(), str(Bits.parse(str(bits).strip())))
            milliseconds = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(f"{place}: {error}") from error
        if not (math.isfinite(milliseconds) and milliseconds >= 0):
            raise SpecError(f"{place}: milliseconds must be finite and >= 0. Got {shown(value)}.")
        if milliseconds > MOST_MILLISECONDS:
            raise SpecError(f"{place}: milliseconds must be at most {MOST_MILLISECONDS:,}. Got {shown(value)}.")
        if key in found:
            raise SpecError(f"{place}: {', '.join(key)} has an entry already. Keep one.")
        found[key] = milliseconds
    return found


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The entries of a CSV file, each with its place; blank lines are left out."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        reader = csv.reader(file)
        try:
            header = [name.strip() for name in next(reader, [])]
            if header != HEADER:
                raise SpecError(
                    f"{path}, line 1: the header must be {','.join(HEADER)}. Got {shown(','.join(header))}."
                )
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield f"{path}, line {reader.line_num}", fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise SpecError(f"{path}, line {reader.line_num + 1}: not a CSV file in UTF-8: {error}.") from error


def nanoseconds(milliseconds: float) -> int:
    """Whole nanoseconds, of the number as it is written.

    >>> nanoseconds(0.1) * 3 == nanoseconds(0.3)
    True
    """
    return round(Fraction(str(float(milliseconds))) * NANOSECONDS)


def _checked_latency(latency: Any, minimize: str | None) -> tuple[str | Latencies, float]:
    if not (isinstance(latency, (tuple, list)) and len(latency) == 2):
        raise SpecError(f"latency is a pair: a table and its limit in milliseconds. Got {shown(latency)}.")
    table, limit = latency
    if not (
        _is_number(limit)
        and limit > 0
        and (limit <= MOST_MILLISECONDS or (minimize == "latency" and limit == math.inf))
    ):
        raise SpecError(
            f"latency's limit is in milliseconds, > 0, at most {MOST_MILLISECONDS:,}, and finite unless latency is what is "
            "minimized. "
            f"Got {shown(limit)}."
        )
    if isinstance(table, Mapping):
        return read_latency(table), float(limit)
    path = os.fspath(table) if isinstance(table, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise SpecError(f"latency's table is a CSV file or a mapping. Got {type(table).__name__}.")
    return path, float(limit)


def _is_number(value: object) -> bool:
    """Whether the value is a number that a float can hold, infinity too."""
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) <= ENDLESS)


def _parse_amount(name: str, given: object) -> tuple[Fraction, bool]:
    """The number, and whether it is a share of the float32 network; decimals as they are written, not as binary."""
    if isinstance(given, str):
        return _parse_text(name, given)
    if isinstance(given, float) and 0 < given <= 1:
        return Fraction(str(float(given))), True
    if type(given) is int and 0 < given <= MOST:
        return Fraction(given), False
    raise SpecError(
        f"{name} must be a share in (0, 1] (a float), an absolute int from 1 to {MOST:,}, or text. Got {shown(given)}."
    )


def _parse_text(name: str, text: str) -> tuple[Fraction, bool]:
    units = _OPERATIONS if name == "bops" else _BYTES
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    if match and match[2] == "%" and 0 < Fraction(match[1]) <= 100:
        return Fraction(match[1]) / 100, True
    if match and not match[2] and 0 < Fraction(match[1]) <= 1:
        return Fraction(match[1]), True
    if match and match[2].upper() in units and 0 < Fraction(match[1]) * units[match[2].upper()] <= MOST:
        return Fraction(match[1]) * units[match[2].upper()], False
    example = '"200M" or "3.5G"' if name == "bops" else '"300kB" or "1.2MB"'
    raise SpecError(f'{name} as text is a share in (0, 1], such as "0.13" or "13%", or a number with a unit, up to {MOST:,}, '
                    f"such as {example}. Got {shown(text)}.")  # fmt: skip
