"""What the metadata of a file must be: every field in its range, and in agreement with its neighbours, before anything is built.

A checksum tells damage from what was written, not who wrote it. So no field is believed.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from calque.errors import SpecError
from calque.grid.arithmetic import SMALLEST_SCALE, activation_limits, float32
from calque.grid.bits import HIGHEST_BITS, LOWEST_BITS, Bits, written_bits
from calque.report import check_report
from calque.run.fields import (
    Check,
    choice,
    flag,
    inside,
    mapping,
    number,
    optional,
    record,
    require,
    sequence,
    shown,
    text,
    whole,
)

LARGEST_SCALE = torch.finfo(torch.float32).max
ROWS = 3  # of the inputs that a file describes, where rows can be told apart
INPUT_VALUES = 2**28  # in all inputs, a gibibyte: what a file of a few bytes may have `load` allocate
_LAYER = re.compile(r"layer (.*) (?:convolution|linear|embedding) \(", re.DOTALL)  # of a name that may have blanks
LONGEST_AXIS = 2**31
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

Table = Mapping[str, Any]

_bits, _axis = whole(LOWEST_BITS, HIGHEST_BITS), whole(0, LONGEST_AXIS)


def _input(where: str, value: Any) -> None:
    """The form of one input, as `describe_input` writes it."""
    require(type(value) is dict, where, "an object", value)
    if "tensor" in value:
        record({"tensor": text, "shape": sequence(_axis, None), "dtype": choice(*DTYPES)})(where, value)
        return
    require(len(value) == 1, where, "an object with one of the fields tensor, value, list, tuple, dict", value)
    kind, part = next(iter(value.items()))
    if kind == "value":
        plain = part is None or type(part) in (bool, int, float, str)
        require(plain, f"{where}.value", "a number, text, true, false or null", part)
    elif kind in ("list", "tuple"):
        sequence(_input)(f"{where}.{kind}", part)
    else:
        choice("tensor", "value", "list", "tuple", "dict")(where, kind)
        mapping(_input)(f"{where}.dict", part)


_grid = record(
    {
        "bits": _bits, "scale": number(SMALLEST_SCALE, LARGEST_SCALE), "zero_point": whole(0, 2**HIGHEST_BITS - 1),
        "source": text, "readers": sequence(text),
    }
)  # fmt: skip


def _place(where: str, value: Any) -> None:
    """An input tensor and one of its axes."""
    sequence(lambda *_: None, 2)(where, value)
    text(where, value[0])
    _axis(where, value[1])


check_types: Check = record(
    {
        "format": whole(1, 1),
        "versions": record({"calque": text, "torch": text}),
        "plan": mapping(written_bits),
        "report": optional(check_report),
        "placement": choice("integer", "inputs"),
        "dynamic": mapping(sequence(_axis)),
        "inputs": mapping(_input),
        "layers": mapping(record({"bits": _bits, "shape": sequence(whole(0, LONGEST_AXIS))})),
        "operators": sequence(sequence(text, 3)),
        "grids": mapping(_grid),
        "aliases": mapping(text),
    },
    {  # files from before these fields were written lack them
        "layout": optional(record({"whole": sequence(text), "apart": flag, "nowhere": flag})),
        "scaled": sequence(sequence(text)),
        "equal_axes": optional(sequence(sequence(_place))),
    },
)


def check_table(table: Table) -> None:
    """Raises SpecError, which names the field, the rule and what was received."""
    check_types("metadata", table)
    _check_names(table)
    _check_layers(table)
    for name, grid in table["grids"].items():
        where = inside("grids", name)
        require(float32(grid["scale"]) == grid["scale"], f"{where}.scale", "a float32 number", grid["scale"])
        whole(*activation_limits(grid["bits"]))(f"{where}.zero_point", grid["zero_point"])
    _check_inputs(table)
    if table["report"] is not None:
        _check_report(table)


def layers_of(table: Table) -> list[str]:
    """The weighted layers among the operators, float ones too, in order."""
    return [match[1] for _, operator, _ in table["operators"] if (match := _LAYER.match(operator))]


def _check_names(table: Table) -> None:
    """Edges, groups and aliases name what exists."""
    made = {name for name, _, _ in table["operators"]}
    require(len(made) == len(table["operators"]), "operators", "of different names", table["operators"])
    for name, grid in table["grids"].items():
        where = inside("grids", name)
        _require_known(f"{where}.source", [grid["source"]], made | set(table["grids"]))
        _require_known(f"{where}.readers", grid["readers"], made | set(table["grids"]))
    for index, names in enumerate(table.get("scaled", ())):
        _require_known(f"scaled[{index}]", names, set(layers_of(table)))
        require(bool(names), f"scaled[{index}]", "a list of at least one layer", names)


def _require_known(where: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise SpecError(f"{where} names {shown(name)}, which is nothing in the network.")


def _check_layers(table: Table) -> None:
    """A layer is in the plan with its bits, among the operators, and has a weight's shape."""
    known, plan = set(layers_of(table)), table["plan"]
    for name, layer in table["layers"].items():
        where = inside("layers", name)
        _require_known(where, [name], known)
        if name not in plan:
            raise SpecError(f"{where} has no entry in the plan.")
        bits = Bits.parse(plan[name])
        require(bits.weight == layer["bits"], f"{where}.bits", f'as in the plan ("{bits}")', layer["bits"])
        require(len(layer["shape"]) in (2, 4), f"{where}.shape", "a list of 2 or 4 sizes", layer["shape"])
        require(min(layer["shape"]) > 0, f"{where}.shape", "of sizes above 0", layer["shape"])
    for name in known - set(table["layers"]):
        if plan.get(name) != "float":
            raise SpecError(
                f"{inside('plan', name)} must be float: the file has no codes of it. Got {shown(plan.get(name))}."
            )


def _check_inputs(table: Table) -> None:
    """Inputs are of a size that a few rows have, and what is said of their axes fits them."""
    shapes = {name: form["shape"] for name, form in tensor_forms(table)}
    for name, axes in table["dynamic"].items():
        where = inside("dynamic", name)
        _require_known(where, [name], set(table["inputs"]))
        require(len(set(axes)) == len(axes), where, "a list of different axes", axes)
        ranks = [len(shape) for leaf, shape in shapes.items() if leaf == name or leaf.startswith(f"{name}[")]
        require(not axes or max(axes) < min(ranks, default=0), where, "a list of axes that the input has", axes)
    for index, group in enumerate(table.get("equal_axes") or ()):
        where = f"equal_axes[{index}]"
        _require_known(where, [name for name, _ in group], set(shapes))
        held = all(axis < len(shapes[name]) for name, axis in group)
        require(held, where, "of axes that the inputs have", group)
    layout, total = table.get("layout"), 0
    if layout is not None:
        require(not (layout["apart"] and layout["nowhere"]), "layout.apart", "false where layout.nowhere is true", True)
        _require_known("layout.whole", layout["whole"], set(shapes))
    for name, shape in shapes.items():
        where = f"{inside('inputs', name)}.shape"
        total += math.prod(shape)
        require(total <= INPUT_VALUES, where, f"so small that all inputs have at most {INPUT_VALUES} values", shape)
        if layout is not None and layout["apart"] and name not in layout["whole"] and shape:
            require(shape[0] <= ROWS, where, f"of at most {ROWS} rows", shape)


def tensor_forms(table: Table) -> Iterator[tuple[str, Table]]:
    """The name of each input tensor, such as "boxes[0]" for a part of an argument, and its form."""
    pending = list(table["inputs"].items())
    while pending:
        name, form = pending.pop(0)
        if "tensor" in form:
            yield name, form
        elif "dict" in form:
            pending += [(f"{name}[{key!r}]", part) for key, part in form["dict"].items()]
        elif "value" not in form:
            parts = form["list" if "list" in form else "tuple"]
            pending += [(f"{name}[{index}]", part) for index, part in enumerate(parts)]


def _check_report(table: Table) -> None:
    """The report tells of this network."""
    for index, layer in enumerate(table["report"]["layers"]):
        where = f"report.layers[{index}]"
        _require_known(f"{where}.name", [layer["name"]], set(table["plan"]))
        known = table["plan"][layer["name"]]
        require(layer["bits"] == known, f"{where}.bits", f'as in the plan ("{known}")', layer["bits"])
