"""Bits and plans: frozen data, no torch modules.

A plan maps names to bits. It is the one currency between quantization, report, files and command line.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from calque.errors import SpecError
from calque.run.fields import inside, parse_toml, require, shown, toml_string
from calque.run.files import path_of, require_file, write_whole

LOWEST_BITS, HIGHEST_BITS = 2, 8

Placement = Literal["inputs", "integer"]

SEEDS = (-(2**63), 2**63 - 1)  # the least and the largest

GROUPS = (16, 32, 64, 128, 256)  # inputs that may share a weight scale: what MatMulNBits reads

SHIPPED = ("nearest", "light", "fast", "accurate", "sequential", "advanced", "paper-2021")  # recipes by name

BOUND = 0.99  # least agreement of each output of a file with the exact integer evaluation

OPTIONS = ("bits", "first_last")  # of quantize, which name bits as layers do

_PATTERN = re.compile(r"(?:w(?P<w>\d{1,9}))?(?:a(?P<a>\d{1,9})|g(?P<g>\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of a layer's weights and of its input activations; None stands for float.

    A tensor that no layer owns (the result of a residual add, say) has activation bits only.

    Attributes:
        group: how many inputs of an output channel share a weight scale, in linear layers on float activations; None: all.

    Raises:
        SpecError: bits outside [2, 8]; a group that is none of GROUPS, or whose activations are not float.

    >>> Bits.parse("w4a8")
    Bits(weight=4, activation=8, group=None)
    >>> str(Bits(4, None)), str(Bits(4, None, 32)), str(Bits(None, 8)), str(Bits(None, None))
    ('w4', 'w4g32', 'a8', 'float')
    """

    weight: int | None
    activation: int | None
    group: int | None = None

    def __post_init__(self) -> None:
        for value in (self.weight, self.activation):
            if value is not None and not (type(value) is int and LOWEST_BITS <= value <= HIGHEST_BITS):
                raise SpecError(f"bits must be an int in [{LOWEST_BITS}, {HIGHEST_BITS}]. Got {value}.")
        if self.group is not None and (self.group not in GROUPS or self.weight is None or self.activation is not None):
            sizes = ", ".join(map(str, GROUPS))
            raise SpecError(f'groups are of {sizes} weights of a layer on float activations: "w4g32". Got "{self}".')

    @classmethod
    def parse(cls, text: object) -> "Bits":
        """The bits that `text` names: "w4a8", "w4" or "w4g32" (float activations), "a8" (a tensor) or "float".

        Capitals and spaces around it do not matter.
        """
        written = text.strip().lower() if isinstance(text, str) else ""
        if written == "float":
            return FLOAT
        match = _PATTERN.fullmatch(written)
        if not match or not match[0]:
            raise SpecError(
                'bits are written "w<bits>a<bits>", "w<bits>", "w<bits>g<group>", "a<bits>" or "float". '
                f"Got {shown(text)}{_instead(text)}."
            )
        weight, activation, group = (None if match[key] is None else int(match[key]) for key in "wag")
        return cls(weight, activation, group)

    def __str__(self) -> str:
        weight = "" if self.weight is None else f"w{self.weight}"
        activation = "" if self.activation is None else f"a{self.activation}"
        group = "" if self.group is None else f"g{self.group}"
        return weight + activation + group or "float"


FLOAT = Bits(None, None)


def _instead(text: object) -> str:
    """What whoever wrote this may have meant."""
    written = shown(text).lower()  # short, whatever it is
    numbers = re.findall(r"\d+", written)
    if "," in written:
        return "; candidates for a budget are a tuple of strings"
    if re.search(r"fp|float|half", written):
        return "; layers stay in float by an override of None"
    if "w" in written and "a" in written and len(numbers) == 2:
        weight, activation = numbers if written.index("w") < written.index("a") else reversed(numbers)
        return f'; write "w{weight}a{activation}"'
    if len(numbers) == 1 and LOWEST_BITS <= int(numbers[0]) <= HIGHEST_BITS:
        return f'; write "w{numbers[0]}a{numbers[0]}", or "w{numbers[0]}" for weights alone'
    return ""


def written_bits(where: str, value: object) -> None:
    """A check (`calque.run.fields`): bits as text, in their short form."""
    bits = _bits_at(where, value)
    require(str(bits) == value, where, f'written "{bits}"', value)


def _bits_at(where: str, value: object) -> Bits:
    require(type(value) is str, where, 'bits as text, such as "w4a8"', value)
    try:
        return Bits.parse(str(value))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Plan(Mapping[str, Bits]):
    """Which bits every layer and every quantized tensor has, by name.

    Raises:
        SpecError: no mapping of names and Bits.

    >>> plan = Plan({"conv1": Bits(8, 8), "add": Bits(None, 8)})
    >>> plan["conv1"].weight
    8
    >>> Plan.parse(plan.to_toml()) == plan
    True
    """

    bits: Mapping[str, Bits]

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Mapping):
            raise SpecError(f"a plan is a dict of names and Bits. Got {shown(self.bits)}.")
        pairs: list[tuple[object, object]] = list(self.bits.items())
        for name, bits in pairs:
            if not (isinstance(name, str) and isinstance(bits, Bits)):
                raise SpecError(
                    f"a plan is a dict of names and Bits. Got {shown(name)}: {shown(bits)}; see Bits.parse."
                )

    def __getitem__(self, name: str) -> Bits:
        return self.bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and dict(self.bits) == dict(other.bits)

    def __hash__(self) -> int:
        return hash(frozenset(self.bits.items()))

    def __str__(self) -> str:
        return self.to_toml()

    def to_toml(self) -> str:
        """The plan as a TOML table."""
        lines = [f'{toml_string(name)} = "{bits}"' for name, bits in self.bits.items()]
        return "\n".join(["[plan]", *lines, ""])

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """The plan that the TOML `text` holds.

        Raises:
            SpecError: not TOML, no table [plan], or an entry that is not bits.
        """
        table = parse_toml(text, "a plan").get("plan")
        if not isinstance(table, dict):
            raise SpecError('a plan file has a table [plan] with lines like "conv1" = "w4a4". None was found.')
        return cls({name: _bits_at(inside("plan", name), entry) for name, entry in table.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to `path` as TOML, whole or not at all. Raises: OSError; SpecError, where it is no path."""
        write_whole(path_of(path, "Plan.save(path)"), self.to_toml().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """The plan in the TOML file `path`. Raises: OSError, SpecError."""
        path = path_of(path, "Plan.load(path)")
        with naming(path):
            return cls.parse(read_text(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a file. Raises: OSError; SpecError if it is none."""
    try:
        return require_file(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{os.fspath(path)} is not a text file in UTF-8: {error.reason}.") from error


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the file's name in front of an error about its contents."""
    try:
        yield
    except SpecError as error:
        name = os.fspath(path)
        raise SpecError(str(error) if str(error).startswith(str(name)) else f"{name}: {error}") from error


def uniform(layers: list[str], bits: Bits, first_last: Bits | None) -> dict[str, Bits]:
    """The same bits for every layer, except `first_last` for the ends (None: nothing special).

    >>> [str(b) for b in uniform(["a", "b", "c"], Bits(4, 4), Bits(8, 8)).values()]
    ['w8a8', 'w4a4', 'w8a8']
    """
    entries = dict.fromkeys(layers, bits)
    if first_last is not None and layers:
        entries[layers[0]] = entries[layers[-1]] = first_last
    return entries


def apply_overrides(
    entries: dict[str, Bits], overrides: Mapping[str, str | None], tensors: list[str]
) -> dict[str, Bits]:
    """`entries` with each glob pattern's bits put on the layers and tensors that it matches; later patterns win.

    Bits with weights go to layers, bits of activations alone to tensors, float to both.

    Args:
        entries: bits per layer.
        overrides: pattern -> bits; None stands for float.
        tensors: names of tensors that may be quantized; a match adds an entry.

    Raises:
        SpecError: a pattern that matches nothing, or bits that do not fit what is matched.
    """
    result = dict(entries)
    for pattern, text in overrides.items():
        bits = FLOAT if text is None else Bits.parse(text)
        matched = [name for name in [*entries, *tensors] if fnmatchcase(name, pattern)]
        if not matched:
            names = ", ".join([*entries, *tensors])
            raise SpecError(f"override pattern {shown(pattern)} matches no layer or tensor. The names are: {names}.")
        suited = [name for name in matched if bits == FLOAT or (bits.weight is not None) == (name in entries)]
        if not suited:
            check_entry(matched[0], bits, is_layer=matched[0] in entries)
        result.update(dict.fromkeys(suited, bits))
    return result


def check_entry(name: str, bits: Bits, *, is_layer: bool) -> Bits:
    """`bits` if a layer (or tensor) can have them; "a8" suits tensors only, "w8..." layers only."""
    if is_layer and bits.weight is None and bits.activation is not None:
        what = name if name in OPTIONS else f"layer {name}: bits"
        raise SpecError(f'{what} must be "w<bits>a<bits>", "w<bits>" or "float". Got "{bits}".')
    if not is_layer and bits.weight is not None:
        raise SpecError(f'tensor {name}: bits must be "a<bits>" or "float". Got "{bits}".')
    return bits
