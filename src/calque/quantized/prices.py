"""What every choice of bits costs, measured once: the loss it adds, and the bytes, operations and memory it takes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calque.errors import SpecError
from calque.grid.bits import Bits, written_bits
from calque.run.fields import COUNT, mapping, number, parse_json, record, require, sequence, text, whole

Sums = tuple[tuple[int, ...], ...]  # [group][choice]
COSTS = ("size", "bops")
VERSION = 2  # of the JSON; since 2 "size" is bytes of the file, before of the packed parameters


@dataclass(frozen=True)
class Prices:
    """The prices of a network's choices.

    Attributes:
        loss: "kl", "mse" or the callable's name.
        base: bits of the base precision, "w8a8".
        base_loss: of the network with every layer at the base.
        groups: layers that share weights decide together; most groups are of one layer.
        choices: per group, bits as text.
        increases: per group and choice, the measured increase of the loss over base_loss, as measured: noise may make it
            negative, a network that broke not finite.
        costs: "size" in bytes of the exported file (nodes, names and metadata included, predicted and an upper bound), "bops" in
            bit-operations, per group and choice.
        fixed: the part of each cost that no choice changes.
        floats: what the float32 network costs, by "size" (its parameters' bytes), "bops" and "activation_memory"; shares of a
            budget refer to it.
        steps: activation memory. Per execution step the fixed bytes, and per group index the bytes of each choice.

    Raises:
        SpecError: fields that do not fit each other.
    """

    loss: str
    base: str
    base_loss: float
    groups: tuple[tuple[str, ...], ...]
    choices: tuple[tuple[str, ...], ...]
    increases: tuple[tuple[float, ...], ...]
    costs: Mapping[str, Sums]
    fixed: Mapping[str, int]
    floats: Mapping[str, int]
    steps: tuple[tuple[int, Mapping[int, tuple[int, ...]]], ...]

    def __post_init__(self) -> None:
        layers = [layer for group in self.groups for layer in group]
        _require(all(self.groups), "a group has at least one layer")
        _require(len(set(layers)) == len(layers), "a layer is in one group only")
        _require(len(self.choices) == len(self.groups) and all(self.choices), "every group has choices")
        for choices in self.choices:
            canonical = [str(Bits.parse(bits)) for bits in choices]
            _require(len(set(canonical)) == len(choices), f"a group's choices differ (got {', '.join(choices)})")
            _require(canonical == list(choices), f"choices are written in their short form (got {', '.join(choices)})")
        Bits.parse(self.base)
        _require(type(self.loss) is str and self.loss != "", "loss is a name")
        _require(self._fits(self.increases), "increases has one number per group and choice")
        _require(set(self.costs) <= set(COSTS), f"costs are {' and '.join(COSTS)}")
        for name, table in self.costs.items():
            _require(self._fits(table), f"{name} has one cost per group and choice")
            _require(all(_is_cost(cost) for row in table for cost in row), f"{name} is in whole numbers >= 0")
            _require(_is_cost(self.fixed.get(name)), f"fixed has a whole number >= 0 for {name}")
        _require(all(_is_cost(value) for value in self.floats.values()), "floats are whole numbers >= 0")
        self._check_steps()

    def _fits(self, table: tuple[tuple[Any, ...], ...]) -> bool:
        return [len(row) for row in table] == [len(row) for row in self.choices]

    def _check_steps(self) -> None:
        for step, (fixed, tables) in enumerate(self.steps):
            _require(_is_cost(fixed), f"step {step} has fixed bytes >= 0")
            for group, row in tables.items():
                known = type(group) is int and 0 <= group < len(self.groups)
                _require(known, f"step {step} names groups by their index (got {group!r})")
                _require(
                    len(row) == len(self.choices[group]), f"step {step} has bytes for every choice of group {group}"
                )
                _require(all(map(_is_cost, row)), f"step {step} has whole bytes >= 0")

    def to_json(self) -> str:
        """The prices as JSON; `from_json` restores them exactly."""
        plain = {
            "version": VERSION,
            **{name: getattr(self, name) for name in ("loss", "base", "groups", "choices")},
            "base_loss": _number_out(self.base_loss),
            "increases": [[_number_out(value) for value in row] for row in self.increases],
            **{name: dict(getattr(self, name)) for name in ("costs", "fixed", "floats")},
            "steps": [{"fixed": fixed, "groups": dict(tables)} for fixed, tables in self.steps],
        }
        return json.dumps(plain, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, content: str) -> "Prices":
        """The prices that `to_json` wrote. Raises: SpecError; also for an older calque's, whose sizes were not the file's."""
        try:
            plain = parse_json(content)
            _check_prices("prices", plain)
        except SpecError as error:
            raise SpecError(f"not a file of prices: {error} Write it with Prices.to_json.") from error
        version = plain.pop("version", 1)
        if "size" in plain["costs"] and version != VERSION:
            raise SpecError(
                f"sizes in prices of version {version} are not bytes of the file, as those of version {VERSION} are. Measure "
                "them again with this calque."
            )
        return cls(**_fields(plain))


def _price(where: str, value: Any) -> None:
    """A number, or the text of one that is not finite."""
    if value not in ("inf", "-inf", "nan"):
        number()(where, value)


def _row_by_group(where: str, value: Any) -> None:
    """Costs by the index of a group."""
    mapping(sequence(_cost))(where, value)
    for group in value:
        require(
            group.isascii() and group.isdecimal() and str(int(group[:9])) == group,
            where,
            "of groups by their index",
            group,
        )


_cost = whole(0, COUNT)
_check_prices = record(
    {
        "loss": text, "base": written_bits, "base_loss": _price, "groups": sequence(sequence(text)),
        "choices": sequence(sequence(written_bits)), "increases": sequence(sequence(_price)),
        "costs": mapping(sequence(sequence(_cost))), "fixed": mapping(_cost), "floats": mapping(_cost),
        "steps": sequence(record({"fixed": _cost, "groups": _row_by_group})),
    },
    {"version": _cost},
)  # fmt: skip


def _fields(plain: dict[str, Any]) -> dict[str, Any]:
    steps = tuple(
        (step["fixed"], {int(group): tuple(row) for group, row in step["groups"].items()}) for step in plain["steps"]
    )
    return {
        **plain,
        "base_loss": float(plain["base_loss"]),
        "groups": tuple(tuple(map(str, group)) for group in plain["groups"]),
        "choices": tuple(tuple(map(str, row)) for row in plain["choices"]),
        "increases": tuple(tuple(map(float, row)) for row in plain["increases"]),
        "costs": {name: tuple(map(tuple, table)) for name, table in plain["costs"].items()},
        "steps": steps,
    }


def _number_out(value: float) -> float | str:
    """JSON has no infinities: those and NaN become text, which float() reads."""
    return float(value) if math.isfinite(value) else str(float(value))


def _is_cost(value: object) -> bool:
    return type(value) is int and 0 <= value <= COUNT


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise SpecError(f"prices do not fit together: {rule}. Measure them again.")
