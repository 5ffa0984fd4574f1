"""Values from files that anyone may have written: every position is checked before it is used, and an error names it.

A check is a function of where a value stands and of the value; it raises SpecError where the value breaks its rule. The checks
here make others: `record({"bits": whole(2, 8)})` is the check of an object with one field.
"""

import json
import math
import sys
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from calque.errors import SpecError

Check = Callable[[str, Any], None]

DEEPEST = 64  # levels of lists and objects in each other; what calque writes has fewer than 10
SHOWN = 60  # characters of a received value in a message
LARGE = 10**15  # integers from here are shown by their size
COUNT = 2**53  # of bytes, operations, steps: past it a float is not exact
ENDLESS = sys.float_info.max


def require(holds: bool, where: str, rule: str, value: object) -> None:
    """Raises SpecError with the place, the rule and what was received, unless the rule `holds`."""
    if not holds:
        raise SpecError(f"{where} must be {rule}. Got {shown(value)}.")


def shown(value: object) -> str:
    """The value in a message: short, and no number of a thousand digits.

    >>> shown(10**5000)
    'an int of about 10^5000'
    >>> print(shown("a" * 100)[-10:])
    aaaaaaa...
    """
    if isinstance(value, int) and abs(value) >= LARGE:
        sign = "-" if value < 0 else ""
        return f"an int of about {sign}10^{round(value.bit_length() * math.log10(2))}"
    if isinstance(value, (dict, list, tuple)) and not _is_short(value):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if len(value) > 3 else f"{kind} of {len(value)} ({_inside(value)})"
    text = repr(value).replace("\n", " ")  # arrays and networks have several lines
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _is_short(value: Any) -> bool:
    """Whether it is a list of words and numbers, which is best shown as it is."""
    plain = isinstance(value, (list, tuple)) and all(
        entry is None or isinstance(entry, (str, bool, float)) or (isinstance(entry, int) and abs(entry) < LARGE)
        for entry in value
    )
    return plain and len(value) > 0 and len(repr(value)) <= SHOWN


def _inside(value: Any) -> str:
    parts = [f"{key!r}"[:SHOWN] if isinstance(value, dict) else type(key).__name__ for key in value]
    return ", ".join(parts) or "empty"


def inside(where: str, name: str) -> str:
    """Where the entry `name` of an object stands.

    >>> inside("layers", "layer1.0")
    "layers['layer1.0']"
    """
    return f"{where}.{name}" if name.isidentifier() and name.isascii() else f"{where}[{shown(name)}]"


def text(where: str, value: Any) -> None:
    """Any text, the empty one too."""
    require(type(value) is str, where, "text", value)


def flag(where: str, value: Any) -> None:
    """True or false."""
    require(type(value) is bool, where, "true or false", value)


def measured(where: str, value: Any) -> None:
    """Any number: what was measured may be infinite or no number."""
    require(type(value) is float or (type(value) is int and abs(value) <= ENDLESS), where, "a number", value)


def whole(low: int, high: int) -> Check:
    """An integer from `low` to `high`."""

    def check(where: str, value: Any) -> None:
        rule = f"an int from {low:,} to {high:,}"
        require(type(value) is int and low <= value <= high, where, rule, value)

    return check


def number(low: float = -ENDLESS, high: float = ENDLESS) -> Check:
    """A finite number from `low` to `high`."""
    ends = [f" {word} {end:,.16g}" for word, end in (("from", low), ("to", high)) if abs(end) < ENDLESS]

    def check(where: str, value: Any) -> None:
        require(type(value) in (int, float) and low <= value <= high, where, f"a finite number{''.join(ends)}", value)

    return check


def choice(*values: str) -> Check:
    """One of these words."""

    def check(where: str, value: Any) -> None:
        if type(value) is not str or value not in values:
            raise SpecError(f"{where} is one of {', '.join(values)}. Got {shown(value)}.")

    return check


def optional(check: Check) -> Check:
    """Null, or what `check` takes."""

    def maybe(where: str, value: Any) -> None:
        if value is not None:
            check(where, value)

    return maybe


def sequence(check: Check, length: int | None = None) -> Check:
    """A list whose entries `check` takes, of that length where one is given."""

    def each(where: str, value: Any) -> None:
        rule = "a list" if length is None else f"a list of {length}"
        require(type(value) is list and length in (None, len(value)), where, rule, value)
        for index, entry in enumerate(value):
            check(f"{where}[{index}]", entry)

    return each


def mapping(check: Check, known: Mapping[str, object] | None = None) -> Check:
    """An object whose values `check` takes, and whose keys are among the `known` ones."""

    def each(where: str, value: Any) -> None:
        require(type(value) is dict, where, "an object", value)
        for name, entry in value.items():
            if known is not None and name not in known:
                raise SpecError(f"{where} has an entry {shown(name)}, which nothing else here knows.")
            check(inside(where, name), entry)

    return each


def record(required: Mapping[str, Check], extra: Mapping[str, Check] | None = None) -> Check:
    """An object that has exactly these fields; those in `extra` may be left out."""
    checks = {**required, **(extra or {})}

    def each(where: str, value: Any) -> None:
        require(type(value) is dict, where, f"an object with the fields {', '.join(checks)}", value)
        missing, unknown = (
            [name for name in required if name not in value],
            [name for name in value if name not in checks],
        )
        if missing or unknown:
            problems = [f"lacks {shown(name)}" for name in missing] + [
                f"has an unknown field {shown(name)}" for name in unknown
            ]
            raise SpecError(f"{where} {', '.join(problems)}. Its fields are {', '.join(checks)}.")
        for name, entry in value.items():
            checks[name](inside(where, name), entry)

    return each


def parse_json(content: object, what: str = "this") -> Any:
    """What a JSON text holds; `what` names it in errors.

    Raises:
        SpecError: no text, or none that parses; a key twice, depth, numbers of thousands of digits.
    """
    if not isinstance(content, str):
        raise SpecError(f"{what} is read from a JSON text. Got {shown(content)}.")
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except RecursionError as error:
        raise SpecError(f"the JSON is nested more than {DEEPEST} levels deep.") from error
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"the JSON does not parse: {error}.") from error
    _require_plain(value)
    return value


def parse_toml(content: object, what: str) -> dict[str, Any]:
    """The table that a TOML text holds; `what` names it in errors. Raises: SpecError, also for depth and for huge numbers."""
    if not isinstance(content, str):
        raise SpecError(f"{what} is parsed from a TOML text. Got {shown(content)}.")
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError too
        reason = f"it is nested more than {DEEPEST} levels deep" if isinstance(error, RecursionError) else error
        raise SpecError(f"{what} is a TOML file. This one does not parse: {reason}.") from error
    _require_plain(table)
    return table


def toml_string(text: str) -> str:
    """The text as a TOML basic string: a JSON string, but for DEL, which TOML wants escaped.

    >>> print(toml_string('say "a"'))
    "say \\"a\\""
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise SpecError(f"the JSON has the field {shown(next(name for name in names if names.count(name) > 1))} twice.")
    return table


def _require_plain(value: Any) -> None:
    """Raises SpecError for depth, and for text that is no Unicode."""
    pending = [(value, 0)]
    while pending:
        entry, depth = pending.pop()
        if depth > DEEPEST:
            raise SpecError(f"lists and objects are nested more than {DEEPEST} levels deep.")
        if isinstance(entry, str) and not entry.isascii() and any("\ud800" <= letter <= "\udfff" for letter in entry):
            raise SpecError(f"text must be Unicode. Got {ascii(entry)[:SHOWN]}.")
        if isinstance(entry, dict):
            pending += [(part, depth + 1) for pair in entry.items() for part in pair]
        elif isinstance(entry, list):
            pending += [(part, depth + 1) for part in entry]
